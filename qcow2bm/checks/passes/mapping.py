"""The guest's mapping: the active L1 table, those of the snapshots, and every L2 table once.

All tables are counted first, in bulk. The tables with something odd in them are then read again, entry by entry, in
the order of the L1 tables, so that findings come as a reader of the mapping would meet them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ...format.entries import L1_RESERVED, L2Entry, equal_entries, l1_offset, table_entries
from ...format.faults import Fault
from ...format.header import Autoclear
from ...format.limits import MAX_L1_ENTRIES
from ...image.mapping_tables import room_for_l1_tables
from ..census import Use
from ..model import Finding, InQemu, Location
from ..problems import found
from ..telling import Fold
from ..view import Root, View
from ..walk import TableWalk

_RAW_OFFSET = "data-file-raw-offset"
_FEW = 1 << 10
"""Entries of an L1 table up to which they are looked at one by one, if they are sound."""

Suspects = Mapping[int, tuple[int, int]]
"""L2 tables to look at entry by entry, as `TableWalk` has them."""


def mapping(view: View) -> Iterator[Finding]:
    """Header, active L1 table, snapshots, and all their L2 tables. Leaves `roots`, `census` and `miscopied`."""
    view.roots = list(_roots(view))
    yield from _bounded(view)
    walk = TableWalk(view)
    walk.run()
    view.miscopied = walk.miscopied
    view.visits = sum(map(sum, walk.suspects.values())) + sum(walk.miscopied.values())
    view.census.add(Use.STRUCTURE, 0, view.geometry.cluster_size)
    done: set[int] = set()
    for root in view.roots:
        yield from _root(view, root, walk.suspects, done)
        if root.snapshot is None and view.header.has_data_file and view.snapshots:
            text = f"{len(view.snapshots)} snapshots in an image with a data file"
            yield found("data-file-snapshots", text, Location("snapshot table"), snapshots=len(view.snapshots))


def _roots(view: View) -> Iterator[Root]:
    header = view.header
    broken = next((fault for fault in view.faults if fault.code in ("l1-offset", "l1-size")), None)
    view.complete = view.complete and broken is None
    yield Root(header.l1_table_offset, header.l1_size, None, broken)
    for _, entry in view.snapshots:
        fault = None
        if not view.geometry.is_aligned(entry.l1_table_offset):
            text = f"its L1 table's offset {entry.l1_table_offset:#x} is not a cluster's"
            fault = Fault("snapshot-l1-unaligned", text)
        elif entry.l1_size > MAX_L1_ENTRIES:
            fault = Fault("snapshot-l1-size", f"its L1 table has {entry.l1_size} entries, which is above 32 MiB")
        yield Root(entry.l1_table_offset, entry.l1_size, entry, fault)


def _bounded(view: View) -> Iterator[Finding]:
    """Leave out the tables after those that together are far larger than all that the file holds."""
    room = view.file.present // 8 + room_for_l1_tables(root.entries for root in view.roots if root.fault is None)
    for index, root in enumerate(view.roots):
        if root.fault is None:
            room -= root.entries
        if room < 0:
            text = "the L1 tables together are larger than the file: the snapshots from here on were not checked"
            yield found("snapshot-l1-excessive", text, Location("L1 table", root.offset, index, snapshot=root.name))
            del view.roots[index:]
            view.complete = False
            return


def _root(view: View, root: Root, suspects: Suspects, done: set[int]) -> Iterator[Finding]:
    """One L1 table: itself, its entries, and its L2 tables that want a closer look and have not had one."""
    table = "active L1 table" if root.snapshot is None else "L1 table of a snapshot"
    where = Location(table, root.offset, snapshot=root.name)
    if root.fault is not None:
        if root.snapshot is not None:
            text = f"snapshot {root.name}: {root.fault.message}"
            yield found(root.fault.code, text, where, offset=root.offset, entries=root.entries)
        return
    if not view.census.add(Use.STRUCTURE, root.offset, 8 * root.entries):
        code = "l1-outside" if root.snapshot is None else "snapshot-l1-outside"
        text = f"the {table} ({8 * root.entries} bytes at {root.offset:#x}) lies outside the file"
        unreadable = root.snapshot is not None and not view.geometry.may_start(root.offset, 8 * root.entries)
        qemu = InQemu.FAILS if unreadable else view.in_qemu(root.offset + 8 * root.entries)
        yield found(code, text, where, qemu=qemu, offset=root.offset, size=8 * root.entries)
    entries = view.read_l1(root)
    if not entries:
        return
    size, cut = view.geometry.cluster_size, view.geometry.cluster_size - 1

    def is_odd(entry: int) -> bool:
        offset = l1_offset(entry)
        return bool(entry & L1_RESERVED or offset & cut or offset + size > view.file.size)

    if view.tables_in_bulk and (len(entries) > _FEW or any(map(is_odd, entries))):
        yield from _in_bulk(view, entries, where, suspects, done)
        return
    for entry, start, stop in equal_entries(entries):  # any number may be the same
        offset, odd = l1_offset(entry), is_odd(entry)
        if not entry or ((offset or view.as_qemu) and not odd and offset not in suspects):
            continue
        yield from _same_entries(view, entry, range(start, stop), where, odd=odd, suspects=suspects, done=done)


def _same_entries(
    view: View, entry: int, indices: range, where: Location, *, odd: bool, suspects: Suspects, done: set[int]
) -> Iterator[Finding]:
    """L1 entries in a row that are the same; `odd` if they break the format or reach outside the file."""
    offset, start = l1_offset(entry), where.host_offset or 0
    for index in indices:
        if not offset and not view.as_qemu:  # where qemu-img takes the header for an L2 table
            place = replace(where, host_offset=start + 8 * index, index=index)
            yield found("l1-entry-no-table", f"L1 entry {entry:#x} has flags and no L2 table", place, entry=entry)
            continue
        if not odd and offset in done:
            break
        place = replace(
            where, host_offset=start + 8 * index, index=index, guest_offset=index * view.geometry.l2_span,
            guest_length=view.geometry.l2_span,
        )  # fmt: skip
        yield from _l1_entry(view, entry, place)
        if offset in suspects and offset not in done:
            visits = sum(suspects[offset])
            each = view.says_at_every_visit
            if not each:
                done.add(offset)
            yield from _l2_table(view, offset, place, 1 if each else visits)


def _in_bulk(view: View, table: array[int], where: Location, suspects: Suspects, done: set[int]) -> Iterator[Finding]:
    """The entries of an L1 table that is judged as a whole: those that are told of are looked at, and no others."""
    from ..wrong import first_of_each, l1_faults, words

    entries = words(table)
    fold = Fold(view.telling, l1_faults(entries, view.geometry, view.file_size))
    named = first_of_each(entries, suspects)
    for index in sorted({*fold.told, *named}):
        for finding in _same_entries(
            view, table[index], range(index, index + 1), where, odd=True, suspects=suspects, done=done
        ):
            if finding.location.structure != where.structure or fold.tells(index, finding.code):
                yield finding
    for code, first, count in fold.rest:
        place = replace(where, host_offset=(where.host_offset or 0) + 8 * first, index=first)
        text = f"{count} more entries of the {where.structure} are like this, from {table[first]:#x} on"
        yield replace(found(code, text, place, count=count), folded=True)


def _l1_entry(view: View, entry: int, where: Location) -> Iterator[Finding]:
    offset = l1_offset(entry)
    if entry & L1_RESERVED:
        yield found("l1-entry-reserved", f"L1 entry {entry:#x} has reserved bits set", where, entry=entry)
    if view.census.reaches_outside(offset, view.geometry.cluster_size):
        text = f"an L2 table at {offset:#x} lies outside the file"
        yield found("l2-outside", text, where, offset=offset, size=view.geometry.cluster_size)
    if not view.geometry.is_aligned(offset):
        yield found("l2-unaligned", f"an L2 table at {offset:#x} is not cluster-aligned", where, offset=offset)


def _l2_table(view: View, offset: int, place: Location, visits: int) -> Iterator[Finding]:
    """The entries of an L2 table that `visits` L1 entries name."""
    geometry = view.geometry
    data = view.file.read_padded(offset, geometry.cluster_size)
    values, start = table_entries(data), place.guest_offset or 0
    fold = _fold_of(view, data)
    for index in range(geometry.l2_entries) if fold is None else fold.indices():
        entry = L2Entry.of(values, index, geometry)
        if not (entry.value or entry.bitmap):
            continue
        for finding in _l2_entry(view, entry, _l2_place(view, offset, index, start, place.snapshot), visits):
            if fold is None or fold.tells(index, finding.code):
                yield finding
    yield from _rest(view, fold, _l2_place(view, offset, 0, start, place.snapshot), visits)


def _rest(view: View, fold: Fold | None, table: Location, visits: int) -> Iterator[Finding]:
    """What is not told entry by entry of an L2 table, which lies where its first entry does."""
    for code, first, count in fold.rest if fold is not None else ():
        where = _l2_place(view, table.host_offset or 0, first, table.guest_offset or 0, table.snapshot)
        text = f"{count} more entries of this L2 table are like this"
        yield replace(found(code, text, where, count=count * visits), folded=True)


def _fold_of(view: View, data: bytes) -> Fold | None:
    """What to tell of an L2 table, of very many; None for all of it."""
    if not view.tables_in_bulk:
        return None
    from ..wrong import l2_faults, l2_words

    version, data_file = view.header.version, view.header.has_data_file
    entries = l2_words(data, view.geometry)
    return Fold(view.telling, l2_faults(*entries, view.geometry, view.file_size, version=version, data_file=data_file))


def _l2_place(view: View, offset: int, index: int, start: int, snapshot: str | None) -> Location:
    """Entry `index` of the L2 table at `offset`, which maps the disk from `start` on."""
    geometry = view.geometry
    return Location(
        "L2 table", offset + index * geometry.l2_entry_size, index, start + index * geometry.cluster_size,
        geometry.cluster_size, snapshot=snapshot,
    )  # fmt: skip


def _l2_entry(view: View, entry: L2Entry, where: Location, visits: int) -> Iterator[Finding]:
    version, data_file = view.header.version, view.header.has_data_file
    for fault in entry.faults(view.geometry, version=version, data_file=data_file):
        yield found(
            fault.code, fault.message, where, count=visits, entry=entry.value, offset=entry.host_offset,
            index=where.index or 0, coffset=entry.value & (1 << view.geometry.compressed_offset_bits) - 1,
        )  # fmt: skip
    if entry.is_compressed and not entry.is_stream(data_file=data_file):
        return
    reach = view.census.outside_of(entry)
    if reach is None:
        return
    code, what = ("compressed-outside", "compressed") if entry.is_compressed else ("data-outside", "data")
    text = f"a {what} cluster ({reach[1]} bytes at {reach[0]:#x}) lies outside the file"
    yield found(code, text, where, count=visits, qemu=view.in_qemu(sum(reach)), offset=reach[0], size=reach[1])


def past_end(view: View) -> Iterator[Finding]:
    """Clusters mapped between the end of the disk and the end of what its last L2 table maps.

    The L1 entries after that one are where a VM's state lies while a snapshot with it is taken or loaded.
    """
    geometry, root = view.geometry, view.roots[0]
    index, first = divmod(geometry.clusters(geometry.virtual_size), geometry.l2_entries)
    l1_table = view.read_l1(root)
    offset = l1_offset(l1_table[index]) if first and index < len(l1_table) else 0
    if not offset or offset >= view.file.size or view.file.is_hole(offset, geometry.cluster_size):
        return
    values = table_entries(view.file.read_padded(offset, geometry.cluster_size))[:: geometry.l2_entry_words]
    entries = map(L2Entry, filter(None, values[first:]))
    data_file = view.header.has_data_file
    used = sum(1 for entry in entries if entry.is_compressed or entry.is_standard(geometry, data_file=data_file))
    if used:
        start = index * geometry.l2_span + first * geometry.cluster_size
        length = geometry.l2_span - first * geometry.cluster_size
        where = Location("active L1 table", root.offset + 8 * index, index, start, length)
        yield found("mapping-past-end", f"{used} clusters are mapped past the end of the disk", where, count=used)


def raw_data_file(view: View) -> Iterator[Finding]:
    """A raw data file is the disk as it is: every cluster of it lies where the guest has it."""
    if not (view.header.has_data_file and view.header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA):
        return
    geometry = view.geometry
    done: set[int] = set()  # a table named twice is wrong the second time, and said to be shared
    for l1_index, l1_entry in enumerate(view.read_l1(view.roots[0])):
        offset = l1_offset(l1_entry)
        if not offset or offset in done or offset >= view.file.size:
            continue
        if view.file.is_hole(offset, geometry.cluster_size):
            continue
        done.add(offset)
        yield from _out_of_place(view, offset, l1_index * geometry.l2_span)


def _out_of_place(view: View, offset: int, start: int) -> Iterator[Finding]:
    """The entries of the L2 table at `offset`, which maps the disk from `start` on, that are not where the guest is."""
    geometry = view.geometry
    values = table_entries(view.file.read_padded(offset, geometry.cluster_size))[:: geometry.l2_entry_words]
    fold = None
    if view.tables_in_bulk:
        from ..wrong import out_of_place, words

        fold = Fold(view.telling, {_RAW_OFFSET: out_of_place(words(values), geometry, start)})
    for index in range(len(values)) if fold is None else fold.indices():
        entry, where = L2Entry(values[index]), _l2_place(view, offset, index, start, None)
        guest = where.guest_offset
        if not entry.value or entry.host_offset == guest or not entry.is_standard(geometry, data_file=True):
            continue
        text = f"guest offset {guest:#x} lies at {entry.host_offset:#x} of a raw data file"
        yield found(_RAW_OFFSET, text, where, entry=entry.value)
    yield from _rest(view, fold, _l2_place(view, offset, 0, start, None), 1)


def structures(view: View) -> Iterator[Finding]:
    """Snapshot table, refcount table and encryption header as clusters in use."""
    header, pointer = view.header, view.crypto_header
    places = [
        ("snapshot table", header.snapshots_offset, view.snapshots_length),
        ("refcount table", header.refcount_table_offset, 8 * len(view.stored.table)),
    ]
    if pointer is not None:
        places.append(("encryption header", pointer.offset, pointer.length))
    for structure, offset, length in places:
        if not view.census.add(Use.STRUCTURE, offset, length):
            code = f"{structure.replace(' ', '-')}-outside"
            text = f"the {structure} ({length} bytes at {offset:#x}) lies outside the file"
            qemu = view.in_qemu(offset + length)
            yield found(code, text, Location(structure, offset), qemu=qemu, offset=offset, size=length)
