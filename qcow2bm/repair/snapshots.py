"""The table of internal snapshots, written anew without what cannot be kept.

A snapshot whose L1 table cannot be read is lost already; while the table names it QEMU refuses to work with any of
them. Extra data above QEMU's limit is cut, entries without the fields that version 3 needs get them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count

from ..checks.model import Finding, RepairClass
from ..checks.passes.snapshots import with_too_small_tables
from ..errors import CorruptImageError
from ..format.geometry import round_up
from ..format.header import SNAPSHOT_FIELDS
from ..format.limits import MAX_SNAPSHOT_EXTRA_DATA
from ..format.snapshot_table import ENTRY_STRUCT, FIXED_LENGTH, NEEDED_EXTRA_DATA, SnapshotEntry, parse_snapshot
from .model import Proposal, Scope, Step
from .workshop import Workshop

_ALL_LOST = ("snapshot-table-offset", "snapshot-table-outside", "data-file-snapshots", "snapshot-count")
_TABLE_ENDS = ("snapshot-table-size", "snapshot-extra-data-size")
_ONE_LOST = ("snapshot-l1-unaligned", "snapshot-l1-size", "snapshot-l1-too-small", "snapshot-l1-outside")


def snapshots(shop: Workshop) -> Iterator[Proposal]:
    """Drop what cannot be kept, then complete what can."""
    lost = shop.found(*_ALL_LOST)
    if lost:
        title = "drop all internal snapshots: their table cannot be used"
        yield _step(title, RepairClass.LOSSY, lost), partial(_write_table, shop, [])
    ends = shop.found(*_TABLE_ENDS)
    if ends:
        title = "cut the snapshot table where it can no longer be read, and extra data to 1024 bytes"
        yield _step(title, RepairClass.LOSSY, ends), partial(_cut, shop)
    broken = shop.found(*_ONE_LOST)
    if broken:
        names = {finding.location.snapshot for finding in broken}
        title = "drop the snapshots that cannot be read: " + ", ".join(sorted(str(name) for name in names)[:5])
        yield _step(title, RepairClass.LOSSY, broken), partial(_drop, shop, _indices(shop, broken))
    poor = shop.found("snapshot-incomplete", "snapshot-id")
    # What stands past the end of the file, or behind an entry that cannot be read, is no entry to be completed.
    if poor and not shop.found(*_ALL_LOST, *_TABLE_ENDS):
        yield _step("complete the snapshot table", RepairClass.LOSSLESS, poor), partial(_complete, shop)


def _step(title: str, kind: RepairClass, found: list[Finding]) -> Step:
    return Step(title, kind, Scope.SNAPSHOTS, Counter(finding.code for finding in found))


def _indices(shop: Workshop, found: list[Finding]) -> set[int]:
    """Places in the table of the snapshots that findings are about.

    A finding about an L1 table says where that is, one about the entry itself where the entry is.
    """
    view = shop.view
    too_small = set(with_too_small_tables(view)) if any(finding.folded for finding in found) else set()
    wanted = {(finding.location.snapshot, finding.location.host_offset) for finding in found}
    return too_small | {
        index
        for index, ((place, entry), root) in enumerate(zip(view.snapshots, view.roots[1:], strict=False))
        if not wanted.isdisjoint({(root.name, place), (root.name, entry.l1_table_offset)})
    }


def _entries(shop: Workshop) -> list[SnapshotEntry]:
    return [entry for _, entry in shop.view.snapshots]


def _drop(shop: Workshop, indices: set[int]) -> None:
    _write_table(shop, [entry for index, entry in enumerate(_entries(shop)) if index not in indices])


def _cut(shop: Workshop) -> None:
    """Keep the entries up to the fault; one that has only too much extra data is kept, and those after it."""
    kept = _entries(shop)
    header = shop.image.header
    at = header.snapshots_offset + sum(entry.size for entry in kept)
    while len(kept) < header.nb_snapshots:
        found = _with_less_extra_data(shop, at)
        if found is None:
            break
        entry, at = found
        kept.append(entry)
    _write_table(shop, kept)


def _with_less_extra_data(shop: Workshop, at: int) -> tuple[SnapshotEntry, int] | None:
    """The entry at `at` with its extra data cut, and where the next one is; None if that is not what is wrong."""
    head = shop.file.read_padded(at, FIXED_LENGTH)
    extra: int = ENTRY_STRUCT.parse(head).extra_data_size
    keep = min(extra, MAX_SNAPSHOT_EXTRA_DATA)
    rest = at + FIXED_LENGTH + extra
    if rest >= shop.file.base.size:
        return None
    short = head[:-4] + keep.to_bytes(4, "big") + shop.file.read_padded(at + FIXED_LENGTH, keep)
    try:
        entry = parse_snapshot(short + shop.file.read_padded(rest, 2 * 0xFFFF))
    except CorruptImageError:
        return None
    end = rest + len(entry.id) + len(entry.name)
    return replace(entry, padding=b""), at + round_up(end - at, 8)


def _complete(shop: Workshop) -> None:
    """The fields that version 3 needs, as QEMU fills them in; an id of its own for each."""
    entries = []
    ids: set[bytes] = set()
    table, header = _entries(shop), shop.image.header
    taken = {entry.id for entry in table}
    numbers = (number for number in count(1) if str(number).encode() not in taken)
    for entry in table:
        fixed = entry
        if header.version >= 3 and len(entry.extra_data) < NEEDED_EXTRA_DATA:
            sizes = (entry.full_vm_state_size, header.size)
            fixed = replace(entry, extra_data=b"".join(size.to_bytes(8, "big") for size in sizes), padding=b"")
        if not entry.id or entry.id in ids:
            fixed = replace(fixed, id=str(next(numbers)).encode(), padding=b"")
        ids.add(fixed.id)
        taken.add(fixed.id)
        entries.append(fixed)
    _write_table(shop, entries)


def _write_table(shop: Workshop, entries: list[SnapshotEntry]) -> None:
    """In place if the old table has the room and its clusters to itself, else into free clusters."""
    view = shop.view
    data = b"".join(entry.build() for entry in entries)
    old, size = view.header.snapshots_offset, view.geometry.cluster_size
    room = round_up(view.snapshots_length, size)
    clusters = range(old // size, (old + room) // size)
    in_place = len(data) <= room and all(shop.owns(cluster * size) for cluster in clusters)
    place = 0
    if data and in_place:
        shop.write(old, data, "snapshot table")
        place = old
    elif data:
        place = shop.put(data, "snapshot table")
    if place != old:
        shop.given_up.update(clusters)
    fields = len(entries).to_bytes(4, "big") + place.to_bytes(8, "big")
    shop.write(SNAPSHOT_FIELDS, fields, "header: the snapshot table")
