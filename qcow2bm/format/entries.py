"""What one entry of a table means: L1, L2, extended L2, compressed, refcount table, refcount block, bitmap table.

This is the readable truth, one entry at a time. With numpy `vectors.py` says over whole tables what they refer to, and
`checks/wrong.py` what is wrong with them; property tests hold each to this.

Source: qcow2 specification, "Cluster mapping", "Extended L2 Entries", "Host cluster management", "Bitmap table".
"""

from __future__ import annotations

import functools
import operator
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from bitarray import bitarray
from bitarray.util import ones

from ..errors import CorruptImageError
from .faults import Fault
from .geometry import ALL_SUBCLUSTERS, COMPRESSED_SECTOR, SUBCLUSTERS, Geometry

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
"""Bits 9..55: the host offset in L1, standard L2 and bitmap table entries."""
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
"""Reserved bits of a standard cluster descriptor."""
REFCOUNT_BLOCK_MASK = 0xFFFF_FFFF_FFFF_FE00
"""Bits 9..63: the host offset in a refcount table entry."""
REFCOUNT_BLOCK_RESERVED = 0x1FF
ALL_ONES = 1 << 0

BITMAP_RESERVED = ~(OFFSET_MASK | ALL_ONES) & (1 << 64) - 1


def bits_of_no_data(geometry: Geometry) -> int:
    """Bits that no sound entry of a bitmap table has which names a data cluster."""
    return BITMAP_RESERVED | ALL_ONES | geometry.cluster_size - 1


def all_sound(table: array[int], geometry: Geometry, file_size: int) -> bool:
    """True if no entry of a bitmap table breaks the format or names data that begins behind the end of the file."""
    named = [value for value in table if value > ALL_ONES]
    return not named or (
        max(named) < file_size and not functools.reduce(operator.or_, named) & bits_of_no_data(geometry)
    )


def _big_endian(data: bytes | array[int], typecode: str) -> array[int]:
    """`data` with the bytes of each item turned round on a little-endian machine: to native integers and back."""
    items = array(typecode, data)
    if sys.byteorder == "little":
        items.byteswap()
    return items


def table_entries(data: bytes) -> array[int]:
    """The 64-bit big-endian entries of a table as native integers."""
    return _big_endian(data, "Q")


def table_bytes(entries: array[int]) -> bytes:
    """The table of 64-bit big-endian entries."""
    return _big_endian(entries, "Q").tobytes()


def equal_entries(table: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Entries in a row that are the same: their value, the index of the first, and of the one behind the last."""
    stop = 0
    for value, group in groupby(table):
        start, stop = stop, stop + sum(1 for _ in group)
        yield value, start, stop


class ClusterKind(Enum):
    """What the guest finds at a cluster or subcluster."""

    UNALLOCATED = "unallocated"
    """Nothing here: the backing file's content, or zeroes."""
    ZERO = "zero"
    """Reads as zeroes, no host cluster."""
    ZERO_ALLOCATED = "zero-allocated"
    """Reads as zeroes, a host cluster is kept for later."""
    DATA = "data"
    COMPRESSED = "compressed"


@dataclass(frozen=True, slots=True)
class CompressedDescriptor:
    """A compressed cluster: where its stream starts, and the bytes up to the end of its last 512-byte sector."""

    offset: int
    length: int

    @classmethod
    def parse(cls, entry: int, geometry: Geometry) -> CompressedDescriptor:
        """Decode bits 0..61 of an L2 entry with bit 62 set."""
        shift = geometry.compressed_offset_bits
        offset = entry & (1 << shift) - 1
        additional = (entry & COMPRESSED - 1) >> shift
        return cls(offset, (additional + 1) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR)

    def build(self, geometry: Geometry) -> int:
        """The L2 entry.

        Raises:
            CorruptImageError: offset or length do not fit the descriptor of this cluster size.
        """
        shift = geometry.compressed_offset_bits
        additional = (self.offset + self.length - 1) // COMPRESSED_SECTOR - self.offset // COMPRESSED_SECTOR
        if self.offset >> shift or additional >> 62 - shift or self.length <= 0:
            raise CorruptImageError("a compressed cluster does not fit its descriptor")
        return COMPRESSED | additional << shift | self.offset


@dataclass(frozen=True, slots=True)
class L2Entry:
    """An L2 entry with, for extended L2, its subcluster bitmap (bits 0..31 allocated, 32..63 read as zeroes)."""

    value: int
    bitmap: int = 0

    @classmethod
    def of(cls, words: Sequence[int], index: int, geometry: Geometry) -> L2Entry:
        """Entry `index` of an L2 table that is given as 64-bit words."""
        if not geometry.extended_l2:
            return cls(words[index])
        return cls(words[2 * index], words[2 * index + 1])

    def build(self, geometry: Geometry) -> bytes:
        """The entry's 8 bytes, or 16 with its subcluster bitmap."""
        words = (self.value, self.bitmap)[: geometry.l2_entry_words]
        return b"".join(word.to_bytes(8, "big") for word in words)

    @property
    def is_compressed(self) -> bool:
        """True if the entry is a compressed cluster descriptor."""
        return bool(self.value & COMPRESSED)

    @property
    def host_offset(self) -> int:
        """Host offset of a standard cluster, 0 if there is none."""
        return 0 if self.is_compressed else self.value & OFFSET_MASK

    @property
    def copied(self) -> bool:
        """True if the refcount is exactly one, as far as the flag can be trusted."""
        return bool(self.value & COPIED)

    def kind(self, geometry: Geometry, *, data_file: bool = False) -> ClusterKind:
        """What the whole cluster is; for extended L2 use `subcluster_kind`. An offset of 0 is real in a data file."""
        if self.is_compressed:
            return ClusterKind.COMPRESSED
        allocated = self.host_offset or (data_file and self.copied)
        if self.value & ZERO and not geometry.extended_l2:
            return ClusterKind.ZERO_ALLOCATED if allocated else ClusterKind.ZERO
        return ClusterKind.DATA if allocated else ClusterKind.UNALLOCATED

    def subcluster_kind(self, index: int, *, data_file: bool = False) -> ClusterKind:
        """What subcluster `index` (0..31) of an extended L2 entry is."""
        if self.is_compressed:
            return ClusterKind.COMPRESSED
        allocated = self.host_offset or (data_file and self.copied)
        if self.bitmap >> SUBCLUSTERS + index & 1:
            return ClusterKind.ZERO_ALLOCATED if allocated else ClusterKind.ZERO
        return ClusterKind.DATA if allocated and self.bitmap >> index & 1 else ClusterKind.UNALLOCATED

    def is_standard(self, geometry: Geometry, *, data_file: bool = False) -> bool:
        """True if the entry has a cluster of its own, for data or for zeroes: what the copied flag is about."""
        if self.is_compressed:
            return False
        zero = self.value & ZERO and not geometry.extended_l2
        return bool(self.host_offset) or (data_file and self.copied and not zero)

    def is_stream(self, *, data_file: bool = False) -> bool:
        """True if the entry is a compressed cluster that takes host clusters, as QEMU counts them.

        Beside an external data file, or with a subcluster bitmap, it is a fault and takes none.
        """
        return self.is_compressed and not (data_file or self.bitmap)

    def faults(self, geometry: Geometry, *, version: int = 3, data_file: bool = False) -> Iterator[Fault]:
        """What breaks the format in the entry by itself, in the order of `check_refcounts_l2`."""
        if self.is_compressed:
            yield from self._compressed_faults(data_file=data_file)
            return
        if self.value & L2_RESERVED:
            yield Fault("l2-entry-reserved", f"L2 entry {self.value:#x} has reserved bits set")
        if self.value & ZERO and (version == 2 or geometry.extended_l2):
            yield Fault("zero-flag-reserved", f"L2 entry {self.value:#x} has a zero flag, which this image cannot have")
        allocated, zeroes = self.bitmap & ALL_SUBCLUSTERS, self.bitmap >> SUBCLUSTERS
        if not self.is_standard(geometry, data_file=data_file):
            if allocated:
                text = f"L2 entry {self.value:#x} has no cluster, but its bitmap {self.bitmap:#x} allocates subclusters"
                yield Fault("subclusters-unallocated", text)
            return
        if allocated & zeroes:
            text = f"subcluster bitmap {self.bitmap:#x} says both allocated and zero of the same subclusters"
            yield Fault("subclusters-contradict", text)
        if not geometry.is_aligned(self.host_offset):
            holds_data = allocated if geometry.extended_l2 else not self.value & ZERO
            kind, what = ("data", "data") if holds_data else ("zero", "preallocated zero")
            yield Fault(f"{kind}-unaligned", f"{what} cluster at {self.host_offset:#x} is not cluster-aligned")

    def _compressed_faults(self, *, data_file: bool) -> Iterator[Fault]:
        if self.copied:
            yield Fault("compressed-copied", f"compressed cluster {self.value:#x} has the copied flag")
        if data_file:
            yield Fault("compressed-data-file", f"compressed cluster {self.value:#x} although data lies in a data file")
        elif self.bitmap:
            text = f"compressed cluster {self.value:#x} has a subcluster bitmap {self.bitmap:#x}"
            yield Fault("compressed-subclusters", text)

    def host_range(self, geometry: Geometry, *, data_file: bool = False) -> tuple[int, int] | None:
        """Offset and length of what the entry refers to in *this* file, or None."""
        if self.is_compressed:
            descriptor = CompressedDescriptor.parse(self.value, geometry)
            return descriptor.offset, descriptor.length
        if data_file or not self.host_offset:
            return None
        return self.host_offset, geometry.cluster_size


def l1_offset(entry: int) -> int:
    """Host offset of the L2 table an L1 entry names, 0 if none."""
    return entry & OFFSET_MASK


def refcount_block_offset(entry: int) -> int:
    """Host offset of the refcount block a refcount table entry names, 0 if none."""
    return entry & REFCOUNT_BLOCK_MASK


@dataclass(frozen=True, slots=True)
class BitmapTableEntry:
    """One entry of a bitmap table: a data cluster, all zeroes, or all ones."""

    value: int

    @property
    def offset(self) -> int:
        """Host offset of the data cluster, 0 if there is none."""
        return self.value & OFFSET_MASK

    @property
    def all_ones(self) -> bool:
        """True if the whole chunk is ones without a data cluster."""
        return self.value == ALL_ONES

    def fault(self, geometry: Geometry) -> Fault | None:
        """Why QEMU would refuse the entry (`check_table_entry`), if it would."""
        if self.value & BITMAP_RESERVED:
            return Fault("bitmap-entry-reserved", f"entry {self.value:#x} has reserved bits set")
        if self.offset and self.value & ALL_ONES:
            return Fault("bitmap-entry-all-ones", f"entry {self.value:#x} has an offset and the all-ones bit")
        if not geometry.is_aligned(self.offset):
            return Fault("bitmap-entry-unaligned", f"entry {self.value:#x} is not cluster-aligned")
        return None


def get_refcount(block: bytes | bytearray, index: int, order: int) -> int:
    """Refcount `index` of a refcount block. Below 8 bits the first one is the least significant of its byte."""
    if order < 3:
        bits = 1 << order
        return block[index * bits // 8] >> index * bits % 8 & (1 << bits) - 1
    width = 1 << order - 3
    return int.from_bytes(block[index * width : (index + 1) * width], "big")


def set_refcount(block: bytearray, index: int, order: int, value: int) -> int:
    """Store a refcount in a refcount block; returns the offset of its first byte.

    Raises:
        OverflowError: `value` does not fit the refcount order.
    """
    if value >> (1 << order):
        raise OverflowError(f"refcount {value} does not fit into {1 << order} bits")
    if order < 3:
        bits = 1 << order
        at, shift = divmod(index * bits, 8)
        block[at] = block[at] & ~((1 << bits) - 1 << shift) | value << shift
        return at
    width = 1 << order - 3
    block[index * width : (index + 1) * width] = value.to_bytes(width, "big")
    return index * width


def used_clusters(block: bytes, order: int) -> bitarray:
    """One bit per refcount of a refcount block, in cluster order: 1 where it is not zero."""
    if order < 3:
        bits = bitarray(buffer=block, endian="little")
        width = 1 << order
    else:
        width = 1 << order - 3
        if 0 not in block[width - 1 :: width]:  # low bytes tell it most of the time, and much faster
            return ones(len(block) // width, "little")
        bits = bitarray(endian="little")
        bits.pack(block)
    used = bits[0::width]
    for part in range(1, width):
        used |= bits[part::width]
    return used
