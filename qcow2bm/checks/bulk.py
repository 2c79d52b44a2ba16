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
from itertools import pairwise

import numpy as np

from ..format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from ..format.geometry import SUBCLUSTERS, Geometry
from ..format.vectors import Clusters, Refcounts, Words, clusters_at, compressed_clusters
from .census import GUEST, Batch, Census, Mismatch, Overlap, TableFacts, Use
from .counters import Array, Counters
from .flags import CopiedFlags, index_ranges
from .l2_words import L2Words
from .stored import StoredRefcounts, block_rows
from .wrong import Mask, words

_NEAR = 1 << 24
_NEAR_PER_ENTRY = 4
"""Clusters with counters of their own: at least so many, and so many for each L2 entry that the image has."""
_LONG_RUN = 1 << 10
_VERY_LONG_RUN = 1 << 11
"""Runs are counted one by one, or looked at one by one altogether, if they are this long on average."""
_DENSE = 1 << 14


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
        as_qemu: bool = False,
    ) -> None:
        super().__init__(geometry, file_size, stored, version=version, data_file=data_file, as_qemu=as_qemu)
        self._near = min(self.clusters + 2, max(_NEAR, _NEAR_PER_ENTRY * entries))
        self._counts = {use: Counters(self._near) for use in Use}
        self.flags = CopiedFlags(geometry, stored, self._near)

    def count(self, use: Use, first: int, stop: int, weight: int) -> None:
        self._counts[use].add_run(first, stop, weight)

    def add_l2_tables(self, offsets: Sequence[int], weight: int) -> None:
        places = np.asarray(offsets, np.uint64)
        size = self.geometry.cluster_size
        odd = places & np.uint64(size - 1) != 0
        odd |= places > np.uint64(max(0, self.file_size - size))
        self._count_structures(self._touched(places[odd]), weight)
        self._count_structures(clusters_at(places[~odd], self.geometry), weight)

    def count_each(self, clusters: Sequence[int], weight: int) -> None:
        self._count_structures(np.fromiter(clusters, np.int64, len(clusters)), weight)

    def count_blocks(self, clusters: Clusters) -> None:
        """Count refcount blocks, each as often as it comes."""
        self._count_structures(clusters, 1)

    def add_bitmap_data(self, offsets: Words) -> None:
        """Count data clusters of bitmaps that begin in the file, each as often as it comes; 0 is none."""
        clusters = clusters_at(offsets[offsets != 0], self.geometry)
        self.clusters = max(self.clusters, int(clusters.max(initial=-1)) + 1)
        self._counts[Use.BITMAP].add_each(clusters, 1)

    def _count_structures(self, clusters: Clusters, weight: int) -> None:
        self._counts[Use.STRUCTURE].add_each(clusters, 1)
        if weight > 1:
            self._counts[Use.REPEATED].add_each(clusters, weight - 1)

    def add_unshared(self, offsets: Sequence[int]) -> bool:
        places = np.unique(clusters_at(np.fromiter(offsets, np.uint64, len(offsets)), self.geometry))
        if places.size < len(offsets) or int(places.max(initial=0)) >= self.clusters:
            return False
        if any(counts.any_of(places) for counts in self._counts.values()):
            return False
        self._counts[Use.STRUCTURE].add_each(places, 1, ascending=True)
        return True

    def doubtful_copied(self, l1_table: array[int], tables: Collection[int]) -> Iterator[tuple[int, int]]:
        values = words(l1_table)
        found = self.flags.wrong_in_l1(values, tables)
        chosen = values[found]
        return index_ranges(found, chosen[1:] != chosen[:-1])

    def miscopied_runs(self, values: array[int]) -> Iterator[tuple[int, int]]:
        wrong = self._miscopied_places(values)
        flags = words(values)[wrong] & np.uint64(COPIED)
        return index_ranges(wrong, flags[1:] != flags[:-1])

    def miscopied(self, values: array[int]) -> Iterator[int]:
        yield from self._miscopied_places(values).tolist()

    def miscopied_entries(self, values: array[int]) -> int:
        return int(self._miscopied_places(values).size)

    def _miscopied_places(self, values: array[int]) -> Clusters:
        if self.data_file:
            return np.fromiter(super().miscopied(values), np.int64)
        entries = L2Words(words(values), None, self.geometry)
        places = entries.standard(data_file=False)
        chosen = np.arange(entries.values.size) if places is None else places
        return chosen[self.flags.wrong(entries.values[chosen], entries.clusters[chosen])]

    def references_of(self, clusters: Clusters) -> Words:
        """How often each of these clusters is referred to."""
        total: Words = np.zeros(clusters.size, np.uint64)
        for counts in self._counts.values():
            total += counts.at(clusters)
        return total

    def references(self, cluster: int) -> int:
        slices = (counts.slice(cluster, cluster + 1) for counts in self._counts.values())
        return sum(int(part[0]) for part in slices if part is not None)

    # L2 tables

    def add_tables(self, batch: Batch) -> TableFacts:
        entries = L2Words.read(batch.data, self.geometry)
        return self._add_long_runs(entries, batch) or self._add_any(entries, batch)

    def _add_long_runs(self, entries: L2Words, batch: Batch) -> TableFacts | None:
        """The quick way, for tables of standard clusters in a few long runs; None if these are not such tables."""
        odd = COMPRESSED | ZERO | entries.odd_bits
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
                ones = self.flags.ones[first:end]
                if not (ones.all() if value & COPIED else not ones.any()):
                    miscopied.append(np.flatnonzero(ones != bool(value & COPIED)) + start)
            if batch.others:
                self._counts[Use.SNAPSHOT].add_run(first, end, batch.others)
        return TableFacts(size, fragmented, 0, [], self._tables(np.concatenate(miscopied)))

    def _add_any(self, entries: L2Words, batch: Batch) -> TableFacts:
        """Entries of any kind."""
        suspects = entries.suspects(
            self.file_size, self.streams_outside_from, version=self.version, data_file=self.data_file
        )
        if suspects is not None:
            self._add_suspects(entries, np.flatnonzero(suspects), batch)
        streams = 0
        if entries.some_compressed and not self.data_file:
            streams = self._add_compressed(entries, suspects, batch)
        places = entries.standard(data_file=self.data_file)
        miscopied = self._add_standard(entries, places, suspects, batch)
        return TableFacts(
            allocated=(entries.values.size if places is None else places.size) + streams,
            fragmented=entries.fragmented(places) + streams,
            compressed=streams,
            suspects=self._tables(np.flatnonzero(suspects) if suspects is not None else None),
            miscopied=self._tables(miscopied),
        )

    def _add_suspects(self, entries: L2Words, places: Clusters, batch: Batch) -> None:
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
        inside = end < self.streams_outside_from
        if inside.any():
            self._count_streams(first[inside], last[inside], batch.active + batch.others)

    def _touched(self, offsets: Words) -> Clusters:
        """The clusters touched by ranges of a cluster's length that do not reach outside the file; 0 begins none."""
        offsets = offsets[(offsets != 0) & (offsets < np.uint64(self.file_size))]
        first = clusters_at(offsets, self.geometry)
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

    def _add_standard(
        self, entries: L2Words, places: Clusters | None, suspects: Mask | None, batch: Batch
    ) -> Clusters | None:
        """Count standard clusters; places of the entries whose copied flag is wrong."""
        if places is not None and not places.size:
            return None
        values = entries.values if places is None else entries.values[places]
        if self.data_file:
            wrong = np.flatnonzero(values & np.uint64(COPIED) == 0)
        else:
            clusters = entries.clusters if places is None else entries.clusters[places]
            wrong = self.flags.wrong(values, clusters) if batch.active else np.empty(0, np.int64)
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

    def _add_compressed(self, entries: L2Words, suspects: Mask | None, batch: Batch) -> int:
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
        for start, stop in block_rows(self._blocks_in_use(), self.geometry.cluster_size):
            first, end = start * per_block, min(stop * per_block, self.clusters)
            if first < end:
                yield first, self._total(first, end), range(start, stop)

    def _blocks_in_use(self) -> array[int]:
        """Indices of refcount blocks that exist or that count clusters in use."""
        per_block = self.geometry.refcounts_per_block
        occupied = self.stored.occupied
        found = [np.array(occupied[: bisect_left(occupied, -(-self.clusters // per_block))], np.int64)]
        found.append(np.arange(-(-min(self._near, self.clusters) // per_block)))
        found += [counts.far_blocks(per_block) for counts in self._counts.values()]
        return array("q", np.unique(np.concatenate(found)).tobytes())

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
        stored, readable = self.stored.counts(indices.start, indices.stop, total.size)
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
