"""The census entry by entry, or rather run by run: for small images, where loading numpy would take longer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from operator import sub

from ..format.entries import OFFSET_MASK, L2Entry, table_entries
from ..format.geometry import Geometry
from .census import GUEST, Batch, Census, Mismatch, Overlap, TableFacts, Use, must_not_share
from .stored import StoredRefcounts

PLAIN_ENTRIES = 1 << 14
"""Entries of tables up to which plain Python is faster than loading numpy."""
PLAIN_BLOCKS = 64
"""The same of refcount blocks."""


class PlainCensus(Census):
    """Run by run: entries that follow each other are one range, and so are the clusters that they refer to."""

    def __init__(
        self,
        geometry: Geometry,
        file_size: int,
        stored: StoredRefcounts,
        *,
        version: int,
        data_file: bool,
        as_qemu: bool = False,
    ) -> None:
        super().__init__(geometry, file_size, stored, version=version, data_file=data_file, as_qemu=as_qemu)
        self._runs: list[tuple[int, int, Use, int]] = []

    def count(self, use: Use, first: int, stop: int, weight: int) -> None:
        self._runs.append((first, stop, use, weight))

    def count_each(self, clusters: Sequence[int], weight: int) -> None:
        for cluster in clusters:
            self.count(Use.STRUCTURE, cluster, cluster + 1, 1)
            if weight > 1:
                self.count(Use.REPEATED, cluster, cluster + 1, weight - 1)

    def references(self, cluster: int) -> int:
        return sum(weight for first, stop, _, weight in self._runs if first <= cluster < stop)

    # L2 tables

    def add_tables(self, batch: Batch) -> TableFacts:
        size = self.geometry.cluster_size
        found = [
            self._add_table(batch.data[start : start + size], batch.active, batch.others)
            for start in range(0, len(batch.data), size)
        ]
        return TableFacts(
            allocated=sum(table.allocated for table in found),
            fragmented=sum(table.fragmented for table in found),
            compressed=sum(table.compressed for table in found),
            suspects=[index for index, table in enumerate(found) if table.suspects],
            miscopied=[index for index, table in enumerate(found) if table.miscopied],
        )

    def _add_table(self, data: memoryview, active: int, others: int) -> TableFacts:
        geometry, data_file = self.geometry, self.data_file
        allocated = fragmented = compressed = expected = 0
        suspect = miscopied = False
        for entry, length in self._entry_runs(bytes(data)):
            faulty = next(entry.faults(geometry, version=self.version, data_file=data_file), None) is not None
            suspect = suspect or faulty
            suspect = not self.count_entry(entry, active, others, length) or suspect
            if entry.is_stream(data_file=data_file):
                compressed += 1
            elif entry.is_standard(geometry, data_file=data_file):
                allocated += length
                fragmented += bool(expected) and entry.host_offset != expected
                expected = entry.host_offset + length * geometry.cluster_size
                miscopied = miscopied or bool(active and self._is_miscopied(entry, length))
        return TableFacts(
            allocated + compressed,
            fragmented + compressed,
            compressed,
            [0] if suspect else [],
            [0] if miscopied else [],
        )

    def _entry_runs(self, data: bytes) -> Iterator[tuple[L2Entry, int]]:
        """Entries that are not zero; those that differ from the one before by one cluster, and in no flag, with it.

        Compressed ones, extended ones and those that go past the end of the file come one by one.
        """
        values, size = table_entries(data), self.geometry.cluster_size
        if self.geometry.extended_l2:
            for value, bitmap in zip(values[::2], values[1::2], strict=True):
                if value or bitmap:
                    yield L2Entry(value, bitmap), 1
            return
        steps = map(sub, values[1:], values)
        # The second cluster of the file does not continue an entry of 0, with flags or without: that names no cluster.
        # An entry of 0 continues another.
        breaks = [
            at
            for at, step in enumerate(steps, 1)
            if (step != size or not values[at - 1] & OFFSET_MASK) and (step or values[at])
        ]
        for start, stop in pairwise([0, *breaks, len(values)]):
            entry = L2Entry(values[start])
            if not entry.value:
                continue
            together = not entry.is_compressed and self._ends_inside(entry, stop - start)
            for at in (start,) if together else range(start, stop):
                yield L2Entry(values[at]), stop - start if together else 1

    def _ends_inside(self, entry: L2Entry, length: int) -> bool:
        return self.data_file or entry.host_offset + length * self.geometry.cluster_size <= self.file_size

    def _is_miscopied(self, entry: L2Entry, length: int) -> bool:
        if self.data_file:
            return not entry.copied
        first = self.geometry.cluster_of(entry.host_offset)
        if entry.copied:
            return not self.stored.all_are(1, first, first + length)
        return any(self.stored.get(cluster) == 1 for cluster in range(first, first + length))

    # Comparing

    def overflows(self) -> Iterator[tuple[int, int]]:
        for first, stop, uses in self._segments():
            references = sum(uses.values())
            if references > self.most:
                yield from ((cluster, references) for cluster in range(first, stop))

    def compared(self) -> Iterator[Mismatch | Overlap]:
        at = 0
        for first, stop, uses in chain(self._segments(), [(self.clusters, self.clusters, {})]):
            yield from self._judge(at, first, 0)
            yield from self._judge(first, stop, min(sum(uses.values()), self.most))
            if any(use in uses for use in GUEST):
                self.guest += stop - first
            if must_not_share(uses):
                yield Overlap(first, stop - first, tuple(sorted(uses.items())))
            at = stop

    def _segments(self) -> Iterator[tuple[int, int, dict[Use, int]]]:
        """Ranges of clusters with the same uses, in order, without those that have none."""
        changes: dict[int, Counter[Use]] = {}
        for first, stop, use, weight in self._runs:
            changes.setdefault(first, Counter())[use] += weight
            changes.setdefault(stop, Counter())[use] -= weight
        uses: Counter[Use] = Counter()
        for first, stop in pairwise([*sorted(changes), 0]):
            uses.update(changes[first])
            uses = +uses  # without those that have come to 0
            if uses:
                yield first, stop, dict(uses)

    def _judge(self, first: int, stop: int, references: int) -> Iterator[Mismatch]:
        """Clusters that should all have one refcount."""
        for start, end, block in self.stored.pieces(first, stop, every=references > 0) if first < stop else ():
            if block is None:
                continue
            if self.stored.all_are(references, start, end):
                self.highest = max(self.highest, end - 1) if references else self.highest
                continue
            for cluster in range(start, end):
                stored = self.stored.get(cluster) or 0
                if stored or references:
                    self.highest = max(self.highest, cluster)
                if stored != references:
                    yield Mismatch(cluster, 1, stored, references)
