"""All index arithmetic of one image: what depends on the cluster size, the refcount order and extended L2 entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .limits import (
    MAX_BITMAP_BYTES,
    MAX_BITMAP_TABLE_ENTRIES,
    MAX_DEFAULT_GRANULARITY,
    MAX_FILE_SIZE,
    MIN_DEFAULT_GRANULARITY,
)

SUBCLUSTERS = 32
"""Subclusters in a cluster of an image with extended L2 entries."""
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1
"""A bit for each of them: one half of the subcluster bitmap."""

COMPRESSED_SECTOR = 512
DISK_SECTOR = 512
"""Bytes in which QEMU counts the length of a disk."""


def div_up(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `number`."""
    return div_up(number, multiple) * multiple


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Sorted numbers as runs (first, count)."""
    first, count = 0, 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def begins_outside(offset: int, length: int, unit: int, size: int) -> bool:
    """True if the last unit of a range, counted from where the range begins, begins at the end of a file or later.

    A file may end within the last cluster of a structure, for a writer need not fill it; but what of a structure
    begins behind the end was never written, or was lost. Nothing lies outside of an empty range.
    """
    return length > 0 and offset + (length - 1) // unit * unit >= size


def is_power_of_two(number: int) -> bool:
    """True for 1, 2, 4, 8 …"""
    return number > 0 and number & (number - 1) == 0


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of one image. Sizes and offsets are in bytes, indices count entries.

    Source: qcow2 specification, "Host cluster management", "Cluster mapping", "Bitmaps".
    """

    cluster_bits: int
    virtual_size: int
    refcount_order: int = 4
    extended_l2: bool = False

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    def clusters(self, length: int) -> int:
        """Clusters that `length` bytes take."""
        return div_up(length, self.cluster_size)

    def cluster_of(self, offset: int) -> int:
        """Number of the cluster that holds `offset`."""
        return offset >> self.cluster_bits

    def offset_of(self, cluster: int) -> int:
        """Offset at which a cluster starts."""
        return cluster << self.cluster_bits

    def is_aligned(self, offset: int) -> bool:
        """True where a cluster starts."""
        return offset & (self.cluster_size - 1) == 0

    def may_start(self, offset: int, length: int) -> bool:
        """True if a table of `length` bytes may start at `offset`: aligned, and within what QEMU can address."""
        return self.is_aligned(offset) and offset + length <= MAX_FILE_SIZE

    # The end of the file

    def is_outside(self, offset: int, length: int, file_size: int) -> bool:
        """True if a structure, or one of its clusters, begins at the end of the file or later: one rule for them all.

        Of a compressed cluster it is the last sector: see `streams_outside_from`.
        """
        return begins_outside(offset, length, self.cluster_size, file_size)

    @staticmethod
    def streams_outside_from(file_size: int) -> int:
        """A compressed stream that ends here or later lies outside the file: its last sector begins behind the end."""
        return round_up(file_size, COMPRESSED_SECTOR) + COMPRESSED_SECTOR

    def outside_for_qemu(self, file_size: int) -> int:
        """Any range that ends here or later is outside for QEMU's check, whatever there is of it before that."""
        return file_size + self.cluster_size

    # Cluster mapping

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry: 8, or 16 with the subcluster bitmap of extended L2."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entry_words(self) -> int:
        """64-bit words of an L2 entry, the first of which is the cluster descriptor."""
        return self.l2_entry_size // 8

    @property
    def compressed_offset_bits(self) -> int:
        """Bits of the host offset in a compressed cluster descriptor; the rest up to bit 61 counts sectors."""
        return 62 - (self.cluster_bits - 8)

    @property
    def l2_entries(self) -> int:
        """Entries in an L2 table, which is one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def l2_span(self) -> int:
        """Guest bytes that one L2 table maps."""
        return self.l2_entries * self.cluster_size

    @property
    def l1_entries(self) -> int:
        """L1 entries that the virtual size needs."""
        return div_up(self.virtual_size, self.l2_span)

    @property
    def subcluster_size(self) -> int:
        """Bytes in a subcluster; a whole cluster without extended L2 entries."""
        return self.cluster_size // SUBCLUSTERS if self.extended_l2 else self.cluster_size

    # Refcounts

    @property
    def refcount_bits(self) -> int:
        """Bits of one refcount."""
        return 1 << self.refcount_order

    @property
    def refcounts_per_block(self) -> int:
        """Refcounts in a refcount block, which is one cluster."""
        return self.cluster_size * 8 // self.refcount_bits

    # Bitmaps

    @property
    def default_granularity(self) -> int:
        """Granularity that QEMU gives a new bitmap: the cluster size, but at least 4 KiB and at most 64 KiB."""
        return min(max(self.cluster_size, MIN_DEFAULT_GRANULARITY), MAX_DEFAULT_GRANULARITY)

    def bitmap_bits(self, granularity: int) -> int:
        """Bits of a bitmap over the whole disk."""
        return div_up(self.virtual_size, granularity)

    def bitmap_bytes(self, granularity: int) -> int:
        """Bytes of a bitmap over the whole disk."""
        return div_up(self.bitmap_bits(granularity), 8)

    def bitmap_table_entries(self, granularity: int) -> int:
        """Entries of its bitmap table; QEMU loads a bitmap only when its table has exactly this size."""
        return self.clusters(self.bitmap_bytes(granularity))

    @property
    def max_bitmap_table_entries(self) -> int:
        """Entries of the largest bitmap table that QEMU takes."""
        return min(MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAP_BYTES // self.cluster_size)
