"""The qcow2 header, versions 2 and 3.

Source: qcow2 specification, "Header", "Additional fields", "Header padding". Version 2 has the first 72 bytes only;
version 3 goes on to `header_length`. What lies between the last field known here and `header_length` is kept byte
for byte, because the specification asks whoever rewrites a header to preserve it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from construct import Bytes, ConstructError, Int32ub, Int64ub, Struct

from ..errors import CorruptImageError, NotQcow2Error, TruncatedImageError, UnsupportedImageError
from .geometry import Geometry
from .limits import (
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_ENTRIES,
    MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
)

MAGIC = b"QFI\xfb"
MIN_SUBCLUSTER = 512


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
REFCOUNT_TABLE_FIELDS = field_offset("refcount_table_offset")
"""Offset of refcount_table_offset (8 bytes) and refcount_table_clusters (4 bytes): one sector, they switch together."""
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
            CorruptImageError: `header_length` is no header's length.
        """
        if data[:4] != MAGIC:
            raise NotQcow2Error("not a qcow2 image", hint="qcow2bm reads qcow2 and nothing else")
        try:
            fields = dict(V2_STRUCT.parse(data))
            del fields["_io"], fields["magic"]
            if fields["version"] not in (2, 3):
                raise UnsupportedImageError(f"qcow2 version {fields['version']} is not known, only 2 and 3 are")
            if fields["version"] == 2:
                return cls(**fields)
            fields |= V3_STRUCT.parse(data[V2_LENGTH:])
            del fields["_io"]
        except ConstructError:
            raise TruncatedImageError("the file ends within the qcow2 header") from None
        length = fields["header_length"]
        if length < V3_LENGTH or length % 8 or length > 1 << MAX_CLUSTER_BITS:
            raise CorruptImageError(f"header_length {length} is not a multiple of 8 between {V3_LENGTH} and a cluster")
        if length > len(data):
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
        """The index arithmetic that follows from this header."""
        return Geometry(
            cluster_bits=self.cluster_bits,
            virtual_size=self.size,
            refcount_order=self.refcount_order,
            extended_l2=bool(self.incompatible_features & Incompatible.EXTENDED_L2),
        )

    @property
    def has_data_file(self) -> bool:
        """True if guest clusters live in an external data file."""
        return bool(self.incompatible_features & Incompatible.EXTERNAL_DATA_FILE)

    def validate(self) -> None:
        """Check what every later computation relies on, within QEMU's own limits (`qcow2_do_open`).

        Raises:
            CorruptImageError: a field is out of bounds.
            UnsupportedImageError: an incompatible feature is set that is not known here.
        """
        if not MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS:
            raise CorruptImageError(f"cluster size 2^{self.cluster_bits} is not between 512 bytes and 2 MiB")
        if self.refcount_order > MAX_REFCOUNT_ORDER:
            raise CorruptImageError(f"refcount order {self.refcount_order} is above {MAX_REFCOUNT_ORDER}")
        # As plain numbers: the inverse of an IntFlag knows no bits above the highest one defined.
        unknown = int(self.incompatible_features) & ~int(KNOWN_INCOMPATIBLE)
        if unknown:
            raise UnsupportedImageError(f"unknown incompatible features {unknown:#x}", hint="a newer QEMU wrote it")
        self._validate_places()

    def _validate_places(self) -> None:
        geometry = self.geometry
        if len(self.build()) > geometry.cluster_size:
            raise CorruptImageError("the header does not fit into the first cluster")
        if geometry.extended_l2 and geometry.subcluster_size < MIN_SUBCLUSTER:
            raise CorruptImageError("extended L2 entries need clusters of at least 16 KiB")
        if self.size > 1 << 63 or max(self.l1_size, geometry.l1_entries) > MAX_L1_ENTRIES:
            raise CorruptImageError("the virtual size needs an L1 table above 32 MiB")
        if self.l1_size < geometry.l1_entries:
            raise CorruptImageError(
                f"the L1 table has {self.l1_size} entries, the virtual size needs {geometry.l1_entries}"
            )
        if not self.refcount_table_clusters:
            raise CorruptImageError("the image has no refcount table")
        if self.refcount_table_clusters * geometry.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise CorruptImageError("the refcount table is above 8 MiB")
        for name in ("l1_table_offset", "refcount_table_offset", "snapshots_offset"):
            offset = getattr(self, name)
            if not geometry.is_aligned(offset) or offset > 1 << 63:
                raise CorruptImageError(f"{name} {offset:#x} is not cluster-aligned")
        if self.backing_file_offset:
            end = self.backing_file_offset + self.backing_file_size
            if end > geometry.cluster_size or self.backing_file_offset < len(self.build()):
                raise CorruptImageError("the backing file name lies outside the first cluster")
            if self.backing_file_size > min(MAX_BACKING_NAME, geometry.cluster_size - self.backing_file_offset):
                raise CorruptImageError(f"the backing file name is longer than {MAX_BACKING_NAME} bytes")
