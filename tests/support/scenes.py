"""Small images that bring each kind of edit to each kind of header: to watch a commit write by write."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qcow2bm import Edit
from tests.support.images import unpack
from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import BITMAPS, Raw

MIB = 1 << 20
SECRET = "fixture"


@dataclass(frozen=True)
class Scene:
    """An image, an edit of it, and what is special: a stage that needs a journal, a new refcount block or table."""

    name: str
    make: Callable[[Path], Path]
    edit: Callable[[Edit], object]
    journal: bool = False
    secret: str | None = None
    grows_table: bool = False
    links_block: bool = False


def create(folder: Path, size: str = "4M", *options: str) -> Path:
    """`qemu-img create` in a folder."""
    image = folder / "image.qcow2"
    settings = ("-o", ",".join(options)) if options else ()
    qemu_img("create", "-q", "-u", "-f", "qcow2", *settings, image.name, size, cwd=folder)
    return image


def empty(folder: Path) -> Path:
    image = create(folder)
    qemu_io(image, "write -P 1 1M 128k")
    return image


def one(folder: Path) -> Path:
    image = empty(folder)
    qemu_img("bitmap", "--add", image, "a")
    qemu_io(image, "write -P 2 2M 64k")
    return image


def three(folder: Path) -> Path:
    image = one(folder)
    qemu_img("bitmap", "--add", "-g", "4k", image, "b")
    qemu_img("bitmap", "--add", "--disable", image, "c")
    qemu_io(image, "write -P 3 3M 4k")
    return image


def small(folder: Path) -> Path:
    return unpack("small-clusters", folder)


def behind_another(folder: Path) -> Path:
    """An unknown extension follows the bitmaps extension, so dropping that moves it."""
    return _laid_out(one(folder), b"after the bitmaps")


def straddling(folder: Path) -> Path:
    """The 24 bytes of the bitmaps extension lie across 1024, the border of two sectors."""
    image = one(folder)
    raw = Raw.load(image)
    raw.insert_extension(bytes(1016 - 8 - raw.extensions()[BITMAPS][0]), before=BITMAPS)
    assert raw.extensions()[BITMAPS][0] == 1016
    raw.save(image)
    return image


def _laid_out(image: Path, data: bytes) -> Path:
    raw = Raw.load(image)
    raw.insert_extension(data)
    raw.save(image)
    return image


def straddling_end(folder: Path) -> Path:
    """No bitmaps yet, and the extension's data will come to lie across the border of two sectors."""
    image = empty(folder)
    raw = Raw.load(image)
    at = raw.extensions()[0][0]
    raw.insert_extension(bytes(1008 - 8 - at))
    assert raw.extensions()[0][0] == 1008
    raw.save(image)
    return image


def backing(folder: Path) -> Path:
    """The backing file's name lies where the bitmaps extension must go."""
    qemu_img("create", "-q", "-f", "qcow2", folder / "base.qcow2", "4M")
    return create(folder, "4M", "backing_file=base.qcow2", "backing_fmt=qcow2")


def crowded(folder: Path) -> Path:
    """The first cluster has room for the name and the extension, but not for the name twice."""
    name = f"{'n' * 230}/{'n' * 230}/base.qcow2"
    (folder / name).parent.mkdir(parents=True)
    qemu_img("create", "-q", "-f", "qcow2", folder / name, "1M")
    return create(folder, "1M", "cluster_size=1k", f"backing_file={name}", "backing_fmt=qcow2")


def unterminated(folder: Path) -> Path:
    """The backing file's name follows the last extension directly, without an end marker between them."""
    image = backing(folder)
    raw = Raw.load(image)
    end, name, length = raw.extensions()[0][0], raw.number(8), raw.number(16, 4)
    raw.data[end : end + length] = raw.data[name : name + length]
    raw.data[end + length : name + length] = bytes(name - end)
    raw.put(8, end)
    raw.save(image)
    return image


def nameless(folder: Path) -> Path:
    """A backing_file_offset without a name: it bounds the extensions all the same."""
    image = empty(folder)
    raw = Raw.load(image)
    raw.put(8, raw.extensions()[0][0] + 8)
    raw.save(image)
    return image


def newer(folder: Path) -> Path:
    """Autoclear bits that nobody here knows."""
    image = three(folder)
    raw = Raw.load(image)
    raw.put(88, 1 | 1 << 40)
    raw.save(image)
    return image


def fixture(name: str) -> Callable[[Path], Path]:
    """A fixture as it is."""
    return lambda folder: unpack(name, folder)


def tiny(folder: Path, size: str = "1M") -> Path:
    """512-byte clusters and 64-bit refcounts: a refcount block describes 32 KiB of the file, a table cluster 2 MiB."""
    image = create(folder, size, "cluster_size=512", "refcount_bits=64")
    qemu_img("bitmap", "--add", "-g", "512", image, "a")
    return image


def huge(folder: Path) -> Path:
    return tiny(folder, "128M")


# ---- edits ----


def add(edit: Edit) -> None:
    edit.add("new")


def add_data(edit: Edit) -> None:
    edit.add("new", granularity=512)
    edit.set_range("new", 4096, 512)


def several(edit: Edit) -> None:
    edit.merge("a", ["b"])
    edit.rename("b", "a much longer name than before")
    edit.remove("c")
    edit.add("d", granularity=512, all_dirty=True)
    edit.unset_range("d", MIB, 4096)


def swap_recording(edit: Edit) -> None:
    edit.enable("c")
    edit.disable("a")


def remove_all(edit: Edit) -> None:
    edit.remove(*edit.names("*"))


def replace_detached(edit: Edit) -> None:
    remove_all(edit)
    edit.add("new")


def long_names(edit: Edit) -> None:
    """A directory of 160 clusters in one piece: more than the ranges of two refcount blocks."""
    for number in range(80):
        edit.add(f"{number:02}{'n' * 990}", recording=False)


def fill(copies: int) -> Callable[[Edit], None]:
    """Bitmaps that all have data in every chunk."""

    def edit_all(edit: Edit) -> None:
        step = 512 * 8 * 512
        for offset in range(0, edit.image.geometry.virtual_size, step):
            edit.set_range("a", offset, 512)
        for number in range(copies):
            edit.copy("a", f"copy {number}")

    return edit_all


SCENES = (
    Scene("first bitmap", empty, add),
    Scene("first bitmap with data", empty, add_data),
    Scene("second bitmap", one, add_data),
    Scene("remove one", three, lambda edit: edit.remove("b")),
    Scene("last bitmap", one, remove_all),
    Scene("last three bitmaps", three, remove_all),
    Scene("clear", three, lambda edit: edit.clear("a", "b")),
    Scene("merge", three, lambda edit: edit.merge("c", ["a", "b"])),
    Scene("copy", three, lambda edit: edit.copy("a", "copy", granularity=1 << 20)),
    Scene("rename", three, lambda edit: edit.rename("a", "another name")),
    Scene("rename in place", three, lambda edit: edit.rename("a", "x")),
    Scene("disable", three, lambda edit: edit.disable("a")),
    Scene("enable and disable", three, swap_recording),
    Scene("set", three, lambda edit: edit.set_range("b", 0, MIB)),
    Scene("unset", three, lambda edit: edit.unset_range("b", 0, 4 * MIB)),
    Scene("several edits", three, several),
    Scene("unknown autoclear bits", newer, several),
    Scene("last bitmap before another extension", behind_another, remove_all, journal=True),
    Scene("switch before another extension", behind_another, add),
    Scene("switch across sectors", straddling, add_data, journal=True),
    Scene("last bitmap across sectors", straddling, remove_all),
    Scene("first bitmap across sectors", straddling_end, add_data),
    Scene("backing name in the way", backing, add_data),
    Scene("backing name in the way, no room", crowded, add_data, journal=True),
    Scene("backing name in the way, no end marker", unterminated, add, journal=True),
    Scene("backing offset without a name", nameless, add),
    Scene("small clusters, add", small, add_data),
    Scene("small clusters, remove all", small, remove_all),
    Scene("small clusters, merge", small, lambda edit: edit.merge("daily", ["full", "sectors"])),
    Scene("1-bit refcounts", fixture("refcount-1"), lambda edit: edit.merge("daily", ["full"])),
    Scene("64-bit refcounts", fixture("refcount-64"), lambda edit: edit.remove("full")),
    Scene("LUKS, add", fixture("luks"), add_data, secret=SECRET),
    Scene("LUKS, remove all", fixture("luks"), remove_all, secret=SECRET),
    Scene("data file", fixture("data-file"), lambda edit: edit.merge("daily", ["full"])),
    Scene("data file, remove all", fixture("data-file"), remove_all),
    Scene("detached, remove", fixture("detached"), remove_all),
    Scene("detached, start again", fixture("detached"), replace_detached),
    Scene("new refcount block", tiny, fill(70), links_block=True),
    Scene("directory over whole refcount ranges", tiny, long_names, links_block=True),
    Scene("new refcount table", huge, fill(160), grows_table=True),
)
