"""Which entries of whole tables are wrong, and how: what `entries.py` says of one entry, with numpy.

Each function gives a mask for every problem that some entry may have.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

from ..format.entries import (
    ALL_ONES,
    BITMAP_RESERVED,
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFCOUNT_BLOCK_MASK,
    REFCOUNT_BLOCK_RESERVED,
    ZERO,
)
from ..format.geometry import ALL_SUBCLUSTERS, SUBCLUSTERS, Geometry
from ..format.vectors import Words, compressed_clusters

_FEW = 1 << 10
"""Entries that are looked up one by one."""

Mask = npt.NDArray[np.bool_]


def words(table: array[int]) -> Words:
    """A table of native integers as numpy has it; nothing is copied."""
    return np.frombuffer(table, np.uint64) if len(table) else np.empty(0, np.uint64)


def split_words(data: bytes | memoryview, geometry: Geometry) -> tuple[Words, Words | None]:
    """The entries of L2 tables, and their subcluster bitmaps if they have some."""
    every = np.frombuffer(data, ">u8").astype(np.uint64)
    if geometry.extended_l2:
        return every[::2].copy(), every[1::2].copy()
    return every, None


def l2_words(data: bytes | memoryview, geometry: Geometry) -> tuple[Words, Words]:
    """The same, with bitmaps of 0 if they have none."""
    values, bitmaps = split_words(data, geometry)
    return values, np.zeros_like(values) if bitmaps is None else bitmaps


def l1_faults(entries: Words, geometry: Geometry, file_size: int) -> dict[str, Mask]:
    """What is wrong with entries of an L1 table."""
    offsets = entries & np.uint64(OFFSET_MASK)
    names: Mask = offsets != 0
    return {
        "l1-entry-no-table": (entries != 0) & ~names,
        "l1-entry-reserved": names & _has(entries, L1_RESERVED),
        "l2-outside": names & (offsets >= np.uint64(file_size)),
        "l2-unaligned": _has(offsets, geometry.cluster_size - 1),
    }


def block_faults(entries: Words, geometry: Geometry, file_size: int) -> dict[str, Mask]:
    """What is wrong with entries of a refcount table, each by itself: one problem of each, the first."""
    offsets = entries & np.uint64(REFCOUNT_BLOCK_MASK)
    reserved = _has(entries, REFCOUNT_BLOCK_RESERVED)
    unaligned = _has(offsets, geometry.cluster_size - 1) & ~reserved
    return {
        "refcount-block-reserved": reserved,
        "refcount-block-unaligned": unaligned,
        "refcount-block-outside": (offsets >= np.uint64(file_size)) & ~reserved & ~unaligned,
    }


def bitmap_faults(entries: Words, geometry: Geometry, file_size: int) -> dict[str, Mask]:
    """What is wrong with entries of a bitmap table: one problem of each, the first."""
    offsets = entries & np.uint64(OFFSET_MASK)
    reserved = _has(entries, BITMAP_RESERVED)
    both = (offsets != 0) & _has(entries, ALL_ONES) & ~reserved
    unaligned = _has(offsets, geometry.cluster_size - 1) & ~reserved & ~both
    return {
        "bitmap-entry-reserved": reserved,
        "bitmap-entry-all-ones": both,
        "bitmap-entry-unaligned": unaligned,
        "bitmap-data-outside": (offsets >= np.uint64(file_size)) & ~reserved & ~both & ~unaligned,
    }


def out_of_place(values: Words, geometry: Geometry, start: int) -> Mask:
    """Entries of an L2 table with a cluster of a raw data file that is not where the guest has it, from `start` on."""
    expected = np.uint64(start) + np.arange(values.size, dtype=np.uint64) * np.uint64(geometry.cluster_size)
    offsets = values & np.uint64(OFFSET_MASK)
    found: Mask = is_standard(values, offsets, geometry, data_file=True) & (offsets != expected)
    return found


def l2_faults(
    values: Words, bitmaps: Words, geometry: Geometry, file_size: int, *, version: int, data_file: bool
) -> dict[str, Mask]:
    """What is wrong with entries of L2 tables."""
    compressed = _has(values, COMPRESSED)
    plain = ~compressed
    offsets = values & np.uint64(OFFSET_MASK)
    zero, allocated = _has(values, ZERO), bitmaps & np.uint64(ALL_SUBCLUSTERS)
    standard = is_standard(values, offsets, geometry, data_file=data_file)
    unaligned = standard & _has(offsets, geometry.cluster_size - 1)
    holds_data = allocated != 0 if geometry.extended_l2 else ~zero
    found = {
        "compressed-copied": compressed & _has(values, COPIED),
        "l2-entry-reserved": plain & _has(values, L2_RESERVED),
        "data-unaligned": unaligned & holds_data,
        "zero-unaligned": unaligned & ~holds_data,
    }
    if version == 2 or geometry.extended_l2:
        found["zero-flag-reserved"] = plain & zero
    if geometry.extended_l2:
        found["subclusters-unallocated"] = plain & ~standard & (allocated != 0)
        found["subclusters-contradict"] = standard & (allocated & bitmaps >> np.uint64(SUBCLUSTERS) != 0)
    if data_file:
        return found | {"compressed-data-file": compressed}
    found["compressed-subclusters"] = compressed & (bitmaps != 0)
    found["data-outside"] = standard & (offsets >= np.uint64(file_size))
    found["compressed-outside"] = outside = compressed & (bitmaps == 0)
    if outside.any():
        outside &= compressed_clusters(values, geometry)[2] >= geometry.streams_outside_from(file_size)
    return found


def is_standard(values: Words, offsets: Words, geometry: Geometry, *, data_file: bool) -> Mask:
    """Entries with a cluster of their own, as `L2Entry.is_standard` says it; `offsets` are their host offsets."""
    named: Mask = offsets != 0
    if data_file:
        own = _has(values, COPIED)
        named |= own if geometry.extended_l2 else own & ~_has(values, ZERO)
    return named & ~_has(values, COMPRESSED)


def first_of_each(entries: Words, wanted: Collection[int]) -> list[int]:
    """The index of the first entry that names each of the wanted tables, in order."""
    named = entries & np.uint64(OFFSET_MASK)
    if not wanted:
        return []
    if entries.size < _FEW:
        firsts: dict[int, int] = {}
        for index, offset in enumerate(named.tolist()):
            if offset and offset in wanted:
                firsts.setdefault(offset, index)
        return list(firsts.values())
    tables = np.sort(np.fromiter(wanted, np.uint64, len(wanted)))
    of_each = np.minimum(np.searchsorted(tables, named), tables.size - 1)
    places = np.flatnonzero((tables[of_each] == named) & (named != 0))
    first = np.full(tables.size, -1)
    first[of_each[places][::-1]] = places[::-1]  # of several the last stays
    found: list[int] = np.sort(first[first >= 0]).tolist()
    return found


def first_inside(table: array[int], size: int) -> Iterator[tuple[int, int]]:
    """The refcount blocks that begin in a file of this size, in order: offset, and the first entry that names it."""
    offsets, first = np.unique(words(table) & np.uint64(REFCOUNT_BLOCK_MASK), return_index=True)
    inside = (offsets != 0) & (offsets < np.uint64(size))
    yield from zip(offsets[inside].tolist(), first[inside].tolist(), strict=True)


def distinct(table: array[int], mask: int) -> Words:
    """The offsets that the entries of a table name, each once and in order; `mask` has the bits of an offset."""
    offsets = words(table) & np.uint64(mask)
    offsets.sort()
    named: Words = offsets[np.diff(offsets, prepend=np.uint64(0)) != 0]
    return named


def _has(entries: Words, bits: int) -> Mask:
    """Entries with any of these bits."""
    found: Mask = entries & np.uint64(bits) != 0
    return found
