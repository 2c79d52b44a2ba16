"""The qcow2 header, versions 2 and 3.

Source: qcow2 specification, "Header", "Additional fields", "Header padding". Version 2 has the first 72 bytes only;
version 3 goes on to `header_length`. What lies between the last field known here and `header_length` is kept byte
for byte, because the specification asks whoever rewrites a header to preserve it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag

from construct import Bytes, ConstructError, Int32ub, Int64ub, Struct

from ..errors import (
    CorruptImageError,
    InterruptedChangeError,
    NotQcow2Error,
    TruncatedImageError,
    UnsupportedImageError,
    UnsupportedVersionError,
)
from .faults import Fault, Weight
from .geometry import DISK_SECTOR, SUBCLUSTERS, Geometry, div_up
from .limits import (
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_ENTRIES,
    MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
)

MAGIC = b"QFI\xfb"
MIN_EXTENDED_CLUSTER = SUBCLUSTERS * 512
SNAPSHOT_HEAD = 40
"""Bytes that a snapshot table entry has at least."""
UNKNOWN_INCOMPATIBLE = "unknown-incompatible"
"""Code of the one fault that a newer program would not call a fault."""
CUT_SHORT = 1 << 62
"""incompatible_features: a bit that nobody defines, set by qcow2bm while it writes what a crash could tear."""
CHANGE_CUT_SHORT = "change-cut-short"
"""Code of the fault that it is still there."""


class Incompatible(IntFlag):
    """incompatible_features: whoever does not know a set bit must not open the image."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """compatible_features: may be ignored."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """autoclear_features: whoever writes to the image clears the bits it does not know."""

    BITMAPS = 1 << 0
    RAW_EXTERNAL_DATA = 1 << 1


KNOWN_INCOMPATIBLE = Incompatible(sum(Incompatible))
KNOWN_AUTOCLEAR = Autoclear(sum(Autoclear))

ENCRYPTION = {0: "none", 1: "aes", 2: "luks"}
COMPRESSION = {0: "zlib", 1: "zstd"}

V2_STRUCT = Struct(
    "magic" / Bytes(4),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)

V3_STRUCT = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)

V2_LENGTH = V2_STRUCT.sizeof()
V3_LENGTH = V2_LENGTH + V3_STRUCT.sizeof()


def field_offset(name: str) -> int:
    """Offset of a field in the header, by its name in the specification."""
    fields = [*V2_STRUCT.subcons, *V3_STRUCT.subcons]
    index = next(index for index, part in enumerate(fields) if part.name == name)
    return sum(part.sizeof() for part in fields[:index])


BACKING_FILE_FIELDS = field_offset("backing_file_offset")
"""Offset of backing_file_offset (8 bytes) and backing_file_size (4 bytes)."""
CLUSTER_BITS_FIELD = field_offset("cluster_bits")
"""Offset of cluster_bits (4 bytes)."""
SIZE_FIELD = field_offset("size")
"""Offset of size (8 bytes), the virtual size."""
L1_FIELDS = field_offset("l1_size")
"""Offset of l1_size (4 bytes) and l1_table_offset (8 bytes)."""
REFCOUNT_TABLE_FIELDS = field_offset("refcount_table_offset")
"""Offset of refcount_table_offset (8 bytes) and refcount_table_clusters (4 bytes): one sector, they switch together."""
SNAPSHOT_FIELDS = field_offset("nb_snapshots")
"""Offset of nb_snapshots (4 bytes) and snapshots_offset (8 bytes): one sector, they switch together."""
INCOMPATIBLE_FIELD = field_offset("incompatible_features")
"""Offset of incompatible_features (8 bytes)."""
AUTOCLEAR_FIELD = field_offset("autoclear_features")
"""Offset of autoclear_features (8 bytes)."""
HEADER_LENGTH_FIELD = field_offset("header_length")
"""Offset of header_length (4 bytes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header's fields under the specification's names. Offsets and sizes in bytes; `l1_size` counts entries.

    `additional` holds the bytes from 104 up to `header_length`: the compression type and whatever is not known here.
    """

    version: int
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int
    size: int
    crypt_method: int = 0
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: Incompatible = Incompatible(0)
    compatible_features: Compatible = Compatible(0)
    autoclear_features: Autoclear = Autoclear(0)
    refcount_order: int = 4
    header_length: int = V2_LENGTH
    additional: bytes = b""

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """The header at the start of `data`, which may be longer than it.

        Raises:
            NotQcow2Error: no qcow2 magic.
            UnsupportedImageError: a version other than 2 and 3.
            TruncatedImageError: `data` ends within the header.
        """
        if data[:4] != MAGIC:
            raise NotQcow2Error("not a qcow2 image", hint="qcow2bm reads qcow2 and nothing else")
        try:
            fields = dict(V2_STRUCT.parse(data))
            del fields["_io"], fields["magic"]
            if fields["version"] not in (2, 3):
                raise UnsupportedVersionError(fields["version"])
            if fields["version"] == 2:
                return cls(**fields)
            fields |= V3_STRUCT.parse(data[V2_LENGTH:])
            del fields["_io"]
        except ConstructError:
            raise TruncatedImageError("the file ends within the qcow2 header") from None
        length = fields["header_length"]
        if len(data) < length <= 1 << MAX_CLUSTER_BITS:
            raise TruncatedImageError("the file ends within the qcow2 header")
        return cls(
            **fields
            | {
                "incompatible_features": Incompatible(fields["incompatible_features"]),
                "compatible_features": Compatible(fields["compatible_features"]),
                "autoclear_features": Autoclear(fields["autoclear_features"]),
                "additional": data[V3_LENGTH:length],
            }
        )

    def build(self) -> bytes:
        """The header's bytes: 72 for version 2, `header_length` for version 3."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        head: bytes = V2_STRUCT.build(fields | {"magic": MAGIC})
        if self.version == 2:
            return head
        tail: bytes = V3_STRUCT.build(
            fields | {name: int(fields[name]) for name in fields if name.endswith("_features")}
        )
        return head + tail + self.additional

    @property
    def compression_type(self) -> int:
        """0 zlib, 1 zstd; a header too short for the field means 0."""
        return self.additional[0] if self.additional else 0

    @property
    def geometry(self) -> Geometry:
        """The index arithmetic that follows from this header.

        QEMU counts a disk in whole sectors; what there is of another one is no part of it.
        """
        return Geometry(
            cluster_bits=self.cluster_bits,
            virtual_size=self.size // DISK_SECTOR * DISK_SECTOR,
            refcount_order=self.refcount_order,
            extended_l2=bool(self.incompatible_features & Incompatible.EXTENDED_L2),
        )

    @property
    def has_data_file(self) -> bool:
        """True if guest clusters live in an external data file."""
        return bool(self.incompatible_features & Incompatible.EXTERNAL_DATA_FILE)

    @property
    def encrypts_by_place(self) -> bool:
        """True if how guest data is encrypted depends on where in the file it lies: LUKS, and not the older AES."""
        return ENCRYPTION.get(self.crypt_method) == "luks"

    def faults(self) -> Iterator[Fault]:
        """What QEMU would refuse to open, in the order in which `qcow2_do_open` looks, and what it does not look at."""
        yield from self._shape_faults()
        if MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS and self.refcount_order <= MAX_REFCOUNT_ORDER:
            yield from self._backing_name_faults()
            yield from self._table_faults()

    def validate(self) -> None:
        """Check what every later computation relies on, within QEMU's own limits.

        Raises:
            CorruptImageError: a field is out of bounds.
            InterruptedChangeError: a change was cut short.
            UnsupportedImageError: an incompatible feature is set that is not known here.
        """
        for fault in self.faults():
            if fault.code == CHANGE_CUT_SHORT:
                raise InterruptedChangeError(fault.message, hint=f"`qcow2bm explain {fault.code}`", code=fault.code)
            if fault.code == UNKNOWN_INCOMPATIBLE:
                raise UnsupportedImageError(fault.message, hint="a newer QEMU wrote it", code=fault.code)
            if fault.weight is not Weight.MINOR:
                raise CorruptImageError(fault.message, code=fault.code)

    def _shape_faults(self) -> Iterator[Fault]:
        """What the whole geometry hangs on, and feature bits."""
        if not MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS:
            text = f"cluster size 2^{self.cluster_bits} is not between 512 bytes and 2 MiB"
            yield Fault("header-cluster-bits", text, Weight.FATAL)
            return
        length, room = self.header_length, 1 << self.cluster_bits
        if not (V2_LENGTH if self.version == 2 else V3_LENGTH) <= length <= room:
            text = f"header_length {length} is not between {V3_LENGTH} and the cluster size"
            yield Fault("header-length", text, Weight.FATAL)
        elif length % 8:
            yield Fault("header-length-odd", f"header_length {length} is not a multiple of 8")
        yield from self._feature_faults()
        if self.refcount_order > MAX_REFCOUNT_ORDER:
            text = f"refcount order {self.refcount_order} is above {MAX_REFCOUNT_ORDER}"
            yield Fault("header-refcount-order", text, Weight.FATAL)
        if self.crypt_method not in ENCRYPTION:
            yield Fault("encryption-method", f"encryption method {self.crypt_method} is not known")

    def _feature_faults(self) -> Iterator[Fault]:
        kind, bit = self.compression_type, bool(self.incompatible_features & Incompatible.COMPRESSION_TYPE)
        if kind not in COMPRESSION:
            yield Fault("compression-type-unknown", f"compression type {kind} is not known")
        elif bit != bool(kind):
            text = f"compression type {COMPRESSION[kind]} and the feature bit for it contradict each other"
            yield Fault("compression-type-bit", text)
        # As plain numbers: the inverse of an IntFlag knows no bits above the highest one defined.
        unknown = int(self.incompatible_features) & ~int(KNOWN_INCOMPATIBLE)
        if unknown & CUT_SHORT:
            text = "a crash has cut a change of qcow2bm short, and its journal is not beside the image"
            yield Fault(CHANGE_CUT_SHORT, text)
            unknown &= ~CUT_SHORT
        if unknown:
            yield Fault(UNKNOWN_INCOMPATIBLE, f"unknown incompatible features {unknown:#x}")
        if self.incompatible_features & Incompatible.EXTENDED_L2 and 1 << self.cluster_bits < MIN_EXTENDED_CLUSTER:
            text = "extended L2 entries need clusters of at least 16 KiB"
            yield Fault("extended-l2-cluster-size", text, Weight.FATAL)
        if any(self.additional[1:8]):
            yield Fault("header-padding", "the padding after the compression type is not zero", Weight.MINOR)

    def _backing_name_faults(self) -> Iterator[Fault]:
        start, room = self.backing_file_offset, self.geometry.cluster_size
        if not start:
            return
        if start > room:
            yield Fault("backing-name-offset", "the backing file name lies outside the first cluster")
        elif self.backing_file_size > min(MAX_BACKING_NAME, room - start):
            text = f"the backing file name is {self.backing_file_size} bytes long, more than there may be"
            yield Fault("backing-name-length", text)
        elif start < self.header_length:
            yield Fault("backing-name-overlap", "the backing file name lies within the header")

    def _table_faults(self) -> Iterator[Fault]:
        geometry = self.geometry
        if not self.refcount_table_clusters:
            yield Fault("refcount-table-missing", "the image has no refcount table")
        table_bytes = self.refcount_table_clusters * geometry.cluster_size
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES:
            yield Fault("refcount-table-size", "the refcount table is above 8 MiB")
        elif not geometry.may_start(self.refcount_table_offset, table_bytes):
            text = f"refcount_table_offset {self.refcount_table_offset:#x} is not cluster-aligned"
            yield Fault("refcount-table-offset", text)
        needed = div_up(self.size, geometry.l2_span)
        if self.size > 1 << 63 or max(self.l1_size, needed) > MAX_L1_ENTRIES:
            yield Fault("l1-size", "the virtual size needs an L1 table above 32 MiB")
        elif not self._may_lie(self.l1_table_offset, 8 * self.l1_size):
            yield Fault("l1-offset", f"l1_table_offset {self.l1_table_offset:#x} is not cluster-aligned")
        elif self.l1_size < needed:
            text = f"the L1 table has {self.l1_size} entries, the virtual size needs {needed}"
            yield Fault("l1-too-small", text)
        if self.nb_snapshots > MAX_SNAPSHOTS:
            text = f"the image says it has {self.nb_snapshots} snapshots, above {MAX_SNAPSHOTS}"
            yield Fault("snapshot-count", text, Weight.MINOR)  # who reads them refuses; the disk does not need them
        elif not self._may_lie(self.snapshots_offset, SNAPSHOT_HEAD * self.nb_snapshots):
            text = f"snapshots_offset {self.snapshots_offset:#x} is not cluster-aligned"
            yield Fault("snapshot-table-offset", text)

    def _may_lie(self, offset: int, length: int) -> bool:
        """True if QEMU takes a table there; one without entries is never read, so it may lie anywhere."""
        if not length:
            return self.geometry.is_aligned(offset) and offset < 1 << 63
        return self.geometry.may_start(offset, length)
