"""The census over whole L2 tables and refcount blocks at once, with numpy.

Sequential images are counted run by run: where each entry is the one before plus one cluster, flags included, one
addition to a slice counts them all. Scattered ones are counted by index, compressed ones by the difference of where
streams begin and end. Only what is not plainly right is left for `entries.py` to explain.

Memory: two bytes for each cluster and use that occurs, one for each refcount, and eight for a reference to a cluster
so far out that no image with so few tables should have it. Counters widen when a count outgrows them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..format.entries import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, REFCOUNT_BLOCK_MASK, ZERO
from ..format.geometry import ALL_SUBCLUSTERS, SUBCLUSTERS, Geometry
from ..format.limits import MAX_FILE_SIZE
from ..format.vectors import Clusters, Refcounts, Words, compressed_clusters, refcounts
from .census import GUEST, Batch, Census, Mismatch, Overlap, TableFacts, Use
from .counters import Array, Counters
from .stored import StoredRefcounts
from .wrong import Mask, words

_NEAR = 1 << 24
_NEAR_PER_ENTRY = 4
"""Clusters with counters of their own: at least so many, and so many for each L2 entry that the image has."""
_LONG_RUN = 1 << 10
_VERY_LONG_RUN = 1 << 11
"""Runs are counted one by one, or looked at one by one altogether, if they are this long on average."""
_DENSE = 1 << 14
_PIECE = 1 << 12
_AT_ONCE = 1 << 18
"""L1 entries that are compared at once: those in the largest cluster, or in several."""
_COMPARED = 1 << 18
"""Bytes of refcount blocks that are compared at once."""


class _Entries:
    """The entries of some L2 tables, and what can be said of all of them at once.

    Attributes:
        values, bitmaps: the first words of the entries, and the second ones if they are extended.
        offsets, clusters: the host offset of each as a standard entry, and the cluster it lies in.
        every: all bits that any entry has.
        lowest, highest: of the offsets.
    """

    def __init__(self, values: Words, bitmaps: Words | None, geometry: Geometry) -> None:
        self.values, self.bitmaps, self._geometry = values, bitmaps, geometry
        self.every = int(np.bitwise_or.reduce(values, initial=0))
        self.some_compressed = bool(self.every & COMPRESSED)
        self.all_compressed = self.some_compressed and bool(int(np.bitwise_and.reduce(values)) & COMPRESSED)

    @cached_property
    def offsets(self) -> Words:
        return self.values & np.uint64(OFFSET_MASK)

    @cached_property
    def clusters(self) -> Clusters:
        return (self.offsets >> np.uint64(self._geometry.cluster_bits)).view(np.int64)

    @cached_property
    def lowest(self) -> int:
        return int(self.offsets.min())

    @cached_property
    def highest(self) -> int:
        return int(self.offsets.max())

    @cached_property
    def edges(self) -> Clusters:
        """Places of entries that are not the one before plus one cluster: flags that change make an edge too."""
        return np.flatnonzero(self.values[1:] - self.values[:-1] != self._geometry.cluster_size) + 1

    @cached_property
    def streams(self) -> tuple[Clusters, Clusters, Clusters]:
        """Of each entry as a compressed one: first and last cluster, and where it ends."""
        return compressed_clusters(self.values, self._geometry)


class BulkCensus(Census):
    """Whole tables at once.

    Args:
        entries: entries of L2 and bitmap tables that the image has, which bounds what its counters may take.
    """

    def __init__(
        self,
        geometry: Geometry,
        file_size: int,
        stored: StoredRefcounts,
        *,
        version: int,
        data_file: bool,
        entries: int,
    ) -> None:
        super().__init__(geometry, file_size, stored, version=version, data_file=data_file)
        self._near = min(self.clusters + 2, max(_NEAR, _NEAR_PER_ENTRY * entries))
        self._counts = {use: Counters(self._near) for use in Use}
        self._is_one: Mask | None = None

    def count(self, use: Use, first: int, stop: int, weight: int) -> None:
        self._counts[use].add_run(first, stop, weight)

    def add_l2_tables(self, offsets: Sequence[int], weight: int) -> None:
        places = np.asarray(offsets, np.uint64)
        size = self.geometry.cluster_size
        odd = places & np.uint64(size - 1) != 0
        odd |= places > np.uint64(max(0, self.file_size - size))
        self._count_structures(self._touched(places[odd]), weight)
        self._count_structures((places[~odd] >> np.uint64(self.geometry.cluster_bits)).view(np.int64), weight)

    def count_each(self, clusters: Sequence[int], weight: int) -> None:
        self._count_structures(np.fromiter(clusters, np.int64, len(clusters)), weight)

    def count_blocks(self, clusters: Clusters) -> None:
        """Count refcount blocks, each as often as it comes."""
        self._count_structures(clusters, 1)

    def add_bitmap_data(self, offsets: Words) -> None:
        """Count data clusters of bitmaps that begin in the file, each as often as it comes; 0 is none."""
        clusters = (offsets[offsets != 0] >> np.uint64(self.geometry.cluster_bits)).view(np.int64)
        self.clusters = max(self.clusters, int(clusters.max(initial=-1)) + 1)
        self._counts[Use.BITMAP].add_each(clusters, 1)

    def _count_structures(self, clusters: Clusters, weight: int) -> None:
        self._counts[Use.STRUCTURE].add_each(clusters, 1)
        if weight > 1:
            self._counts[Use.REPEATED].add_each(clusters, weight - 1)

    def add_unshared(self, offsets: Sequence[int]) -> bool:
        clusters = np.fromiter(offsets, np.uint64, len(offsets)) >> np.uint64(self.geometry.cluster_bits)
        places = np.unique(clusters.view(np.int64))
        if places.size < len(offsets) or int(places.max(initial=0)) >= self.clusters:
            return False
        if any(counts.any_of(places) for counts in self._counts.values()):
            return False
        self._counts[Use.STRUCTURE].add_each(places, 1, ascending=True)
        return True

    def doubtful_copied(self, l1_table: array[int], tables: Collection[int]) -> Iterator[tuple[int, int]]:
        values = words(l1_table)
        found = self._doubtful_tables(values, tables)
        chosen = values[found]
        return _ranges(found, chosen[1:] != chosen[:-1])

    def miscopied_runs(self, values: array[int]) -> Iterator[tuple[int, int]]:
        wrong = self._miscopied_places(values)
        flags = words(values)[wrong] & np.uint64(COPIED)
        return _ranges(wrong, flags[1:] != flags[:-1])

    def miscopied(self, values: array[int]) -> Iterator[int]:
        yield from self._miscopied_places(values).tolist()

    def miscopied_entries(self, values: array[int]) -> int:
        return int(self._miscopied_places(values).size)

    def _miscopied_places(self, values: array[int]) -> Clusters:
        if self.data_file:
            return np.fromiter(super().miscopied(values), np.int64)
        entries = _Entries(words(values), None, self.geometry)
        places = self._standard(entries)
        chosen = np.arange(entries.values.size) if places is None else places
        return chosen[self._miscopied(entries.values[chosen], entries.clusters[chosen])]

    def miscopied_tables(self, l1_table: array[int]) -> array[int]:
        return array("q", self._doubtful_tables(words(l1_table), ()).tobytes())

    def miscopied_table_runs(self, l1_table: array[int], step: int) -> Iterator[tuple[int, int, int]]:
        """The entries of `miscopied_tables` in a row with the same flag and refcount, cut at multiples of `step`.

        Each run as first index, how many, and that refcount.
        """
        values = words(l1_table)
        for start in range(0, values.size, _AT_ONCE):  # a multiple of any step
            part = values[start : start + _AT_ONCE]
            found = self._doubtful_tables(part, ())
            chosen = part[found]
            clusters = (chosen & np.uint64(OFFSET_MASK)) >> np.uint64(self.geometry.cluster_bits)
            stored, flags = self._refcounts_of(clusters.view(np.int64)), chosen >= np.uint64(COPIED)
            new = (np.diff(found) != 1) | (stored[1:] != stored[:-1]) | (flags[1:] != flags[:-1])
            new |= found[1:] % step == 0
            edges = [0, *(np.flatnonzero(new) + 1).tolist(), found.size]
            for first, stop in pairwise(edges if found.size else ()):
                yield start + int(found[first]), stop - first, int(stored[first])

    def _doubtful_tables(self, l1_table: Words, tables: Collection[int]) -> Clusters:
        """Places of L1 entries whose copied flag contradicts the refcount, or that name one of some tables."""
        wanted = np.fromiter(tables, np.uint64, len(tables))
        found = [np.empty(0, np.int64)]
        for start in range(0, l1_table.size, _AT_ONCE):
            part = l1_table[start : start + _AT_ONCE]
            used = np.flatnonzero(part & np.uint64(OFFSET_MASK))
            entries = _Entries(part[used], None, self.geometry)
            doubtful = self._miscopied(entries.values, entries.clusters)
            if wanted.size:
                doubtful = np.union1d(doubtful, np.flatnonzero(np.isin(entries.offsets, wanted)))
            found.append(used[doubtful] + start)
        return np.concatenate(found)

    def references_of(self, clusters: Clusters) -> Words:
        """How often each of these clusters is referred to."""
        counts = [counts.at(clusters) for counts in self._counts.values()]
        total: Words = np.sum(counts, axis=0, dtype=np.uint64)
        return total

    def references(self, cluster: int) -> int:
        slices = (counts.slice(cluster, cluster + 1) for counts in self._counts.values())
        return sum(int(part[0]) for part in slices if part is not None)

    # L2 tables

    def add_tables(self, batch: Batch) -> TableFacts:
        words = np.frombuffer(batch.data, ">u8").astype(np.uint64)
        if self.geometry.extended_l2:
            entries = _Entries(words[::2].copy(), words[1::2].copy(), self.geometry)
        else:
            entries = _Entries(words, None, self.geometry)
        return self._add_long_runs(entries, batch) or self._add_any(entries, batch)

    def _add_long_runs(self, entries: _Entries, batch: Batch) -> TableFacts | None:
        """The quick way, for tables of standard clusters in a few long runs; None if these are not such tables."""
        odd = COMPRESSED | ZERO | self._odd_bits
        size = entries.values.size
        if self.data_file or entries.every & odd or entries.edges.size * _VERY_LONG_RUN > size:
            return None
        runs = [
            (start, stop - start, int(entries.values[start]))
            for start, stop in pairwise([0, *entries.edges.tolist(), size])
        ]
        clusters = self.geometry.clusters(self.file_size)
        firsts = [self.geometry.cluster_of(value & OFFSET_MASK) for _, _, value in runs]
        if not all(firsts) or any(
            first + run[1] > min(clusters, self._near) for first, run in zip(firsts, runs, strict=True)
        ):
            return None
        if entries.bitmaps is not None and (entries.bitmaps & entries.bitmaps >> np.uint64(SUBCLUSTERS)).any():
            return None
        miscopied, fragmented, end = [np.empty(0, np.int64)], 0, 0
        for first, (start, length, value) in zip(firsts, runs, strict=True):
            fragmented += first != end and start % self.geometry.l2_entries != 0
            end = first + length
            if batch.active:
                self._counts[Use.DATA].add_run(first, end, batch.active)
                ones = self._ones_near()[first:end]
                if not (ones.all() if value & COPIED else not ones.any()):
                    miscopied.append(np.flatnonzero(ones != bool(value & COPIED)) + start)
            if batch.others:
                self._counts[Use.SNAPSHOT].add_run(first, end, batch.others)
        return TableFacts(size, fragmented, 0, [], self._tables(np.concatenate(miscopied)))

    def _add_any(self, entries: _Entries, batch: Batch) -> TableFacts:
        """Entries of any kind."""
        suspects = self._suspects(entries)
        if suspects is not None:
            self._add_suspects(entries, np.flatnonzero(suspects), batch)
        streams = 0
        if entries.some_compressed and not self.data_file:
            streams = self._add_compressed(entries, suspects, batch)
        places = self._standard(entries)
        miscopied = self._add_standard(entries, places, suspects, batch)
        return TableFacts(
            allocated=(entries.values.size if places is None else places.size) + streams,
            fragmented=self._fragmented(entries, places) + streams,
            compressed=streams,
            suspects=self._tables(np.flatnonzero(suspects) if suspects is not None else None),
            miscopied=self._tables(miscopied),
        )

    def _add_suspects(self, entries: _Entries, places: Clusters, batch: Batch) -> None:
        """Count what suspects refer to inside the file: `count_entry` of each."""
        if self.data_file:
            return
        values = entries.values[places]
        compressed: Mask = values & np.uint64(COMPRESSED) != 0
        clusters = self._touched(entries.offsets[places[~compressed]])
        for use, weight in ((Use.DATA, batch.active), (Use.SNAPSHOT, batch.others)):
            if weight:
                self._counts[use].add_each(clusters, weight)
        if entries.bitmaps is not None:
            compressed &= entries.bitmaps[places] == 0
        first, last, end = compressed_clusters(values[compressed], self.geometry)
        inside = end - self.file_size < self.geometry.cluster_size
        if inside.any():
            self._count_streams(first[inside], last[inside], batch.active + batch.others)

    def _touched(self, offsets: Words) -> Clusters:
        """The clusters touched by ranges of a cluster's length that do not reach outside the file; 0 begins none."""
        offsets = offsets[(offsets != 0) & (offsets < np.uint64(self.file_size))]
        first = (offsets >> np.uint64(self.geometry.cluster_bits)).view(np.int64)
        unaligned: Mask = offsets & np.uint64(self.geometry.cluster_size - 1) != 0
        clusters: Clusters = np.concatenate([first, first[unaligned] + 1])
        self.clusters = max(self.clusters, int(clusters.max(initial=-1)) + 1)
        return clusters

    def _tables(self, places: Clusters | None) -> list[int]:
        """Indices of the tables that hold the entries at these places."""
        if places is None or not places.size:
            return []
        tables: list[int] = np.unique(places // self.geometry.l2_entries).tolist()
        return tables

    @property
    def _odd_bits(self) -> int:
        """Bits that no standard entry has: reserved ones, and those of an offset within a cluster."""
        return L2_RESERVED | (self.geometry.cluster_size - 1 & OFFSET_MASK)

    def _suspects(self, entries: _Entries) -> Mask | None:
        """Entries to look at one by one: all that `L2Entry.faults` complains of or that reach outside; None if none.

        Some that are sound may be among them.
        """
        odd = self._odd_bits | (ZERO if self.version == 2 else 0)
        suspects: Mask = np.zeros(entries.values.size, np.bool_)
        if not entries.all_compressed and (
            entries.every & odd or (not self.data_file and entries.highest >= self.file_size)
        ):
            suspects |= entries.values & np.uint64(odd) != 0
            if not self.data_file:
                suspects |= entries.offsets >= np.uint64(self.file_size)
            suspects &= entries.values & np.uint64(COMPRESSED) == 0
        if entries.some_compressed:
            suspects |= self._odd_streams(entries)
        if entries.bitmaps is not None:
            suspects |= self._odd_subclusters(entries, entries.bitmaps)
        return suspects if suspects.any() else None

    def _odd_streams(self, entries: _Entries) -> Mask:
        compressed: Mask = entries.values & np.uint64(COMPRESSED) != 0
        if self.data_file:
            return compressed
        odd: Mask = entries.streams[2] >= self.file_size + self.geometry.cluster_size
        if entries.every & COPIED:
            odd |= entries.values & np.uint64(COPIED) != 0
        return odd if entries.all_compressed else odd & compressed

    def _odd_subclusters(self, entries: _Entries, bitmaps: Words) -> Mask:
        low = np.uint64(ALL_SUBCLUSTERS)
        odd: Mask = bitmaps & bitmaps >> np.uint64(SUBCLUSTERS) != 0
        odd |= (entries.values & np.uint64(OFFSET_MASK) == 0) & (bitmaps & low != 0)
        if entries.some_compressed:
            compressed = entries.values & np.uint64(COMPRESSED) != 0
            odd = np.where(compressed, bitmaps != 0, odd)
        if entries.every & ZERO:
            odd |= entries.values & np.uint64(COMPRESSED | ZERO) == np.uint64(ZERO)
        return odd

    def _standard(self, entries: _Entries) -> Clusters | None:
        """Places of the entries with a standard cluster; None if all are."""
        if not entries.some_compressed and not self.data_file and entries.lowest:
            return None
        if entries.all_compressed:
            return np.empty(0, np.int64)
        standard: Mask = entries.offsets != 0
        if self.data_file:
            flag = np.uint64(COPIED) if self.geometry.extended_l2 else np.uint64(COPIED | ZERO)
            standard |= entries.values & flag == np.uint64(COPIED)
        standard &= entries.values & np.uint64(COMPRESSED) == 0
        return None if standard.all() else np.flatnonzero(standard)

    def _fragmented(self, entries: _Entries, places: Clusters | None) -> int:
        """Standard clusters that do not follow the one before them in their table."""
        if places is None:
            after = entries.edges
            before = after - 1
            apart = entries.offsets[after] - entries.offsets[before] != self.geometry.cluster_size
        else:
            before, after = places[:-1], places[1:]
            apart = np.diff(entries.offsets[places]) != self.geometry.cluster_size
        size = self.geometry.l2_entries
        return int(np.count_nonzero(apart & (before // size == after // size)))

    def _add_standard(
        self, entries: _Entries, places: Clusters | None, suspects: Mask | None, batch: Batch
    ) -> Clusters | None:
        """Count standard clusters; places of the entries whose copied flag is wrong."""
        if places is not None and not places.size:
            return None
        values = entries.values if places is None else entries.values[places]
        if self.data_file:
            wrong = np.flatnonzero(values & np.uint64(COPIED) == 0)
        else:
            clusters = entries.clusters if places is None else entries.clusters[places]
            wrong = self._miscopied(values, clusters) if batch.active else np.empty(0, np.int64)
            sound = None if suspects is None else ~(suspects if places is None else suspects[places])
            edges = entries.edges if places is None and sound is None else None
            self._count_standard(clusters if sound is None else clusters[sound], edges, batch)
        if not batch.active:
            return None
        return wrong if places is None else places[wrong]

    def _count_standard(self, clusters: Clusters, edges: Clusters | None, batch: Batch) -> None:
        """Count clusters, run by run if runs are known by their edges and long enough."""
        runs = edges is not None and edges.size * _LONG_RUN < clusters.size
        ascending = not runs and bool((clusters[1:] > clusters[:-1]).all())
        for use, weight in ((Use.DATA, batch.active), (Use.SNAPSHOT, batch.others)):
            if not weight:
                continue
            if runs and edges is not None:
                for start, stop in pairwise([0, *edges.tolist(), clusters.size]):
                    first = int(clusters[start])
                    self._counts[use].add_run(first, first + stop - start, weight)
            else:
                self._counts[use].add_each(clusters, weight, ascending=ascending)

    def _miscopied(self, values: Words, clusters: Clusters) -> Clusters:
        """Places of entries whose copied flag contradicts the refcount on disk, where that can be read."""
        near = self._ones_near()
        ones = near.take(clusters, mode="clip")
        if int(clusters.max(initial=0)) >= near.size:
            far = np.flatnonzero(clusters >= near.size)
            ones[far] = self._refcounts_of(clusters[far]) == 1
        wrong = ones != (values.view(np.int64) < 0)  # the copied flag is the highest bit
        if self._is_unreadable.any():
            wrong &= ~self._is_unreadable.take(clusters // self.geometry.refcounts_per_block, mode="clip")
        return np.flatnonzero(wrong)

    def _refcounts_of(self, clusters: Clusters) -> Words:
        """The refcounts of some clusters on disk, a refcount block at a time; 0 where there is none."""
        per_block = self.geometry.refcounts_per_block
        found = np.zeros(clusters.size, np.uint64)
        blocks = clusters // per_block
        known = np.flatnonzero(self._is_named.take(blocks, mode="clip"))
        known = known[np.argsort(blocks[known], kind="stable")]
        starts = np.flatnonzero(np.diff(blocks[known], prepend=-1))
        for start, stop in pairwise([*starts.tolist(), known.size]):
            places = known[start:stop]
            index = int(blocks[places[0]])
            counts, _ = self._stored(range(index, index + 1), per_block)
            found[places] = counts[clusters[places] - index * per_block]
        return found

    @cached_property
    def _is_named(self) -> Mask:
        """Whether the refcount table names each block, and that there is none behind its end."""
        return np.append(words(self.stored.table) & np.uint64(REFCOUNT_BLOCK_MASK) != 0, False)

    @cached_property
    def _is_unreadable(self) -> Mask:
        """Whether each block cannot be read, and that what is behind the table's end can."""
        offsets = words(self.stored.table) & np.uint64(REFCOUNT_BLOCK_MASK)
        unreadable = offsets & np.uint64(self.geometry.cluster_size - 1) != 0
        unreadable |= offsets > np.uint64(MAX_FILE_SIZE - self.geometry.cluster_size)
        return np.append(unreadable, False)

    def _add_compressed(self, entries: _Entries, suspects: Mask | None, batch: Batch) -> int:
        """Count what compressed clusters take; how many there are, without those that QEMU does not count."""
        first, last, _ = entries.streams
        counted = streams = entries.values.size
        if suspects is not None or not entries.all_compressed:
            chosen: Mask = entries.values & np.uint64(COMPRESSED) != 0
            if entries.bitmaps is not None:
                chosen &= entries.bitmaps == 0
            streams = int(np.count_nonzero(chosen))
            sound = chosen if suspects is None else chosen & ~suspects
            first, last, counted = first[sound], last[sound], int(np.count_nonzero(sound))
        if counted:
            self._count_streams(first, last, batch.active + batch.others)
        return streams

    def _count_streams(self, first: Clusters, last: Clusters, weight: int) -> None:
        counts = self._counts[Use.COMPRESSED]
        base, stop = int(first.min()), int(last.max()) + 1
        self.clusters = max(self.clusters, stop)
        dense = stop - base <= 4 * first.size + _DENSE
        reach = last - first
        for step in range(int(reach.max()) + 1):
            part = first if step == 0 else first[np.flatnonzero(reach >= step)] + step
            if dense:
                counts.add_counts(base, np.bincount(part - base), weight)
            else:
                counts.add_each(part, weight)

    # Copied flags

    def _ones_near(self) -> Mask:
        if self._is_one is None:
            self._is_one = np.zeros(self._near, np.bool_)
            per_block, at_once = self.geometry.refcounts_per_block, max(1, _COMPARED // self.geometry.cluster_size)
            occupied = self.stored.occupied
            near = occupied[: bisect_left(occupied, -(-self._near // per_block))]
            for start, stop in _rows(near, at_once):
                part = self._is_one[start * per_block : stop * per_block]
                counts, readable = self._stored(range(start, stop), part.size)
                np.equal(counts, 1, out=part)
                if readable is not None:
                    part |= ~readable
        return self._is_one

    # Comparing

    def overflows(self) -> Iterator[tuple[int, int]]:
        for counts in self._counts.values():
            counts.tighten()
        if sum(counts.peak for counts in self._counts.values()) <= self.most:
            return
        for first, total, _ in self._totals():
            for place in np.flatnonzero(total > self.most).tolist():
                yield first + place, int(total[place])

    def compared(self) -> Iterator[Mismatch | Overlap]:
        for first, total, indices in self._totals():
            yield from self._judge(first, total, indices)

    def _totals(self) -> Iterator[tuple[int, Refcounts, range]]:
        """All references to the clusters of some refcount blocks in a row, from which cluster on."""
        per_block = self.geometry.refcounts_per_block
        at_once = max(1, _COMPARED // self.geometry.cluster_size)
        for start, stop in _rows(self._blocks_in_use(), at_once):
            first, end = start * per_block, min(stop * per_block, self.clusters)
            if first < end:
                yield first, self._total(first, end), range(start, stop)

    def _blocks_in_use(self) -> list[int]:
        """Indices of refcount blocks that exist or that count clusters in use."""
        per_block = self.geometry.refcounts_per_block
        occupied = self.stored.occupied
        found = set(occupied[: bisect_left(occupied, -(-self.clusters // per_block))])
        found.update(range(-(-min(self._near, self.clusters) // per_block)))
        for counts in self._counts.values():
            found |= counts.far_blocks(per_block)
        return sorted(found)

    def _total(self, first: int, stop: int) -> Refcounts:
        parts = [counts.slice(first, stop) for counts in self._counts.values()]
        some = [part for part in parts if part is not None]
        if not some:
            return np.zeros(stop - first, np.uint16)
        if len(some) == 1:
            return some[0]
        peak = sum(counts.peak for counts in self._counts.values())
        total: Refcounts = some[0].astype(np.uint16 if peak < 1 << 16 else np.uint64)
        for part in some[1:]:
            np.add(total, part, out=total, casting="unsafe")
        return total

    def _judge(self, first: int, total: Refcounts, indices: range) -> Iterator[Mismatch | Overlap]:
        stored, readable = self._stored(indices, total.size)
        self._note_use(first, total, stored, readable)
        if not np.array_equal(stored, total):
            yield from self._mismatches(first, total, stored, readable)
        if int(total.max()) < 2:
            return
        yield from self._overlaps(first, first + total.size)

    def _note_use(self, first: int, total: Refcounts, stored: Refcounts, readable: Mask | None) -> None:
        """Keep `highest` and `guest` up to date."""
        if readable is None and (total[-1] or stored[-1]):
            self.highest = first + total.size - 1
        else:
            used: Mask = (total != 0) | (stored != 0)
            if readable is not None:
                used &= readable
            if used.any():
                self.highest = max(self.highest, first + used.size - 1 - int(used[::-1].argmax()))
        parts = [self._counts[use].slice(first, first + total.size) for use in GUEST]
        some = [part for part in parts if part is not None]
        if some:
            self.guest += int(np.count_nonzero(np.logical_or.reduce(some) if len(some) > 1 else some[0]))

    def _stored(self, indices: range, size: int) -> tuple[Refcounts, Mask | None]:
        """Refcounts on disk of the first `size` clusters of some blocks; where they can be read, None if everywhere."""
        blocks, readable = self.stored.row(indices.start, indices.stop)
        stored = refcounts(blocks, self.geometry.refcount_order)[:size]
        if all(readable):
            return stored, None
        return stored, np.repeat(readable, self.geometry.refcounts_per_block)[:size]

    def _mismatches(self, first: int, total: Refcounts, stored: Refcounts, readable: Mask | None) -> Iterator[Mismatch]:
        references = np.minimum(total, self.most) if self.most < np.iinfo(total.dtype).max else total
        wrong = stored != references
        if readable is not None:
            wrong &= readable
        places = np.flatnonzero(wrong)
        if not places.size:
            return
        here, there = stored[places].astype(np.uint64), references[places].astype(np.uint64)
        new = (np.diff(places) != 1) | (np.diff(here) != 0) | (np.diff(there) != 0)
        starts = [0, *(np.flatnonzero(new) + 1).tolist(), places.size]
        for start, stop in pairwise(starts):
            yield Mismatch(first + int(places[start]), stop - start, int(here[start]), int(there[start]))

    def _overlaps(self, first: int, stop: int) -> Iterator[Overlap]:
        """Clusters whose uses must not share one: `must_not_share`, over arrays."""
        parts = ((use, counts.slice(first, stop)) for use, counts in self._counts.items())
        at = {use: part for use, part in parts if part is not None}
        places = _shared(at)
        rows = np.array([part[places] for part in at.values()])
        new = (np.diff(places) != 1) | (rows[:, 1:] != rows[:, :-1]).any(axis=0)
        starts = [0, *(np.flatnonzero(new) + 1).tolist(), places.size]
        for start, end in pairwise(starts if places.size else ()):
            uses = tuple((use, count) for use, count in zip(at, rows[:, start].tolist(), strict=True) if count)
            yield Overlap(first + int(places[start]), end - start, uses)


def _shared(at: Mapping[Use, Array]) -> Clusters:
    """Places that have uses which must not share one cluster."""
    found: list[Clusters] = []
    data, compressed, snapshot = (at.get(use) for use in (Use.DATA, Use.COMPRESSED, Use.SNAPSHOT))
    if data is not None and data.max() > 1:
        found.append(np.flatnonzero(data > 1))
    if compressed is not None:
        guests = (guest for guest in (data, snapshot) if guest is not None)
        found += [np.flatnonzero((guest != 0) & (compressed != 0)) for guest in guests]
    for use, other in ((Use.STRUCTURE, Use.BITMAP), (Use.BITMAP, Use.STRUCTURE)):
        part = at.get(use)
        if part is None:
            continue
        owned = np.flatnonzero(part)  # few: the rest is guest data
        alone = part[owned] == 1
        for rival in (at.get(other), data, snapshot, compressed):
            if rival is not None:
                alone &= rival[owned] == 0
        found.append(owned[~alone])
    return np.unique(np.concatenate([np.empty(0, np.int64), *found]))


def _ranges(places: Clusters, differ: Mask) -> Iterator[tuple[int, int]]:
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


def _rows(numbers: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Numbers in a row as (first, last + 1), at most so many together."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1 or place - start >= most:
            yield numbers[start], numbers[place - 1] + 1
            start = place
