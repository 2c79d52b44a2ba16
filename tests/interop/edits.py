"""Every kind of edit, said twice: to qcow2bm and to `qemu-img bitmap`.

rename, copy, set, unset and all-dirty have no word in qemu-img. A copy is an add and a merge there, a rename that and a
remove; what set, unset and all-dirty make of a bitmap is worked out by `ranges` from what QEMU reads without them.
The bitmaps that the edits name are those of `combinations.Maker`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import qcow2bm
from qcow2bm.bitmap.draft import Source
from qcow2bm.bitmap.edit import Edit
from tests.interop.combinations import KIB, MIB, bitmap
from tests.interop.ranges import mark, unmark
from tests.support.qemu import Ranges

OTHER = ("-b", "source.qcow2", "-F", "qcow2")

Command = tuple[str, ...]
"""Options of `qemu-img bitmap`, then the bitmap's name."""


@dataclass(frozen=True)
class Step:
    """One edit.

    Attributes:
        ours: the edit, given the draft and a bitmap of another image as a source.
        theirs: what it is in `qemu-img bitmap` commands.
        painted: a bitmap that the commands leave without what set, unset or all-dirty do, and how that changes its
            ranges, given the granularity and the size of the disk.
    """

    name: str
    ours: Callable[[Edit, Source], None]
    theirs: tuple[Command, ...] = ()
    painted: tuple[str, Callable[[Ranges, int, int], Ranges]] | None = None


def _all(_: Ranges, __: int, size: int) -> Ranges:
    return [(0, size)]


def _set(offset: int, length: int) -> Callable[[Ranges, int, int], Ranges]:
    return lambda ranges, granularity, size: mark(ranges, offset, length, granularity=granularity, size=size)


def _unset(offset: int, length: int) -> Callable[[Ranges, int, int], Ranges]:
    return lambda ranges, granularity, size: unmark(ranges, offset, length, granularity=granularity, size=size)


def _set_tail(ranges: Ranges, granularity: int, size: int) -> Ranges:
    return mark(ranges, size - 1, 1, granularity=granularity, size=size)


def _unset_tail(ranges: Ranges, granularity: int, size: int) -> Ranges:
    return unmark(ranges, size - 3 * MIB, 3 * MIB, granularity=granularity, size=size)


def _size(edit: Edit) -> int:
    return edit.image.geometry.virtual_size


STEPS = (
    Step("add", lambda e, _: e.add("added"), (("--add", "added"),)),
    Step("merge-same-granularity", lambda e, _: e.merge("added", ["daily"]), (("--merge", "daily", "added"),)),
    Step("remove", lambda e, _: e.remove("old"), (("--remove", "old"),)),
    Step("merge-finer-to-coarser", lambda e, _: e.merge("coarse", ["fine"]), (("--merge", "fine", "coarse"),)),
    Step("add-fine", lambda e, _: e.add("added-fine", granularity=512), (("--add", "-g", "512", "added-fine"),)),
    Step(
        "merge-coarser-to-finer",
        lambda e, _: e.merge("added-fine", ["coarse"]),
        (("--merge", "coarse", "added-fine"),),
    ),
    Step("add-coarse", lambda e, _: e.add("added-2g", granularity=2 << 30), (("--add", "-g", "2G", "added-2g"),)),
    Step("merge-into-coarsest", lambda e, _: e.merge("added-2g", ["daily"]), (("--merge", "daily", "added-2g"),)),
    Step("add-disabled", lambda e, _: e.add("off", recording=False), (("--add", "--disable", "off"),)),
    Step(
        "merge-several-into-disabled",
        lambda e, _: e.merge("off", ["daily", "fine", "scratch"]),
        (("--merge", "daily", "--merge", "fine", "--merge", "scratch", "off"),),
    ),
    Step("add-all-dirty", lambda e, _: e.add("all", all_dirty=True), (("--add", "all"),), ("all", _all)),
    Step(
        "add-all-dirty-fine",
        lambda e, _: e.add("all-fine", all_dirty=True, granularity=512),
        (("--add", "-g", "512", "all-fine"),),
        ("all-fine", _all),
    ),
    Step(
        "merge-other-image-into-recording",
        lambda e, other: e.merge("daily", [other]),
        (("--merge", "elsewhere", *OTHER, "daily"),),
    ),
    Step(
        "merge-other-image-into-disabled",
        lambda e, other: e.merge("idle", [other, "scratch"]),
        (("--merge", "elsewhere", *OTHER, "idle"), ("--merge", "scratch", "idle")),
    ),
    Step("enable", lambda e, _: e.enable("idle"), (("--enable", "idle"),)),
    Step("clear", lambda e, _: e.clear("scratch"), (("--clear", "scratch"),)),
    Step("disable", lambda e, _: e.disable("scratch"), (("--disable", "scratch"),)),
    Step(
        "rename",
        lambda e, _: e.rename("coarse", "renamed"),
        (("--add", "-g", "1M", "--disable", "--merge", "coarse", "renamed"), ("--remove", "coarse")),
    ),
    Step("copy", lambda e, _: e.copy("daily", "copied"), (("--add", "--merge", "daily", "copied"),)),
    Step(
        "copy-coarser",
        lambda e, _: e.copy("fine", "copied-1m", granularity=MIB),
        (("--add", "-g", "1M", "--disable", "--merge", "fine", "copied-1m"),),
    ),
    Step(
        "copy-finer",
        lambda e, _: e.copy("renamed", "copied-4k", granularity=4 * KIB),
        (("--add", "-g", "4k", "--disable", "--merge", "renamed", "copied-4k"),),
    ),
    Step(
        "copy-other-image",
        lambda e, other: e.copy(other, "imported"),
        (("--add", "-g", "4k", "--merge", "elsewhere", *OTHER, "imported"),),
    ),
    Step("set", lambda e, _: e.set_range("copied", 5 * MIB + 1, 2 * MIB), (), ("copied", _set(5 * MIB + 1, 2 * MIB))),
    Step("set-tail", lambda e, _: e.set_range("copied-4k", _size(e) - 1, 1), (), ("copied-4k", _set_tail)),
    Step(
        "unset",
        lambda e, _: e.unset_range("all-fine", 3 * MIB + 7, 4 * MIB),
        (),
        ("all-fine", _unset(3 * MIB + 7, 4 * MIB)),
    ),
    Step("unset-tail", lambda e, _: e.unset_range("all", _size(e) - 3 * MIB, 3 * MIB), (), ("all", _unset_tail)),
)  # fmt: skip


def by_qemu(image: Path, secret: str | None) -> None:
    """Every step on `image`, by `qemu-img bitmap`; one call for what it does to one bitmap in a row."""
    commands = [command for step in STEPS for command in step.theirs]
    for (name, _), calls in groupby(commands, lambda command: (command[-1], "-b" in command)):
        bitmap(image, *(option for command in calls for option in command[:-1]), name=name, secret=secret)


def by_us(image: Path, groups: list[list[Step]], after: Callable[[Path], object]) -> None:
    """Every step on `image`, by us: one commit for each group. `after` is called after each."""
    with qcow2bm.open(image.with_name("source.qcow2")) as other:
        source = other.bitmaps["elsewhere"].source
        for group in groups:
            with qcow2bm.open(image, writable=True) as ours, ours.edit() as edit:
                for step in group:
                    step.ours(edit, source)
            after(image)


def paint(dirty: dict[str, Ranges], granularity: Callable[[str], int], size: int) -> None:
    """Do to what QEMU read from its own image what set, unset and all-dirty did to ours."""
    for step in STEPS:
        if step.painted is not None:
            name, change = step.painted
            dirty[name] = partial(change, dirty[name])(granularity(name), size)
