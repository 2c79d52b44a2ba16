"""The commands that are cut short: every one that changes an image, as a user types it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qcow2bm import __main__
from tests.crash.shapes import Shape
from tests.support.qemu import open_arguments, qemu_img
from tests.support.raw import Raw


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

    def words(self, image: Path, shape: Shape) -> list[str]:
        """The words of the command line."""
        names = {"image": image, "undo": image.with_name("undo"), "folder": image.parent, "size": shape.size}
        return [word.format(**names) for word in self.line.split()]

    def run(self, image: Path, shape: Shape) -> int:
        """Run it in this process."""
        return __main__.main(self.words(image, shape))


def _only_a(image: Path, shape: Shape) -> None:
    _bitmaps(image, shape, "--remove", "b", "c")


def _none(image: Path, shape: Shape) -> None:
    _bitmaps(image, shape, "--remove", "a", "b", "c")


def _bitmaps(image: Path, shape: Shape, option: str, *names: str) -> None:
    opening, file = open_arguments(image, shape.secret)
    for name in names:
        qemu_img("bitmap", option, *opening, file, name, cwd=image.parent)


def _undoable(image: Path, _shape: Shape) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        status = __main__.main(["merge", str(image), "c", "a", "b", "--undo", str(image.with_name("undo"))])
    assert status == 0


def _exported(image: Path, _shape: Shape) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert __main__.main(["export", str(image), str(image.with_name("exported"))]) == 0
        assert __main__.main(["clear", str(image), "--match", "*"]) == 0


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


def _leaky(image: Path, _shape: Shape) -> None:
    """Clusters at the end that nothing uses, counted."""
    raw = Raw.load(image)
    end = len(raw.data) // raw.cluster_size
    raw.data.extend(bytes(3 * raw.cluster_size))
    for cluster in range(end, end + 3):
        raw.set_refcount(cluster * raw.cluster_size, 1)
    raw.save(image)


def _too_low(image: Path, _shape: Shape) -> None:
    """The clusters of bitmap tables and of the L1 table have lost their refcounts."""
    raw = Raw.load(image)
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
    Command("set", "set {image} b --range 64k+300k"),
    Command("unset", "unset {image} b --range 0+{size}"),
    Command("merge", "merge {image} c a b"),
    Command("merge, with undo", "merge {image} sum a b c --create --undo {undo}"),
    Command("copy", "copy {image}#a {image}#twin -g 512"),
    Command("merge by subtract", "merge {image} b a --op subtract"),
    Command("invert", "invert {image} b"),
    Command("resample", "resample {image} a -g 512"),
    Command("resample, coarser", "resample {image} --match * -g 1M"),
    Command("set from allocation", "set {image} c --from-allocation"),
    Command("import", "import {image} {folder}/exported --merge", _exported),
    Command("rebuild", "rebuild {image} b --against {folder}/older.raw", _older, fits=_is_open),
    Command("diff into", "diff {folder}/older.raw {image} --into {image}#differs", _older, fits=_is_open),
    Command("grow", "resize {image} +64M", fits=_has_no_data_file),
    Command("grow with a data file", "resize {image} +1M --data-file {folder}/data.raw", fits=_has_data_file),
    Command("grow, tail dirty, with undo", "resize {image} +1M --dirty-tail --undo {undo}", fits=_has_no_data_file),
    Command("shrink", "resize {image} -512k --shrink", fits=_has_no_data_file),
    Command("shrink to little", "resize {image} 64k --shrink --undo {undo}", fits=_has_no_data_file),
    Command("undo", "undo {image} {undo}", _undoable),
    Command("drop-in bitmap --merge", "qemu-img bitmap --merge a -f qcow2 {image} c"),
    Command("drop-in bitmap --add", "qemu-img bitmap --add -f qcow2 {image} new"),
    Command("repair leaks", "repair {image} --yes --only leaks", _leaky, status=(0, 3)),
    Command("repair refcounts", "repair {image} --yes --no-undo", _too_low),
    Command("repair twins", "repair {image} --yes --only bitmaps --allow lossy", _twins, status=(0, 3)),
    Command("salvage", "repair {image} --yes --in-use all-dirty", _in_use),
    Command("drop-in check -r all", "qemu-img check -r all -f qcow2 {image}", _too_low),
)
