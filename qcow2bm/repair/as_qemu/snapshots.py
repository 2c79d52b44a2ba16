"""The snapshot table: read although it breaks QEMU's limits, and written anew.

Source: `qcow2_check_read_snapshot_table` and `qcow2_check_fix_snapshot_table`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace

from ...checks.model import Finding, InQemu, Location
from ...checks.passes.snapshots import incomplete, snapshot_table
from ...checks.problems import found
from ...checks.view import View
from ...format.geometry import round_up
from ...format.header import SNAPSHOT_FIELDS
from ...format.limits import MAX_SNAPSHOT_EXTRA_DATA, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS
from ...format.snapshot_table import FIXED_FIELDS, FIXED_LENGTH, SnapshotEntry
from ...image.file import ImageFile
from .allocation import allocate, free
from .blocks import RefcountBlocks
from .model import Counts, Event, GivenUpError, Mode, Notice
from .node import Node

_WINDOW = 1 << 19
_INT_MAX = (1 << 31) - 1
_KNOWN = 24
"""Bytes of extra data that QEMU writes at least: those two, and the instruction count."""


def read(node: Node, mode: Mode, counts: Counts, failure: Finding | None) -> Iterator[Event]:
    """Read the table; leaves the snapshots in the node and in its view.

    Args:
        failure: why the header's fields are no table's.

    Raises:
        GivenUpError: it cannot be read.
    """
    view = node.view
    if mode is Mode.LEAKS:
        if failure is not None:
            yield Event(failure)
            raise GivenUpError
        for finding in snapshot_table(view):
            yield Event(finding)
            if finding.qemu is InQemu.FAILS:
                raise GivenUpError
            if finding.qemu is InQemu.CORRUPTION:
                counts.corruptions += finding.count
    else:
        yield from _read_anyway(node, counts)
    node.snapshots = [entry for _, entry in view.snapshots]
    node.snapshots_length = view.snapshots_length


def _read_anyway(node: Node, counts: Counts) -> Iterator[Event]:
    view, header = node.view, node.view.header
    count = min(header.nb_snapshots, MAX_SNAPSHOTS)
    if count < header.nb_snapshots:
        yield Event(Notice.SNAPSHOTS_OVERHANGING, values={"count": header.nb_snapshots - count})
    if any(fault.code == "snapshot-table-offset" for fault in replace(header, nb_snapshots=count).faults()):
        text = f"snapshots_offset {header.snapshots_offset:#x} is not a cluster's"
        yield Event(found("snapshot-table-offset", text, Location("snapshot table", header.snapshots_offset)))
        raise GivenUpError
    yield from _entries(view, count, counts)
    dropped = header.nb_snapshots - len(view.snapshots)
    if dropped:
        counts.corruptions_fixed += dropped
        node.file.write_at(SNAPSHOT_FIELDS, len(view.snapshots).to_bytes(4, "big"))
    for finding in incomplete(view):
        counts.corruptions += 1
        yield Event(finding, mended=True)


def _entries(view: View, count: int, counts: Counts) -> Iterator[Event]:
    """Read entries, without extra data above the limit, as long as the table is not too large."""
    window, start = _Window(view.file), view.header.snapshots_offset
    at, length = start, 0
    for index in range(count):
        at = round_up(at, 8)
        entry, end, extra = _entry(window, at)
        if extra > MAX_SNAPSHOT_EXTRA_DATA:
            yield Event(Notice.EXTRA_DATA_DROPPED, values={"index": index, "size": extra})
            counts.corruptions += 1
        length = round_up(length, 8) + _unpadded(entry)
        if length > MAX_SNAPSHOT_TABLE_BYTES or end - start > _INT_MAX:
            yield Event(Notice.SNAPSHOTS_TOO_BIG, values={"count": count - index})
            return
        view.snapshots.append((at, entry))
        view.snapshots_length = end - start
        at = end


class _Window:
    """Bytes of a table that is read from the front to the back."""

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self._base = 0
        self._data = b""

    def bytes(self, at: int, length: int) -> bytes:
        """`length` bytes, with zeroes past the end of the file."""
        if not self._base <= at <= at + length <= self._base + len(self._data):
            self._base, self._data = at, self._file.read_padded(at, max(length, _WINDOW))
        return self._data[at - self._base : at - self._base + length]


def _entry(window: _Window, at: int) -> tuple[SnapshotEntry, int, int]:
    """An entry with at most 1024 bytes of extra data, where it ends, and how much extra data it has."""
    head = FIXED_FIELDS.unpack(window.bytes(at, FIXED_LENGTH))
    l1_table, l1_size, id_size, name_size, seconds, nanoseconds, clock, state_size, extra = head
    data = window.bytes(at + FIXED_LENGTH, min(extra, MAX_SNAPSHOT_EXTRA_DATA))
    names = window.bytes(at + FIXED_LENGTH + extra, id_size + name_size)
    times = seconds, nanoseconds, clock
    entry = SnapshotEntry(l1_table, l1_size, *times, state_size, data, names[:id_size], names[id_size:])
    return entry, at + FIXED_LENGTH + extra + len(names), extra


def rewrite(node: Node, blocks: RefcountBlocks, counts: Counts) -> Iterator[Event]:
    """Write the table anew into free clusters, and give the old one's back.

    Raises:
        GivenUpError: there is no room for it.
    """
    try:
        yield from _rewrite(node, blocks)
    except GivenUpError as error:
        counts.errors += 1
        yield Event(Notice.SNAPSHOT_TABLE_FAILED, values={"reason": error.reason or errno.EIO})
        raise
    counts.corruptions_fixed += counts.corruptions
    counts.corruptions = 0


def _rewrite(node: Node, blocks: RefcountBlocks) -> Iterator[Event]:
    disk_size = node.geometry.virtual_size & -512
    entries = [_completed(entry, disk_size) for entry in node.snapshots]
    table = b"".join(map(SnapshotEntry.build, entries))
    length = len(table) - entries[-1].size + _unpadded(entries[-1]) if entries else 0
    if length > MAX_SNAPSHOT_TABLE_BYTES:
        raise GivenUpError(errno.EFBIG)
    offset = yield from allocate(node, blocks, length)
    structure = node.overlapped(offset, length)
    if structure is not None:
        yield from node.signal(Notice.CORRUPT_OVERLAP, structure=structure.value)
        yield from free(node, blocks, offset, length)
        raise GivenUpError(errno.EIO)
    node.fill(offset, table[:length])
    node.file.write_at(SNAPSHOT_FIELDS, len(entries).to_bytes(4, "big") + offset.to_bytes(8, "big"))
    yield from free(node, blocks, node.snapshots_offset, node.snapshots_length)
    node.snapshots_offset, node.snapshots_length = offset, length


def _completed(entry: SnapshotEntry, disk_size: int) -> SnapshotEntry:
    """An entry as QEMU writes it: with all the extra data it knows, names up to a zero byte, and no padding."""
    state_size, extra = entry.full_vm_state_size, entry.extra_data
    size = disk_size if entry.virtual_size is None else entry.virtual_size
    count = extra[16:_KNOWN] if len(extra) >= _KNOWN else b"\xff" * 8
    return replace(
        entry,
        vm_state_size=state_size if state_size < 1 << 32 else 0,
        extra_data=state_size.to_bytes(8, "big") + size.to_bytes(8, "big") + count + extra[_KNOWN:],
        id=entry.id.partition(b"\0")[0],
        name=entry.name.partition(b"\0")[0],
        padding=b"",
    )


def _unpadded(entry: SnapshotEntry) -> int:
    return FIXED_LENGTH + len(entry.extra_data) + len(entry.id) + len(entry.name)
