"""`qcow2bm estimate`: what would the next incremental backup copy, and which granularity would pay?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .options import BitmapsArgument, ForceShareOption, ImageArgument, OutputOption, ProgressOption
from .output import Cell, Column, JsonObject, Output, print_json, print_pairs, print_table, warn
from .progress import ProgressBar
from .sizes import exact_size, human_size, percent

if TYPE_CHECKING:
    from ..chain.estimate import AtGranularity, Estimate  # loads numpy

_COLUMNS = (
    Column("GRANULARITY", right=True),
    Column("DIRTY", right=True),
    Column("DATA", right=True),
    Column("ZERO", right=True),
    Column("UNALLOCATED", right=True),
    Column("BITMAP", right=True),
    Column(""),
)
_QEMU_UNIT = 64 << 10
"""QEMU's own backup job copies no less at once."""


def estimate(
    image: ImageArgument,
    bitmaps: BitmapsArgument = None,
    *,
    force_share: ForceShareOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Tell what the next incremental backup by each bitmap would copy, at its granularity and at others.

    Only the mapping is read, no guest data and no other file, so it works on encrypted images too. Dirty data is what
    costs something; dirty zeroes do not, and what the image holds nothing of is the backing file's. A coarser
    granularity is told exactly; of a finer one only bounds are known, for nobody knows which part of a granule was
    written. Without names all bitmaps that are ready.
    """
    from ..chain.estimate import estimate as estimated

    if force_share:
        warn("read without keeping writers out: what is shown may be stale", image)
    with ProgressBar(wanted=progress) as bar:
        found = estimated(image, *(bitmaps or []), force_share=force_share, progress=bar)
    if output is Output.JSON:
        print_json({"image": str(image), "estimates": [_document(one) for one in found]})
        return 0
    if not found:
        print("no bitmap is ready")
    for place, one in enumerate(found):
        if place:
            print()
        _print(one)
    return 0


# JSON


def _document(found: Estimate) -> JsonObject:
    return {
        "bitmap": found.bitmap,
        "virtual-size": found.virtual_size,
        "granularity": found.granularity,
        "backing": found.has_backing,
        "copied-bytes": _copied(found, found.current),
        "dirty-extents": found.runs,
        "granularities": [_row_json(row) for row in found.rows],
        "coarser": found.coarser,
        "finer": found.finer,
    }


def _row_json(row: AtGranularity) -> JsonObject:
    return {
        "granularity": row.granularity,
        "exact": row.is_exact,
        "dirty-bytes": row.dirty,
        "data-bytes": row.data,
        "zero-bytes": row.zero,
        "unallocated-bytes": row.unallocated,
        "least-dirty-bytes": row.least_dirty,
        "least-data-bytes": row.least_data,
        "bitmap-bytes": row.bitmap_bytes,
    }


def _copied(found: Estimate, row: AtGranularity) -> int:
    from ..chain.estimate import copied

    return copied(row, has_backing=found.has_backing)


# For reading


def _print(found: Estimate) -> None:
    own = _copied(found, found.current)
    print_pairs(
        [
            ("bitmap", Cell(found.bitmap, "bold")),
            ("granularity", exact_size(found.granularity)),
            ("next incremental", f"{exact_size(own)}, {percent(own, found.virtual_size)} of the disk"),
            ("dirty ranges", str(found.runs)),
        ]
    )
    print()
    print_table(_COLUMNS, [_row(found, row) for row in found.rows])
    print()
    for line in _advice(found):
        print(line)


def _row(found: Estimate, row: AtGranularity) -> Sequence[str]:
    exact = row.granularity >= found.granularity
    dirty = human_size(row.dirty) if exact else _between(row.least_dirty, row.dirty)
    data = human_size(row.data) if exact else _between(row.least_data, row.data)
    rest = [human_size(size) if exact else _between(0, size) for size in (row.zero, row.unallocated)]
    mark = "as it is" if row.granularity == found.granularity else ""
    return [human_size(row.granularity), dirty, data, *rest, human_size(row.bitmap_bytes), mark]


def _between(least: int, most: int) -> str:
    return human_size(most) if least == most else f"{human_size(least)} to {human_size(most)}"


def _advice(found: Estimate) -> Iterator[str]:
    """Which granularity would pay, as far as anybody can tell."""
    own, bits = _copied(found, found.current), found.current.bitmap_bytes
    if not found.runs:
        yield "Nothing is dirty: which granularity would pay cannot be told."
        return
    if found.coarser is not None:
        row = found.at(found.coarser)
        more = _copied(found, row) - own
        what = f"{human_size(more)} more, {percent(more, own)}" if more else "no more"
        yield (
            f"Coarser pays: {human_size(row.granularity)} would copy {what}, with a bitmap of "
            f"{human_size(row.bitmap_bytes)} instead of {human_size(bits)}."
        )
    elif found.finer is not None:
        row = found.at(found.finer)
        yield (
            f"Finer may pay: the dirty ranges are short. {human_size(row.granularity)} would copy {human_size(own)} at "
            f"most, {human_size(row.least_data)} of data at least, with a bitmap of {human_size(row.bitmap_bytes)} "
            f"instead of {human_size(bits)}."
        )
        yield "This bitmap cannot tell how much: let a second one record beside it, and estimate again."
        if row.granularity < _QEMU_UNIT:
            yield (
                f"QEMU's own backup job copies {human_size(_QEMU_UNIT)} at least; a finer bitmap helps those that read"
                " by it, as over NBD."
            )
    else:
        yield "The granularity fits: a coarser one would copy more, and the dirty ranges are long."
