"""The copied flags of the active L1 and L2 entries: set where, and only where, the refcount on disk is exactly one."""

from __future__ import annotations

from collections.abc import Iterator

from ...format.entries import COPIED, L2Entry, l1_offset, table_entries
from ..model import Finding, Location
from ..problems import found
from ..view import View


def copied(view: View) -> Iterator[Finding]:
    """Entries whose flag contradicts the refcount; what cannot be read is left out."""
    geometry, root = view.geometry, view.roots[0]
    span = geometry.l2_span
    done: set[int] = set()
    l1_table = view.read_l1(root)
    if not view.miscopied and view.census.copied_rightly(l1_table):
        return
    for index, entry in enumerate(l1_table):
        offset = l1_offset(entry)
        stored = view.stored.get(geometry.cluster_of(offset)) if offset else None
        if stored is None:
            continue
        if (stored == 1) != bool(entry & COPIED):
            where = Location("active L1 table", root.offset + 8 * index, index, index * span, span)
            flag = "set" if entry & COPIED else "clear"
            text = f"the copied flag of L1 entry {index} is {flag}, its L2 table's refcount is {stored}"
            cluster = geometry.cluster_of(offset)
            yield found("copied-l1", text, where, index=index, entry=entry, refcount=stored, first=cluster)
        if offset in view.miscopied and offset not in done:
            visits = view.miscopied[offset]
            each = view.says_at_every_visit(visits)
            if not each:
                done.add(offset)
            yield from _table(view, offset, index, 1 if each else visits)


def _table(view: View, offset: int, l1_index: int, visits: int) -> Iterator[Finding]:
    """The entries of one L2 table; neighbours that are wrong in the same way are one finding, but not for QEMU."""
    geometry = view.geometry
    values = table_entries(view.file.read_padded(offset, geometry.cluster_size))[:: geometry.l2_entry_words]
    step = 1 if view.as_qemu or visits > 1 else len(values)
    runs = view.census.miscopied_runs(values)
    parts = ((at, min(at + step, end)) for start, end in runs for at in range(start, end, step))
    for index, stop in parts:
        value, length = values[index], stop - index
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
