"""`qcow2bm estimate`: what would the next incremental backup copy, and which granularity would pay?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .. import api
from ..bitmap.store import State
from ..errors import naming
from .failures import BROKEN_BITMAP
from .options import BitmapsArgument, ForceShareOption, ImageArgument, OutputOption, ProgressOption
from .output import Cell, Column, JsonObject, Output, print_json, print_pairs, print_table, warn
from .progress import ProgressBar
from .reading import complaints, reading
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

_STATES = {State.ACTIVE: "in use by a running VM, which has its bits in memory"}
"""States of which the name says too little."""


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
    written.

    Without names all bitmaps that are ready. Which are left out is said; as with `list`, exit status 4 means that one
    of them is broken.
    """
    from ..chain.estimate import estimates

    with reading(image, force_share=force_share) as opened:
        with naming(image), ProgressBar(wanted=progress) as bar:
            found = estimates(opened.qcow2, *(bitmaps or []), progress=bar)
        left_out = [] if bitmaps else [bitmap for bitmap in opened.bitmaps if bitmap.state is not State.READY]
        broken = [] if bitmaps else complaints(opened.bitmaps)
    if output is Output.JSON:
        others = [{"bitmap": bitmap.name, "state": bitmap.state.value} for bitmap in left_out]
        print_json({"image": str(image), "estimates": [_document(one) for one in found], "left-out": others})
    else:
        _print_all(found)
    if left_out:
        warn(_why_left_out(left_out), image)
    for text in broken:
        warn(text, image)
    return BROKEN_BITMAP if broken else 0


def _why_left_out(bitmaps: Sequence[api.Bitmap]) -> str:
    """Which bitmaps have no bits to be relied on: how many, and why."""
    listed = ", ".join(f"'{bitmap.name}' is {_STATES.get(bitmap.state, bitmap.state.value)}" for bitmap in bitmaps)
    return f"{len(bitmaps)} left out: {listed}"


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


def _print_all(found: Sequence[Estimate]) -> None:
    if not found:
        print("no bitmap is ready")
    for place, one in enumerate(found):
        if place:
            print()
        _print(one)


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
    elif not own:
        yield "Nothing that is dirty is data: the next incremental copies next to nothing, at this granularity."
    elif found.coarser is not None:
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
    else:
        yield _why_it_fits(found)
    if own and min(found.granularity, found.finer or found.granularity) < _QEMU_UNIT:
        whole = ""
        if found.granularity < _QEMU_UNIT:
            whole = f", so by this bitmap it would copy {human_size(_copied(found, found.at(_QEMU_UNIT)))}"
        yield (
            f"QEMU's own backup job copies {human_size(_QEMU_UNIT)} at once, or more{whole}; a finer bitmap helps "
            "those that read by it, as over NBD."
        )


def _why_it_fits(found: Estimate) -> str:
    """Why neither a coarser granularity pays nor a finer one is worth a measurement."""
    own = _copied(found, found.current)
    wider = next((row for row in found.rows if row.granularity > found.granularity), None)
    if wider is None:
        coarser = "there is no coarser one worth thinking about"
    elif any(_copied(found, row) > own for row in found.rows if row.granularity > found.granularity):
        coarser = "a coarser one would copy more"
    else:
        coarser = "a coarser one would make the bitmap no smaller"
    if not found.is_scattered:
        return f"The granularity fits: {coarser}, and the dirty ranges are long."
    if found.rows[0].granularity < found.granularity:
        return f"The granularity fits: {coarser}, and a finer one could save no more than its bitmap grows."
    return f"The granularity fits: {coarser}, and it is as fine as is worth thinking about."
