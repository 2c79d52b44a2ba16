"""The rows of the table: what is measured, on which image, and how fast it has to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.craft import GIB, KIB, MIB, TIB, BitmapSpec, bitmap_image
from benchmarks.patterns import Scattered

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IMAGE = "IMAGE"  # stands for the path of a side's own copy

DATABASE = Scattered(0.001)  # nearly every cluster of such a bitmap holds some bits: nothing can be left out


@dataclass(frozen=True)
class Case:
    """One row. Commands are words after the program's name; several are taken in turn, one for each run."""

    name: str
    title: str
    target: float  # our wall time in terms of qemu-img's
    craft: Callable[[Path], None]
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    fresh_copy: bool = False  # the command changes the image so that it cannot run on it again
    runs: int = 5
    peak_rss_limit: int | None = None  # bytes


def tiny(path: Path) -> None:
    """What most images are to a bitmap command: start-up is all that counts."""
    bitmap_image(path, 1 * GIB, [BitmapSpec("b0", 64 * KIB, DATABASE)])


def large(bitmaps: int) -> Callable[[Path], None]:
    """64 TiB with so many bitmaps of 128 MiB each, called b0, b1 ..."""

    def craft(path: Path) -> None:
        bitmap_image(path, 64 * TIB, [BitmapSpec(f"b{number}", 64 * KIB, DATABASE) for number in range(bitmaps)])

    return craft


CASES = (
    Case(
        name="tiny-list",
        title="start-up: `list`, tiny image (beside `qemu-img info`)",
        target=15,
        craft=tiny,
        ours=("list IMAGE",),
        theirs=("info IMAGE",),
        runs=20,
    ),
    Case(
        name="tiny-drop-in",
        title="start-up: drop-in `qemu-img bitmap --enable`, `--disable`, tiny image",
        target=12,
        craft=tiny,
        ours=("qemu-img bitmap --enable IMAGE b0", "qemu-img bitmap --disable IMAGE b0"),
        theirs=("bitmap --enable IMAGE b0", "bitmap --disable IMAGE b0"),
        runs=20,
    ),
    Case(
        name="list",
        title="`list`, one bitmap of 128 MiB, 64 TiB disk (beside `qemu-img info`)",
        target=0.08,
        craft=large(1),
        ours=("list IMAGE",),
        theirs=("info IMAGE",),
    ),
    Case(
        name="remove",
        title="`remove` one of five bitmaps of 128 MiB, 64 TiB disk",
        target=0.05,
        craft=large(5),
        ours=("remove IMAGE b2",),
        theirs=("bitmap --remove IMAGE b2",),
        fresh_copy=True,
    ),
    Case(
        name="enable",
        title="`enable`, `disable` one of five bitmaps of 128 MiB, 64 TiB disk",
        target=0.05,
        craft=large(5),
        ours=("enable IMAGE b2", "disable IMAGE b2"),
        theirs=("bitmap --enable IMAGE b2", "bitmap --disable IMAGE b2"),
    ),
    Case(
        name="merge",
        title="`merge` two bitmaps of 128 MiB, 64 TiB disk, synced",
        target=0.08,
        craft=large(2),
        ours=("merge IMAGE b0 b1",),
        theirs=("bitmap --merge b1 IMAGE b0",),
        fresh_copy=True,
        peak_rss_limit=64 * MIB,
    ),
)
