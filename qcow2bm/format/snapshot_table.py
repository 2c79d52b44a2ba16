"""Snapshot table entries.

Source: qcow2 specification, "Snapshots". Only what an entry says is here; the L1 table it points to is read by
`image/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from construct import Int16ub, Int32ub, Int64ub, Struct

from ..errors import CorruptImageError
from .geometry import round_up
from .limits import MAX_SNAPSHOT_EXTRA_DATA, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS
from .quick import quick

ENTRY_STRUCT = Struct(
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_size" / Int16ub,
    "name_size" / Int16ub,
    "date_sec" / Int32ub,
    "date_nsec" / Int32ub,
    "vm_clock_nsec" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)
FIXED_LENGTH = ENTRY_STRUCT.sizeof()
_NAMES = [part.name or "" for part in ENTRY_STRUCT.subcons]
FIXED_FIELDS = quick(ENTRY_STRUCT)
NEEDED_EXTRA_DATA = 16
"""Bytes of extra data that version 3 needs: VM state size and disk size."""
MAX_ENTRY_LENGTH = round_up(FIXED_LENGTH + MAX_SNAPSHOT_EXTRA_DATA + 2 * 0xFFFF, 8)


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """One internal snapshot. `l1_size` counts entries, `date_*` and `vm_clock_nsec` are as in the specification."""

    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    extra_data: bytes
    id: bytes
    name: bytes
    padding: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of the entry in the table, padding included."""
        return round_up(FIXED_LENGTH + len(self.extra_data) + len(self.id) + len(self.name), 8)

    @property
    def virtual_size(self) -> int | None:
        """Disk size when the snapshot was taken, in bytes, if the extra data says it."""
        return int.from_bytes(self.extra_data[8:16], "big") if len(self.extra_data) >= 16 else None

    @property
    def full_vm_state_size(self) -> int:
        """Bytes of VM state: the 64-bit field of the extra data where there is one."""
        return int.from_bytes(self.extra_data[:8], "big") if len(self.extra_data) >= 8 else self.vm_state_size

    def build(self) -> bytes:
        """The entry's bytes, padded with what was there or with zeroes."""
        head = FIXED_FIELDS.pack(
            self.l1_table_offset, self.l1_size, len(self.id), len(self.name), self.date_sec, self.date_nsec,
            self.vm_clock_nsec, self.vm_state_size, len(self.extra_data),
        )  # fmt: skip
        body = head + self.extra_data + self.id + self.name
        return body + (self.padding or bytes(-len(body) % 8))


def parse_snapshot(data: bytes, offset: int = 0) -> SnapshotEntry:
    """The entry at `offset` of a snapshot table; the last entry of a table may lack its padding.

    Raises:
        CorruptImageError: the entry goes past the end of `data` or has more than 1024 bytes of extra data.
    """
    if offset + FIXED_LENGTH > len(data):
        raise _truncated(offset)
    head = dict(zip(_NAMES, FIXED_FIELDS.unpack_from(data, offset), strict=True))
    extra, id_size, name_size = head.pop("extra_data_size"), head.pop("id_size"), head.pop("name_size")
    if extra > MAX_SNAPSHOT_EXTRA_DATA:
        text = f"a snapshot has {extra} bytes of extra data, above {MAX_SNAPSHOT_EXTRA_DATA}"
        raise CorruptImageError(text, code="snapshot-extra-data-size")
    id_at = offset + FIXED_LENGTH + extra
    name_at = id_at + id_size
    end = name_at + name_size
    if end > len(data):
        raise _truncated(offset)
    return SnapshotEntry(
        **head,
        extra_data=data[offset + FIXED_LENGTH : id_at],
        id=data[id_at:name_at],
        name=data[name_at:end],
        padding=data[end : end + -(end - offset) % 8],
    )


def parse_snapshots(read: Callable[[int, int], bytes], offset: int, count: int) -> Iterator[tuple[int, SnapshotEntry]]:
    """The `count` entries of the table at `offset`, each with its offset in the file.

    Args:
        read: reads from an offset on up to a number of bytes, fewer at the end of the file.

    Raises:
        CorruptImageError: as `parse_snapshot`, or the table is larger than QEMU's limits.
    """
    if count > MAX_SNAPSHOTS:
        raise CorruptImageError(
            f"the image says it has {count} snapshots, above {MAX_SNAPSHOTS}", code="snapshot-count"
        )
    window, base, at = b"", offset, offset
    for _ in range(count):
        if len(window) - (at - base) < MAX_ENTRY_LENGTH:
            window, base = read(at, 4 * MAX_ENTRY_LENGTH), at
        entry = parse_snapshot(window, at - base)
        if at + entry.size - len(entry.padding) - offset > MAX_SNAPSHOT_TABLE_BYTES:
            raise CorruptImageError("the snapshot table is above 64 MiB", code="snapshot-table-size")
        yield at, entry
        at += entry.size


def _truncated(offset: int) -> CorruptImageError:
    text = f"the snapshot table ends within its entry at {offset:#x}"
    return CorruptImageError(text, code="snapshot-table-outside")
