"""What `entries.py` says of one entry, over whole L2 tables with numpy.

For images with more mapping entries than a Python loop should walk. This is the one module of `format/` that loads
numpy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from .entries import COMPRESSED, OFFSET_MASK
from .geometry import COMPRESSED_SECTOR, Geometry

Clusters = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Refcounts = npt.NDArray[np.unsignedinteger]

_COARSE_BITS = 20
_COUNTED_AT_ONCE = 1 << 22
"""L1 entries that are kept before they are counted."""


def clusters_at(offsets: Words, geometry: Geometry) -> Clusters:
    """The cluster that each host offset lies in."""
    return (offsets >> np.uint64(geometry.cluster_bits)).view(np.int64)


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
        first[compressed], last[compressed], _ = compressed_clusters(values[compressed], geometry)
    return first, last


def compressed_clusters(descriptors: Words, geometry: Geometry) -> tuple[Clusters, Clusters, Clusters]:
    """First and last host cluster of each compressed cluster descriptor, and the host offset where it ends.

    Matches `CompressedDescriptor.parse`.
    """
    shift = geometry.compressed_offset_bits
    words = descriptors.view(np.int64)
    start = words & (1 << shift) - 1
    end = words >> shift
    end &= (1 << 62 - shift) - 1  # sectors after the first one
    end += 1
    end *= COMPRESSED_SECTOR
    end += start & -COMPRESSED_SECTOR
    last = end - 1
    last >>= geometry.cluster_bits
    start >>= geometry.cluster_bits
    return start, last, end


def refcounts(blocks: bytes | memoryview, order: int) -> Refcounts:
    """The refcounts of one or more refcount blocks, native and as wide as they need. Matches `get_refcount`."""
    if order >= 3:
        width = 1 << order - 3
        return np.frombuffer(blocks, f">u{width}").astype(f"u{width}", copy=False)
    packed = np.frombuffer(blocks, np.uint8)
    bits, mask = 1 << order, (1 << (1 << order)) - 1
    counts = np.empty((packed.size, 8 // bits), np.uint8)
    for index in range(8 // bits):
        np.bitwise_and(packed >> np.uint8(index * bits), np.uint8(mask), out=counts[:, index])
    return counts.reshape(-1)


def pack_refcounts(counts: Refcounts, order: int) -> bytes:
    """The refcount blocks that hold these refcounts: what `refcounts` undoes."""
    if order >= 3:
        return counts.astype(f">u{1 << order - 3}").tobytes()
    bits = 1 << order
    each = counts.astype(np.uint8).reshape(-1, 8 // bits)
    packed = np.zeros(each.shape[0], np.uint8)
    for index in range(8 // bits):
        packed |= each[:, index] << np.uint8(index * bits)
    return packed.tobytes()


def weigh_tables(l1_tables: Iterable[tuple[array[int], bool]]) -> list[tuple[int, int, array[int]]]:
    """How often L2 tables are named by L1 tables, of the active disk (True) and of others (False).

    Tables named equally often come together: (times by active ones, by others, offsets in order). Entries of 0 name
    none.
    """
    offsets, keys, base = _weighed(l1_tables)
    order = np.argsort(keys, kind="stable")
    keys, offsets = keys[order], offsets[order]
    starts = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    firsts = keys[[0, *starts.tolist()]].tolist() if keys.size else []
    return [
        (*divmod(key, base), array("Q", part.tobytes()))
        for key, part in zip(firsts, np.split(offsets, starts), strict=False)
    ]


def _weighed(l1_tables: Iterable[tuple[array[int], bool]]) -> tuple[Words, Clusters, int]:
    """All L2 tables that are named, in order, and of each the times by active tables times a base, plus by others."""
    active, others = _Weights(), _Weights()
    for table, is_active in l1_tables:
        (active if is_active else others).add(np.frombuffer(table, np.uint64))
    if not others.offsets().size:
        return active.offsets(), active.of(active.offsets()), 1
    offsets, _ = _counted(np.concatenate([active.offsets(), others.offsets()]))
    keys = others.of(offsets)
    base = int(keys.max(initial=0)) + 1
    weights = active.of(offsets)
    weights *= base
    keys += weights
    return offsets, keys, base


class NamedTables:
    """The L2 tables that L1 tables name: each offset once, and where it is named first."""

    def __init__(self, l1_tables: Iterable[tuple[array[int], str]]) -> None:
        """Takes L1 tables, each with its owner."""
        self._parts: list[tuple[str, Words, npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = []
        for table, owner in l1_tables:
            values = np.frombuffer(table, np.uint64)
            used = np.flatnonzero(values)
            offsets, first, times = _first_of_each(values[used] & np.uint64(OFFSET_MASK))
            self._parts.append((owner, offsets, used[first].astype(np.int32), times > 1))
        every = np.concatenate([np.empty(0, np.uint64), *(offsets for _, offsets, _, _ in self._parts)])
        firsts = np.concatenate([np.empty(0, np.int32), *(first for _, _, first, _ in self._parts)])
        self._offsets, places, _ = _first_of_each(every)
        self._first = firsts[places]
        if self._offsets.size and not self._offsets[0]:
            self._offsets, self._first = self._offsets[1:], self._first[1:]

    @property
    def count(self) -> int:
        """How many there are."""
        return self._offsets.size

    def unaligned(self, geometry: Geometry) -> int | None:
        """The first offset that is not a cluster's."""
        odd = np.flatnonzero(self._offsets & np.uint64(geometry.cluster_size - 1))
        return int(self._offsets[odd[0]]) if odd.size else None

    def entries(self, wanted: Iterable[int]) -> Iterator[tuple[int, int, str]]:
        """L1 entries that name the wanted offsets: offset, index, owner. One that is named more often comes twice."""
        offsets = np.unique(np.fromiter(wanted, np.uint64))
        for owner, named, first, is_repeated in self._parts:
            for place in np.flatnonzero(np.isin(named, offsets, assume_unique=True) & (named != 0)).tolist():
                for _ in range(1 + int(is_repeated[place])):
                    yield int(named[place]), int(first[place]), owner

    def at(self, place: int) -> tuple[int, int] | None:
        """The offset at a place in their order, and the index of the first entry that names it; None past the end."""
        return (int(self._offsets[place]), int(self._first[place])) if place < self._offsets.size else None

    def place(self, offset: int) -> int:
        """The place of the first that does not lie before `offset`."""
        return int(np.searchsorted(self._offsets, np.uint64(max(0, offset))))


def _first_of_each(values: Words) -> tuple[Words, Clusters, Clusters]:
    """The distinct values, sorted, where each comes first, and how often; in half of what `np.unique` takes."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = _starts(ordered)
    ordered = ordered[starts]
    order = order[starts]
    return ordered, order, _lengths(starts, values.size)


def _starts(ordered: Words) -> Clusters:
    """Where values that are in order begin anew."""
    new = np.ones(ordered.size, np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return np.flatnonzero(new)


def _lengths(starts: Clusters, stop: int) -> Clusters:
    """How far it is from each to the next one, and from the last to `stop`."""
    lengths = np.full_like(starts, stop)
    lengths[:-1] = starts[1:]
    lengths -= starts
    return lengths


def _counted(values: Words) -> tuple[Words, Clusters]:
    """The distinct values, sorted, and how often each is there; `values` is sorted in place."""
    values.sort()
    starts = _starts(values)
    return values[starts], _lengths(starts, values.size)


class _Weights:
    """How often offsets came, with what came lately not yet counted."""

    def __init__(self) -> None:
        self._offsets: Words = np.empty(0, np.uint64)
        self._times: Clusters = np.empty(0, np.int64)
        self._new: list[Words] = []
        self._room = _COUNTED_AT_ONCE

    def add(self, entries: Words) -> None:
        self._new.append(entries[entries != 0] & np.uint64(OFFSET_MASK))
        self._room -= entries.size
        if self._room < 0:
            self._settle()

    def offsets(self) -> Words:
        self._settle()
        return self._offsets

    def of(self, offsets: Words) -> Clusters:
        """The times of each of `offsets`, which are sorted and include all that came."""
        times = np.zeros(offsets.size, np.int64)
        times[np.searchsorted(offsets, self.offsets())] = self._times
        return times

    def _settle(self) -> None:
        if not self._new:
            return
        new, times = _counted(np.concatenate(self._new))
        self._new, self._room = [], _COUNTED_AT_ONCE
        if not self._offsets.size:
            self._offsets, self._times = new, times
            return
        offsets, _ = _counted(np.concatenate([self._offsets, new]))
        total = np.zeros(offsets.size, np.int64)
        total[np.searchsorted(offsets, self._offsets)] += self._times
        total[np.searchsorted(offsets, new)] += times
        self._offsets, self._times = offsets, total


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
