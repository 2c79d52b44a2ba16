"""Bitmap directory entries: one per bitmap, 8-aligned, one after the other.

Source: qcow2 specification, "Bitmap directory". Extra data and unknown flags are kept as they are. The directory is
rewritten in place only where one disk sector holds all that differs, so that it switches all or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag

from construct import Int8ub, Int16ub, Int32ub, Int64ub, Struct

from ..errors import CorruptImageError
from .faults import Fault, Weight
from .geometry import Geometry, round_up
from .limits import (
    MAX_BITMAP_NAME,
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
)
from .quick import quick

DIRTY_TRACKING = 1
"""The one bitmap type the specification knows."""


class BitmapFlag(IntFlag):
    """Flags of a directory entry."""

    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


_IN_USE, _AUTO, _COMPATIBLE = map(int, BitmapFlag)
_UNKNOWN = ~(_IN_USE | _AUTO | _COMPATIBLE)


ENTRY_STRUCT = Struct(
    "bitmap_table_offset" / Int64ub,
    "bitmap_table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)
FIXED_LENGTH = ENTRY_STRUCT.sizeof()
_NAMES = [part.name or "" for part in ENTRY_STRUCT.subcons]
_FIELDS = quick(ENTRY_STRUCT)
MAX_ENTRY_LENGTH = round_up(FIXED_LENGTH + MAX_BITMAP_NAME, 8)
"""Bytes of the longest entry without extra data."""


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """One bitmap directory entry.

    `bitmap_table_size` counts entries, `bitmap_table_offset` is in bytes, `name` is raw bytes.
    """

    bitmap_table_offset: int
    bitmap_table_size: int
    flags: BitmapFlag
    granularity_bits: int
    name: bytes
    extra_data: bytes = b""
    type: int = DIRTY_TRACKING
    padding: bytes = b""

    @property
    def granularity(self) -> int:
        """Guest bytes that one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def qemu_name(self) -> bytes:
        """The name as QEMU has it: a zero byte ends it."""
        return self.name.partition(b"\0")[0]

    @property
    def in_use(self) -> bool:
        """True if its bits may be stale: QEMU was, or is, at work with it."""
        return bool(int(self.flags) & _IN_USE)  # plain numbers are far quicker, and there may be tens of thousands

    @property
    def recording(self) -> bool:
        """True if QEMU tracks writes in it."""
        return bool(int(self.flags) & _AUTO)

    @property
    def size(self) -> int:
        """Bytes of the entry in the directory, padding included."""
        return round_up(FIXED_LENGTH + len(self.extra_data) + len(self.name), 8)

    def build(self) -> bytes:
        """The entry's bytes, padded with what was there or with zeroes."""
        head = _FIELDS.pack(
            self.bitmap_table_offset, self.bitmap_table_size, int(self.flags), self.type, self.granularity_bits,
            len(self.name), len(self.extra_data),
        )  # fmt: skip
        body = head + self.extra_data + self.name
        return body + (self.padding or bytes(-len(body) % 8))

    def faults(self, geometry: Geometry) -> Iterator[Fault]:
        """Why QEMU would refuse this entry, and with it the image: as `check_dir_entry` and `load_bitmap_data` do.

        And, as a minor one, padding that is not zero, which QEMU does not look at.
        """
        if self.bitmap_table_offset == 0 or not geometry.may_start(
            self.bitmap_table_offset, 8 * self.bitmap_table_size
        ):
            yield Fault("bitmap-table-offset", f"its table's offset {self.bitmap_table_offset:#x} is not a cluster's")
        # As plain numbers: the inverse of an IntFlag knows no bits above the highest one defined.
        flags, compatible = int(self.flags), int(self.flags) & _COMPATIBLE
        if flags & _UNKNOWN:
            yield Fault("bitmap-flags", f"it has unknown flags {flags:#x}")
        if self.type != DIRTY_TRACKING:
            yield Fault("bitmap-type", f"its type {self.type} is not known")
        if not 0 < len(self.name) <= MAX_BITMAP_NAME:
            yield Fault("bitmap-name", f"its name is {len(self.name)} bytes long")
        elif b"\0" in self.name:
            yield Fault("bitmap-name", "there is a zero byte in its name, and QEMU's ends there")
        if self.extra_data and compatible:
            text = f"it has {len(self.extra_data)} bytes of extra data that need not be known, but QEMU refuses them"
            yield Fault("bitmap-extra-data-compatible", text)
        elif self.extra_data:
            yield Fault("bitmap-extra-data", f"it has {len(self.extra_data)} bytes of extra data that are not known")
        elif compatible:
            yield Fault("bitmap-flags", f"it has unknown flags {flags:#x}")
        if not MIN_GRANULARITY_BITS <= self.granularity_bits <= MAX_GRANULARITY_BITS:
            text = f"its granularity 2^{self.granularity_bits} is not between 512 bytes and 2 GiB"
            yield Fault("bitmap-granularity", text)
            return
        yield from self._table_faults(geometry)
        if any(self.padding):
            yield Fault("bitmap-padding", "the padding of its directory entry is not zero", Weight.MINOR)

    def _table_faults(self, geometry: Geometry) -> Iterator[Fault]:
        size = self.bitmap_table_size
        if not 0 < size <= geometry.max_bitmap_table_entries:
            yield Fault("bitmap-table-size", f"its table has {size} entries")
            return
        needed = geometry.bitmap_table_entries(self.granularity)
        if size != needed and not self.in_use:
            yield Fault("bitmap-table-size", f"its table has {size} entries, the disk needs {needed}")


def parse_entry(data: bytes, offset: int = 0) -> BitmapEntry:
    """The entry at `offset` of a directory.

    Raises:
        CorruptImageError: the entry goes past the end of the directory.
    """
    if offset + FIXED_LENGTH > len(data):
        raise _no_such_entries(f"the bitmap directory ends within its entry at {offset:#x}")
    head = dict(zip(_NAMES, _FIELDS.unpack_from(data, offset), strict=True))
    extra, name_size = head["extra_data_size"], head["name_size"]
    if extra >> 31:
        raise _no_such_entries(f"a bitmap has {extra} bytes of extra data, more than a directory can hold")
    name_at = offset + FIXED_LENGTH + extra
    length = FIXED_LENGTH + extra + name_size
    end = offset + round_up(length, 8)
    if end > len(data):
        raise _no_such_entries(f"the bitmap directory ends within its entry at {offset:#x}")
    return BitmapEntry(
        bitmap_table_offset=head["bitmap_table_offset"],
        bitmap_table_size=head["bitmap_table_size"],
        flags=BitmapFlag(head["flags"]),
        granularity_bits=head["granularity_bits"],
        name=data[name_at : name_at + name_size],
        extra_data=data[offset + FIXED_LENGTH : name_at],
        type=head["type"],
        padding=data[offset + length : end],
    )


def parse_directory(data: bytes, count: int) -> Iterator[tuple[int, BitmapEntry]]:
    """The entries of a directory of `count` bitmaps, each with its offset in `data`.

    Raises:
        CorruptImageError: the entries do not fill the directory exactly. What was sound comes first.
    """
    offset = 0
    for index in range(count):
        if offset >= len(data):
            raise _no_such_entries(f"the bitmap directory holds {index} bitmaps, the header extension says {count}")
        entry = parse_entry(data, offset)
        yield offset, entry
        offset += entry.size
    if 0 < len(data) - offset < FIXED_LENGTH:
        raise _no_such_entries(f"the bitmap directory ends within an entry at {offset:#x}")
    if offset != len(data):
        raise _no_such_entries(f"the bitmap directory goes on after its {count} bitmaps")


def _no_such_entries(message: str) -> CorruptImageError:
    return CorruptImageError(message, code="bitmap-directory-entries")
