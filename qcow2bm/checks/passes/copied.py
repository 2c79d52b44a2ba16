"""The copied flags of the active L1 and L2 entries: set where, and only where, the refcount on disk is exactly one."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ...format.entries import COPIED, L2Entry, l1_offset, table_entries
from ..model import Finding, Location
from ..plain import PLAIN_ENTRIES
from ..problems import found
from ..view import Root, View

_REMEMBERED = 1 << 12
"""Refcounts of L2 tables."""


def copied(view: View) -> Iterator[Finding]:
    """Entries whose flag contradicts the refcount; what cannot be read is left out."""
    geometry, root = view.geometry, view.roots[0]
    l1_table = view.read_l1(root)
    if view.telling.folds and len(l1_table) > PLAIN_ENTRIES:
        yield from _in_bulk(view, root, l1_table)
        return
    done: set[int] = set()
    pending: _Run | None = None
    refcount = lru_cache(_REMEMBERED)(view.stored.get)  # any number of entries may name one table
    step = 1 if view.as_qemu else geometry.cluster_size // 8
    for index, stop in _cut(view.census.doubtful_copied(l1_table, view.miscopied), step):
        entry = l1_table[index]
        offset = l1_offset(entry)
        stored = refcount(geometry.cluster_of(offset)) if offset else None
        if stored is None:
            continue
        if (stored == 1) != bool(entry & COPIED):
            last, pending = pending, _Run(root.offset + 8 * index, index, stop - index, entry, stored)
            if view.as_qemu:
                yield _of_l1(view, pending)
                pending = None
            elif last is not None and last.goes_on_with(pending, geometry.cluster_size):
                pending = last._replace(length=last.length + pending.length)
            elif last is not None:
                yield _of_l1(view, last)
        if offset in view.miscopied and offset not in done:
            visits = view.miscopied[offset]
            each = view.says_at_every_visit
            if not each:
                done.add(offset)
            yield from _table(view, offset, index, 1 if each else visits)
    if pending is not None:
        yield _of_l1(view, pending)


def _in_bulk(view: View, root: Root, l1_table: array[int]) -> Iterator[Finding]:
    """The same of a large L1 table: first its own flags, then those of the tables that it names."""
    from ..wrong import first_of_each, words

    entries, flags, told = words(l1_table), view.bulk.flags, 0
    for first, length, stored in flags.wrong_l1_runs(entries, view.geometry.cluster_size // 8):
        run = _Run(root.offset + 8 * first, first, length, l1_table[first], stored)
        if not view.telling.take("copied-l1", 1):
            rest = flags.wrong_in_l1(entries).size - told
            text = f"the copied flags of {rest} more L1 entries contradict the refcounts"
            where = Location("active L1 table", run.place, run.first)
            yield replace(found("copied-l1", text, where, count=rest), folded=True)
            break
        told += run.length
        yield _of_l1(view, run)
    for index in first_of_each(entries, view.miscopied):
        offset = l1_offset(l1_table[index])
        yield from _table(view, offset, index, view.miscopied[offset])


def _cut(ranges: Iterable[tuple[int, int]], step: int) -> Iterator[tuple[int, int]]:
    """Ranges cut wherever an index is a multiple of `step`."""
    for start, stop in ranges:
        at = start
        while at < stop:
            end = min(stop, (at // step + 1) * step)
            yield at, end
            at = end


class _Run(NamedTuple):
    """L1 entries in a row, in one cluster, whose flags are wrong in the same way."""

    place: int
    first: int
    length: int
    entry: int
    stored: int

    def goes_on_with(self, other: _Run, cluster_size: int) -> bool:
        same = self.stored == other.stored and not (self.entry ^ other.entry) & COPIED
        return same and self.place + 8 * self.length == other.place and bool(other.place % cluster_size)


def _of_l1(view: View, run: _Run) -> Finding:
    geometry, span = view.geometry, view.geometry.l2_span
    where = Location("active L1 table", run.place, run.first, run.first * span, run.length * span)
    flag = "set" if run.entry & COPIED else "clear"
    text = f"the copied flag of L1 entry {run.first} is {flag}, its L2 table's refcount is {run.stored}"
    return found(
        "copied-l1", text, where, count=run.length, index=run.first, entry=run.entry, refcount=run.stored,
        first=geometry.cluster_of(l1_offset(run.entry)), entries=run.length,
    )  # fmt: skip


def _table(view: View, offset: int, l1_index: int, visits: int) -> Iterator[Finding]:
    """The entries of one L2 table; neighbours that are wrong in the same way are one finding, but not for QEMU."""
    geometry = view.geometry
    values = table_entries(view.file.read_padded(offset, geometry.cluster_size))[:: geometry.l2_entry_words]
    step = 1 if view.as_qemu or visits > 1 else len(values)
    runs = view.census.miscopied_runs(values)
    parts = ((at, min(at + step, end)) for start, end in runs for at in range(start, end, step))
    told = 0
    for index, stop in parts:
        value, length = values[index], stop - index
        if not view.telling.take("copied-l2", 1):
            rest = view.census.miscopied_entries(values) - told
            text = f"the copied flags of {rest} more entries of this L2 table contradict the refcounts"
            where = Location("L2 table", offset + index * geometry.l2_entry_size, index)
            yield replace(found("copied-l2", text, where, count=visits * rest), folded=True)
            return
        told += length
        cluster = geometry.cluster_of(L2Entry(value).host_offset)
        stored = 1 if view.header.has_data_file else view.stored.get(cluster)
        guest = l1_index * geometry.l2_span + index * geometry.cluster_size
        place = offset + index * geometry.l2_entry_size
        where = Location("L2 table", place, index, guest, length * geometry.cluster_size)
        flag = "set" if value & COPIED else "clear"
        text = f"the copied flag of L2 entry {value:#x} is {flag}, its cluster's refcount is {stored}"
        yield found(
            "copied-l2", text, where, count=visits * length, entry=value, refcount=stored or 0, first=cluster,
            entries=length,
        )  # fmt: skip
