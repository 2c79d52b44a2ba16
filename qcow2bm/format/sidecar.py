"""The layout of an export file: bitmaps outside of any image.

Little-endian, and written and read from its start to its end without seeking. First a preamble, the same in every
version, that says how to read the rest; the header; then records, each a head, which says how many bytes follow it, and
a body. Every part has a CRC-32C of its own, so that damage is found where it is, and the last record a SHA-256 of all
that came before it, so that nothing can be left out or put in::

    preamble  header
    BITMAP  CHUNKS ... CHUNKS  BITMAP_END     for each bitmap
    FILE_END

A bitmap is cut into chunks of 64 KiB whatever the cluster size of its image was. Chunks that are all zeroes or all ones
have no bytes, and one record speaks for any number of them. docs/export-format.md is the full description.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, Self

from construct import (
    Bytes,
    Construct,
    ConstructError,
    GreedyBytes,
    Int16ul,
    Int32ul,
    Int64sl,
    Int64ul,
    Prefixed,
    Struct,
    Terminated,
)

from .geometry import div_up

MAGIC = b"QCOW2BM bitmaps\0"
VERSION = 1
CHUNK_BYTES = 64 << 10
"""Bytes of bits in a chunk, the last one of a bitmap excepted."""
CHUNK_BITS = 8 * CHUNK_BYTES
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 4 << 10
"""The header of version 1 with the longest names there are takes less."""
MAX_TEXT_BYTES = 1 << 10

_PREAMBLE = struct.Struct("<16s4I")
_HEAD = struct.Struct("<HHIQQI")
_SEAL = struct.Struct("<I")
PREAMBLE_SIZE = _PREAMBLE.size + _SEAL.size
HEAD_SIZE = _HEAD.size + _SEAL.size


class Kind(IntEnum):
    """What a record is."""

    BITMAP = 1
    CHUNKS = 2
    BITMAP_END = 3
    FILE_END = 4


class Encoding(IntEnum):
    """How the bits of a CHUNKS record are stored; 0 in the head of any other record."""

    ZEROES = 0
    ONES = 1
    PLAIN = 2
    ZSTD = 3


class ExportFlag(IntFlag):
    """Flags of an exported bitmap. Whoever meets one that is not here must refuse the file."""

    RECORDING = 1 << 0
    STALE = 1 << 1
    """It was in use or detached: its bits may lack writes."""


def crc(data: bytes) -> int:
    """CRC-32C."""
    from crc32c import crc32c

    return crc32c(data)


def chunk_size(bits: int, index: int) -> int:
    """Bytes of chunk `index` of a bitmap of `bits` bits."""
    return min(CHUNK_BYTES, div_up(bits, 8) - index * CHUNK_BYTES)


def chunk_count(bits: int) -> int:
    """Chunks of a bitmap of `bits` bits."""
    return div_up(bits, CHUNK_BITS)


class Preamble(NamedTuple):
    """What stands first in every version: how to read the header, and whether one may.

    Attributes:
        flags: none is known in version 1; one that is not known means that the file cannot be read.
        header_length: bytes of the header, which follows.
        header_crc: over them.
    """

    version: int
    flags: int
    header_length: int
    header_crc: int

    def build(self) -> bytes:
        """The preamble and its checksum."""
        return _sealed(_PREAMBLE.pack(MAGIC, *self))

    @classmethod
    def parse(cls, raw: bytes) -> Self | None:
        """The preamble, or None if its checksum is wrong."""
        fields = _unsealed(_PREAMBLE, raw)
        return None if fields is None else cls(*fields[1:])


class RecordHead(NamedTuple):
    """Head of a record.

    Attributes:
        encoding: of a CHUNKS record.
        length: bytes of the body.
        first, chunks: the first chunk that a CHUNKS record speaks for, and how many; 0 in others.
        body_crc: over the body.
    """

    kind: int
    encoding: int
    length: int
    first: int
    chunks: int
    body_crc: int

    def build(self) -> bytes:
        """The head and its checksum."""
        return _sealed(_HEAD.pack(*self))

    @classmethod
    def parse(cls, raw: bytes) -> Self | None:
        """The head, or None if its checksum is wrong."""
        fields = _unsealed(_HEAD, raw)
        return None if fields is None else cls(*fields)


def _sealed(head: bytes) -> bytes:
    return head + _SEAL.pack(crc(head))


def _unsealed(layout: struct.Struct, raw: bytes) -> tuple[int, ...] | None:
    if _SEAL.unpack_from(raw, layout.size) != (crc(raw[: layout.size]),):
        return None
    return layout.unpack_from(raw)


def record(
    kind: Kind, body: bytes = b"", *, encoding: Encoding = Encoding.ZEROES, first: int = 0, chunks: int = 0
) -> bytes:
    """A whole record."""
    return RecordHead(kind, encoding, len(body), first, chunks, crc(body)).build() + body


# ---- bodies, of which there are few ----

_TEXT = Prefixed(Int16ul, GreedyBytes)
_HEADER = Struct(
    "virtual_size" / Int64ul,
    "cluster_size" / Int32ul,
    "chunk_size" / Int32ul,
    "bitmaps" / Int32ul,
    "made_ns" / Int64sl,
    "mtime_ns" / Int64sl,
    "image_id" / Bytes(DIGEST_BYTES),
    "tool" / _TEXT,
    "image" / _TEXT,
    Terminated,
)
_BITMAP = Struct("granularity_bits" / Int32ul, "flags" / Int32ul, "bits" / Int64ul, "name" / GreedyBytes)
_BITMAP_END = Struct("dirty_bytes" / Int64ul, "digest" / Bytes(DIGEST_BYTES), Terminated)
_FILE_END = Struct("bitmaps" / Int32ul, "length" / Int64ul, "digest" / Bytes(DIGEST_BYTES), Terminated)
BITMAP_FIXED = 16
"""Bytes of a BITMAP record's body before the name."""


def _fields(layout: Construct[Any, Any], raw: bytes) -> dict[str, object]:
    """The named fields.

    Raises:
        ValueError: the bytes are too few or too many.
    """
    try:
        return {name: value for name, value in layout.parse(raw).items() if name and not name.startswith("_")}
    except ConstructError as error:
        raise ValueError("its length does not fit what is in it") from error


@dataclass(frozen=True, slots=True)
class ExportHeader:
    """What the file says of the image the bitmaps are of. Sizes in bytes, times in nanoseconds since 1970.

    Attributes:
        chunk_size: `CHUNK_BYTES`, in version 1.
        bitmaps: how many follow.
        made_ns: when the file was made.
        mtime_ns: time stamp of the image file at that time; 0 if it has none that tells, as a block device.
        image_id: what the image's mapping was; see `bitmap/sidecar_lineage.py`.
        tool: the program that made the file, and its version.
        image: name of the image file, without its folder.
    """

    virtual_size: int
    cluster_size: int
    chunk_size: int
    bitmaps: int
    made_ns: int
    mtime_ns: int
    image_id: bytes
    tool: bytes
    image: bytes

    def build(self) -> bytes:
        """Preamble and header."""
        body: bytes = _HEADER.build({name: getattr(self, name) for name in self.__slots__})
        return Preamble(VERSION, 0, len(body), crc(body)).build() + body

    @classmethod
    def parse(cls, raw: bytes) -> ExportHeader:
        """The header; raises ValueError for another length than its fields have."""
        return cls(**_fields(_HEADER, raw))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ExportEntry:
    """Body of a BITMAP record. `bits` is how many the bitmap has, `name` is raw bytes."""

    granularity_bits: int
    flags: ExportFlag
    bits: int
    name: bytes

    def build(self) -> bytes:
        """The record."""
        body = _BITMAP.build({name: getattr(self, name) for name in self.__slots__} | {"flags": int(self.flags)})
        return record(Kind.BITMAP, body)

    @classmethod
    def parse(cls, raw: bytes) -> ExportEntry:
        """The body; raises ValueError if it is too short."""
        fields = _fields(_BITMAP, raw)
        return cls(**fields | {"flags": ExportFlag(fields["flags"])})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ExportEntryEnd:
    """Body of a BITMAP_END record: what its bits come to."""

    dirty_bytes: int
    digest: bytes

    def build(self) -> bytes:
        """The record."""
        return record(Kind.BITMAP_END, _BITMAP_END.build({"dirty_bytes": self.dirty_bytes, "digest": self.digest}))

    @classmethod
    def parse(cls, raw: bytes) -> ExportEntryEnd:
        """The body; raises ValueError for another length than its fields have."""
        return cls(**_fields(_BITMAP_END, raw))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ExportEnd:
    """Body of the FILE_END record.

    Attributes:
        length, digest: of all bytes before the record.
    """

    bitmaps: int
    length: int
    digest: bytes

    def build(self) -> bytes:
        """The record."""
        return record(Kind.FILE_END, _FILE_END.build({name: getattr(self, name) for name in self.__slots__}))

    @classmethod
    def parse(cls, raw: bytes) -> ExportEnd:
        """The body; raises ValueError for another length than its fields have."""
        return cls(**_fields(_FILE_END, raw))  # type: ignore[arg-type]


# ---- the bytes of a chunk ----


def pack_chunk(plain: bytes) -> tuple[Encoding, bytes]:
    """The shortest way to store a chunk that is neither all zeroes nor all ones."""
    from zstandard import ZstdCompressor

    packed: bytes = ZstdCompressor().compress(plain)
    return (Encoding.ZSTD, packed) if len(packed) < len(plain) else (Encoding.PLAIN, plain)


def unpack_chunk(encoding: int, stored: bytes, size: int) -> bytes:
    """The `size` bytes of a chunk. Never makes more, whatever the stored bytes claim.

    Raises:
        ValueError: they are no such chunk.
    """
    if encoding == Encoding.PLAIN:
        plain = stored
    else:
        import zstandard

        try:
            # A frame without a stated size, or with another one, is refused before anything is allocated for it.
            if zstandard.frame_content_size(stored) != size:
                raise ValueError("its compressed bytes are not of its size")
            plain = zstandard.ZstdDecompressor().decompress(stored)
        except zstandard.ZstdError as error:
            raise ValueError("its compressed bytes are damaged") from error
    if len(plain) != size:
        raise ValueError(f"it has {len(plain)} bytes instead of {size}")
    return plain
