"""The census over whole L2 tables and refcount blocks at once, with numpy.

Sequential images are counted run by run: where each entry is the one before plus one cluster, flags included, one
addition to a slice counts them all. Scattered ones are counted by index, compressed ones by the difference of where
streams begin and end. Only what is not plainly right is left for `entries.py` to explain.

Memory: two bytes for each cluster and use that occurs, one for each refcount, and eight for a reference to a cluster
so far out that no image with so few tables should have it. Counters widen when a count outgrows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..format.entries import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO, L2Entry
from ..format.geometry import SUBCLUSTERS, Geometry
from ..format.vectors import Clusters, Refcounts, Words, compressed_clusters, refcounts
from .census import GUEST, Batch, Census, Mismatch, Overlap, TableFacts, Use, continues, joined
from .stored import StoredRefcounts

_NEAR = 1 << 24
_NEAR_PER_ENTRY = 4
"""Clusters with counters of their own: at least so many, and so many for each L2 entry that the image has."""
_PIECE = 1 << 14
"""References that are counted by index at once: their number bounds what one cluster can gain."""
_LONG_RUN = 16
"""Runs are taken one by one if they are this long on average."""
_COMPARED = 1 << 18
"""Bytes of refcount blocks that are compared at once."""

_LESSON = 16 << 20

Counters = npt.NDArray[np.unsignedinteger[Any]]
Mask = npt.NDArray[np.bool_]


class _Counts:
    """Counters of one use: an array for the clusters near the front, a list of references to those far out."""

    def __init__(self, near: int) -> None:
        self._near = near
        self._far: list[tuple[int, Clusters]] = []
        self._far_runs: list[tuple[int, int, int]] = []
        self._sorted: tuple[Clusters, Words] | None = None
        self.array: Counters | None = None
        self.peak = 0

    def add_run(self, first: int, stop: int, weight: int) -> None:
        """Count the clusters from `first` up to `stop`."""
        if stop > self._near:
            self._far_runs.append((max(first, self._near), stop, weight))
        if first < self._near:
            part = slice(first, min(stop, self._near))
            array = self._room(int(self._counters()[part].max(initial=0)) + weight)
            array[part] += array.dtype.type(weight)

    def add_each(self, clusters: Clusters, weight: int) -> None:
        """Count clusters in any order, each as often as it comes."""
        if clusters.size and int(clusters.max()) >= self._near:
            far = clusters >= self._near
            self._far.append((weight, clusters[far]))
            clusters = clusters[~far]
        for start in range(0, clusters.size, _PIECE):
            piece = clusters[start : start + _PIECE]
            most = int(self._counters()[piece].max()) + weight * piece.size
            array = self._room(most)
            np.add.at(array, piece, array.dtype.type(weight))

    def add_steps(self, base: int, steps: Clusters, weight: int) -> None:
        """Count cluster `base + i` as often as the sum of `steps` up to i says."""
        stop = base + steps.size
        if stop > self._near:  # a rare case, in the plain way
            counts = np.cumsum(steps)
            self.add_each(np.repeat(np.arange(base, stop, dtype=np.int64), counts), weight)
            return
        counts = np.cumsum(steps) * weight
        array = self._room(int(self._counters()[base:stop].max(initial=0)) + int(counts.max(initial=0)))
        array[base:stop] += counts.astype(array.dtype)

    def slice(self, first: int, stop: int) -> Counters | None:
        """The counts of the clusters from `first` up to `stop`; None if all are 0."""
        if stop <= self._near:
            return None if self.array is None else self.array[first:stop]
        counts = np.zeros(stop - first, np.uint64)
        if self.array is not None and first < self._near:
            counts[: self._near - first] = self.array[first:]
        clusters, weights = self._far_sorted()
        begin, end = np.searchsorted(clusters, [first, stop])
        np.add.at(counts, clusters[begin:end] - first, weights[begin:end])
        for start, end_of_run, weight in self._far_runs:
            if start < stop and end_of_run > first:
                counts[max(0, start - first) : end_of_run - first] += np.uint64(weight)
        return counts if counts.any() else None

    def far_blocks(self, per_block: int) -> set[int]:
        """Indices of the refcount blocks that count clusters far out which are referred to."""
        found = {int(index) for index in np.unique(self._far_sorted()[0] // per_block)}
        for first, stop, _ in self._far_runs:
            found.update(range(first // per_block, (stop - 1) // per_block + 1))
        return found

    def _far_sorted(self) -> tuple[Clusters, Words]:
        if self._sorted is None:
            parts = [clusters for _, clusters in self._far]
            clusters = np.concatenate(parts) if parts else np.empty(0, np.int64)
            weights = [np.full(part.size, weight, np.uint64) for weight, part in self._far]
            order = np.argsort(clusters, kind="stable")
            joined_weights = np.concatenate(weights) if weights else np.empty(0, np.uint64)
            self._sorted = clusters[order], joined_weights[order]
        return self._sorted

    def _counters(self) -> Counters:
        if self.array is None:
            self.array = np.zeros(self._near, np.uint16)  # the kernel gives the pages when they are written to
        return self.array

    def _room(self, most: int) -> Counters:
        """The counters, wide enough for a count of `most`."""
        array = self._counters()
        self.peak = max(self.peak, most)
        if most > np.iinfo(array.dtype).max:
            wider = np.uint32 if most < 1 << 32 else np.uint64
            self.array = array = array.astype(wider)
        return array


class BulkCensus(Census):
    """Whole tables at once.

    Args:
        entries: L2 entries that the image has, which bounds what its counters may take.
    """

    def __init__(
        self, geometry: Geometry, file_size: int, stored: StoredRefcounts, *, data_file: bool, entries: int
    ) -> None:
        super().__init__(geometry, file_size, stored, data_file=data_file)
        self._near = min(self.clusters + 2, max(_NEAR, _NEAR_PER_ENTRY * entries))
        self._counts = {use: _Counts(self._near) for use in Use}
        self._is_one: Mask | None = None
        # A large block once given back teaches malloc to keep what smaller ones return, instead of a trip to the
        # kernel for each temporary array.
        np.empty(_LESSON, np.uint8)

    def count(self, use: Use, first: int, stop: int, weight: int) -> None:
        self._counts[use].add_run(first, stop, weight)

    def count_each(self, clusters: Sequence[int], weight: int) -> None:
        places = np.fromiter(clusters, np.int64, len(clusters))
        self._counts[Use.STRUCTURE].add_each(places, 1)
        if weight > 1:
            self._counts[Use.REPEATED].add_each(places, weight - 1)

    def references(self, cluster: int) -> int:
        slices = (counts.slice(cluster, cluster + 1) for counts in self._counts.values())
        return sum(int(part[0]) for part in slices if part is not None)

    # L2 tables

    def add_tables(self, batch: Batch) -> TableFacts:
        words = np.frombuffer(batch.data, ">u8").astype(np.uint64)
        extended = self.geometry.extended_l2
        values, bitmaps = (words[::2].copy(), words[1::2]) if extended else (words, None)
        compressed = self._compressed(values, bitmaps)
        suspects = self._suspects(values, bitmaps)
        places = self._standard(values)
        if suspects is not None:
            for place in np.flatnonzero(suspects).tolist():
                entry = L2Entry(int(values[place]), int(bitmaps[place]) if bitmaps is not None else 0)
                self.count_entry(entry, batch.active, batch.others)
        if compressed is not None and not self.data_file:
            self._add_compressed(values, compressed if suspects is None else compressed & ~suspects, batch)
        miscopied = self._add_standard(values, places, suspects, batch)
        streams = int(compressed.sum()) if compressed is not None and not self.data_file else 0
        return TableFacts(
            allocated=(values.size if places is None else places.size) + streams,
            fragmented=self._fragmented(values, places) + streams,
            compressed=streams,
            suspects=self._tables(np.flatnonzero(suspects) if suspects is not None else None),
            miscopied=self._tables(miscopied),
        )

    def _tables(self, places: Clusters | None) -> list[int]:
        """Indices of the tables that hold the entries at these places."""
        if places is None or not places.size:
            return []
        tables: list[int] = np.unique(places // self.geometry.l2_entries).tolist()
        return tables

    def _compressed(self, values: Words, bitmaps: Words | None) -> Mask | None:
        """Which entries are compressed clusters that count; None if there is none."""
        compressed: Mask = values & np.uint64(COMPRESSED) != 0
        if bitmaps is not None:
            compressed &= bitmaps == 0
        return compressed if compressed.any() else None

    def _suspects(self, values: Words, bitmaps: Words | None) -> Mask | None:
        """Entries to look at one by one: all that `L2Entry.faults` complains of or that reach outside; None if none.

        Some that are sound may be among them.
        """
        odd = L2_RESERVED | (self.geometry.cluster_size - 1 & OFFSET_MASK)
        every = int(np.bitwise_or.reduce(values, initial=0))
        highest = int((values & np.uint64(OFFSET_MASK)).max(initial=0)) if not every & COMPRESSED else 0
        if bitmaps is None and not every & (odd | COMPRESSED) and (self.data_file or highest < self.file_size):
            return None
        compressed = values & np.uint64(COMPRESSED) != 0
        suspects: Mask = ~compressed & (values & np.uint64(odd) != 0)
        if not self.data_file:
            suspects |= ~compressed & (values & np.uint64(OFFSET_MASK) >= np.uint64(self.file_size))
        if compressed.any():
            suspects |= self._odd_streams(values, compressed)
        if bitmaps is not None:
            suspects |= self._odd_subclusters(values, bitmaps, compressed)
        return suspects if suspects.any() else None

    def _odd_streams(self, values: Words, compressed: Mask) -> Mask:
        if self.data_file:
            return compressed
        odd: Mask = compressed & (values & np.uint64(COPIED) != 0)
        _, _, end = compressed_clusters(values, self.geometry)
        odd |= compressed & (end - self.file_size >= self.geometry.cluster_size)
        return odd

    def _odd_subclusters(self, values: Words, bitmaps: Words, compressed: Mask) -> Mask:
        low = np.uint64((1 << SUBCLUSTERS) - 1)
        unallocated = values & np.uint64(OFFSET_MASK) == 0
        odd: Mask = compressed & (bitmaps != 0)
        odd |= bitmaps & bitmaps >> np.uint64(SUBCLUSTERS) != 0
        odd |= ~compressed & unallocated & (bitmaps & low != 0)
        odd |= values & np.uint64(COMPRESSED | ZERO) == np.uint64(ZERO)
        return odd

    def _standard(self, values: Words) -> Clusters | None:
        """Places of the entries with a standard cluster; None if all are."""
        standard: Mask = values & np.uint64(OFFSET_MASK) != 0
        if self.data_file:
            flag = np.uint64(COPIED) if self.geometry.extended_l2 else np.uint64(COPIED | ZERO)
            standard |= values & flag == np.uint64(COPIED)
        standard &= values & np.uint64(COMPRESSED) == 0
        return None if standard.all() else np.flatnonzero(standard)

    def _fragmented(self, values: Words, places: Clusters | None) -> int:
        """Standard clusters that do not follow the one before them in their table."""
        chosen = values if places is None else values[places]
        apart = np.flatnonzero(np.diff(chosen & np.uint64(OFFSET_MASK)) != self.geometry.cluster_size)
        before, after = (apart, apart + 1) if places is None else (places[apart], places[apart + 1])
        size = self.geometry.l2_entries
        return int(np.count_nonzero(before // size == after // size))

    def _add_standard(
        self, values: Words, places: Clusters | None, suspects: Mask | None, batch: Batch
    ) -> Clusters | None:
        """Count standard clusters; places of the entries whose copied flag is wrong."""
        chosen = values if places is None else values[places]
        if self.data_file:
            wrong = np.flatnonzero(chosen & np.uint64(COPIED) == 0)
        else:
            wrong = self._miscopied(chosen) if batch.active and chosen.size else np.empty(0, np.int64)
            sound = chosen if suspects is None else chosen[~(suspects if places is None else suspects[places])]
            self._count_standard(sound, batch)
        if not batch.active:
            return None
        return wrong if places is None else places[wrong]

    def _count_standard(self, values: Words, batch: Batch) -> None:
        clusters = ((values & np.uint64(OFFSET_MASK)) >> np.uint64(self.geometry.cluster_bits)).view(np.int64)
        starts = self._run_starts(values)
        for use, weight in ((Use.DATA, batch.active), (Use.SNAPSHOT, batch.others)):
            if not weight or not values.size:
                continue
            if starts is None:
                self._counts[use].add_each(clusters, weight)
                continue
            for start, stop in pairwise(starts):
                first = int(clusters[start])
                self._counts[use].add_run(first, first + stop - start, weight)

    def _run_starts(self, values: Words) -> list[int] | None:
        """Where runs begin of entries that differ by one cluster and in no flag, and the end; None if they are short.

        Differences are taken modulo 2^64, so flags that change break a run too.
        """
        edges = np.flatnonzero(np.diff(values) != self.geometry.cluster_size) + 1
        return None if edges.size * _LONG_RUN > values.size else [0, *edges.tolist(), values.size]

    def _miscopied(self, values: Words) -> Clusters:
        """Places of entries whose copied flag contradicts the refcount on disk."""
        clusters = ((values & np.uint64(OFFSET_MASK)) >> np.uint64(self.geometry.cluster_bits)).view(np.int64)
        ones = self._ones_near()
        starts = self._run_starts(values)
        if starts is None or int(clusters.max(initial=0)) >= ones.size:
            return self._miscopied_each(values, clusters)
        found = [np.empty(0, np.int64)]
        for start, stop in pairwise(starts):
            first = int(clusters[start])
            wrong = ones[first : first + stop - start] != bool(int(values[start]) & COPIED)
            if wrong.any():
                found.append(np.flatnonzero(wrong) + start)
        return np.concatenate(found)

    def _miscopied_each(self, values: Words, clusters: Clusters) -> Clusters:
        near = self._ones_near()
        ones = near[np.minimum(clusters, near.size - 1)]
        for place in np.flatnonzero(clusters >= near.size).tolist():
            ones[place] = self.stored.get(int(clusters[place])) in (1, None)
        return np.flatnonzero(ones != (values & np.uint64(COPIED) != 0))

    def _add_compressed(self, values: Words, compressed: Mask, batch: Batch) -> None:
        first, last, _ = compressed_clusters(values[compressed], self.geometry)
        if not first.size:
            return
        weight, counts = batch.active + batch.others, self._counts[Use.COMPRESSED]
        base, stop = int(first.min()), int(last.max()) + 1
        self.clusters = max(self.clusters, stop)
        if stop - base <= 4 * first.size + _PIECE:
            steps = np.bincount(first - base, minlength=stop - base + 1)
            steps -= np.bincount(last + 1 - base, minlength=stop - base + 1)
            counts.add_steps(base, steps[:-1], weight)
            return
        for step in range(int((last - first).max()) + 1):
            counts.add_each((first + step)[last - first >= step], weight)

    # Copied flags

    def _ones_near(self) -> Mask:
        if self._is_one is None:
            self._is_one = np.zeros(self._near, np.bool_)
            per_block, at_once = self.geometry.refcounts_per_block, max(1, _COMPARED // self.geometry.cluster_size)
            for start, stop in _rows([*self.stored.indices()], at_once):
                part = self._is_one[start * per_block : stop * per_block]
                counts, readable = self._stored(range(start, stop), part.size)
                np.equal(counts, 1, out=part)
                if readable is not None:
                    part |= ~readable
        return self._is_one

    # Comparing

    def overflows(self) -> Iterator[tuple[int, int]]:
        if sum(counts.peak for counts in self._counts.values()) <= self.most:
            return
        for first, total, _ in self._totals():
            for place in np.flatnonzero(total > self.most).tolist():
                yield first + place, int(total[place])

    def compare(self) -> Iterator[Mismatch | Overlap]:
        pending: dict[type, Mismatch | Overlap] = {}
        for first, total, indices in self._totals():
            for found in self._judge(first, total, indices):
                last = pending.get(type(found))
                if last is not None and continues(last, found):
                    pending[type(found)] = joined(last, found)
                    continue
                if last is not None:
                    yield last
                pending[type(found)] = found
        yield from pending.values()

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
        found = set(self.stored.indices())
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
        for place in self._shared(first, first + total.size).tolist():
            cluster = first + place
            slices = {use: counts.slice(cluster, cluster + 1) for use, counts in self._counts.items()}
            uses = tuple((use, int(part[0])) for use, part in slices.items() if part is not None and part[0])
            yield Overlap(cluster, 1, uses)

    def _note_use(self, first: int, total: Refcounts, stored: Refcounts, readable: Mask | None) -> None:
        """Keep `highest` and `guest` up to date."""
        used: Mask = (total != 0) | (stored != 0)
        if readable is not None:
            used &= readable
        if used.any():
            self.highest = max(self.highest, first + used.size - 1 - int(used[::-1].argmax()))
        parts = [self._counts[use].slice(first, first + total.size) for use in GUEST]
        some = [part != 0 for part in parts if part is not None]
        if some:
            self.guest += int(np.count_nonzero(np.logical_or.reduce(some) if len(some) > 1 else some[0]))

    def _stored(self, indices: range, size: int) -> tuple[Refcounts, Mask | None]:
        """Refcounts on disk of the first `size` clusters of some blocks; where they can be read, None if everywhere."""
        blocks = [self.stored.block(index) for index in indices]
        empty = bytes(self.geometry.cluster_size)
        stored = refcounts(b"".join(block or empty for block in blocks), self.geometry.refcount_order)[:size]
        if None not in blocks:
            return stored, None
        readable = np.repeat([block is not None for block in blocks], self.geometry.refcounts_per_block)[:size]
        return stored, readable

    def _mismatches(self, first: int, total: Refcounts, stored: Refcounts, readable: Mask | None) -> Iterator[Mismatch]:
        references = np.minimum(total, self.most) if self.geometry.refcount_bits < 64 else total
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

    def _shared(self, first: int, stop: int) -> Clusters:
        """Places of clusters whose uses must not share one: `must_not_share`, over arrays."""
        parts = {use: counts.slice(first, stop) for use, counts in self._counts.items()}
        zero = np.zeros(stop - first, np.uint8)
        at = {use: zero if part is None else part for use, part in parts.items()}
        bad: Mask = at[Use.DATA] > 1
        if parts[Use.COMPRESSED] is not None:
            bad |= (at[Use.COMPRESSED] > 0) & ((at[Use.DATA] > 0) | (at[Use.SNAPSHOT] > 0))
        for use in (Use.STRUCTURE, Use.BITMAP):
            if parts[use] is None:
                continue
            owned = np.flatnonzero(at[use])  # few: the rest is guest data
            other = Use.BITMAP if use is Use.STRUCTURE else Use.STRUCTURE
            alone = at[use][owned] == 1
            for guest in (other, Use.DATA, Use.SNAPSHOT, Use.COMPRESSED):
                alone &= at[guest][owned] == 0
            bad[owned[~alone]] = True
        return np.flatnonzero(bad)


def _rows(numbers: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Numbers in a row as (first, last + 1), at most so many together."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1 or place - start >= most:
            yield numbers[start], numbers[place - 1] + 1
            start = place
