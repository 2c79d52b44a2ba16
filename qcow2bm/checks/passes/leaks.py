"""Leaked clusters, and whose they were: a detached bitmap's, a lost one's, or a lost part of the mapping's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from heapq import merge
from operator import attrgetter
from typing import NamedTuple

from ...bitmap.store import StoredBitmap
from ...format.entries import OFFSET_MASK
from ...format.geometry import runs
from ...format.text import decode_name
from ...image.references import Reference
from ..census import Mismatch
from ..clusters import mismatch
from ..doubts import has_wrong_pointers, header_doubt, leak_doubt
from ..lost import Leaked, bitmap_places, counted_too_often, holds_bitmap_table, lost_directories, lost_tables
from ..model import Finding, Location
from ..problems import found
from ..view import View

_OWNED = 1 << 20
"""Clusters of lost structures that are told apart from other leaks."""


class Owner(NamedTuple):
    """Whose a cluster was: the code of its leak, a phrase, and the bitmap."""

    code: str | None
    phrase: str = ""
    bitmap: str | None = None


_NOBODY = Owner(None)
_TABLE = Owner("leak-lost-table", " (they look like a lost L2 table and its data)")
_Owned = dict[int, Owner]


def leaks(view: View) -> Iterator[Finding]:
    """The leaks that the comparison has left, in parts of one owner each. Leaves `leak_doubt` and `header_doubt`."""
    leaked = Leaked(view.leaks)
    view.header_doubt = header_doubt(view, leaked)
    if not view.leaks and not view.overcounted:
        return
    owned = _detached(view) if not view.directory.attached else {}
    if not owned:
        owned = _lost(view, leaked)
    if not view.blind:  # else any of them may be
        _add_lost_tables(view, leaked, owned)
        _weigh(view, leaked, owned)
    yield from _misplaced(view)
    known = sorted(owned)
    for run in merge(view.leaks, view.overcounted, key=attrgetter("first")):
        for part, owner in _parts(run, owned, known):
            yield mismatch(view, part, owner.code, owner.phrase, owner.bitmap)


def _misplaced(view: View) -> Iterator[Finding]:
    """Clusters of bitmaps that nobody counts, where an entry may name another than it should."""
    if not has_wrong_pointers(view) or not view.directory.attached:
        return
    uncounted, left = Leaked(view.uncounted), _OWNED
    lost = cache(partial(holds_bitmap_table, view, counted_too_often(view)))
    tables = {bitmap.entry.bitmap_table_offset: bitmap for bitmap in view.bitmaps}
    for bitmap in tables.values():
        for reference in _doubtful(view, bitmap, lost):
            if view.census.reaches_outside(reference.offset, reference.length) or left <= 0:
                continue
            first, last = (view.geometry.cluster_of(reference.offset + at) for at in (0, reference.length - 1))
            left -= last + 1 - first
            for start, count in runs(uncounted.within(first, last + 1)):
                offset = view.geometry.offset_of(start)
                what = "a cluster" if count == 1 else f"{count} clusters"
                text = f"{what} at {offset:#x}: {reference.owner}, and counted by nobody"
                where = Location("cluster", offset, bitmap=bitmap.name)
                yield found("bitmap-clusters-uncounted", text, where, count=count, first=start)


def _doubtful(view: View, bitmap: StoredBitmap, is_lost: Callable[[int], bool]) -> Iterator[Reference]:
    """The data of a bitmap, and the table if nothing vouches for it.

    A table that names data which is counted is the right one. If it names none, another one must be among the leaked
    clusters for it to be the wrong one.
    """
    if bitmap.fault is not None:
        return
    table, *data = bitmap.references()
    clusters = (view.geometry.cluster_of(offset) for value in bitmap.table if (offset := value & OFFSET_MASK))
    if not any(map(view.stored.get, clusters)) and is_lost(bitmap.entry.bitmap_table_size):
        yield table
    yield from data


def _weigh(view: View, leaked: Leaked, owned: _Owned) -> None:
    """See what speaks against taking leaks for leaks."""
    has_table = any(owner.code == _TABLE.code for owner in owned.values())
    ownerless = len(leaked) - sum(cluster in leaked for cluster, owner in owned.items() if owner.code != _TABLE.code)
    plain = ownerless + sum(run.count for run in view.overcounted)
    view.leak_doubt = view.leak_doubt or view.header_doubt or leak_doubt(view, leaked, plain, has_table=has_table)


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
        _own(view, owned, bitmap_places(view, bitmap.entry), owner)
    return owned


def _lost(view: View, leaked: Leaked) -> _Owned:
    """The clusters of bitmaps whose directory lies in a leaked cluster."""
    owned: _Owned = {}
    alive = {bitmap.entry.name for bitmap in view.bitmaps}
    for directory in lost_directories(view, leaked):
        for at, entry in directory.entries:
            if entry.name in alive:
                continue  # what a change that was cut short has left of an earlier state
            place = directory.offset + at, entry.size
            _own(view, owned, [place], Owner("leak-lost-bitmap", " (a lost bitmap directory)"))
            name = decode_name(entry.name)
            owner = Owner("leak-lost-bitmap", f" (lost bitmap '{name}')", name)
            _own(view, owned, bitmap_places(view, entry), owner)
    return owned


def _add_lost_tables(view: View, leaked: Leaked, owned: _Owned) -> None:
    """The clusters that look like an L2 table whose L1 entry is lost, and those that it refers to."""
    for table, data in lost_tables(view, leaked):
        if owned.get(table, _TABLE) is _TABLE:  # a lost L1 table may have named it
            for cluster in (table, *data)[: max(0, _OWNED - len(owned))]:
                owned.setdefault(cluster, _TABLE)


def _own(view: View, owned: _Owned, places: Iterable[tuple[int, int]], owner: Owner) -> None:
    for offset, length in places:
        if view.census.reaches_outside(offset, length) or len(owned) > _OWNED:
            continue
        for cluster in range(view.geometry.cluster_of(offset), view.geometry.cluster_of(offset + length - 1) + 1):
            owned.setdefault(cluster, owner)
