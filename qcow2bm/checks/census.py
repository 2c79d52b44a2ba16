"""How often each cluster is referred to, and by what kind of structure.

A census can be taken by two means: here with the readable truth of `format/entries.py`, which is quickest for small
images because it loads nothing; in `bulk.py` over whole tables with numpy. Both answer the same questions, and a
property test holds them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, pairwise
from operator import sub

from ..format.entries import L2Entry, table_entries
from ..format.geometry import Geometry
from .stored import StoredRefcounts


class Use(IntEnum):
    """What a reference is for. Clusters of guest data may be shared in ways in which tables may not."""

    STRUCTURE = 0
    """Header, L1 and L2 tables, refcounts, snapshot table, encryption header: each counts once."""
    BITMAP = 1
    """Bitmap directory, tables and data."""
    REPEATED = 2
    """Further L1 entries that name an L2 table which counts already."""
    DATA = 3
    """Standard clusters of the active disk."""
    SNAPSHOT = 4
    """Standard clusters of snapshots."""
    COMPRESSED = 5
    """Compressed clusters, of any disk: several may lie in one host cluster."""


GUEST = (Use.DATA, Use.SNAPSHOT, Use.COMPRESSED)
"""The uses that are guest data."""


@dataclass(frozen=True, slots=True)
class Batch:
    """L2 tables of one weight, read together.

    Attributes:
        offsets: host offset of each.
        data: their bytes, one table after the other.
        active: how many entries of the active L1 table name each of them.
        others: how many entries of snapshots' L1 tables do.
    """

    offsets: Sequence[int]
    data: memoryview
    active: int
    others: int


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What the entries of a batch of L2 tables came to, each table counted once.

    Attributes:
        allocated, fragmented, compressed: clusters as qemu-img's statistics count them.
        suspects: indices of tables with an entry that breaks the format, reaches outside the file, or looks like it.
        miscopied: indices of tables of the active disk with a copied flag that contradicts the refcount.
    """

    allocated: int
    fragmented: int
    compressed: int
    suspects: Sequence[int]
    miscopied: Sequence[int]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """`count` clusters from `first` on whose refcount on disk is `stored` and should be `references`."""

    first: int
    count: int
    stored: int
    references: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """`count` clusters from `first` on with uses that must not share a cluster, each use with how often."""

    first: int
    count: int
    uses: tuple[tuple[Use, int], ...]


class Census(ABC):
    """Counts references, then compares them with the refcounts on disk.

    Attributes:
        clusters: clusters of the file, or one more if a reference ends in the one after it.
        highest: the highest cluster that `compare` has seen used or counted.
        guest: how many clusters `compare` has seen that hold guest data, of the disk or of snapshots.
    """

    def __init__(
        self, geometry: Geometry, file_size: int, stored: StoredRefcounts, *, version: int, data_file: bool
    ) -> None:
        self.geometry = geometry
        self.file_size = file_size
        self.stored = stored
        self.version = version
        self.data_file = data_file
        self.clusters = geometry.clusters(file_size)
        self.highest = 0
        self.guest = 0

    def reaches_outside(self, offset: int, length: int) -> bool:
        """True if a range ends one cluster or more after the end of the file. The last cluster may be cut short."""
        return offset + length - self.file_size >= self.geometry.cluster_size

    def add(self, use: Use, offset: int, length: int, weight: int = 1) -> bool:
        """Count the clusters of a range; False, and nothing is counted, if it reaches outside the file."""
        if length <= 0 or weight <= 0:
            return True
        if self.reaches_outside(offset, length):
            return False
        stop = self.geometry.cluster_of(offset + length - 1) + 1
        self.clusters = max(self.clusters, stop)
        self.count(use, self.geometry.cluster_of(offset), stop, weight)
        return True

    def count_entry(self, entry: L2Entry, active: int, others: int, length: int = 1) -> bool:
        """Count what an entry and those that continue it, `length` in all, refer to.

        False if that reaches outside the file.
        """
        if entry.is_compressed and (self.data_file or entry.bitmap):
            return True
        place = entry.host_range(self.geometry, data_file=self.data_file)
        if place is None:
            return True
        if entry.is_compressed:
            return self.add(Use.COMPRESSED, *place, active + others)
        offset, size = place[0], place[1] * length
        return self.add(Use.DATA, offset, size, active) and self.add(Use.SNAPSHOT, offset, size, others)

    def add_l2_tables(self, offsets: Sequence[int], weight: int) -> None:
        """Count L2 tables, each named by `weight` L1 entries; those that reach outside the file are left out."""
        size = self.geometry.cluster_size
        plain = [offset for offset in offsets if self.geometry.is_aligned(offset) and offset + size <= self.file_size]
        self.count_each([self.geometry.cluster_of(offset) for offset in plain], weight)
        if len(plain) < len(offsets):
            for offset in set(offsets) - set(plain):
                self.add(Use.STRUCTURE, offset, size)
                self.add(Use.REPEATED, offset, size, weight - 1)

    @abstractmethod
    def count(self, use: Use, first: int, stop: int, weight: int) -> None:
        """Count `weight` references to each of the clusters from `first` up to `stop`."""

    @abstractmethod
    def count_each(self, clusters: Sequence[int], weight: int) -> None:
        """Count structures of one cluster each, once as such and `weight - 1` times as repeated."""

    def add_unshared(self, offsets: Sequence[int]) -> bool:
        """Count structures of one cluster each, if none of the clusters counts so far; False if nothing is counted.

        May say False where that is not so.
        """
        return not offsets

    def copied_rightly(self, l1_table: array[int]) -> bool:
        """True if the copied flags of all entries are right; may say False where they are."""
        return not any(l1_table)

    @abstractmethod
    def references(self, cluster: int) -> int:
        """How often a cluster is referred to."""

    @abstractmethod
    def add_tables(self, batch: Batch) -> TableFacts:
        """Count what the entries of L2 tables refer to."""

    def compare(self) -> Iterator[Mismatch | Overlap]:
        """What is not as it should be, in cluster order; neighbours that are alike are one.

        Clusters whose refcounts cannot be read are left out. References above what a refcount can hold are compared
        as the most it can hold: `overflows` has them.
        """
        pending: dict[type, Mismatch | Overlap] = {}
        for found in self.compared():
            last = pending.get(type(found))
            if last is not None and continues(last, found):
                pending[type(found)] = joined(last, found)
                continue
            if last is not None:
                yield last
            pending[type(found)] = found
        yield from pending.values()

    @abstractmethod
    def compared(self) -> Iterator[Mismatch | Overlap]:
        """As `compare`, in any pieces."""

    @abstractmethod
    def overflows(self) -> Iterator[tuple[int, int]]:
        """Pairs (cluster, references) of clusters with more references than a refcount can hold."""

    @property
    def most(self) -> int:
        """The largest refcount that this image can store."""
        return (1 << self.geometry.refcount_bits) - 1


class PlainCensus(Census):
    """Run by run: entries that follow each other are one range, and so are the clusters that they refer to."""

    def __init__(
        self, geometry: Geometry, file_size: int, stored: StoredRefcounts, *, version: int, data_file: bool
    ) -> None:
        super().__init__(geometry, file_size, stored, version=version, data_file=data_file)
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
            if entry.is_compressed and not (data_file or entry.bitmap):
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
        breaks = [at for at, step in enumerate(steps, 1) if step != size and (step or values[at])]
        for begin, stop in pairwise([0, *breaks, len(values)]):
            start = begin if values[begin] else begin + 1  # nothing, and then the second cluster of the file
            if start == stop:
                continue
            entry = L2Entry(values[start])
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


def must_not_share(uses: dict[Use, int]) -> bool:
    """True if one cluster cannot have all these uses."""
    owners = uses.get(Use.STRUCTURE, 0) + uses.get(Use.BITMAP, 0)
    data, compressed = uses.get(Use.DATA, 0), uses.get(Use.COMPRESSED, 0)
    guests = data + uses.get(Use.SNAPSHOT, 0)
    return owners > 1 or bool(owners and guests + compressed) or data > 1 or bool(guests and compressed)


def continues(last: Mismatch | Overlap, new: Mismatch | Overlap) -> bool:
    """True if `new` is what `last` is, and begins where it ends."""
    if last.first + last.count != new.first:
        return False
    if isinstance(last, Mismatch) and isinstance(new, Mismatch):
        return (last.stored, last.references) == (new.stored, new.references)
    return isinstance(last, Overlap) and isinstance(new, Overlap) and last.uses == new.uses


def joined(last: Mismatch | Overlap, new: Mismatch | Overlap) -> Mismatch | Overlap:
    """Both as one."""
    if isinstance(last, Mismatch):
        return Mismatch(last.first, last.count + new.count, last.stored, last.references)
    return Overlap(last.first, last.count + new.count, last.uses)
