"""`resize` beside `qemu-img resize`: the same disk, the same bitmaps, nothing leaked; and QEMU opens whatever it left.

Every image is made twice, resized by each of the two in the same steps, and compared after each step.
QCOW2BM_ROUNDS multiplies the random images.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.errors import (
    BitmapInconsistentError,
    BitmapLimitError,
    CorruptImageError,
    ImageIOError,
    UnsupportedImageError,
    UsageError,
)
from qcow2bm.resize.tidying import plan_tidying
from tests.support.qemu import (
    StorageDaemon,
    check,
    create_luks,
    guest_digest,
    qemu_img,
    qemu_img_json,
    qemu_io,
    read_bitmaps,
)
from tests.support.raw import OFFSET, Raw
from tests.support.recording import Tape, crash_states
from tests.support.states import bitmaps

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
ROUNDS = int(os.environ.get("QCOW2BM_ROUNDS", "1"))
CLEAN, LEAKS = 0, 3


# ---- two of a kind ----


@dataclass
class Twin:
    """An image that QEMU resizes and one that we do, in folders of their own so that relative names mean the same.

    `external` is what the data file is called.
    """

    folder: Path
    external: str | None = None
    name: str = "image.qcow2"

    @property
    def theirs(self) -> Path:
        return self.folder / "theirs" / self.name

    @property
    def ours(self) -> Path:
        return self.folder / "ours" / self.name

    @classmethod
    def of(cls, folder: Path, external: str | None = None) -> Twin:
        """From what lies in FOLDER/theirs."""
        shutil.copytree(folder / "theirs", folder / "ours")
        return cls(folder, external)

    def resize(self, size: int, *, dirty_tail: bool | None = None) -> list[str] | None:
        """Resize both; what we did, or None where QEMU could not."""
        done = qemu_img(
            "resize", "-q", "-f", "qcow2", "--shrink", self.theirs.name, str(size), check=False, cwd=self.theirs.parent
        )
        data_file = self.ours.with_name(self.external) if self.external else None
        with qcow2bm.open(self.ours, writable=True) as image:
            plan = qcow2bm.plan_resize(image, size, shrink=True, dirty_tail=dirty_tail, data_file=data_file)
            image.commit(plan)
            assert image.virtual_size == size
            assert image.qcow2.file.size <= (plan.size_after if plan.cut_to is None else plan.cut_to)
        return list(plan.summary) if done.returncode == 0 else None

    def compare(self) -> None:
        """The same disk, the same bitmaps, no errors."""
        assert virtual_size(self.ours) == virtual_size(self.theirs)
        assert guest_digest(self.ours) == guest_digest(self.theirs)
        assert bitmaps(self.ours) == bitmaps(self.theirs)
        self.require_sound()
        ours, theirs = Raw.load(self.ours), Raw.load(self.theirs)
        assert l1_table(ours) == l1_table(theirs)
        assert guest_references(ours) == guest_references(theirs)
        if self.external:
            assert self.ours.with_name(self.external).stat().st_size == virtual_size(self.ours)

    def require_sound(self) -> None:
        """What QEMU, and what we, think of our image."""
        said = check(self.ours)
        assert said["returncode"] == CLEAN, said
        report = qcow2bm.check(self.ours)
        assert report.exit_status == CLEAN, report.findings
        ready = {name: list(ranges) for name, _, _, state, ranges in bitmaps(self.ours) if state == "ready"}
        assert read_bitmaps(self.ours) == ready


def virtual_size(image: Path) -> int:
    return int(qemu_img_json("info", "-f", "qcow2", image.name, cwd=image.parent)["virtual-size"])


def l1_table(raw: Raw) -> list[bool]:
    """Which L1 entries name a table with anything in it: QEMU leaves empty ones, and entries behind the end."""
    tables = [raw.number(raw.number(40) + 8 * index) & OFFSET for index in range(raw.number(36, 4))]
    there = [bool(table) and any(raw.data[table : table + raw.cluster_size]) for table in tables]
    while there and not there[-1]:
        there.pop()
    return there


def guest_references(raw: Raw) -> list[tuple[int, bool]]:
    """Refcount and copied flag of each cluster that holds guest data, in the order of the disk."""
    found = []
    wide = raw.number(4, 4) == 3 and bool(raw.number(72) & 16)
    for index in range(len(l1_table(raw))):
        table = raw.number(raw.number(40) + 8 * index) & OFFSET
        for at in range(table, table + raw.cluster_size, 16 if wide else 8) if table else ():
            entry = raw.number(at)
            if entry & OFFSET and not entry >> 62 & 1 and not raw.number(72) & 4:
                found.append((raw.refcount((entry & OFFSET) // raw.cluster_size), bool(entry >> 63)))
    return found


def create(folder: Path, size: int, *options: str, name: str = "image.qcow2") -> Path:
    """`qemu-img create`, in FOLDER/theirs."""
    home = folder / "theirs"
    home.mkdir(exist_ok=True)
    said = ("-o", ",".join(options)) if options else ()
    qemu_img("create", "-q", "-f", "qcow2", *said, name, str(size), cwd=home)
    return home / name


def add_bitmaps(image: Path, granularities: dict[str, str]) -> None:
    """Recording bitmaps of these granularities; one that begins with "off" does not record."""
    for name, granularity in granularities.items():
        disable = ("--disable",) if name.startswith("off") else ()
        qemu_img("bitmap", "--add", *disable, "-g", granularity, image.name, name, cwd=image.parent)


def say(summary: list[str] | None) -> str:
    assert summary is not None, "QEMU refused"
    return "\n".join(summary)


# ---- up and down ----

SHAPES = {
    "512": ("cluster_size=512",),
    "4k": ("cluster_size=4k", "refcount_bits=1"),
    "64k": ("cluster_size=64k",),
    "2M": ("cluster_size=2M", "refcount_bits=64"),
    "extended": ("cluster_size=64k", "extended_l2=on"),
    "extended-16k": ("cluster_size=16k", "extended_l2=on", "refcount_bits=32"),
    "lazy": ("cluster_size=4k", "lazy_refcounts=on", "refcount_bits=8"),
    "v2": ("compat=0.10", "cluster_size=4k"),
}
GRANULARITIES = {"a": "512", "b": "4k", "off": "64k", "d": "1M"}


@pytest.mark.parametrize("shape", SHAPES)
def test_up_and_down_as_qemu_does(shape: str, tmp_path: Path) -> None:
    image = create(tmp_path, 5 * MIB + 512, *SHAPES[shape])
    qemu_io(image, "write -P 9 4M 1M")
    sizes = (20 * MIB + 1536, 2 * MIB + 512, 512, 3 * MIB) if shape in ("512", "2M") else (20 * MIB, MIB, 512, 3 * MIB)
    if shape != "v2":
        add_bitmaps(image, GRANULARITIES)
    qemu_io(image, "write -P 1 0 64k", "write -P 2 2M 700k", "write -z 3M 256k", "write -P 3 5M 512")
    twin = Twin.of(tmp_path)
    for size in sizes:
        twin.resize(size)
        assert virtual_size(twin.ours) == size
        if size != 3 * MIB or shape == "512":  # the end of the old disk's last cluster comes back: see below
            twin.compare()


@pytest.mark.parametrize("granularity", ["512", "64k", "2G"])
def test_large_disks(granularity: str, tmp_path: Path) -> None:
    """Where a bitmap has many clusters of bits, and an L1 table several entries."""
    image = create(tmp_path, GIB)
    add_bitmaps(image, {"a": granularity, "off": "64k"})
    qemu_io(image, "write -P 1 0 4k", "write -P 2 600M 1M", "write -P 3 1023M 1M")
    twin = Twin.of(tmp_path)
    for size in (20 * GIB, 3 * GIB, 700 * MIB, 600 * MIB + 512):
        say(twin.resize(size))
        twin.compare()


def test_bitmaps_that_mark_everything(tmp_path: Path) -> None:
    """All-ones entries, and bits up to the very end, do not spill into what is added."""
    image = create(tmp_path, 3 * MIB + 512, "cluster_size=512")
    add_bitmaps(image, {"a": "512", "b": "64k"})
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("ones", granularity=512, all_dirty=True)
        edit.set_range("a", 0, 3 * MIB + 512)
    twin = Twin.of(tmp_path)
    for size, end in ((8 * MIB, 3 * MIB + 512), (2 * MIB + 512, 2 * MIB + 512), (64 * MIB, 2 * MIB + 512)):
        say(twin.resize(size))  # QEMU itself lets all-ones entries spill over the end, to the next 64 bits
        twin.require_sound()
        assert read_bitmaps(twin.ours) == {"a": [(0, end)], "b": [], "ones": [(0, end)]}


def test_a_dirty_tail(tmp_path: Path) -> None:
    image = create(tmp_path, 3 * MIB + 512)
    add_bitmaps(image, {"a": "512", "b": "64k", "off": "1M"})
    twin = Twin.of(tmp_path)
    twin.resize(10 * MIB, dirty_tail=True)
    assert read_bitmaps(twin.ours) == {
        "a": [(3 * MIB + 512, 7 * MIB - 512)],
        "b": [(3 * MIB, 7 * MIB)],
        "off": [(3 * MIB, 7 * MIB)],
    }
    twin.require_sound()


# ---- snapshots, compressed clusters ----


@pytest.mark.parametrize("shape", ["512", "64k", "extended"])
def test_snapshots_keep_what_they_need(shape: str, tmp_path: Path) -> None:
    image = create(tmp_path, 4 * MIB, *SHAPES[shape])
    qemu_io(image, "write -P 1 0 4M")
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "write -P 2 1M 1M", "write -P 3 3M 64k")
    qemu_img("snapshot", "-c", "between", image)
    qemu_io(image, "write -P 4 2M 256k")
    add_bitmaps(image, {"a": "64k"})
    qemu_io(image, "write -P 5 0 64k")
    twin = Twin.of(tmp_path)
    for size in (2 * MIB + 4096, 8 * MIB):
        say(twin.resize(size))
        twin.require_sound()
        assert guest_digest(twin.ours) == guest_digest(twin.theirs)
        assert guest_references(Raw.load(twin.ours)) == guest_references(Raw.load(twin.theirs))
    for image in (twin.ours, twin.theirs):
        qemu_img("bitmap", "--remove", image, "a")
        qemu_img("snapshot", "-a", "before", image)
    assert virtual_size(twin.ours) == 4 * MIB
    twin.compare()
    for name in ("before", "between"):
        qemu_img("snapshot", "-d", name, twin.ours)
    assert check(twin.ours)["returncode"] == CLEAN


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("extended", ["on", "off"])
def test_compressed_clusters(kind: str, extended: str, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(b"".join(bytes([n % 251]) * 700 for n in range(6000)))
    os.truncate(source, 4 * MIB)
    (tmp_path / "theirs").mkdir()
    image = tmp_path / "theirs" / "image.qcow2"
    said = f"cluster_size=16k,compression_type={kind},extended_l2={extended}"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", said, source, image)
    add_bitmaps(image, {"a": "64k"})
    twin = Twin.of(tmp_path)
    for size in (4 * MIB - 512, 3 * MIB + 5 * KIB, MIB, 512):
        say(twin.resize(size))
        twin.compare()


# ---- backing files ----


@dataclass
class Backed:
    """A disk on a backing file: what kinds of clusters it has where it ends."""

    size: int
    requests: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    compress: int | None = None
    snapshot: bool = False
    refused: bool = False


BACKED = {
    "aligned": Backed(MIB),
    "nothing there": Backed(MIB + 5 * 512),
    "data there": Backed(MIB + 5 * 512, ("write -P 1 1M 512",)),
    "zeroes there": Backed(MIB + 5 * 512, ("write -z 1M 2560",)),
    "compressed there": Backed(MIB + 9 * 512, compress=16),
    "a snapshot has it too": Backed(MIB + 5 * 512, ("write -P 1 1M 512",), snapshot=True),
    "extended, nothing there": Backed(MIB + 5 * 512, options=("extended_l2=on",)),
    "extended, aligned": Backed(MIB + 2048, ("write -P 1 1M 512",), ("extended_l2=on",)),
    "extended, data there": Backed(MIB + 5 * 512, ("write -P 1 1M 2560", "write -z 960k 2k"), ("extended_l2=on",)),
    "extended, zeroes there": Backed(MIB + 5 * 512, ("write -z 1M 2560",), ("extended_l2=on",)),
    "small": Backed(MIB + 512, ("write -P 1 1M 512",), ("cluster_size=512",)),
    "v2 within the cluster": Backed(MIB + 512, ("write -P 1 1000k 8k",), ("compat=0.10",)),
}


def backed(folder: Path, case: Backed, length: int) -> Path:
    home = folder / "theirs"
    home.mkdir(exist_ok=True)
    base = create(folder, length, name="base.qcow2")
    qemu_io(base, f"write -P 170 0 {length}")
    first = 2 * MIB if case.compress is not None else case.size
    image = create(folder, first, "backing_file=base.qcow2", "backing_fmt=qcow2", *case.options)
    if case.compress is not None:
        qemu_io(image, f"write -c -P 7 {case.compress * 64 * KIB} 64k")
        qemu_img("resize", "-q", "--shrink", image, str(case.size))
    if case.requests:
        qemu_io(image, *case.requests)
    if case.snapshot:
        qemu_img("snapshot", "-c", "s", image)
    if "compat=0.10" not in case.options:
        add_bitmaps(image, {"a": "4k"})
    return image


@pytest.mark.parametrize("name", BACKED)
def test_a_longer_backing_file_does_not_show_through(name: str, tmp_path: Path) -> None:
    case = BACKED[name]
    old = digest_of_prefix(backed(tmp_path, case, 4 * MIB), case.size)
    twin = Twin.of(tmp_path)
    for size in (MIB + 32 * KIB,) if name.startswith("v2") else (MIB + 32 * KIB, 9 * MIB, MIB + 16 * KIB, 3 * MIB):
        done = twin.resize(size)
        twin.require_sound()
        assert digest_of_prefix(twin.ours, case.size) == old
        if size <= 9 * MIB and done is not None and "compressed" not in name:
            assert guest_digest(twin.ours) == guest_digest(twin.theirs)
            assert bitmaps(twin.ours) == bitmaps(twin.theirs)
        assert zeroes_from(twin.ours, case.size)


@pytest.mark.parametrize("length", [512, MIB, MIB + 512])
def test_a_backing_file_that_is_not_longer_changes_nothing(length: int, tmp_path: Path) -> None:
    backed(tmp_path, Backed(MIB + 512, ("write -P 1 1M 512",)), length)
    twin = Twin.of(tmp_path)
    for size in (5 * MIB, 600 * MIB):
        say(twin.resize(size))
        twin.compare()


def test_a_raw_backing_file(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "base.raw").write_bytes(b"x" * (2 * MIB - 100))
    create(tmp_path, MIB, "backing_file=base.raw", "backing_fmt=raw")
    twin = Twin.of(tmp_path)
    say(twin.resize(3 * MIB))
    twin.compare()


def test_a_backing_file_that_cannot_be_opened_stands_in_the_way_of_growth_alone(tmp_path: Path) -> None:
    image = create(tmp_path, 2 * MIB)
    qemu_img("rebase", "-u", "-b", "nbd://nowhere/", "-F", "raw", image)
    with (
        qcow2bm.open(image, writable=True) as opened,
        pytest.raises(UnsupportedImageError, match="not the name of a file"),
    ):
        qcow2bm.plan_resize(opened, 3 * MIB)
    qemu_img("rebase", "-u", "-b", "gone", "-F", "raw", image)
    with qcow2bm.open(image, writable=True) as opened:
        with pytest.raises(ImageIOError, match=r"image\.qcow2: its backing file .*gone cannot be read: No such file"):
            qcow2bm.plan_resize(opened, 3 * MIB)
        opened.commit(qcow2bm.plan_resize(opened, MIB, shrink=True))
        assert opened.virtual_size == MIB


def test_version_2_cannot_hide_a_backing_file(tmp_path: Path) -> None:
    image = backed(tmp_path, Backed(MIB, options=("compat=0.10",)), 4 * MIB)
    before = image.read_bytes()
    with (
        qcow2bm.open(image, writable=True) as opened,
        pytest.raises(UnsupportedImageError, match="version 2 has no zero clusters"),
    ):
        qcow2bm.plan_resize(opened, 2 * MIB)
    assert image.read_bytes() == before


def converted(image: Path) -> bytes:
    out = image.with_name("prefix.raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.name, out.name, cwd=image.parent)
    data = out.read_bytes()
    out.unlink()
    return data


def digest_of_prefix(image: Path, length: int) -> bytes:
    return converted(image)[:length]


def zeroes_from(image: Path, start: int) -> bool:
    return not any(converted(image)[start:])


# ---- data files ----


@pytest.mark.parametrize("raw", ["on", "off"])
@pytest.mark.parametrize("shape", ["cluster_size=64k", "cluster_size=16k,extended_l2=on"])
def test_data_files_follow(raw: str, shape: str, tmp_path: Path) -> None:
    said = f"{shape},data_file=disk.raw,data_file_raw={raw}"
    image = create(tmp_path, 2 * MIB + 512, said)
    add_bitmaps(image, {"a": "64k", "b": "512"})
    qemu_io(image, "write -P 1 0 64k", "write -P 2 2M 512", "write -P 3 1M 64k")
    twin = Twin.of(tmp_path, "disk.raw")
    for size in (3 * MIB, 80 * MIB + 512, MIB + 4096, 512, 2 * MIB):
        say(twin.resize(size))
        twin.compare()
        if raw == "on":
            assert twin.ours.with_name("disk.raw").read_bytes() == converted(twin.ours)


def test_a_raw_data_file_that_is_longer_than_the_disk_shows_what_it_holds(tmp_path: Path) -> None:
    """As in QEMU; but the bitmaps say so."""
    image = create(tmp_path, MIB, "data_file=disk.raw,data_file_raw=on")
    add_bitmaps(image, {"a": "64k"})
    os.truncate(image.with_name("disk.raw"), 3 * MIB)
    qemu_io(image.with_name("disk.raw"), "write -P 5 2M 64k", fmt="raw")
    twin = Twin.of(tmp_path, "disk.raw")
    assert "not zeroes" in say(twin.resize(4 * MIB))
    twin.require_sound()
    assert guest_digest(twin.ours) == guest_digest(twin.theirs)
    assert read_bitmaps(twin.ours) == {"a": [(2 * MIB, 64 * KIB)]}


def test_a_data_file_that_is_not_raw_is_cut_where_no_cluster_is_used(tmp_path: Path) -> None:
    """Where a cluster lies elsewhere than the guest has it, cutting the file at the disk's size would lose it.

    The specification allows that; QEMU does not read it.
    """
    image = create(tmp_path, 4 * MIB, "data_file=disk.raw")
    qemu_io(image, "write -P 1 0 64k", "write -P 2 3M 64k")
    raw = Raw.load(image)
    raw.put(raw.l2_entry(0), 3 * MIB | 1 << 63)
    raw.put(raw.l2_entry(48), 0)
    raw.save(image)
    disk = image.with_name("disk.raw")
    with qcow2bm.open(image, writable=True) as opened:
        opened.commit(qcow2bm.plan_resize(opened, MIB, shrink=True, data_file=disk))
    assert disk.stat().st_size == 3 * MIB + 64 * KIB


def test_a_data_file_is_named_by_the_user_and_checked(tmp_path: Path) -> None:
    image = create(tmp_path, 2 * MIB, "data_file=disk.raw")
    plain = create(tmp_path, 2 * MIB, name="plain.qcow2")
    with qcow2bm.open(image, writable=True) as opened:
        with pytest.raises(UnsupportedImageError, match="external data file"):
            qcow2bm.plan_resize(opened, 3 * MIB)
        with pytest.raises(UsageError, match="not its data file"):
            qcow2bm.plan_resize(opened, 3 * MIB, data_file=image)
        plan = qcow2bm.plan_resize(opened, 3 * MIB, data_file=image.with_name("disk.raw"))
        os.truncate(image.with_name("disk.raw"), 5 * MIB)
        with pytest.raises(qcow2bm.errors.OutdatedPlanError, match="length has changed"):
            opened.commit(plan)
    with qcow2bm.open(plain, writable=True) as opened, pytest.raises(UsageError, match="no external data file"):
        qcow2bm.plan_resize(opened, 3 * MIB, data_file=image.with_name("disk.raw"))


# ---- what comes back ----


def test_what_an_old_end_brings_back_is_dirty(tmp_path: Path) -> None:
    """QEMU lets the rest of a cut cluster come back and calls it clean: a backup would miss it."""
    image = create(tmp_path, 4 * MIB)
    qemu_io(image, "write -P 1 0 4M")
    add_bitmaps(image, {"a": "4k"})
    twin = Twin.of(tmp_path)
    twin.resize(MIB + 512)
    assert "not zeroes" in say(twin.resize(2 * MIB))
    assert guest_digest(twin.ours) == guest_digest(twin.theirs)
    assert read_bitmaps(twin.theirs) == {"a": []}
    assert read_bitmaps(twin.ours) == {"a": [(MIB, 64 * KIB)]}


def test_entries_past_the_end_do_not_come_back(tmp_path: Path) -> None:
    """Tables that map more than the disk, as a crash may leave them: a growth drops them instead of showing them."""
    image = create(tmp_path, 4 * MIB)
    qemu_io(image, "write -P 1 0 4M")
    raw = Raw.load(image)
    raw.put(24, 2 * MIB)
    raw.save(image)
    with qcow2bm.open(image, writable=True) as opened:
        opened.commit(qcow2bm.plan_resize(opened, 3 * MIB))
    qemu_io(image, "read -P 1 0 2M", "read -P 0 2M 1M")
    said = check(image)
    assert said["returncode"] == CLEAN, said


# ---- encryption ----


def test_encrypted_images(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    image = tmp_path / "theirs" / "image.qcow2"
    create_luks(image, "4M", "fixture")
    qemu_io(image, "write -P 1 0 4M", secret="fixture")
    before = guest_digest(image, "fixture")
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("a", granularity=65536)
    found = []
    for size in (4 * MIB + 512, 4 * MIB, 2 * MIB + 512, 4 * MIB):
        with qcow2bm.open(image, writable=True) as opened:
            opened.commit(qcow2bm.plan_resize(opened, size, shrink=True))
        assert check(image, "fixture")["returncode"] == CLEAN
        found.append(guest_digest(image, "fixture"))
    assert read_bitmaps(image, secret="fixture") == {"a": [(2 * MIB, 64 * KIB)]}, "cannot be read, so it is dirty"
    assert found[1] == before


# ---- bitmaps that cannot follow, and such that are made to fit ----


def leave_in_use(image: Path) -> None:
    daemon = StorageDaemon(image)
    daemon.start()
    daemon.kill()


def test_a_bitmap_in_use_stands_in_the_way_as_in_qemu(tmp_path: Path) -> None:
    image = create(tmp_path, 2 * MIB)
    add_bitmaps(image, {"a": "64k"})
    leave_in_use(image)
    assert qemu_img("resize", "-f", "qcow2", image, "3M", check=False).returncode == 1
    with qcow2bm.open(image, writable=True) as opened:
        with pytest.raises(BitmapInconsistentError, match="cannot follow the disk"):
            qcow2bm.plan_resize(opened, 3 * MIB)
        assert not qcow2bm.plan_resize(opened, 2 * MIB), "it fits, so there is nothing to do"


def test_a_bitmap_that_would_be_too_large_is_refused(tmp_path: Path) -> None:
    image = create(tmp_path, TIB)
    add_bitmaps(image, {"a": "512"})
    with qcow2bm.open(image, writable=True) as opened:
        with pytest.raises(BitmapLimitError, match="larger granularity"):
            qcow2bm.plan_resize(opened, 3 * TIB)
        opened.commit(qcow2bm.plan_resize(opened, 2 * TIB))
    assert check(image)["returncode"] == CLEAN


def misfit(folder: Path, old: int, now: int, *, in_use: bool = False) -> Path:
    """An image whose header says another size than its bitmaps were made for."""
    image = create(folder, old, "cluster_size=4k")
    add_bitmaps(image, {"a": "512", "b": "4k"})
    qemu_io(image, "write -P 1 0 4k", f"write -P 2 {old - 64 * KIB} 4k")
    qemu_img("resize", "-q", "-f", "qcow2", "--shrink", image, str(max(old, now))) if now > old else None
    raw = Raw.load(image)
    raw.put(24, now)
    if in_use:
        at, _, _ = raw.directory
        raw.put(at + 12, raw.number(at + 12, 4) | 1, 4)
    raw.save(image)
    return image


def test_bitmaps_too_long_for_the_disk_are_cut(tmp_path: Path) -> None:
    image = misfit(tmp_path, 64 * MIB, 20 * MIB)
    assert "error" in check(image), "QEMU does not even open it"
    with qcow2bm.open(image, writable=True) as opened:
        opened.commit(qcow2bm.plan_resize(opened, 20 * MIB))
        assert not qcow2bm.plan_resize(opened, 20 * MIB)
    assert read_bitmaps(image) == {"a": [(0, 4 * KIB)], "b": [(0, 4 * KIB)]}
    assert check(image)["returncode"] == CLEAN


@pytest.mark.parametrize("tail", [None, False])
def test_bitmaps_too_short_for_the_disk_get_a_dirty_tail(tail: bool | None, tmp_path: Path) -> None:
    image = create(tmp_path, 20 * MIB, "cluster_size=4k")
    add_bitmaps(image, {"a": "512", "b": "4k"})
    qemu_io(image, "write -P 1 0 4k", "write -P 2 19M 4k")
    with qcow2bm.open(image, writable=True) as opened:
        opened.commit(qcow2bm.plan_resize(opened, 200 * MIB))
    longer = Raw.load(image)
    at, _, _ = longer.directory
    table, entries = longer.tables()["a"]
    assert entries > 2
    longer.put(at + 8, 2, 4)  # 2 clusters of 4 KiB of bits at 512 bytes: 32 MiB
    for place in range(table + 16, table + 8 * entries, 8):
        assert not longer.number(place) & OFFSET
    longer.save(image)
    assert "error" in check(image)
    assert "bitmap-table-size" in qcow2bm.check(image).counts
    with qcow2bm.open(image, writable=True) as opened:
        opened.commit(qcow2bm.plan_resize(opened, 210 * MIB, dirty_tail=tail))
    found = read_bitmaps(image)
    start = 19 * MIB
    if tail is None:
        assert found["a"] == [(0, 4 * KIB), (start, 210 * MIB - start)]
    else:
        assert found["a"] == [(0, 4 * KIB), (start, 4 * KIB)]
    # This one had a fitting table, but the other one proves that something resized the disk behind both. Two clusters
    # of its bits are for more than 128 MiB.
    assert found["b"] == (
        [(0, 4 * KIB), (start, 4 * KIB), (128 * MIB, 82 * MIB)] if tail is None else [(0, 4 * KIB), (start, 4 * KIB)]
    )
    assert check(image)["returncode"] == CLEAN
    assert qcow2bm.check(image).exit_status == CLEAN


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize("tail", [None, True, False])
@pytest.mark.parametrize("size", [64, 80, 96])
def test_bitmaps_that_fit_by_luck_are_dirty_where_they_may_lack_a_growth(
    size: int, tail: bool | None, in_use: bool, tmp_path: Path
) -> None:
    """Something made the disk 80 MiB large: the table of the fine bitmap shows it, the coarse one's does not."""
    image = create(tmp_path, 80 * MIB, "cluster_size=4k")
    patch_size(image, 64 * MIB)
    add_bitmaps(image, {"fine": "512", "coarse": "64k"})
    qemu_io(image, "write -P 1 0 64k")
    patch_size(image, 80 * MIB)
    if in_use:
        raw = Raw.load(image)
        at, _, _ = raw.directory  # where the fine one comes first
        raw.put(at + 12, raw.number(at + 12, 4) | 1, 4)
        raw.save(image)
    with qcow2bm.open(image, writable=True) as opened:
        if in_use and size != 80:
            with pytest.raises(BitmapInconsistentError):
                qcow2bm.plan_resize(opened, size * MIB, shrink=True)
            return
        plan = qcow2bm.plan_resize(opened, size * MIB, shrink=True, dirty_tail=tail)
        opened.commit(plan)
        found = {
            b.name: [(e.offset, e.length) for e in b.extents()] for b in opened.bitmaps if b.state.value == "ready"
        }
    assert "coarse" in found
    grown = [(48 * MIB, (size - 48) * MIB)]  # three clusters of bits at 512 bytes stand for 48 MiB: it had more
    for name, ranges in found.items():
        assert ranges == [(0, 64 * KIB), *(grown if tail is not False else [])], name
    assert ("--clean-tail" in say(list(plan.summary))) is (tail is False)
    assert "something resized the disk" in say(list(plan.summary))


def test_new_bytes_are_dirty_in_all_if_one_is_too_long(tmp_path: Path) -> None:
    image = create(tmp_path, 80 * MIB, "cluster_size=4k")
    add_bitmaps(image, {"fine": "512", "coarse": "64k"})
    patch_size(image, 64 * MIB)
    with qcow2bm.open(image, writable=True) as opened:
        opened.commit(qcow2bm.plan_resize(opened, 96 * MIB))
    assert read_bitmaps(image) == {name: [(64 * MIB, 32 * MIB)] for name in ("fine", "coarse")}


def patch_size(image: Path, size: int) -> None:
    """Give the disk another size as something would that knows nothing of bitmaps."""
    raw = Raw.load(image)
    raw.put(24, size)
    raw.save(image)


def test_a_long_l1_table_of_tiny_clusters(tmp_path: Path) -> None:
    """More refcount blocks than one of them can describe; the image is sound after every stage."""
    image = create(tmp_path, MIB, "cluster_size=512", "refcount_bits=64")
    add_bitmaps(image, {"a": "64k"})
    with qcow2bm.open(image) as opened:
        plan = qcow2bm.plan_resize(opened, 9 * GIB)
    part = tmp_path / "part.qcow2"
    shutil.copy(image, part)
    for stage in plan.stages:
        with part.open("r+b") as file:
            for write in stage.writes:
                file.seek(write.offset)
                file.write(write.read())
        assert check(part)["returncode"] in (CLEAN, LEAKS)
    assert check(part)["returncode"] == CLEAN
    twin = Twin.of(tmp_path)
    say(twin.resize(9 * GIB))
    assert virtual_size(twin.ours) == 9 * GIB
    assert bitmaps(twin.ours) == bitmaps(twin.theirs)
    twin.require_sound()


def test_one_in_use_is_made_to_fit_and_stays_in_use(tmp_path: Path) -> None:
    image = misfit(tmp_path, 64 * MIB, 20 * MIB, in_use=True)
    with qcow2bm.open(image, writable=True) as opened:
        with pytest.raises(BitmapInconsistentError, match="cannot follow"):
            qcow2bm.plan_resize(opened, 30 * MIB)
        opened.commit(qcow2bm.plan_resize(opened, 20 * MIB))
        assert [(b.name, b.state.value) for b in opened.bitmaps] == [("a", "inconsistent"), ("b", "ready")]
        assert not qcow2bm.plan_resize(opened, 20 * MIB)
    assert check(image)["returncode"] == CLEAN


# ---- undo, crashes ----


@pytest.mark.parametrize("size", [512, MIB + 512, 64 * MIB])
def test_undo_gives_every_byte_back(size: int, tmp_path: Path) -> None:
    image = create(tmp_path, 8 * MIB, "cluster_size=4k")
    qemu_io(image, "write -P 1 0 8M")
    add_bitmaps(image, {"a": "512"})
    before = image.read_bytes()
    with qcow2bm.open(image, writable=True) as opened:
        plan = qcow2bm.plan_resize(opened, size, shrink=True)
        opened.commit(plan, undo=tmp_path / "undo")
    assert check(image)["returncode"] == CLEAN
    assert len(image.read_bytes()) == plan.size_after
    qcow2bm.undo(image, tmp_path / "undo")
    assert image.read_bytes() == before


def test_the_unused_end_of_the_file_is_cut(tmp_path: Path) -> None:
    """As QEMU cuts it, although there was no room in front; empty refcount blocks are in nobody's way."""
    image = create(tmp_path, 8 * MIB, "cluster_size=512", "refcount_bits=64")
    qemu_io(image, "write -P 1 0 2M")
    add_bitmaps(image, {"a": "64k"})
    twin = Twin.of(tmp_path)
    say(twin.resize(64 * KIB))
    twin.compare()
    assert twin.ours.stat().st_size <= twin.theirs.stat().st_size + 16 * KIB


CRASHES = {
    "grow": (3 * MIB, 300 * MIB, ()),
    "shrink": (3 * MIB, MIB + 512, ()),
    "grow over a backing file": (MIB + 512, 2 * MIB, ("backing_file=base.qcow2", "backing_fmt=qcow2")),
    "shrink to nothing": (3 * MIB, 512, ("refcount_bits=64",)),
    "tidy up": (3 * MIB, MIB + 512, ()),
}


def commit_alone(image: Path, planned: Callable[[qcow2bm.Image], qcow2bm.Plan], tape: Tape) -> None:
    """A change without the one that may follow it."""
    with qcow2bm.open(image, writable=True, open_file=tape.open) as opened:
        opened.commit(replace(planned(opened), then=None))


@pytest.mark.parametrize("name", CRASHES)
@pytest.mark.parametrize("snapshot", [False, True])
def test_every_state_that_a_crash_leaves_is_the_old_or_the_new_disk(name: str, snapshot: bool, tmp_path: Path) -> None:
    old, new, options = CRASHES[name]
    base = create(tmp_path, 2 * MIB, name="base.qcow2")
    qemu_io(base, "write -P 170 0 2M")
    image = create(tmp_path, old, "cluster_size=4k", *options)
    qemu_io(image, f"write -P 1 0 {old}")
    if snapshot:
        qemu_img("snapshot", "-c", "s", image)
        qemu_io(image, "write -P 2 64k 64k")
    add_bitmaps(image, {"a": "512"})
    qemu_io(image, "write -P 3 0 64k")
    if name == "tidy up":
        commit_alone(image, lambda opened: qcow2bm.plan_resize(opened, new, shrink=True), Tape())
    before, tape = image.read_bytes(), Tape()
    was = (virtual_size(image), guest_digest(image), bitmaps(image))
    if name == "tidy up":
        commit_alone(image, lambda opened: plan_tidying(opened.qcow2), tape)
        assert image.stat().st_size < len(before)
    else:
        commit_alone(image, lambda opened: qcow2bm.plan_resize(opened, new, shrink=True), tape)
    now = (new, guest_digest(image), bitmaps(image))
    writes = [[event for event in epoch if event.kind == "write"] for epoch in tape.epochs()]
    journal = image.with_name(image.name + ".qcow2bm-journal")
    asked: set[bytes] = set()
    for state, data in crash_states(before, writes, subsets_up_to=3):
        epoch = len(writes) if state == "done" else int(state.split()[1].rstrip(","))
        image.write_bytes(data)
        if tape.journal is not None and {epoch, epoch - 1} & tape.journaled:
            journal.write_bytes(tape.journal)
            qcow2bm.open(image, writable=True).close()
        with qcow2bm.open(image) as opened:
            size = opened.virtual_size
        assert (size, bitmaps(image)) in ((was[0], was[2]), (now[0], now[2])), state
        assert qcow2bm.check(image).exit_status in (CLEAN, LEAKS), state
        if "," not in state and data not in asked:
            asked.add(data)
            assert check(image)["returncode"] in (CLEAN, LEAKS), state
            assert (size, guest_digest(image)) in ((was[0], was[1]), (now[0], now[1])), state
    assert check(image)["returncode"] == CLEAN


def test_a_failing_write_leaves_image_and_data_file_as_they_were(tmp_path: Path) -> None:
    image = create(tmp_path, MIB, "data_file=disk.raw,data_file_raw=on")
    add_bitmaps(image, {"a": "64k"})
    before = image.read_bytes()
    for number in range(3):
        tape = Tape(fail_at=number)
        with qcow2bm.open(image, writable=True, open_file=tape.open) as opened:
            plan = qcow2bm.plan_resize(opened, 2 * MIB, data_file=image.with_name("disk.raw"))
            with pytest.raises(qcow2bm.errors.ImageIOError):
                opened.commit(plan)
        assert image.read_bytes() == before
        assert image.with_name("disk.raw").stat().st_size == MIB


# ---- at random ----


def random_image(chance: random.Random, folder: Path) -> tuple[Twin, bool]:
    """An image of any kind with bitmaps of any granularity; whether it has snapshots."""
    cluster = chance.choice((512, 4 * KIB, 16 * KIB, 64 * KIB, MIB))
    said = [f"cluster_size={cluster}", f"refcount_bits={chance.choice((1, 2, 16, 64))}"]
    snapshots = chance.random() < 0.4 and said[1][-2:] in ("16", "64")
    if cluster >= 16 * KIB and chance.random() < 0.5:
        said.append("extended_l2=on")
    size = chance.randrange(1, 8 * MIB // 512) * 512
    if chance.random() < 0.4:
        length = chance.choice((size // 2 // 512 * 512 + 512, size, size + 512, size + 3 * MIB))
        base = create(folder, length, name="base.qcow2")
        qemu_io(base, f"write -P 170 0 {length}")
        said += ["backing_file=base.qcow2", "backing_fmt=qcow2"]
    image = create(folder, size, *said)
    if size >= cluster:
        places = chance.sample(range(size // cluster), k=min(size // cluster, chance.randrange(4)))
        requests = [f"write -c -P {chance.randrange(1, 256)} {place * cluster} {cluster}" for place in places]
        qemu_io(image, *requests) if requests else None
    qemu_io(image, *requests_within(chance, size), options=("-d", "unmap"))
    if snapshots:
        qemu_img("snapshot", "-c", "s", image)
        qemu_io(image, *requests_within(chance, size), options=("-d", "unmap"))
    names = {f"b{number}": str(512 << chance.randrange(0, 13)) for number in range(chance.randrange(0, 4))}
    add_bitmaps(image, names)
    qemu_io(image, *requests_within(chance, size), options=("-d", "unmap"))
    return Twin.of(folder), snapshots


def requests_within(chance: random.Random, size: int) -> list[str]:
    said = []
    for _ in range(chance.randrange(1, 8)):
        verb = chance.choice(("write -P {}", "write -P {}", "write -z", "write -z -u", "discard"))
        length = min(chance.choice((512, 4 * KIB, 64 * KIB, 700 * KIB)) * chance.randrange(1, 4), size)
        offset = chance.choice((chance.randrange(0, size - length + 1, 512), size - length))
        said.append(f"{verb.format(chance.randrange(1, 256))} {offset} {length}")
    return said


@pytest.mark.parametrize("seed", range(4 * ROUNDS))
def test_random_images(seed: int, tmp_path: Path) -> None:
    """No byte that is new or has changed is clean in any bitmap, and all else is as in QEMU."""
    chance = random.Random(seed)
    twin, snapshots = random_image(chance, tmp_path)
    same = exact = True
    for _ in range(3):
        was, marked = converted(twin.ours), read_bitmaps(twin.ours)
        change = chance.choice((chance.randrange(-len(was) // 512, 0), chance.randrange(1, 12 * MIB // 512))) * 512
        size = max(512, len(was) + change // chance.choice((1, 1, 64)) // 512 * 512)
        done = twin.resize(size)
        same = done is not None and same
        exact = exact and same and "not zeroes" not in say(done)
        now = converted(twin.ours)
        twin.require_sound()
        kept = min(len(was), len(now))
        assert now[:kept] == was[:kept]
        assert len(now) == size
        require_marked(read_bitmaps(twin.ours), marked, now, len(was))
        if same and not snapshots:
            assert guest_digest(twin.ours) == guest_digest(twin.theirs)
            assert l1_table(Raw.load(twin.ours)) == l1_table(Raw.load(twin.theirs))
        if exact:
            assert bitmaps(twin.ours) == bitmaps(twin.theirs)
        if size != len(was):
            qemu_io(twin.ours, *(changes := requests_within(chance, size)), options=("-d", "unmap"))
            qemu_io(twin.theirs, *changes, options=("-d", "unmap"), check=same)


def require_marked(
    found: dict[str, list[tuple[int, int]]], before: dict[str, list[tuple[int, int]]], now: bytes, old: int
) -> None:
    assert found.keys() == before.keys()
    for name, ranges in found.items():
        covered = bytearray(len(now))
        for offset, length in ranges:
            covered[offset : offset + length] = b"\1" * length
        for offset, length in before[name]:
            end = min(offset + length, len(now))
            assert covered[offset:end].count(1) == max(0, end - offset), name
        for sector in range(old, len(now), 512):
            assert covered[sector] or not any(now[sector : sector + 512]), (name, sector)


@pytest.mark.parametrize("written", [(0,), (0, 40)], ids=["nothing is dropped", "the end is dropped"])
@pytest.mark.parametrize("undo", [False, True], ids=["", "with undo"])
def test_a_shrink_does_not_go_by_refcounts_that_lie(tmp_path: Path, written: tuple[int, ...], undo: bool) -> None:
    """The file's end would be cut off with the guest's data, which nothing counts."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_io(image, *(f"write -P 1 {at}M 256k" for at in reversed(written)))
    raw = Raw.load(image)
    for guest in (2, 3):
        raw.set_refcount(raw.number(raw.l2_entry(guest)) & OFFSET, 0)
    raw.save(image)
    before = image.read_bytes()
    with (
        qcow2bm.open(image, writable=True) as opened,
        pytest.raises(CorruptImageError, match="the image is damaged"),
    ):
        opened.commit(qcow2bm.plan_resize(opened, 32 * MIB, shrink=True), undo=tmp_path / "undo" if undo else None)
    assert image.read_bytes() == before
