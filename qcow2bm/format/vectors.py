"""What `entries.py` says of one entry, over whole L2 tables with numpy.

For images with more mapping entries than a Python loop should walk. This is the one module of `format/` that loads
numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from .entries import COMPRESSED, OFFSET_MASK
from .geometry import COMPRESSED_SECTOR, Geometry

Clusters = npt.NDArray[np.int64]

_COARSE_BITS = 20


def host_clusters(table: bytes, geometry: Geometry) -> tuple[Clusters, Clusters]:
    """First and last host cluster that each entry of one or more L2 tables refers to; 0 and -1 for none.

    Shape: one element per entry, extended or not. Matches `L2Entry.host_range` of an image without data file.
    """
    values = np.frombuffer(table, ">u8")[:: geometry.l2_entry_words].astype(np.uint64)
    offsets = (values & np.uint64(OFFSET_MASK)).astype(np.int64)
    first = offsets >> geometry.cluster_bits
    # An unaligned offset reaches into a second cluster; 0 is no cluster.
    last = np.where(offsets > 0, (offsets + geometry.cluster_size - 1) >> geometry.cluster_bits, -1)
    compressed = np.flatnonzero(values & np.uint64(COMPRESSED))
    if compressed.size:
        shift = geometry.compressed_offset_bits
        chosen = values[compressed]
        start = (chosen & np.uint64((1 << shift) - 1)).astype(np.int64)
        sectors = ((chosen & np.uint64(COMPRESSED - 1)) >> np.uint64(shift)).astype(np.int64) + 1
        end = start - start % COMPRESSED_SECTOR + sectors * COMPRESSED_SECTOR
        first[compressed] = start >> geometry.cluster_bits
        last[compressed] = (end - 1) >> geometry.cluster_bits
    return first, last


class ClusterFilter:
    """Which of many clusters are among a few wanted ones.

    A coarse map of at most 2^20 flags turns nearly all of them away before the exact test.
    """

    def __init__(self, wanted: Iterable[int]) -> None:
        self._wanted = np.unique(np.fromiter(wanted, np.int64))
        highest = int(self._wanted[-1]) if self._wanted.size else 0
        self._shift = max(0, highest.bit_length() - _COARSE_BITS)
        self._coarse = np.zeros((highest >> self._shift) + 2, bool)
        self._coarse[self._wanted >> self._shift] = True
        self._coarse_less_one = np.zeros_like(self._coarse)
        self._coarse_less_one[(self._wanted[self._wanted > 0] - 1) >> self._shift] = True

    def may_hit(self, table: bytes, geometry: Geometry) -> bool:
        """False if no entry of one or more L2 tables refers to a wanted cluster: a quick test that most tables pass."""
        values = np.frombuffer(table, ">u8")[:: geometry.l2_entry_words].astype(np.uint64)
        every = int(np.bitwise_or.reduce(values, initial=0))
        if every & COMPRESSED or every & OFFSET_MASK & (geometry.cluster_size - 1):
            return True  # entries that reach into more than one cluster
        values &= np.uint64(OFFSET_MASK)
        # The offset 0 is no cluster: one less wraps round, past the map's end, where the last flag is never set.
        values -= np.uint64(1)
        values >>= np.uint64(geometry.cluster_bits + self._shift)
        return bool(np.take(self._coarse_less_one, values.view(np.int64), mode="clip").any())

    def hits(self, clusters: Clusters) -> Clusters:
        """Indices of the elements of `clusters` that are wanted."""
        coarse = np.minimum(clusters >> self._shift, self._coarse.size - 1)
        maybe = np.flatnonzero(self._coarse[coarse])
        found = clusters[maybe]
        places = np.searchsorted(self._wanted, found)
        places[places == self._wanted.size] = 0
        return maybe[self._wanted[places] == found] if self._wanted.size else maybe[:0]

    def range_hits(self, first: Clusters, last: Clusters) -> Iterator[tuple[int, int]]:
        """Pairs (index, cluster) for every wanted cluster between `first` and `last` of an element."""
        for index in self.hits(np.where(last >= first, first, -1)):
            yield int(index), int(first[index])
        for step in range(1, int(np.max(last - first, initial=0)) + 1):
            longer = np.flatnonzero(last - first >= step)
            for index in self.hits(first[longer] + step):
                yield int(longer[index]), int(first[longer[index]] + step)
