"""The table of internal snapshots; their L1 tables are walked with the active one."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import CorruptImageError
from ...format.geometry import div_up
from ...format.snapshot_table import SnapshotEntry, parse_snapshots
from ...format.text import decode_name
from ..model import Finding, Location
from ..problems import found, from_fault
from ..view import View, snapshot_name, unreadable

_NEEDED = 16
"""Bytes of extra data that version 3 needs: VM state size and disk size."""


def snapshot_table(view: View) -> Iterator[Finding]:
    """Read the table as far as it goes. Leaves `snapshots` and `snapshots_length`."""
    header = view.header
    if any(fault.code in ("snapshot-count", "snapshot-table-offset") for fault in view.faults):
        view.complete = False
        return
    try:
        for offset, entry in parse_snapshots(view.file.read_padded, header.snapshots_offset, header.nb_snapshots):
            view.snapshots.append((offset, entry))
            view.snapshots_length = offset + entry.size - len(entry.padding) - header.snapshots_offset
    except CorruptImageError as error:
        view.complete = False
        index = len(view.snapshots)
        place = Location("snapshot table", header.snapshots_offset, index)
        finding = from_fault(unreadable(error), place)
        yield found(finding.code, finding.message, place, index=index, left=header.nb_snapshots - index)
    yield from _entries(view)


def _entries(view: View) -> Iterator[Finding]:
    ids: set[bytes] = set()
    extended = view.header.version >= 3
    for index, (offset, entry) in enumerate(view.snapshots):
        if extended and len(entry.extra_data) < _NEEDED:
            text = f"snapshot {index} has {len(entry.extra_data)} bytes of extra data, version 3 needs {_NEEDED}"
            yield found("snapshot-incomplete", text, _place(index, offset, entry), index=index)
        if offset >= view.file.size:
            continue  # all zeroes
        if not entry.id or entry.id in ids:
            text = f"snapshot {index} has " + (f"the id {decode_name(entry.id)} of another" if entry.id else "no id")
            yield found("snapshot-id", text, _place(index, offset, entry))
        ids.add(entry.id)
        size = entry.virtual_size
        needed = 0 if size is None or size >= 1 << 63 else div_up(size, view.geometry.l2_span)
        if entry.l1_size < needed:
            text = f"its L1 table has {entry.l1_size} entries, its disk of {size} bytes needs {needed}"
            yield found("snapshot-l1-too-small", text, _place(index, offset, entry))


def _place(index: int, offset: int, entry: SnapshotEntry) -> Location:
    return Location("snapshot table", offset, index, snapshot=snapshot_name(entry))
