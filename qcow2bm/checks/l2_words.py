"""The entries of some L2 tables as arrays, and what can be said of all of them at once."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ..format.entries import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO
from ..format.geometry import ALL_SUBCLUSTERS, SUBCLUSTERS, Geometry
from ..format.vectors import Clusters, Words, clusters_at, compressed_clusters
from .wrong import Mask, is_standard, split_words


class L2Words:
    """The entries of some L2 tables.

    Attributes:
        values, bitmaps: the first words of the entries, and the second ones if they are extended.
        every: all bits that any entry has.
        some_compressed, all_compressed: of the entries.
    """

    def __init__(self, values: Words, bitmaps: Words | None, geometry: Geometry) -> None:
        self.values, self.bitmaps, self._geometry = values, bitmaps, geometry
        self.every = int(np.bitwise_or.reduce(values, initial=0))
        self.some_compressed = bool(self.every & COMPRESSED)
        self.all_compressed = self.some_compressed and bool(int(np.bitwise_and.reduce(values)) & COMPRESSED)

    @classmethod
    def read(cls, data: bytes | memoryview, geometry: Geometry) -> L2Words:
        """The entries of tables that lie one after the other."""
        return cls(*split_words(data, geometry), geometry)

    @cached_property
    def offsets(self) -> Words:
        """The host offset of each as a standard entry."""
        return self.values & np.uint64(OFFSET_MASK)

    @cached_property
    def clusters(self) -> Clusters:
        """The cluster that each lies in as one."""
        return clusters_at(self.offsets, self._geometry)

    @cached_property
    def lowest(self) -> int:
        """The lowest of the host offsets."""
        return int(self.offsets.min())

    @cached_property
    def highest(self) -> int:
        """The highest of them."""
        return int(self.offsets.max())

    @cached_property
    def edges(self) -> Clusters:
        """Places of entries that are not the one before plus one cluster: flags that change make an edge too."""
        return np.flatnonzero(self.values[1:] - self.values[:-1] != self._geometry.cluster_size) + 1

    @cached_property
    def streams(self) -> tuple[Clusters, Clusters, Clusters]:
        """Of each entry as a compressed one: first and last cluster, and where it ends."""
        return compressed_clusters(self.values, self._geometry)

    @property
    def odd_bits(self) -> int:
        """Bits that no standard entry has: reserved ones, and those of an offset within a cluster."""
        return L2_RESERVED | (self._geometry.cluster_size - 1 & OFFSET_MASK)

    def suspects(self, file_size: int, streams_from: int, *, version: int, data_file: bool) -> Mask | None:
        """Entries to look at one by one: all that `L2Entry.faults` complains of or that reach outside; None if none.

        Some that are sound may be among them. Streams that end at `streams_from` or later reach outside.
        """
        odd = self.odd_bits | (ZERO if version == 2 else 0)
        suspects: Mask = np.zeros(self.values.size, np.bool_)
        if not self.all_compressed and (self.every & odd or (not data_file and self.highest >= file_size)):
            suspects |= self.values & np.uint64(odd) != 0
            if not data_file:
                suspects |= self.offsets >= np.uint64(file_size)
            suspects &= self.values & np.uint64(COMPRESSED) == 0
        if self.some_compressed:
            suspects |= self._odd_streams(streams_from, data_file=data_file)
        if self.bitmaps is not None:
            suspects |= self._odd_subclusters(self.bitmaps)
        return suspects if suspects.any() else None

    def _odd_streams(self, outside_from: int, *, data_file: bool) -> Mask:
        compressed: Mask = self.values & np.uint64(COMPRESSED) != 0
        if data_file:
            return compressed
        odd: Mask = self.streams[2] >= outside_from
        if self.every & COPIED:
            odd |= self.values & np.uint64(COPIED) != 0
        return odd if self.all_compressed else odd & compressed

    def _odd_subclusters(self, bitmaps: Words) -> Mask:
        low = np.uint64(ALL_SUBCLUSTERS)
        odd: Mask = bitmaps & bitmaps >> np.uint64(SUBCLUSTERS) != 0
        odd |= (self.offsets == 0) & (bitmaps & low != 0)
        if self.some_compressed:
            compressed = self.values & np.uint64(COMPRESSED) != 0
            odd = np.where(compressed, bitmaps != 0, odd)
        if self.every & ZERO:
            odd |= self.values & np.uint64(COMPRESSED | ZERO) == np.uint64(ZERO)
        return odd

    def standard(self, *, data_file: bool) -> Clusters | None:
        """Places of the entries with a standard cluster; None if all are."""
        if not self.some_compressed and not data_file and self.lowest:
            return None
        if self.all_compressed:
            return np.empty(0, np.int64)
        found = is_standard(self.values, self.offsets, self._geometry, data_file=data_file)
        return None if found.all() else np.flatnonzero(found)

    def fragmented(self, places: Clusters | None) -> int:
        """How many standard clusters do not follow the one before them in their table; `places` are theirs."""
        if places is None:
            after = self.edges
            before = after - 1
            apart = self.offsets[after] - self.offsets[before] != self._geometry.cluster_size
        else:
            before, after = places[:-1], places[1:]
            apart = np.diff(self.offsets[places]) != self._geometry.cluster_size
        size = self._geometry.l2_entries
        return int(np.count_nonzero(apart & (before // size == after // size)))
