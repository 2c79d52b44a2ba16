"""How often each cluster is referred to, and by what kind of structure.

A census can be taken by two means: in `plain.py` with the readable truth of `format/entries.py`, which is quickest for
small images because it loads nothing; in `bulk.py` over whole tables with numpy. Both answer the same questions, and a
property test holds them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from ..format.entries import COPIED, L2Entry, equal_entries
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
        as_qemu: what lies outside the file is what QEMU's check takes for it: less than there is.
        clusters: clusters of the file, or one more if a reference ends in the one after it.
        highest: the highest cluster that `compare` has seen used or counted.
        guest: how many clusters `compare` has seen that hold guest data, of the disk or of snapshots.
    """

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
        self.as_qemu = as_qemu
        self.geometry = geometry
        self.file_size = file_size
        self.stored = stored
        self.version = version
        self.data_file = data_file
        self.clusters = geometry.clusters(file_size)
        self.highest = 0
        self.guest = 0

    def reaches_outside(self, offset: int, length: int) -> bool:
        """True if a structure, or a standard cluster, lies outside the file."""
        if self.as_qemu:
            return length > 0 and offset + length >= self.geometry.outside_for_qemu(self.file_size)
        return self.geometry.is_outside(offset, length, self.file_size)

    @property
    def streams_outside_from(self) -> int:
        """Compressed streams that end here or later lie outside the file."""
        if self.as_qemu:
            return self.geometry.outside_for_qemu(self.file_size)
        return self.geometry.streams_outside_from(self.file_size)

    def outside_of(self, entry: L2Entry) -> tuple[int, int] | None:
        """What an L2 entry refers to in this file, as offset and length, if that lies outside; None if it does not."""
        place = entry.host_range(self.geometry, data_file=self.data_file)
        if place is None:
            return None
        is_outside = sum(place) >= self.streams_outside_from if entry.is_compressed else self.reaches_outside(*place)
        return place if is_outside else None

    def add(self, use: Use, offset: int, length: int, weight: int = 1) -> bool:
        """Count the clusters of a range; False, and nothing is counted, if it reaches outside the file."""
        if weight <= 0:
            return True
        if self.reaches_outside(offset, length):
            return False
        self._add_inside(use, offset, length, weight)
        return True

    def _add_inside(self, use: Use, offset: int, length: int, weight: int) -> None:
        if length <= 0:
            return
        stop = self.geometry.cluster_of(offset + length - 1) + 1
        self.clusters = max(self.clusters, stop)
        self.count(use, self.geometry.cluster_of(offset), stop, weight)

    def count_entry(self, entry: L2Entry, active: int, others: int, length: int = 1) -> bool:
        """Count what an entry and those that continue it, `length` in all, refer to.

        False if that reaches outside the file.
        """
        if entry.is_compressed and not entry.is_stream(data_file=self.data_file):
            return True
        place = entry.host_range(self.geometry, data_file=self.data_file)
        if place is None:
            return True
        if entry.is_compressed:
            if self.outside_of(entry) is not None:
                return False
            self._add_inside(Use.COMPRESSED, *place, active + others)
            return True
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

    def doubtful_copied(
        self,
        l1_table: array[int],
        tables: Collection[int],  # noqa: ARG002
    ) -> Iterator[tuple[int, int]]:
        """L1 entries whose copied flag may be wrong, or that name one of these L2 tables; may say more.

        As ranges of indices; all entries of a range are the same.
        """
        return ((start, stop) for entry, start, stop in equal_entries(l1_table) if entry)

    def miscopied(self, values: array[int]) -> Iterator[int]:
        """Indices of the entries of an L2 table whose copied flag contradicts the refcount, where that is known."""
        for index, value in enumerate(values):
            entry = L2Entry(value)
            if value and entry.is_standard(self.geometry, data_file=self.data_file):
                stored = 1 if self.data_file else self.stored.get(self.geometry.cluster_of(entry.host_offset))
                if stored is not None and (stored == 1) != entry.copied:
                    yield index

    def miscopied_entries(self, values: array[int]) -> int:
        """How many entries of an L2 table those are."""
        return sum(1 for _ in self.miscopied(values))

    def miscopied_runs(self, values: array[int]) -> Iterator[tuple[int, int]]:
        """The same as ranges of indices; the flag is the same in all of a range."""
        start = stop = -1
        for index in self.miscopied(values):
            if index == stop and not (values[index] ^ values[start]) & COPIED:
                stop += 1
                continue
            if stop > start:
                yield start, stop
            start, stop = index, index + 1
        if stop > start:
            yield start, stop

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
