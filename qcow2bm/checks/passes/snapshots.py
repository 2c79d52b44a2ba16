"""The table of internal snapshots; their L1 tables are walked with the active one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from ...errors import CorruptImageError
from ...format.faults import Fault
from ...format.geometry import div_up
from ...format.snapshot_table import NEEDED_EXTRA_DATA, SnapshotEntry, parse_snapshots
from ...format.text import decode_name
from ..model import Finding, Location
from ..problems import found, from_fault
from ..view import View, snapshot_name


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
        finding = from_fault(Fault.of(error), place)
        yield found(finding.code, finding.message, place, index=index, left=header.nb_snapshots - index)

    def size_text(_: int, entry: SnapshotEntry) -> str:
        needed = f"its disk of {entry.virtual_size} bytes needs {_needed(view, entry)}"
        return f"its L1 table has {entry.l1_size} entries, {needed}"

    yield from incomplete(view)
    yield from _told(view, "snapshot-id", _same_ids(view), _id_text)
    yield from _told(view, "snapshot-l1-too-small", with_too_small_tables(view), size_text)


def incomplete(view: View) -> Iterator[Finding]:
    """Entries without the extra data that version 3 needs."""
    entries = enumerate(view.snapshots) if view.header.version >= 3 else ()
    poor = (index for index, (_, entry) in entries if len(entry.extra_data) < NEEDED_EXTRA_DATA)
    yield from _told(view, "snapshot-incomplete", poor, _extra_text)


def _same_ids(view: View) -> Iterator[int]:
    """Places of the entries without an id, or with that of another."""
    ids: set[bytes] = set()
    for index, (offset, entry) in enumerate(view.snapshots):
        if offset >= view.file.size:
            return  # all zeroes
        if not entry.id or entry.id in ids:
            yield index
        ids.add(entry.id)


def with_too_small_tables(view: View) -> Iterator[int]:
    """Places of the entries whose L1 table has less than their disk needs."""
    for index, (offset, entry) in enumerate(view.snapshots):
        if offset >= view.file.size:
            return  # all zeroes
        if entry.l1_size < _needed(view, entry):
            yield index


def _extra_text(index: int, entry: SnapshotEntry) -> str:
    return f"snapshot {index} has {len(entry.extra_data)} bytes of extra data, version 3 needs {NEEDED_EXTRA_DATA}"


def _id_text(index: int, entry: SnapshotEntry) -> str:
    return f"snapshot {index} has " + (f"the id {decode_name(entry.id)} of another" if entry.id else "no id")


def _needed(view: View, entry: SnapshotEntry) -> int:
    """Entries of an L1 table that the disk of a snapshot needs; 0 if its size says nothing sensible."""
    size = entry.virtual_size
    return div_up(size, view.geometry.l2_span) if size is not None and size < 1 << 63 else 0


def _told(view: View, code: str, indices: Iterable[int], say: Callable[[int, SnapshotEntry], str]) -> Iterator[Finding]:
    """The problem of some entries: those that are told one by one, and the rest as one."""
    first = rest = 0
    for index in indices:
        offset, entry = view.snapshots[index]
        if view.telling.take(code, 1):
            where = Location("snapshot table", offset, index, snapshot=snapshot_name(entry))
            yield found(code, say(index, entry), where, index=index)
        else:
            first, rest = (first if rest else index), rest + 1
    if rest:
        where = Location("snapshot table", view.snapshots[first][0], first)
        yield replace(found(code, f"{rest} more snapshots are like this", where, count=rest), folded=True)
