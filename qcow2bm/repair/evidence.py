"""What the mapping tables of an image prove about changes, without reading guest data.

Two kinds of evidence. What a layer holds itself: wherever it says nothing, a guest reads what it would have read when
the layer was made. And what an internal snapshot still has: a cluster that both use is copied before it is written to,
so where both name one host cluster nothing was written since. In doubt a cluster counts as changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..bitmap.bits import BitVector
from ..chain.marks import Marks
from ..chain.tables import SLICE, UNALLOCATED, ZEROES, Mask, Tables, units
from ..errors import UnsupportedImageError, UsageError
from ..format.entries import COMPRESSED, COPIED, OFFSET_MASK
from ..format.geometry import Geometry
from ..format.snapshot_table import SnapshotEntry
from ..format.text import decode_name
from ..format.vectors import Words
from ..image.image import Qcow2Image


def allocated(image: Qcow2Image, granularity: int) -> BitVector:
    """Every granule about which the active disk says anything itself: data, compressed or zero.

    What is not marked is read from the backing file, or as zeroes if there is none.

    Raises:
        CorruptImageError: a mapping table cannot be read, so nobody knows.
        BitmapLimitError: as `Marks`.
    """
    geometry = image.geometry
    marks = Marks(geometry.virtual_size, granularity, geometry.cluster_size)
    tables = Tables.active(image)
    for index, offset in zip(tables.indices.tolist(), tables.offsets.tolist(), strict=True):
        for first, count in _slices(geometry):
            words = tables.words(offset, first, count)
            if words is not None:
                kinds = units(words, geometry, data_file=image.header.has_data_file).kinds
                start = index * geometry.l2_span + first * geometry.cluster_size
                marks.mark_units(start, geometry.subcluster_size, kinds != UNALLOCATED)
    return marks.vector()


def find_snapshot(image: Qcow2Image, wanted: str) -> SnapshotEntry:
    """The internal snapshot of that id, or else of that name, as QEMU looks it up.

    Raises:
        UsageError: there is none, or more than one.
        CorruptImageError: the snapshot table cannot be read.
    """
    snapshots = image.snapshots().entries
    found = [entry for entry in snapshots if decode_name(entry.id) == wanted]
    found = found or [entry for entry in snapshots if decode_name(entry.name) == wanted]
    if not found:
        raise UsageError(f"no internal snapshot has the id or name '{wanted}'", hint="`qcow2bm info` shows them")
    if len(found) > 1:
        raise UsageError(f"{len(found)} internal snapshots have the id or name '{wanted}'", hint="give an id")
    return found[0]


def unlike_snapshot(image: Qcow2Image, snapshot: SnapshotEntry, granularity: int, *, is_start: bool) -> BitVector:
    """Every granule that may differ from what it was when a bitmap began, by an internal snapshot.

    What lies past the end of the snapshot's disk counts as changed.

    Args:
        is_start: the snapshot is of the very moment the bitmap began. Then what reads as zeroes, or from the backing
            file, in both is unchanged. After an older snapshot it may have been written before the bitmap began, and
            discarded since: such clusters count as changed then, and only those with a host cluster do not.

    Raises:
        UnsupportedImageError: guest data lies in an external data file, whose clusters nothing counts.
        CorruptImageError: a table cannot be read.
        BitmapLimitError: as `Marks`.
    """
    if image.header.has_data_file:
        raise UnsupportedImageError("guest data lies in an external data file, which snapshots do not protect")
    comparison = _Comparison(image, snapshot, granularity, is_start=is_start)
    comparison.run()
    return comparison.marks.vector()


class _Comparison:
    """The active L1 table beside a snapshot's."""

    def __init__(self, image: Qcow2Image, snapshot: SnapshotEntry, granularity: int, *, is_start: bool) -> None:
        self._image = image
        self._is_start = is_start
        self._active, self._older = Tables.active(image), Tables.of_snapshot(image, snapshot)
        size = image.geometry.virtual_size
        self._end = size if snapshot.virtual_size is None else min(size, snapshot.virtual_size)
        self.marks = Marks(size, granularity, image.geometry.cluster_size)

    def run(self) -> None:
        geometry = self._image.geometry
        self.marks.mark_bytes(self._end, geometry.virtual_size)
        span = geometry.l2_span
        both = np.union1d(self._active.indices, self._older.indices).tolist()
        inside = [index for index in both if index * span < geometry.virtual_size]
        if not self._is_start:  # neither disk says anything there
            for before, index in pairwise([-1, *inside, geometry.l1_entries]):
                self.marks.mark_bytes((before + 1) * span, index * span)
        for index in inside:
            self._compare_tables(index)

    def _compare_tables(self, index: int) -> None:
        """Mark what may have changed in the range of an L1 entry."""
        geometry = self._image.geometry
        mine, is_copied = self._active.find(index)
        theirs, _ = self._older.find(index)
        start = index * geometry.l2_span
        if mine == theirs and is_copied:
            # A table that two disks use cannot have one owner: it may have been written to for both of them.
            self.marks.mark_bytes(start, start + geometry.l2_span)
            return
        for first, count in _slices(geometry):
            left = self._words(mine, first, count)
            right = left if mine == theirs else self._words(theirs, first, count)
            place = start + first * geometry.cluster_size
            self.marks.mark_units(place, geometry.cluster_size, self._differ(left, right))

    def _words(self, offset: int, first: int, count: int) -> Words:
        words = self._active.words(offset, first, count) if offset else None
        return np.zeros(count * self._image.geometry.l2_entry_words, np.uint64) if words is None else words

    def _differ(self, left: Words, right: Words) -> Mask:
        """Entry by entry. The copied flag of a snapshot's entries is not kept up to date, so it is left out."""
        geometry = self._image.geometry
        stride = geometry.l2_entry_words
        mine, theirs = left[::stride], right[::stride]
        flag = np.uint64(COPIED)
        changed: Mask = mine & ~flag != theirs & ~flag
        if geometry.extended_l2:
            changed |= left[1::2] != right[1::2]
        hosted = mine & np.uint64(OFFSET_MASK | COMPRESSED) != 0
        # One host cluster in both, but the flag says one owner: it may have been written to in place.
        changed |= hosted & (mine & flag != 0)
        if self._is_start:
            changed &= ~self._both_zero(left, right)
        else:
            changed |= ~hosted
        return changed

    def _both_zero(self, left: Words, right: Words) -> Mask:
        """Clusters that read as zeroes on both disks, however either says so."""
        geometry = self._image.geometry
        entries = left.size // geometry.l2_entry_words
        found: Mask = np.ones(entries, np.bool_)
        empty = (ZEROES,) if self._image.header.backing_file_offset else (ZEROES, UNALLOCATED)
        for words in (left, right):
            kinds = units(words, geometry, data_file=False).kinds.reshape(entries, -1)
            found &= np.isin(kinds, empty).all(axis=1)
        return found


def _slices(geometry: Geometry) -> Iterator[tuple[int, int]]:
    """An L2 table in slices: first entry and how many."""
    for first in range(0, geometry.l2_entries, SLICE):
        yield first, min(SLICE, geometry.l2_entries - first)
