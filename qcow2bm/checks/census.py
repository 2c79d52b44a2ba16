"""How often each cluster is referred to, and by what kind of structure.

A census is taken twice over by different means: here entry by entry with the readable truth of `format/entries.py`,
which is quickest for small images because it loads nothing; in `bulk.py` over whole tables with numpy. Both answer the
same questions, and a property test holds them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from ..format.entries import L2Entry, get_refcount, table_entries, used_clusters
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

    def __init__(self, geometry: Geometry, file_size: int, stored: StoredRefcounts, *, data_file: bool) -> None:
        self.geometry = geometry
        self.file_size = file_size
        self.stored = stored
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

    def count_entry(self, entry: L2Entry, active: int, others: int) -> bool:
        """Count what an entry refers to; False if that reaches outside the file."""
        if entry.is_compressed and (self.data_file or entry.bitmap):
            return True
        place = entry.host_range(self.geometry, data_file=self.data_file)
        if place is None:
            return True
        if entry.is_compressed:
            return self.add(Use.COMPRESSED, *place, active + others)
        return self.add(Use.DATA, *place, active) and self.add(Use.SNAPSHOT, *place, others)

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

    @abstractmethod
    def references(self, cluster: int) -> int:
        """How often a cluster is referred to."""

    @abstractmethod
    def add_tables(self, batch: Batch) -> TableFacts:
        """Count what the entries of L2 tables refer to."""

    @abstractmethod
    def compare(self) -> Iterator[Mismatch | Overlap]:
        """What is not as it should be, in cluster order.

        Clusters whose refcounts cannot be read are left out. References above what a refcount can hold are compared
        as the most it can hold: `overflows` has them.
        """

    @abstractmethod
    def overflows(self) -> Iterator[tuple[int, int]]:
        """Pairs (cluster, references) of clusters with more references than a refcount can hold."""

    @property
    def most(self) -> int:
        """The largest refcount that this image can store."""
        return (1 << self.geometry.refcount_bits) - 1


class PlainCensus(Census):
    """One entry at a time, in dictionaries."""

    def __init__(self, geometry: Geometry, file_size: int, stored: StoredRefcounts, *, data_file: bool) -> None:
        super().__init__(geometry, file_size, stored, data_file=data_file)
        self._counts: dict[Use, Counter[int]] = {use: Counter() for use in Use}

    def count(self, use: Use, first: int, stop: int, weight: int) -> None:
        counts = self._counts[use]
        for cluster in range(first, stop):
            counts[cluster] += weight

    def count_each(self, clusters: Sequence[int], weight: int) -> None:
        for cluster in clusters:
            self._counts[Use.STRUCTURE][cluster] += 1
            self._counts[Use.REPEATED][cluster] += weight - 1

    def references(self, cluster: int) -> int:
        return sum(counts[cluster] for counts in self._counts.values())

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
        values = table_entries(bytes(data))
        stride = geometry.l2_entry_words
        allocated = fragmented = compressed = expected = 0
        suspect = miscopied = False
        for at in range(0, len(values), stride):
            if not (values[at] or values[at + stride - 1]):
                continue
            entry = L2Entry(values[at], values[at + 1] if stride == 2 else 0)
            faulty = next(entry.faults(geometry, data_file=data_file), None) is not None
            suspect = suspect or faulty or not self.count_entry(entry, active, others)
            if entry.is_compressed and not (data_file or entry.bitmap):
                compressed += 1
            elif entry.is_standard(geometry, data_file=data_file):
                allocated += 1
                fragmented += bool(expected) and entry.host_offset != expected
                expected = entry.host_offset + geometry.cluster_size
                miscopied = miscopied or bool(active and self._is_miscopied(entry))
        suspects = [0] if suspect else []
        return TableFacts(
            allocated + compressed, fragmented + compressed, compressed, suspects, [0] if miscopied else []
        )

    def _is_miscopied(self, entry: L2Entry) -> bool:
        stored = 1 if self.data_file else self.stored.get(self.geometry.cluster_of(entry.host_offset))
        return stored is not None and (stored == 1) != entry.copied

    def overflows(self) -> Iterator[tuple[int, int]]:
        for cluster in sorted({cluster for counts in self._counts.values() for cluster in counts}):
            references = self.references(cluster)
            if references > self.most:
                yield cluster, references

    def compare(self) -> Iterator[Mismatch | Overlap]:
        used = {cluster for counts in self._counts.values() for cluster in counts}
        per_block, order = self.geometry.refcounts_per_block, self.geometry.refcount_order
        by_block: dict[int, set[int]] = {}
        for cluster in used:
            by_block.setdefault(cluster // per_block, set()).add(cluster)
        for index in sorted({*by_block, *self.stored.indices()}):
            base = index * per_block
            block = self.stored.block(index)
            found: list[Mismatch | Overlap] = []
            for cluster in sorted(_interesting(block, order, base) | by_block.get(index, set())):
                if cluster >= self.clusters:
                    break
                references = min(self.references(cluster), self.most) if cluster in used else 0
                stored = get_refcount(block, cluster - base, order) if block else 0
                if block is not None and (stored or references):
                    self.highest = max(self.highest, cluster)
                if block is not None and stored != references:
                    _append(found, Mismatch(cluster, 1, stored, references))
                if cluster in used:
                    self.guest += any(self._counts[use][cluster] for use in GUEST)
                    uses = tuple((use, counts[cluster]) for use, counts in self._counts.items() if counts[cluster])
                    if must_not_share(dict(uses)):
                        _append(found, Overlap(cluster, 1, uses))
            yield from found


def _interesting(block: bytes | None, order: int, base: int) -> set[int]:
    """The clusters with a refcount above 0; `base` is the first that the block counts."""
    return {base + within for within in used_clusters(block, order).search(1)} if block else set()


def must_not_share(uses: dict[Use, int]) -> bool:
    """True if one cluster cannot have all these uses."""
    owners = uses.get(Use.STRUCTURE, 0) + uses.get(Use.BITMAP, 0)
    data, compressed = uses.get(Use.DATA, 0), uses.get(Use.COMPRESSED, 0)
    guests = data + uses.get(Use.SNAPSHOT, 0)
    return owners > 1 or bool(owners and guests + compressed) or data > 1 or bool(guests and compressed)


def _append(found: list[Mismatch | Overlap], new: Mismatch | Overlap) -> None:
    """Join what continues the last of its kind."""
    last = next((index for index in range(len(found) - 1, -1, -1) if type(found[index]) is type(new)), None)
    if last is not None and continues(found[last], new):
        found[last] = joined(found[last], new)
    else:
        found.append(new)


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
