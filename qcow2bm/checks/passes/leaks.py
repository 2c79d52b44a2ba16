"""Leaked clusters, and whose they were: bitmaps that are detached, or that nothing refers to any more.

When a program that knows no bitmaps has written to an image, QEMU's next writer drops the bitmaps extension; an
`amend` to version 2 does so at once. What is left are clusters with a refcount and no reference. Their directory still
says what they are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

from ...errors import CorruptImageError
from ...format.bitmap_directory import FIXED_LENGTH, MAX_ENTRY_LENGTH, BitmapEntry, parse_entry
from ...format.entries import BitmapTableEntry, L2Entry, table_entries
from ...format.limits import MAX_BITMAP_DIRECTORY_BYTES
from ...format.text import decode_name
from ...image.plan import SECTOR
from ..census import Mismatch
from ..clusters import mismatch
from ..model import Finding
from ..view import View

_LOOKED_AT = 1 << 16
"""Leaked clusters that are read to see whether they are a bitmap directory."""
_DIRECTORY_PIECE = 64 << 10
_OWNED = 1 << 20
"""Clusters of lost bitmaps that are told apart from other leaks."""


class Owner(NamedTuple):
    """Whose a cluster was: the code of its leak, a phrase, and the bitmap."""

    code: str | None
    phrase: str = ""
    bitmap: str | None = None


_NOBODY = Owner(None)
_Owned = dict[int, Owner]


def leaks(view: View) -> Iterator[Finding]:
    """The leaks that the comparison has left, in parts of one owner each."""
    if not view.leaks:
        return
    owned = _detached(view) if not view.directory.attached else {}
    if not owned:
        owned = _lost(view)
    if not view.blind:  # else any of them may be
        _add_lost_tables(view, owned)
    known = sorted(owned)
    for run in view.leaks:
        for part, owner in _parts(run, owned, known):
            yield mismatch(view, part, owner.code, owner.phrase, owner.bitmap)


def _parts(run: Mismatch, owned: _Owned, known: list[int]) -> Iterator[tuple[Mismatch, Owner]]:
    """A run of leaks in parts of one owner each."""
    start, stop = run.first, run.first + run.count
    while start < stop:
        place = bisect_left(known, start)
        owner = owned.get(start, _NOBODY)
        end = start + 1
        if owner is _NOBODY:  # up to the next cluster that somebody owned
            end = min(stop, known[place]) if place < len(known) else stop
        else:
            while end < stop and owned.get(end) == owner:
                end += 1
        yield Mismatch(start, end - start, run.stored, run.references), owner
        start = end


def _detached(view: View) -> _Owned:
    """The clusters that the bitmaps refer to although the autoclear bit is off."""
    owned: _Owned = {}
    code = "leak-detached-bitmap"
    pointer = view.directory.pointer
    if pointer is not None:
        place = pointer.bitmap_directory_offset, pointer.bitmap_directory_size
        _own(view, owned, [place], Owner(code, " (the directory of the detached bitmaps)"))
    for bitmap in view.bitmaps:
        owner = Owner(code, f" (detached bitmap '{bitmap.name}')", bitmap.name)
        _own(view, owned, _places(view, bitmap.entry), owner)
    return owned


def _lost(view: View) -> _Owned:
    """The clusters of bitmaps whose directory lies in a leaked cluster."""
    owned: _Owned = {}
    leaked = _Leaked(view.leaks)
    alive = {bitmap.entry.name for bitmap in view.bitmaps}
    for cluster in islice(leaked, _LOOKED_AT):
        if cluster in owned:
            continue
        start = view.geometry.offset_of(cluster)
        for at, entry in _lost_entries(view, cluster, leaked):
            name = decode_name(entry.name)
            if entry.name in alive:
                continue  # what a change that was cut short has left of an earlier state
            _own(view, owned, [(start + at, entry.size)], Owner("leak-lost-bitmap", " (a lost bitmap directory)"))
            owner = Owner("leak-lost-bitmap", f" (lost bitmap '{name}')", name)
            _own(view, owned, _places(view, entry), owner)
    return owned


def _add_lost_tables(view: View, owned: _Owned) -> None:
    """The clusters that look like an L2 table whose L1 entry is lost, and those that it refers to."""
    leaked = _Leaked(view.leaks)
    owner = Owner("leak-lost-table", " (they look like a lost L2 table and its data)")
    for cluster in islice(leaked, _LOOKED_AT):
        if cluster not in owned and (data := _lost_table(view, cluster, leaked)):
            owned.setdefault(cluster, owner)
            for other in data[:_OWNED]:
                owned.setdefault(other, owner)


def _lost_table(view: View, cluster: int, leaked: _Leaked) -> list[int]:
    """The leaked clusters that a leaked one refers to, if it is an L2 table beyond doubt; none if it is not.

    All its entries are sound, what they refer to is counted and most of it leaked, and one has a flag that no other
    table has.
    """
    start, size = view.geometry.offset_of(cluster), view.geometry.cluster_size
    found: list[int] = []
    foreign, is_mapping = 0, False
    for at in range(0, size, SECTOR):
        if view.file.is_hole(start + at, size - at):
            break
        values = table_entries(view.file.read_padded(start + at, SECTOR))
        for index in range(0, len(values), view.geometry.l2_entry_words):
            if not values[index]:
                continue
            entry = L2Entry(values[index], values[index + 1] if view.geometry.extended_l2 else 0)
            place = entry.host_range(view.geometry)
            if next(entry.faults(view.geometry, version=view.header.version), None) is not None:
                return []
            if place is None or not view.stored.get(other := view.geometry.cluster_of(place[0])):
                return []
            if other in leaked:
                found.append(other)
            else:
                foreign += 1
            is_mapping = is_mapping or entry.copied or entry.is_compressed
    return found if is_mapping and len(found) > foreign else []


class _Leaked:
    """Leaked clusters, in order."""

    def __init__(self, runs: list[Mismatch]) -> None:
        self._runs = runs
        self._firsts = [run.first for run in runs]

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(range(run.first, run.first + run.count) for run in self._runs)

    def __contains__(self, cluster: int) -> bool:
        place = bisect_right(self._firsts, cluster) - 1
        return place >= 0 and cluster < self._runs[place].first + self._runs[place].count


def _lost_entries(view: View, cluster: int, leaked: _Leaked) -> list[tuple[int, BitmapEntry]]:
    """The entries of a bitmap directory that begins with a leaked cluster, each with its place in it.

    None unless all of the first one fits; as far as the clusters are leaked.
    """
    found: list[tuple[int, BitmapEntry]] = []
    start = view.geometry.offset_of(cluster)
    if not view.file.read_padded(start, FIXED_LENGTH).strip(b"\0"):
        return found
    data, at = b"", 0
    while at < MAX_BITMAP_DIRECTORY_BYTES and view.geometry.cluster_of(start + at) in leaked:
        if len(data) - at < MAX_ENTRY_LENGTH:
            data += view.file.read_padded(start + len(data), _DIRECTORY_PIECE if found else MAX_ENTRY_LENGTH)
        try:
            entry = parse_entry(data, at)
        except CorruptImageError:
            break
        if not _is_sound(view, entry, leaked):
            break
        found.append((at, entry))
        at += entry.size
    return found


def _is_sound(view: View, entry: BitmapEntry, leaked: _Leaked) -> bool:
    """True if nobody would write such bytes by chance.

    Sizes, flags, padding and name all fit, and table and data lie in clusters that are leaked too.
    """
    if any(entry.padding) or entry.extra_data or not entry.name or b"\0" in entry.name:
        return False
    if next(entry.faults(view.geometry), None) is not None:
        return False
    if view.geometry.cluster_of(entry.bitmap_table_offset) not in leaked:
        return False
    for value in view.read_table(entry):
        data = BitmapTableEntry(value)
        if data.fault(view.geometry) is not None:
            return False
        if data.offset and view.geometry.cluster_of(data.offset) not in leaked:
            return False
    return True


def _places(view: View, entry: BitmapEntry) -> Iterator[tuple[int, int]]:
    """The host ranges of a bitmap's table and data."""
    length = 8 * entry.bitmap_table_size
    if not view.geometry.may_start(entry.bitmap_table_offset, length):
        return
    yield entry.bitmap_table_offset, length
    if not view.file.is_hole(entry.bitmap_table_offset, length):
        for value in view.read_table(entry):
            offset = BitmapTableEntry(value).offset
            if offset:
                yield offset, view.geometry.cluster_size


def _own(view: View, owned: _Owned, places: Iterable[tuple[int, int]], owner: Owner) -> None:
    for offset, length in places:
        if view.census.reaches_outside(offset, length) or len(owned) > _OWNED:
            continue
        for cluster in range(view.geometry.cluster_of(offset), view.geometry.cluster_of(offset + length - 1) + 1):
            owned.setdefault(cluster, owner)
