"""The copied flags of whole tables against the refcounts on disk, with numpy."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..format.entries import COPIED, OFFSET_MASK, REFCOUNT_BLOCK_MASK
from ..format.geometry import Geometry
from ..format.limits import MAX_FILE_SIZE
from ..format.vectors import Clusters, Words, clusters_at
from .stored import StoredRefcounts, block_rows
from .wrong import Mask, words

_PIECE = 1 << 12
_AT_ONCE = 1 << 18
"""L1 entries that are compared at once: those in the largest cluster, or in several."""


class CopiedFlags:
    """What the refcounts on disk say of copied flags.

    Args:
        near: clusters of which it is kept whether their refcount is one; those behind are looked up each time.
    """

    def __init__(self, geometry: Geometry, stored: StoredRefcounts, near: int) -> None:
        self._geometry = geometry
        self._stored = stored
        self._near = near

    @cached_property
    def ones(self) -> Mask:
        """Which of the near clusters have a refcount of one, or one that cannot be read."""
        ones: Mask = np.zeros(self._near, np.bool_)
        per_block = self._geometry.refcounts_per_block
        occupied = self._stored.occupied
        near = occupied[: bisect_left(occupied, -(-self._near // per_block))]
        for start, stop in block_rows(near, self._geometry.cluster_size):
            part = ones[start * per_block : stop * per_block]
            counts, readable = self._stored.counts(start, stop, part.size)
            np.equal(counts, 1, out=part)
            if readable is not None:
                part |= ~readable
        return ones

    def wrong(self, values: Words, clusters: Clusters) -> Clusters:
        """Places of the entries whose flag contradicts the refcount of their cluster, where that can be read."""
        near = self.ones
        ones = near.take(clusters, mode="clip")
        if int(clusters.max(initial=0)) >= near.size:
            far = np.flatnonzero(clusters >= near.size)
            ones[far] = self._refcounts(clusters[far]) == 1
        wrong = ones != (values.view(np.int64) < 0)  # the copied flag is the highest bit
        if self._is_unreadable.any():
            wrong &= ~self._is_unreadable.take(clusters // self._geometry.refcounts_per_block, mode="clip")
        return np.flatnonzero(wrong)

    def wrong_in_l1(self, l1_table: Words, tables: Collection[int] = ()) -> Clusters:
        """Places of the L1 entries whose flag contradicts the L2 table's refcount, or that name one of `tables`."""
        wanted = np.fromiter(tables, np.uint64, len(tables))
        found = [np.empty(0, np.int64)]
        for start in range(0, l1_table.size, _AT_ONCE):
            part = l1_table[start : start + _AT_ONCE]
            used = np.flatnonzero(part & np.uint64(OFFSET_MASK))
            values = part[used]
            places = self.wrong(values, self._clusters(values))
            if wanted.size:
                named = np.isin(values & np.uint64(OFFSET_MASK), wanted)
                places = np.union1d(places, np.flatnonzero(named))
            found.append(used[places] + start)
        return np.concatenate(found)

    def wrong_l1_runs(self, l1_table: Words, step: int) -> Iterator[tuple[int, int, int]]:
        """The L1 entries with a wrong flag, in a row with the same flag and refcount, cut at multiples of `step`.

        Each run as first index, how many, and that refcount.
        """
        for start in range(0, l1_table.size, _AT_ONCE):  # a multiple of any step
            part = l1_table[start : start + _AT_ONCE]
            found = self.wrong_in_l1(part)
            chosen = part[found]
            stored, flags = self._refcounts(self._clusters(chosen)), chosen >= np.uint64(COPIED)
            new = (np.diff(found) != 1) | (stored[1:] != stored[:-1]) | (flags[1:] != flags[:-1])
            new |= found[1:] % step == 0
            edges = [0, *(np.flatnonzero(new) + 1).tolist(), found.size]
            for first, stop in pairwise(edges if found.size else ()):
                yield start + int(found[first]), stop - first, int(stored[first])

    def _clusters(self, values: Words) -> Clusters:
        return clusters_at(values & np.uint64(OFFSET_MASK), self._geometry)

    def _refcounts(self, clusters: Clusters) -> Words:
        """The refcounts of some clusters, a refcount block at a time; 0 where there is none."""
        per_block = self._geometry.refcounts_per_block
        found = np.zeros(clusters.size, np.uint64)
        blocks = clusters // per_block
        known = np.flatnonzero(self._is_named.take(blocks, mode="clip"))
        known = known[np.argsort(blocks[known], kind="stable")]
        starts = np.flatnonzero(np.diff(blocks[known], prepend=-1))
        for start, stop in pairwise([*starts.tolist(), known.size]):
            places = known[start:stop]
            index = int(blocks[places[0]])
            counts, _ = self._stored.counts(index, index + 1, per_block)
            found[places] = counts[clusters[places] - index * per_block]
        return found

    @cached_property
    def _is_named(self) -> Mask:
        """Whether the refcount table names each block, and that there is none behind its end."""
        return np.append(self._blocks != 0, False)

    @cached_property
    def _is_unreadable(self) -> Mask:
        """Whether each block cannot be read, and that what is behind the table's end can."""
        unreadable = self._blocks & np.uint64(self._geometry.cluster_size - 1) != 0
        unreadable |= self._blocks > np.uint64(MAX_FILE_SIZE - self._geometry.cluster_size)
        return np.append(unreadable, False)

    @property
    def _blocks(self) -> Words:
        offsets: Words = words(self._stored.table) & np.uint64(REFCOUNT_BLOCK_MASK)
        return offsets


def index_ranges(places: Clusters, differ: Mask) -> Iterator[tuple[int, int]]:
    """Places in a row as (first, last + 1), cut where `differ` says that one is not like the one before it.

    As lists a piece at a time: whoever asks may have enough of them soon.
    """
    edges = np.flatnonzero((np.diff(places) != 1) | differ) + 1
    start = 0
    for at in range(0, edges.size + 1, _PIECE):
        for edge in edges[at : at + _PIECE].tolist():
            yield int(places[start]), int(places[edge - 1]) + 1
            start = edge
    if places.size:
        yield int(places[start]), int(places[-1]) + 1
