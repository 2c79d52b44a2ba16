"""Header extensions: the area between the header and the end of the first cluster, or the backing file name.

Source: qcow2 specification, "Header extensions". An extension is kept byte for byte, padding included, whether its
type is known or not; the typed views below are read from its data. Every extension knows its offset, because the 24
bytes of the bitmaps extension are overwritten in place when a new bitmap directory takes over.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from construct import Bytes, Const, GreedyRange, Int8ub, Int32ub, Int64ub, Struct

from ..errors import CorruptImageError
from .faults import Fault
from .geometry import round_up
from .text import decode_name

_HEAD = struct.Struct(">II")
HEAD_LENGTH = _HEAD.size
"""Bytes of an extension's type and length; also the whole of the end marker."""


class ExtensionType(IntEnum):
    """Type codes of the extensions the specification defines."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO_HEADER = 0x0537BE77
    DATA_FILE = 0x44415441


@dataclass(frozen=True, slots=True)
class Extension:
    """One header extension.

    `offset` is that of its type field; `padding` is what follows `data` up to a multiple of 8.
    """

    type: int
    data: bytes
    offset: int = 0
    padding: bytes = b""

    @property
    def data_offset(self) -> int:
        """File offset of `data`."""
        return self.offset + HEAD_LENGTH

    @property
    def end(self) -> int:
        """File offset of what follows."""
        return self.offset + HEAD_LENGTH + round_up(len(self.data), 8)

    @property
    def type_name(self) -> str:
        """The specification's name of the type, or its number."""
        try:
            return ExtensionType(self.type).name.lower().replace("_", "-")
        except ValueError:
            return f"unknown-{self.type:#010x}"

    def build(self) -> bytes:
        """The extension's bytes, padded with what was there or with zeroes."""
        padding = self.padding or bytes(-len(self.data) % 8)
        return _HEAD.pack(self.type, len(self.data)) + self.data + padding


@dataclass(frozen=True, slots=True)
class ExtensionArea:
    """All header extensions in order.

    Attributes:
        start: where the area starts: the header's length.
        end: offset of the end marker, or of the end of the area if it is filled without one.
        limit: first offset the area may not reach: the backing file name or the end of the first cluster.
        fault: why the area cannot be read beyond `end`, or None.
    """

    extensions: tuple[Extension, ...]
    start: int
    end: int
    limit: int
    fault: Fault | None = None

    @classmethod
    def parse(cls, data: bytes, start: int, limit: int) -> ExtensionArea:
        """Read the area of `data` (the file from offset 0) between `start` and `limit`, as far as it makes sense."""
        found, fault = [], None
        at = start
        while at < limit:
            if at + HEAD_LENGTH > limit:
                fault = Fault("extension-too-long", f"the header extensions go on at {at:#x}, where there is no room")
                break
            kind, length = _HEAD.unpack_from(data, at)
            body = at + HEAD_LENGTH
            if length > limit - body:  # of the end marker too: QEMU looks at the length first
                text = f"header extension {kind:#x} at {at:#x} is longer than the room it has"
                fault = Fault("extension-too-long", text)
                break
            if kind == ExtensionType.END:
                break
            stop = min(body + round_up(length, 8), limit)
            found.append(Extension(kind, data[body : body + length], at, data[body + length : stop]))
            at = stop
        return cls(tuple(found), start, at, limit, fault)

    def validate(self) -> None:
        """Raise CorruptImageError if an extension's length goes past the limit."""
        if self.fault is not None:
            raise CorruptImageError(self.fault.message, code=self.fault.code)

    def build(self) -> bytes:
        """The area's bytes with its end marker, if there is room for one."""
        # The limit may cut the last padding short: a backing file name can start anywhere.
        body = b"".join(extension.build() for extension in self.extensions)[: self.limit - self.start]
        return body + bytes(HEAD_LENGTH) if self.end + HEAD_LENGTH <= self.limit else body

    def find(self, kind: ExtensionType) -> Extension | None:
        """The first extension of a type."""
        return next((extension for extension in self.extensions if extension.type == kind), None)

    def text(self, kind: ExtensionType) -> str | None:
        """The data of a string extension; bytes that are not UTF-8 as surrogates."""
        extension = self.find(kind)
        return None if extension is None else decode_name(extension.data)


BITMAPS_STRUCT = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "bitmap_directory_size" / Int64ub,
    "bitmap_directory_offset" / Int64ub,
)
BITMAPS_LENGTH = BITMAPS_STRUCT.sizeof()


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """The bitmaps extension's data, 24 bytes: where the bitmap directory is. Size and offset in bytes."""

    nb_bitmaps: int
    bitmap_directory_size: int
    bitmap_directory_offset: int
    reserved: int = 0

    @classmethod
    def parse(cls, data: bytes) -> BitmapsExtension:
        """Raises CorruptImageError when the data is not 24 bytes long."""
        if len(data) != BITMAPS_LENGTH:
            text = f"the bitmaps extension is {len(data)} bytes long instead of {BITMAPS_LENGTH}"
            raise CorruptImageError(text, code="bitmaps-extension-length")
        fields = BITMAPS_STRUCT.parse(data)
        return cls(fields.nb_bitmaps, fields.bitmap_directory_size, fields.bitmap_directory_offset, fields.reserved)

    def build(self) -> bytes:
        """The 24 bytes."""
        built: bytes = BITMAPS_STRUCT.build({name: getattr(self, name) for name in self.__slots__})
        return built


CRYPTO_STRUCT = Struct("offset" / Int64ub, "length" / Int64ub)


@dataclass(frozen=True, slots=True)
class CryptoHeaderPointer:
    """The full disk encryption header pointer: where the LUKS header lies in this file, in bytes."""

    offset: int
    length: int

    @classmethod
    def parse(cls, data: bytes) -> CryptoHeaderPointer:
        """Raises CorruptImageError when the data is not 16 bytes long."""
        if len(data) != CRYPTO_STRUCT.sizeof():
            text = f"the encryption header pointer is {len(data)} bytes long instead of 16"
            raise CorruptImageError(text, code="encryption-extension-length")
        fields = CRYPTO_STRUCT.parse(data)
        return cls(fields.offset, fields.length)

    def build(self) -> bytes:
        """The 16 bytes."""
        built: bytes = CRYPTO_STRUCT.build({"offset": self.offset, "length": self.length})
        return built


_FEATURES = GreedyRange(Struct("type" / Int8ub, "bit" / Int8ub, "name" / Bytes(46)))
FEATURE_LENGTH = 48


@dataclass(frozen=True, slots=True)
class FeatureName:
    """A row of the feature name table. `type`: 0 incompatible, 1 compatible, 2 autoclear; `raw_name`: 46 bytes."""

    type: int
    bit: int
    raw_name: bytes

    @property
    def name(self) -> str:
        """The name without its zero padding."""
        return decode_name(self.raw_name.rstrip(b"\0"))


def parse_feature_names(data: bytes) -> tuple[FeatureName, ...]:
    """The rows of a feature name table; a short last row is ignored, as QEMU does."""
    whole = len(data) - len(data) % FEATURE_LENGTH
    return tuple(FeatureName(row.type, row.bit, bytes(row.name)) for row in _FEATURES.parse(data[:whole]))


END_MARKER = Const(bytes(HEAD_LENGTH)).build(None)
"""Type 0, length 0: the end of the header extensions."""
