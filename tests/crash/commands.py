"""The commands that are cut short: every one that changes an image, as a user types it."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from unittest.mock import patch

from qcow2bm import __main__
from qcow2bm.image.file import ImageFile
from qcow2bm.image.undo_layout import State
from qcow2bm.image.undo_reader import UndoReader
from tests.crash.disk import Folder
from tests.crash.recorder import recorded
from tests.crash.shapes import Shape
from tests.support.qemu import open_arguments, qemu_img, qemu_io
from tests.support.raw import OFFSET, Raw


def nothing(_image: Path, _shape: Shape) -> None:
    """No preparation."""


@dataclass(frozen=True)
class Command:
    """A command line.

    `{image}` stands for the image, `{folder}` for its folder, `{undo}` for a file there, `{size}` for its disk's size.

    Attributes:
        prepare: what the image needs first.
        fits: False for a shape on which the command would be refused.
        status: what it ends with.
    """

    name: str
    line: str
    prepare: Callable[[Path, Shape], None] = nothing
    fits: Callable[[Shape], bool] = lambda _: True
    status: tuple[int, ...] = (0,)

    @property
    def failed(self) -> tuple[int, ...]:
        """What it ends with where a call fails: a repair also with what a check says that could not read something."""
        return (1, 2, 4) if self.line.startswith(("repair", "check", "qemu-img check")) else (1,)

    def words(self, image: Path, shape: Shape) -> list[str]:
        """The words of the command line."""
        names = {"image": image, "undo": image.with_name("undo"), "folder": image.parent, "size": shape.size}
        return [word.format(**names) for word in self.line.split()]

    def run(self, image: Path, shape: Shape) -> int:
        """Run it in this process, and the real qemu-img, which the drop-in may leave the work to, in its own."""
        with patch("os.execv", _instead):
            try:
                return __main__.main(self.words(image, shape))
            except SystemExit as ended:
                return ended.code if isinstance(ended.code, int) else 1


def _instead(_path: str, words: list[str]) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    raise SystemExit(done.returncode)


def _only_a(image: Path, shape: Shape) -> None:
    _bitmaps(image, shape, "--remove", "b", "c")


def _none(image: Path, shape: Shape) -> None:
    _bitmaps(image, shape, "--remove", "a", "b", "c")


def _bitmaps(image: Path, shape: Shape, option: str, *names: str) -> None:
    opening, file = open_arguments(image, shape.secret)
    for name in names:
        qemu_img("bitmap", option, *opening, file, name, cwd=image.parent)


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What a command prints meanwhile, kept."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield out


def _quietly(*words: str | Path) -> None:
    with quiet() as said:
        status = __main__.main([str(word) for word in words])
    assert status in (0, 2, 3), said.getvalue()


def _undoable(image: Path, _shape: Shape) -> None:
    _quietly("merge", image, "c", "a", "b", "--undo", image.with_name("undo"))


def _exported(image: Path, _shape: Shape) -> None:
    _quietly("export", image, image.with_name("exported"))
    _quietly("clear", image, "--match", "*")


def _older(image: Path, shape: Shape) -> None:
    """A disk of zeroes, as the image's was before the guest wrote."""
    with image.with_name("older.raw").open("wb") as file:
        file.truncate(shape.size)


def _is_open(shape: Shape) -> bool:
    """Guest data can be read: it is neither encrypted nor in a file that somebody would have to name."""
    return shape.secret is None and _has_no_data_file(shape)


def _has_data_file(shape: Shape) -> bool:
    return any("data_file" in option for option in shape.options)


def _has_no_data_file(shape: Shape) -> bool:
    return not _has_data_file(shape)


def _has_clean_parts(shape: Shape) -> bool:
    """Not where the guest has written all over the disk to fill the refcount table, so that all is dirty."""
    return shape.name != "no room in the refcount table"


def _has_room(shape: Shape) -> bool:
    return "no room" not in shape.name


def _frees_leaks(shape: Shape) -> bool:
    """Not where bits that nobody knows may vouch for what looks like a leak."""
    return _has_room(shape) and shape.name != "unknown autoclear bits"


def _leaky(image: Path, _shape: Shape) -> None:
    """Clusters at the end that nothing uses, counted."""
    raw = Raw.load(image)
    end = len(raw.data) // raw.cluster_size
    raw.data.extend(bytes(3 * raw.cluster_size))
    for cluster in range(end, end + 3):
        raw.set_refcount(cluster * raw.cluster_size, 1)
    raw.save(image)


def _too_low(image: Path, _shape: Shape) -> None:
    """The clusters of bitmap tables and of the L1 table have lost their refcounts, and an L1 entry its flag."""
    raw = Raw.load(image)
    entry = next(at for at in count(raw.number(40), 8) if raw.number(at))
    raw.put(entry, raw.number(entry) & OFFSET)
    for offset in (*(table for table, _ in raw.tables().values()), raw.number(40)):
        raw.set_refcount(offset, 0)
    raw.save(image)


def _twins(image: Path, _shape: Shape) -> None:
    """Two bitmaps have one table: QEMU refuses the image, or worse."""
    raw = Raw.load(image)
    at = raw.directory[0]
    table = raw.number(at)
    second = at + (24 + 1 + 7) // 8 * 8
    raw.put(second, table)
    raw.save(image)


def _no_refcounts(image: Path, _shape: Shape) -> None:
    """The refcount table holds nothing: the whole structure must be made anew."""
    raw = Raw.load(image)
    table, clusters = raw.number(48), raw.number(56, 4)
    raw.data[table : table + clusters * raw.cluster_size] = bytes(clusters * raw.cluster_size)
    raw.save(image)


def _astray(image: Path, _shape: Shape) -> None:
    """A guest cluster lies outside the file, and a second L1 entry has lost its flag."""
    raw = Raw.load(image)
    l1 = next(at for at in count(raw.number(40), 8) if raw.number(at))
    l2 = raw.number(l1) & OFFSET
    entry = next(at for at in count(l2, 8) if raw.number(at))
    raw.put(entry, 1 << 63 | 1 << 50)
    raw.put(l1, l2)
    raw.save(image)


def _in_use_and_older(image: Path, shape: Shape) -> None:
    _in_use(image, shape)
    _older(image, shape)


def _repaired(image: Path, shape: Shape) -> None:
    _too_low(image, shape)
    _quietly("repair", image, "--yes", "--undo", image.with_name("undo"))


def _quarantined(image: Path, _shape: Shape) -> None:
    raw = Raw.load(image)
    second = raw.directory[0] + (24 + 1 + 7) // 8 * 8
    raw.put(second + 12, 0x2 | 0x4, 4)  # a flag that QEMU refuses where there is no extra data
    raw.save(image)
    _quietly("repair", image, "--yes", "--only", "bitmaps", "--undo", image.with_name("undo"))


def _planned(image: Path, shape: Shape) -> None:
    _too_low(image, shape)
    _quietly("repair", image, "--dry-run", "--plan", image.with_name("plan"))


def _cut_short(image: Path, shape: Shape) -> None:
    """A repair has been writing; its journal is all that leads back."""
    _too_low(image, shape)
    before = Folder.read(image.parent)
    with recorded(image.parent) as ops:
        _quietly("repair", image, "--yes", "--no-undo")
    with contextlib.closing(ImageFile.open(image)) as file:
        journal = file.journal
    removed = next(number for number, op in enumerate(ops) if (op.kind, op.name) == ("unlink", journal.name))
    file_number = before.names[image.name]
    written = [number for number, op in enumerate(ops[:removed]) if (op.kind, op.file) == ("write", file_number)]
    before.after(ops[: written[len(written) // 2] + 1]).write(image.parent)
    with UndoReader(journal) as reader:
        assert reader.state is State.IN_PROGRESS


def _another(image: Path, shape: Shape) -> None:
    qemu_img("create", "-q", "-f", "qcow2", image.with_name("other.qcow2"), str(shape.size))
    qemu_img("bitmap", "--add", image.with_name("other.qcow2"), "theirs")
    qemu_io(image.with_name("other.qcow2"), "write 64k 128k")


def _listed(image: Path, _shape: Shape) -> None:
    extents = [{"offset": 65536, "length": 4096, "dirty": True}, {"offset": 300_000, "length": 100, "dirty": True}]
    image.with_name("extents").write_text(json.dumps(extents))


def _in_use(image: Path, _shape: Shape) -> None:
    raw = Raw.load(image)
    at = raw.directory[0]
    raw.put(at + 12, raw.number(at + 12, 4) | 1, 4)
    raw.save(image)


COMMANDS = (
    Command("add", "add {image} new -g 64k"),
    Command("add, all dirty, with undo", "add {image} new -g 512 --all-dirty --undo {undo}"),
    Command("first bitmap", "add {image} new", _none),
    Command("remove", "remove {image} b"),
    Command("remove the last", "remove {image} a", _only_a),
    Command("remove all", "remove {image} --match *"),
    Command("rename", "rename {image} a another-name-that-is-longer"),
    Command("rename in place", "rename {image} a x"),
    Command("clear", "clear {image} a b"),
    Command("enable", "enable {image} c"),
    Command("disable", "disable {image} a b"),
    Command("set", "set {image} b --range 64k+300k", fits=_has_clean_parts),
    Command("unset", "unset {image} b --range 0+{size}"),
    Command("merge", "merge {image} c a b"),
    Command("merge, with undo", "merge {image} sum a b c --create --undo {undo}"),
    Command("copy", "copy {image}#a {image}#twin -g 512"),
    Command("merge by subtract", "merge {image} b a --op subtract"),
    Command("invert", "invert {image} b"),
    Command("resample", "resample {image} a -g 512"),
    Command("resample, coarser", "resample {image} --match * -g 1M"),
    Command("set from allocation", "set {image} c --from-allocation"),
    Command("set from extents", "set {image} b --from-extents {folder}/extents", _listed, _has_clean_parts),
    Command("copy from another image", "copy {folder}/other.qcow2#theirs {image}#ours", _another),
    Command("import", "import {image} {folder}/exported --merge", _exported),
    Command("rebuild", "rebuild {image} b --against {folder}/older.raw", _older, fits=_is_open),
    Command("diff into", "diff {folder}/older.raw {image} --into {image}#differs", _older, fits=_is_open),
    Command("grow", "resize {image} +64M", fits=_has_no_data_file),
    Command("grow with a data file", "resize {image} +1M --data-file {folder}/data.raw", fits=_has_data_file),
    Command(
        "grow with a data file, with undo",
        "resize {image} +1M --data-file {folder}/data.raw --undo {undo}",
        fits=_has_data_file,
    ),
    Command("grow, tail dirty, with undo", "resize {image} +1M --dirty-tail --undo {undo}", fits=_has_no_data_file),
    Command("shrink", "resize {image} -512k --shrink", fits=_has_no_data_file),
    Command("shrink to little", "resize {image} 64k --shrink --undo {undo}", fits=_has_no_data_file),
    Command("undo", "undo {image} {undo} --force", _undoable),
    Command("undo of a repair", "undo {image} {undo} --force", _repaired),
    Command("bring a bitmap back", "undo {image} {undo} --bitmap b --stale", _quarantined),
    Command("after a crash", "repair {image} --yes --no-undo", _cut_short, status=(0, 3)),
    Command("drop-in bitmap --merge", "qemu-img bitmap --merge a -f qcow2 {image} c"),
    Command("drop-in bitmap --add", "qemu-img bitmap --add -f qcow2 {image} new"),
    Command("drop-in bitmap --remove", "qemu-img bitmap --remove -f qcow2 {image} b"),
    Command("drop-in bitmap --enable", "qemu-img bitmap --enable -f qcow2 {image} c"),
    Command("drop-in bitmap --clear", "qemu-img bitmap --clear --disable -f qcow2 {image} a"),
    Command("repair leaks", "repair {image} --yes --only leaks", _leaky, fits=_frees_leaks, status=(0, 3)),
    Command("repair refcounts", "repair {image} --yes --no-undo", _too_low, status=(0, 3)),
    Command("repair by a plan", "repair {image} --yes --apply {folder}/plan", _planned, status=(0, 3)),
    Command("make refcounts anew", "repair {image} --yes", _no_refcounts, status=(0, 2, 3)),
    Command("repair mappings", "repair {image} --yes --allow lossy", _astray, fits=_has_no_data_file, status=(0, 3)),
    Command("check -r all", "check {image} -r all", _too_low, status=(0, 3)),
    Command("repair twins", "repair {image} --yes --only bitmaps --allow lossy", _twins, status=(0, 3)),
    Command("salvage", "repair {image} --yes --in-use all-dirty", _in_use, status=(0, 3)),
    Command(
        "salvage by comparing",
        "repair {image} --yes --in-use rebuild --against {folder}/older.raw",
        _in_use_and_older,
        fits=_is_open,
        status=(0, 3),
    ),
    Command("drop-in check -r leaks", "qemu-img check -r leaks -f qcow2 {image}", _leaky, fits=_has_room),
    Command("drop-in check -r all", "qemu-img check -r all -f qcow2 {image}", _too_low),
)
