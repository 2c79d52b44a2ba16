"""The rows of the table: what is measured, on which image, and how fast it has to be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from benchmarks.craft import GIB, KIB, MIB, TIB, BitmapSpec, bitmap_image, full_image
from benchmarks.data import data_image
from benchmarks.patterns import Scattered

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IMAGE = "IMAGE"  # stands for the path of a side's own copy
OLDER = "OLDER"  # stands for the path of a second image that a `craft` leaves beside the first, for both sides

DATABASE = Scattered(0.001)  # nearly every cluster of such a bitmap holds some bits: nothing can be left out

BUSY = Scattered(0.1)  # a database after a busy day: what QEMU does run by run takes it longest


@dataclass(frozen=True)
class Case:
    """One row. Commands are words after the program's name; several are taken in turn, one for each run.

    The other program is qemu-img, and something else only where qemu-img cannot do the work.

    Neighbours with the same `craft` share one image.
    """

    name: str
    title: str
    target: float  # our wall time in terms of qemu-img's
    craft: Callable[[Path], None]
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    their_program: tuple[str, ...] = ("qemu-img",)
    fresh_copy: bool = False  # the command changes the image so that it cannot run on it again
    runs: int = 5
    peak_rss_limit: int | None = None  # bytes


def tiny(path: Path) -> None:
    """What most images are to a bitmap command: start-up is all that counts."""
    bitmap_image(path, 1 * GIB, [BitmapSpec("b0", 64 * KIB, DATABASE)])


@cache  # the same function for the same number: rows can share its image
def large(bitmaps: int) -> Callable[[Path], None]:
    """64 TiB with so many bitmaps of 128 MiB each, called b0, b1 ..."""

    def craft(path: Path) -> None:
        bitmap_image(path, 64 * TIB, [BitmapSpec(f"b{number}", 64 * KIB, DATABASE) for number in range(bitmaps)])

    return craft


def mixed(path: Path) -> None:
    """64 TiB with bitmaps of two granularities, called coarse (8 MiB of bits) and fine (128 MiB)."""
    bitmaps = [BitmapSpec("coarse", MIB, BUSY), BitmapSpec("fine", 64 * KIB, BUSY)]
    bitmap_image(path, 64 * TIB, bitmaps)


def largest(path: Path) -> None:
    """Two bitmaps of 512 MiB, above which QEMU takes none, called b0 and b1."""
    bitmap_image(path, 256 * TIB, [BitmapSpec(f"b{number}", 64 * KIB, DATABASE) for number in range(2)])


def busy(path: Path) -> None:
    """A bitmap of 64 GiB with 94,000 dirty ranges."""
    bitmap_image(path, 64 * GIB, [BitmapSpec("b0", 64 * KIB, BUSY)])


def tiny_full(path: Path) -> None:
    """A check's tiny image: two L2 tables, so that it has something to look at."""
    full_image(path, 1 * GIB)


def random_clusters(path: Path) -> None:
    """Neighbours on the disk lie far apart in the file: each L2 entry leads to another refcount block."""
    full_image(path, 64 * GIB, layout="shuffled")


# The others map 16.8 million clusters each. A check reads no data, so there is none in the files.


def full(path: Path) -> None:
    """One L1 table over 2048 L2 tables."""
    full_image(path, 1 * TIB)


def extended_l2(path: Path) -> None:
    """The same clusters in twice the L2 tables."""
    full_image(path, 1 * TIB, extended_l2=True)


def snapshots(path: Path) -> None:
    """Eleven L1 tables over the same L2 tables."""
    full_image(path, 1 * TIB, snapshots=10)


def small_clusters(path: Path) -> None:
    """32768 L2 tables, each among its data."""
    full_image(path, 64 * GIB, cluster_size=4 * KIB)


def compressed(path: Path) -> None:
    """Three or four streams in each cluster of the file."""
    full_image(path, 1 * TIB, layout="compressed")


def older(path: Path) -> Path:
    """Where a `craft` leaves a second image."""
    return path.with_name("older.qcow2")


def equal_data(path: Path) -> None:
    """Two images of 1 GiB of the same random data: all of both has to be read to know."""
    data_image(path, 1 * GIB)
    data_image(older(path), 1 * GIB)


def equal_streams(path: Path) -> None:
    """Two images of the same 256 MiB, compressed by zlib to a quarter."""
    data_image(path, 256 * MIB, compressed=True)
    data_image(older(path), 256 * MIB, compressed=True)


def check(
    name: str,
    what: str,
    target: float,
    craft: Callable[[Path], None],
    *,
    native: bool = False,
    runs: int = 3,
    peak_rss_limit: int | None = None,
) -> Case:
    """A row about the check of a sound image, by the drop-in unless `native`."""
    return Case(
        name=name,
        title=f"{'`check`' if native else 'drop-in `qemu-img check`'}, {what}",
        target=target,
        craft=craft,
        ours=("check IMAGE" if native else "qemu-img check IMAGE",),
        theirs=("check IMAGE",),
        runs=runs,
        peak_rss_limit=peak_rss_limit,
    )


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
        name="extents",
        title="`show --extents`, 94,000 dirty ranges (beside `nbdinfo --map` of `qemu-nbd -B`)",
        target=8,
        craft=busy,
        ours=("show --extents IMAGE b0",),
        theirs=("--map=qemu:dirty-bitmap:b0 -- [ qemu-nbd -r -f qcow2 -B b0 IMAGE ]",),
        their_program=("nbdinfo",),
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
    Case(
        name="merge-to-coarser",
        title="`merge`, granularity 64 KiB into 1 MiB, 64 TiB disk, synced",
        target=0.06,
        craft=mixed,
        ours=("merge IMAGE coarse fine",),
        theirs=("bitmap --merge fine IMAGE coarse",),
        fresh_copy=True,
        peak_rss_limit=64 * MIB,
    ),
    Case(
        name="merge-to-finer",
        title="`merge`, granularity 1 MiB into 64 KiB, 64 TiB disk, synced",
        target=0.30,
        craft=mixed,
        ours=("merge IMAGE fine coarse",),
        theirs=("bitmap --merge coarse IMAGE fine",),
        fresh_copy=True,
        peak_rss_limit=64 * MIB,
    ),
    Case(
        name="resample",
        title="`resample`, 64 KiB to 1 MiB, 64 TiB disk, synced (beside `qemu-img bitmap --add -g 1M --merge`)",
        target=0.06,
        craft=mixed,
        ours=("resample IMAGE fine -g 1M",),
        theirs=("bitmap --add -g 1M --merge fine IMAGE new",),
        fresh_copy=True,
        peak_rss_limit=64 * MIB,
    ),
    Case(
        name="merge-largest",
        title="`merge` two bitmaps of 512 MiB, 256 TiB disk, synced",
        target=0.20,
        craft=largest,
        ours=("merge IMAGE b0 b1",),
        theirs=("bitmap --merge b1 IMAGE b0",),
        fresh_copy=True,
        runs=3,
        peak_rss_limit=64 * MIB,
    ),
    Case(
        name="diff",
        title="`diff` of 1 GiB of equal data, with the whole bitmap (beside `qemu-img compare`)",
        target=1.0,
        craft=equal_data,
        ours=("diff OLDER IMAGE",),
        theirs=("compare OLDER IMAGE",),
        peak_rss_limit=96 * MIB,
    ),
    Case(
        name="diff-compressed",
        title="`diff` of 256 MiB of equal data, compressed (beside `qemu-img compare`)",
        target=1.0,
        craft=equal_streams,
        ours=("diff OLDER IMAGE",),
        theirs=("compare OLDER IMAGE",),
        peak_rss_limit=96 * MIB,
    ),
    check("check-tiny", "tiny image (start-up)", 12, tiny_full, runs=20),
    check("check-tiny-native", "tiny image (start-up)", 15, tiny_full, native=True, runs=20),
    check("check-full", "1 TiB, full", 0.25, full, peak_rss_limit=120 * MIB),
    check("check-full-native", "1 TiB, full", 0.25, full, native=True, peak_rss_limit=120 * MIB),
    check("check-extended-l2", "1 TiB, full, extended L2 entries", 0.25, extended_l2),
    check("check-snapshots", "1 TiB, full, 10 internal snapshots", 0.12, snapshots),
    check("check-small-clusters", "64 GiB, full, clusters of 4 KiB", 0.20, small_clusters),
    check("check-compressed", "1 TiB, full, compressed", 0.60, compressed),
    check("check-random", "64 GiB, full, clusters placed at random", 0.02, random_clusters),
)
