"""The wrong entries of a table all at once: what is done where a check has folded them into one finding.

Such a table holds thousands of them, and an edit of its own for each would take as long as the damage is large. A
table is written in pieces of a cluster at most, and what something else uses too is left alone, as with single entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..checks.model import Finding
from ..format.entries import table_entries
from ..format.geometry import runs
from .folded import l1_masked, l2_masked, l2_table
from .model import GuestRange
from .workshop import Workshop

Mend = Callable[[Any, Any], tuple[Any, Any]]
"""What becomes of an entry and its subcluster bitmap: of one as integers, or of many as arrays."""
_MOST_RANGES = 64
"""Guest ranges of one table that are told apart; of more the whole is told that they lie in."""


def guest_ranges(shop: Workshop, finding: Finding) -> Iterator[GuestRange]:
    """What a folded finding about the active disk concerns."""
    where, geometry = finding.location, shop.seen.geometry
    if where.snapshot is not None:
        return
    if where.structure == "L2 table":
        mask, each = l2_masked(shop.seen, finding)[2], geometry.cluster_size
        start = (where.guest_offset or 0) - (where.index or 0) * each
    else:
        mask, each, start = l1_masked(shop.seen, finding)[2], geometry.l2_span, 0
    places = mask.nonzero()[0]
    if not places.size:
        return
    if int((places[1:] - places[:-1] != 1).sum()) < _MOST_RANGES:
        for first, count in runs(places.tolist()):
            yield start + first * each, count * each
    else:
        yield start + int(places[0]) * each, int(places[-1] - places[0] + 1) * each


def mend_l2(shop: Workshop, finding: Finding, mend: Mend) -> None:
    """Change the entries of an L2 table that have the problem."""
    import numpy as np

    values, bitmaps, mask = l2_masked(shop.seen, finding)
    values[mask], bitmaps[mask] = mend(values[mask], bitmaps[mask])
    every = np.stack([values, bitmaps][: shop.seen.geometry.l2_entry_words], axis=1)
    _write(shop, l2_table(shop.seen, finding), every.astype(">u8").tobytes(), f"L2 table: {int(mask.sum())} entries")


def mend_l1(shop: Workshop, finding: Finding, mend: Callable[[Any], Any]) -> None:
    """Change the entries of an L1 table that have the problem."""
    start, entries, mask = l1_masked(shop.seen, finding)
    entries[mask] = mend(entries[mask])
    _write(shop, start, entries.astype(">u8").tobytes(), f"L1 table: {int(mask.sum())} entries")


def mend_flags(shop: Workshop, finding: Finding) -> None:
    """Turn the copied flags of a table round that contradict the refcounts."""
    from ..checks.wrong import words

    view, where = shop.seen, finding.location
    if where.structure == "L2 table":
        start, size = l2_table(shop.seen, finding), view.geometry.l2_entry_size
        data = bytearray(shop.file.read_padded(start, view.geometry.cluster_size))
        places = view.census.miscopied(table_entries(bytes(data))[:: view.geometry.l2_entry_words])
    else:
        start, size = view.roots[0].offset, 8
        table = view.read_l1(view.roots[0])
        data = bytearray(shop.file.read_padded(start, 8 * len(table)))
        places = iter(view.bulk.flags.wrong_in_l1(words(table)).tolist())
    for place in places:  # the flag is the highest bit of an entry
        data[place * size] ^= 0x80
    _write(shop, start, bytes(data), f"{where.structure}: copied flags")


def _write(shop: Workshop, start: int, data: bytes, purpose: str) -> None:
    """Write a table, without the parts of it that something else uses too."""
    there = max(0, shop.file.size - start)  # the last cluster of a file may be cut short, and then it stays so
    if not any(data[there:]):
        data = data[:there]
    size, at = shop.seen.geometry.cluster_size, 0
    while at < len(data):
        end = min(len(data), at + size - (start + at) % size)
        if shop.owns(start + at):
            shop.write(start + at, data[at:end], purpose)
        at = end
