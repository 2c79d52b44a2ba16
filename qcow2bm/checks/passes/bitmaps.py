"""The bitmaps extension, the bitmap directory, its entries and their tables."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ...bitmap.store import StoredBitmap
from ...format.entries import OFFSET_MASK, BitmapTableEntry, all_sound
from ...format.faults import Fault
from ...format.limits import MAX_BITMAP_NAME
from ...image import lock
from ..census import Use
from ..model import Finding, InQemu, Location
from ..problems import found, from_fault
from ..telling import Fold
from ..view import View

if TYPE_CHECKING:
    from ..wrong import Mask

_SMALL = 64
"""Entries of a table that are looked at more quickly one by one than as an array."""
_OUTSIDE = "bitmap-data-outside"


def directory(view: View) -> Iterator[Finding]:
    """Extension, directory and tables as the format has them, detached ones too: what QEMU sees when it opens."""
    found_in = view.directory
    if found_in.damage is not None:
        extension = found_in.extension
        place = Location("extensions", extension.offset if extension is not None else None)
        assert found_in.damage_code is not None
        fault = Fault(found_in.damage_code, found_in.damage)
        yield from_fault(fault, place, qemu=InQemu.SILENT if found_in.is_ignored else None)
    names: set[bytes] = set()
    room = view.file.present + view.geometry.max_bitmap_table_entries
    for index, bitmap in enumerate(found_in.bitmaps):
        yield from _entry(view, bitmap, index, duplicate=bitmap.entry.qemu_name in names)
        names.add(bitmap.entry.qemu_name)
        room -= bitmap.entry.bitmap_table_size
        if room < 0:
            text = "the bitmap tables together are larger than the file: those from here on were not checked"
            yield found("bitmap-tables-excessive", text, _listed(bitmap, index))
            view.complete = False
            return
        view.bitmaps.append(bitmap)
        if not bitmap.entry.in_use:
            yield from _table_faults(view, bitmap)


def clusters(view: View) -> Iterator[Finding]:
    """The clusters that directory, tables and data take, and what QEMU sees of tables in its check."""
    pointer = view.directory.pointer
    if pointer is not None and view.directory.attached:
        view.census.add(Use.BITMAP, pointer.bitmap_directory_offset, pointer.bitmap_directory_size)
    for bitmap in view.bitmaps:
        yield from _table(view, bitmap)
        if bitmap.entry.in_use:
            yield from _table_faults(view, bitmap)


def _listed(bitmap: StoredBitmap, index: int) -> Location:
    return Location("bitmap directory", bitmap.place, index, bitmap=bitmap.name)


def _entry(view: View, bitmap: StoredBitmap, index: int, *, duplicate: bool) -> Iterator[Finding]:
    attached, in_use = view.directory.attached, bitmap.entry.in_use
    silent = None if attached else InQemu.SILENT
    if attached and not (in_use or duplicate or bitmap.entry_faults):
        return
    where = _listed(bitmap, index)
    for fault in bitmap.entry_faults:
        # No name, and one with a zero byte in it, QEMU does not mind as it opens an image to read.
        readable = fault.code == "bitmap-name" and len(bitmap.entry.name) <= MAX_BITMAP_NAME
        qemu = InQemu.SILENT if readable else silent
        offset = bitmap.entry.bitmap_table_offset
        if attached and in_use and fault.code == "bitmap-table-offset" and offset and view.geometry.is_aligned(offset):
            qemu = InQemu.FAILS  # too high for any file, which QEMU notices when it reads there: in its check
        yield from_fault(fault, where, prefix=f"bitmap '{bitmap.name}': ", qemu=qemu)
    if duplicate:
        ignored = InQemu.SILENT if in_use else silent  # QEMU skips one in use whose name it knows
        yield found("bitmap-name-duplicate", f"a second bitmap is called '{bitmap.name}'", where, qemu=ignored)
    if not attached:
        text = f"bitmap '{bitmap.name}' is detached: the autoclear bit is off"
        yield found("bitmap-detached", text, where)
    elif in_use and lock.has_writer(view.file.fd):
        yield found("bitmap-active", f"bitmap '{bitmap.name}' is in use by a running VM", where)
    elif in_use:
        text = f"bitmap '{bitmap.name}' is marked in use, and nobody has the image open"
        yield found("bitmap-inconsistent", text, where)


def _may_be_read(view: View, bitmap: StoredBitmap) -> bool:
    """False where the entry's faults have said already that there is no such table; QEMU's check reads one at 0."""
    offset, entries = bitmap.entry.bitmap_table_offset, bitmap.entry.bitmap_table_size
    if not offset and not view.as_qemu:
        return False
    return view.geometry.may_start(offset, 8 * entries) and entries <= view.geometry.max_bitmap_table_entries


def _read(view: View, bitmap: StoredBitmap) -> array[int]:
    """A bitmap table; nothing if there is none, or nothing in it."""
    offset, length = bitmap.entry.bitmap_table_offset, 8 * bitmap.entry.bitmap_table_size
    if not _may_be_read(view, bitmap) or view.file.is_hole(offset, length):
        return array("Q")
    return view.read_table(bitmap.entry)


def _is_small_and_sound(view: View, table: array[int]) -> bool:
    """True of most tables, and told of them at once; there may be tens of thousands."""
    return len(table) <= _SMALL and all_sound(table, view.geometry, view.file_size)


def _place(bitmap: StoredBitmap, index: int) -> Location:
    return Location("bitmap table", bitmap.entry.bitmap_table_offset + 8 * index, index, bitmap=bitmap.name)


def _table_faults(view: View, bitmap: StoredBitmap) -> Iterator[Finding]:
    """Entries that break the format. QEMU loads tables as it opens the image, those in use only in its check."""
    in_use = bitmap.entry.in_use
    qemu = (InQemu.FAILS if in_use else InQemu.REFUSES) if view.directory.attached else InQemu.SILENT
    if view.as_qemu and qemu is InQemu.SILENT:
        return
    table = _read(view, bitmap)
    if _is_small_and_sound(view, table):
        return
    fold = _breaking(view, table) if view.bitmaps_in_bulk else None
    prefix = f"bitmap '{bitmap.name}': table "
    for at in range(len(table)) if fold is None else fold.indices():
        fault = BitmapTableEntry(table[at]).fault(view.geometry) if table[at] else None
        if fault is not None:
            yield from_fault(fault, _place(bitmap, at), prefix=prefix, qemu=qemu)
            if view.as_qemu:
                return  # QEMU looks no further
    yield from _rest(fold, bitmap, table, qemu)


def _table(view: View, bitmap: StoredBitmap) -> Iterator[Finding]:
    """The clusters of one bitmap; counted if the bitmaps count."""
    if not _may_be_read(view, bitmap):
        return
    attached, census, size = view.directory.attached, view.census, view.geometry.cluster_size
    qemu = None if attached else InQemu.SILENT
    offset, length = bitmap.entry.bitmap_table_offset, 8 * bitmap.entry.bitmap_table_size
    if census.reaches_outside(offset, length):
        text = f"the table of bitmap '{bitmap.name}' ({length} bytes at {offset:#x}) lies outside the file"
        where = Location("bitmap table", offset, bitmap=bitmap.name)
        silent = view.in_qemu(offset + length) if qemu is None else qemu
        yield found("bitmap-table-outside", text, where, qemu=silent, offset=offset, size=length)
    elif attached:
        census.add(Use.BITMAP, offset, length)
    table = _read(view, bitmap)
    if _is_small_and_sound(view, table):
        for value in table if attached else ():
            if value & OFFSET_MASK:
                census.add(Use.BITMAP, value & OFFSET_MASK, size)
        return
    fold = _counted(view, table) if view.bitmaps_in_bulk else None
    for at in range(len(table)) if fold is None else fold.indices():
        entry = BitmapTableEntry(table[at])
        if not entry.offset or (fold is None and entry.fault(view.geometry) is not None):
            continue
        if census.reaches_outside(entry.offset, size):
            text = f"data of bitmap '{bitmap.name}' at {entry.offset:#x} lies outside the file"
            yield found(_OUTSIDE, text, _place(bitmap, at), qemu=qemu, offset=entry.offset, size=size)
        elif attached:
            census.add(Use.BITMAP, entry.offset, size)
    yield from _rest(fold, bitmap, table, qemu)


def _judged(view: View, table: array[int]) -> dict[str, Mask]:
    """The wrong entries of a table that is judged as a whole, by problem."""
    from ..wrong import bitmap_faults, words

    return bitmap_faults(words(table), view.geometry, view.file_size)


def _breaking(view: View, table: array[int]) -> Fold:
    """Which entries to tell of, of those that break the format."""
    faults = _judged(view, table)
    del faults[_OUTSIDE]
    return Fold(view.telling, faults)


def _counted(view: View, table: array[int]) -> Fold:
    """Count the data clusters; which entries to tell of, of those that reach outside the file."""
    import numpy as np

    from ..wrong import words

    faults = _judged(view, table)
    if view.directory.attached:
        sound = words(table)[~np.logical_or.reduce(list(faults.values()))]
        view.bulk.add_bitmap_data(sound & np.uint64(OFFSET_MASK))
    return Fold(view.telling, {_OUTSIDE: faults[_OUTSIDE]})


def _rest(fold: Fold | None, bitmap: StoredBitmap, table: array[int], qemu: InQemu | None) -> Iterator[Finding]:
    """What is not told entry by entry."""
    for code, first, count in fold.rest if fold is not None else ():
        text = f"{count} more entries of the table of bitmap '{bitmap.name}' are like this, from {table[first]:#x} on"
        yield replace(found(code, text, _place(bitmap, first), qemu=qemu, count=count), folded=True)
