"""The layout of an undo file: its header, its records, and the ranges that it keeps besides.

Little-endian, each part with its own CRC-32C. First a header of 512 bytes, which a disk writes whole, so that the state
changes at one moment. Then the records, one for each write of the change: a fixed head, the old bytes (none if they
were all zero) and, where a structure in use is rewritten, the new ones. Then what is kept although nothing overwrites
it: the ranges with their labels, and their bytes in pieces, each piece of the file once, whatever ranges it lies in.
The first range may be one without bytes, whose label notes how the external data file was left. Between the two come
the clusters that the change gives up and its undoing takes back, of which there is only a checksum.

Version 1 ends after the records, and says neither when it was made nor whether a crash could tear the change. Version 2
knows nothing of clusters that were given up, and of the header only the first sector. Version 3 does not say when the
machine was started. All are read as ever.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import reduce
from operator import xor
from pathlib import Path
from typing import NamedTuple, Self

from construct import Int32ul, Int64sl, Int64ul, Struct

from ..format.header import CLUSTER_BITS_FIELD, V2_LENGTH
from ..format.limits import MAX_CLUSTER_BITS, MIN_CLUSTER_BITS
from .file import ImageFile
from .plan import SECTOR


class State(IntEnum):
    """How far the change an undo file belongs to has come."""

    IN_PROGRESS = 1
    COMPLETE = 2
    UNDONE = 3


PIECE = 1 << 20
"""Bytes of a kept piece, and of one that was given up, at most. Part of the format: who reads refuses longer ones."""
VERSION = 4
MAX_STAGES = 64
"""No plan has nearly as many. Who reads refuses more: each is flushed when it is put back."""
_MAGIC = {number: b"QCOW2BM undo %d\n\0" % number for number in range(1, VERSION + 1)}
_FIELDS_1 = {
    "state": Int32ul,
    "head_crc": Int32ul,
    "size_before": Int64ul,
    "size_after": Int64ul,
    "mtime_before_ns": Int64sl,
    "mtime_ns": Int64sl,
    "records": Int64ul,
}
_FIELDS_2 = {"kept": Int64ul, "kept_at": Int64ul, "made_ns": Int64sl, "journaled": Int64ul}
_FIELDS_3 = {"given_up": Int64ul, "given_up_at": Int64ul, "inode": Int64ul}
_FIELDS_4 = {"boot": Int64ul}
_FIELDS = {
    1: _FIELDS_1,
    2: _FIELDS_1 | _FIELDS_2,
    3: _FIELDS_1 | _FIELDS_2 | _FIELDS_3,
    4: _FIELDS_1 | _FIELDS_2 | _FIELDS_3 | _FIELDS_4,
}
_MAX_SIZE = (1 << 63) - 1

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_RECORD = struct.Struct("<6Q2I")
_KEPT = struct.Struct("<3Q2I")
_SEAL = struct.Struct("<I")


def crc(data: bytes | memoryview, value: int = 0) -> int:
    """CRC-32C of `data`, going on from `value`."""
    from crc32c import crc32c

    return crc32c(data, value)


class RecordHead(NamedTuple):
    """Head of a record; its old bytes and then its new ones follow, and `crc` is over both.

    Attributes:
        length: bytes that were replaced, as far as the file reached.
        old_stored: how many of the old bytes follow: none if all were zero.
        new_stored: how many of the new ones: none of a free cluster that was filled.
        filled: length of that cluster's new content, of which there is only the checksum `filled_crc`.
    """

    stage: int
    offset: int
    length: int
    old_stored: int
    new_stored: int
    filled: int
    filled_crc: int
    crc: int

    @property
    def body(self) -> int:
        """Bytes that follow."""
        return self.old_stored + self.new_stored

    def build(self) -> bytes:
        """The head and its checksum."""
        return _sealed(_RECORD.pack(*self))

    @classmethod
    def parse(cls, raw: bytes) -> Self | None:
        """The head, or None if it is cut short or its checksum is wrong."""
        fields = _unsealed(_RECORD, raw)
        return None if fields is None else cls(*fields)


class KeptPart(IntEnum):
    """What a kept part is.

    A range, with its label after the head; a piece, with its bytes, none if all are zero; or a piece of clusters that
    were given up, with the checksum of their bytes, none of a hole.
    """

    RANGE = 1
    PIECE = 2
    GIVEN_UP = 3


class KeptHead(NamedTuple):
    """Head of a kept part of `length` bytes of the image; `stored` bytes follow it, and `crc` is over them."""

    offset: int
    length: int
    stored: int
    kind: int
    crc: int

    @property
    def body(self) -> int:
        """Bytes that follow."""
        return self.stored

    def build(self) -> bytes:
        """The head and its checksum."""
        return _sealed(_KEPT.pack(*self))

    @classmethod
    def parse(cls, raw: bytes) -> Self | None:
        """The head, or None if it is cut short or its checksum is wrong."""
        fields = _unsealed(_KEPT, raw)
        return None if fields is None else cls(*fields)


RECORD_SIZE = _RECORD.size + _SEAL.size
KEPT_SIZE = _KEPT.size + _SEAL.size
CRC_SIZE = _SEAL.size


def seen(image: ImageFile, version: int = VERSION) -> dict[str, int]:
    """What the header of an undo file of a version says of its image once the change is done."""
    return {"head_crc": crc(image.read_padded(0, _head_length(image, version))), "size_after": image.size}


def zeroes_crc(length: int, value: int = 0) -> int:
    """CRC-32C of zeroes, going on from `value`: in as many steps as the length has bits, for a hole may be of any.

    What more zeroes make of a checksum is an affine map of its 32 bits; twice as many are that map, twice.
    """
    count, rest = divmod(length, PIECE)
    step = [crc(bytes(PIECE), start) for start in (0, *(1 << bit for bit in range(32)))] if count else []
    while count:
        if count & 1:
            value = _mapped(step, value)
        step = [_mapped(step, start) for start in step] if count > 1 else step
        count >>= 1
    return crc(bytes(rest), value)


def _mapped(step: Sequence[int], value: int) -> int:
    """An affine map, given by what it makes of zero and of each single bit."""
    return reduce(xor, (step[1 + bit] ^ step[0] for bit in range(32) if value >> bit & 1), step[0])


def this_boot() -> int:
    """Which start of the machine this is: a number that no other start has. 0 where that is not told."""
    try:
        return int(_BOOT_ID.read_text(encoding="ascii").replace("-", "")[:16], 16)
    except (OSError, ValueError):
        return 0


def _head_length(image: ImageFile, version: int) -> int:
    """Header, extensions and backing name have the first cluster, which QEMU writes anew without what is dead."""
    bits = int.from_bytes(image.read_padded(0, SECTOR)[CLUSTER_BITS_FIELD:][:4], "big")
    return 1 << bits if version > 2 and MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS else SECTOR


def _sealed(head: bytes) -> bytes:
    return head + _SEAL.pack(crc(head))


def _unsealed(layout: struct.Struct, raw: bytes) -> tuple[int, ...] | None:
    if len(raw) != layout.size + _SEAL.size or _SEAL.unpack_from(raw, layout.size) != (crc(raw[: layout.size]),):
        return None
    return layout.unpack_from(raw)


@dataclass(frozen=True, slots=True)
class Summary:
    """The header of an undo file. Sizes in bytes, times in nanoseconds since 1970.

    Attributes:
        head_crc: over the first cluster of the image after the change; in versions before the third the first sector.
        mtime_ns: time stamp of the image after the change; 0 until it is done.
        records: how many there are.
        kept: how many kept ranges and pieces there are, `kept_at` being where they start.
        made_ns: when the file was made; 0 if that is not known.
        given_up: how many pieces of clusters that were given up there are, `given_up_at` being where they start.
        inode: number of the image's inode, 0 if that is not known.
        boot: which start of the machine the time stamp is of, 0 if that is not known.
        journaled: 1 if a crash could tear the change, and so its undoing, 0 if not.
    """

    state: State
    head_crc: int
    size_before: int
    size_after: int
    mtime_before_ns: int
    mtime_ns: int
    records: int
    kept: int = 0
    kept_at: int = 0
    made_ns: int = 0
    journaled: int = 0
    given_up: int = 0
    given_up_at: int = 0
    inode: int = 0
    boot: int = 0
    version: int = VERSION

    def build(self) -> bytes:
        """The sector, in the version the file was written in."""
        layout = _FIELDS[self.version]
        fields: bytes = Struct(**layout).build({name: int(getattr(self, name)) for name in layout})
        return (_MAGIC[self.version] + fields + _SEAL.pack(crc(fields))).ljust(SECTOR, b"\0")

    @classmethod
    def parse(cls, sector: bytes) -> Summary | None:
        """The header in the first sector of an undo file; None if its checksum is wrong, or a size is none of an image.

        Raises:
            ValueError: it is none.
        """
        version = next((number for number, magic in _MAGIC.items() if sector.startswith(magic)), None)
        if version is None or len(sector) < SECTOR:
            raise ValueError
        layout = Struct(**_FIELDS[version])
        start = len(_MAGIC[version])
        end = start + layout.sizeof()
        if _SEAL.unpack_from(sector, end) != (crc(sector[start:end]),):
            return None
        found = dict(layout.parse(sector[start:end]))
        del found["_io"]
        if not V2_LENGTH <= found["size_before"] <= _MAX_SIZE or found["size_after"] > _MAX_SIZE:
            return None
        return cls(**found | {"state": State(found["state"]), "version": version})
