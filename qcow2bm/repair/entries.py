"""Entries of L1 and L2 tables that break the format: what each becomes.

Only what the guest cannot read today is given up, and only if the user allows it: such a cluster becomes zeroes, which
is what QEMU reads past the end of the file, or unallocated where the format knows no zero clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..checks.model import Finding, RepairClass
from ..checks.view import View
from ..format.entries import COPIED, L1_RESERVED, L2_RESERVED, ZERO, L2Entry, l1_offset, table_entries
from ..format.geometry import ALL_SUBCLUSTERS, SUBCLUSTERS, Geometry
from . import whole_tables
from .model import GuestRange, Proposal, Scope, Step
from .workshop import Workshop


def _given_up(geometry: Geometry, version: int, *_: object) -> tuple[int, int]:
    if geometry.extended_l2:
        return 0, ALL_SUBCLUSTERS << SUBCLUSTERS
    return ZERO if version >= 3 else 0, 0


def _without(bits: int) -> _Mend:
    return lambda _, __, value, bitmap: (value & (_EVERY_BIT ^ bits), bitmap)


_Mend = Callable[[Geometry, int, Any, Any], tuple[Any, Any]]
"""What becomes of an entry and its subcluster bitmap: of one as integers, or of many as arrays."""
_EVERY_BIT = (1 << 64) - 1

_L2: dict[str, tuple[RepairClass, str, _Mend]] = {
    "zero-unaligned": (RepairClass.LOSSY, "give up preallocated zero clusters that are not aligned", _given_up),
    "compressed-copied": (RepairClass.LOSSLESS, "clear the copied flag of compressed clusters", _without(COPIED)),
    "data-unaligned": (RepairClass.LOSSY, "give up clusters that are not aligned", _given_up),
    "data-outside": (RepairClass.LOSSY, "give up clusters that lie outside the file", _given_up),
    "compressed-outside": (RepairClass.LOSSY, "give up compressed clusters that lie outside the file", _given_up),
    "compressed-data-file": (RepairClass.LOSSY, "give up compressed clusters beside a data file", _given_up),
    "subclusters-unallocated": (
        RepairClass.LOSSY,
        "take back the allocation of subclusters without a cluster",
        lambda _, __, value, bitmap: (value, bitmap & (_EVERY_BIT ^ ALL_SUBCLUSTERS)),
    ),
    "subclusters-contradict": (
        RepairClass.GUESS,
        "take subclusters that are data and zero for data",
        lambda _, __, value, bitmap: (value, bitmap & ((bitmap & ALL_SUBCLUSTERS) << SUBCLUSTERS ^ _EVERY_BIT)),
    ),
    "compressed-subclusters": (
        RepairClass.GUESS, "clear the subcluster bitmap of compressed clusters", lambda _, __, value, ___: (value, 0),
    ),
    "zero-flag-reserved": (RepairClass.GUESS, "clear zero flags", _without(ZERO)),
    "l2-entry-reserved": (RepairClass.GUESS, "clear reserved bits of L2 entries", _without(L2_RESERVED)),
}  # fmt: skip
"""Code to class, title, and what an entry becomes. Guesses that keep data come last: they may show further faults."""

_L1: dict[str, tuple[RepairClass, str, Callable[[Any], Any]]] = {
    "l1-entry-reserved": (
        RepairClass.GUESS, "clear reserved bits of L1 entries", lambda entry: entry & (_EVERY_BIT ^ L1_RESERVED),
    ),
    "l1-entry-no-table": (RepairClass.LOSSLESS, "clear the flags of L1 entries without an L2 table", lambda _: 0),
    "l2-unaligned": (RepairClass.LOSSY, "give up L2 tables that are not aligned", lambda _: 0),
    "l2-outside": (RepairClass.LOSSY, "give up L2 tables that lie outside the file", lambda _: 0),
}  # fmt: skip
_GARBAGE_FREE = frozenset({"l1-entry-no-table", "compressed-copied"})
"""Problems that leave what the guest reads alone."""


def entries(shop: Workshop) -> Iterator[Proposal]:
    """A step for each kind of fault, first in L1 tables, then in L2 tables."""
    for code, (kind, title, mend) in _L1.items():
        if found := shop.found(code):
            yield _step(shop, code, kind, title, found), partial(_mend_l1, shop, found, mend)
    for code, (kind, title, mend_entry) in _L2.items():
        if found := shop.found(code):
            yield _step(shop, code, kind, title, found), partial(_mend_l2, shop, code, found, mend_entry)


def _step(shop: Workshop, code: str, kind: RepairClass, title: str, found: list[Finding]) -> Step:
    guest = () if code in _GARBAGE_FREE else tuple(_joined(shop, found))
    return Step(title, kind, Scope.MAPPINGS, {code: sum(finding.count for finding in found)}, guest)


def _joined(shop: Workshop, found: list[Finding]) -> Iterator[GuestRange]:
    """The guest ranges of findings, neighbours as one; those of snapshots are not the guest's disk.

    What a table maps past the end of the disk is not the guest's either, and there may be far more of that.
    """
    places = {
        (where.guest_offset, where.guest_length)
        for where in (finding.location for finding in found if not finding.folded)
        if where.snapshot is None and where.guest_offset is not None and where.guest_length is not None
    }
    for finding in found:
        if finding.folded:
            places.update(whole_tables.guest_ranges(shop, finding))
    start = end = -1
    disk = shop.seen.geometry.virtual_size
    for offset, length in sorted((offset, min(length, disk - offset)) for offset, length in places if offset < disk):
        if offset > end or end < 0:
            if end > start:
                yield start, end - start
            start = offset
        end = max(end, offset + length)
    if end > start:
        yield start, end - start


def _mend_l1(shop: Workshop, found: list[Finding], mend: Callable[[int], int]) -> None:
    for finding in found:
        if finding.folded:
            whole_tables.mend_l1(shop, finding, mend)
            continue
        place = finding.location.host_offset
        assert place is not None, "findings about entries say where they are"
        entry = int.from_bytes(shop.file.read_padded(place, 8), "big")
        if _is_bad(shop.seen, finding.code, entry) and shop.owns(place):
            shop.write(place, mend(entry).to_bytes(8, "big"), f"L1 entry {finding.location.index}")


def _mend_l2(shop: Workshop, code: str, found: list[Finding], mend: _Mend) -> None:
    view = shop.seen
    geometry, version = view.geometry, view.header.version
    for finding in found:
        if finding.folded:
            whole_tables.mend_l2(shop, finding, partial(mend, geometry, version))
            continue
        place = finding.location.host_offset
        assert place is not None, "findings about entries say where they are"
        raw = shop.file.read_padded(place, geometry.l2_entry_size)
        entry = L2Entry.of(table_entries(raw), 0, geometry)
        # One entry may have several faults, and may have been mended for another of them.
        if _has_fault(view, code, entry) and shop.owns(place):
            new = L2Entry(*mend(geometry, version, entry.value, entry.bitmap)).build(geometry)
            shop.write(place, new, f"L2 entry {finding.location.index}")


def _is_bad(view: View, code: str, entry: int) -> bool:
    """True if an L1 entry still has this fault."""
    offset, size = l1_offset(entry), view.geometry.cluster_size
    if code == "l1-entry-reserved":
        return bool(entry & L1_RESERVED)
    if code == "l1-entry-no-table":
        return not offset
    return not view.geometry.is_aligned(offset) or view.census.reaches_outside(offset, size)


def _has_fault(view: View, code: str, entry: L2Entry) -> bool:
    """True if the entry still has this fault."""
    data_file = view.header.has_data_file
    faults = entry.faults(view.geometry, version=view.header.version, data_file=data_file)
    if any(fault.code == code for fault in faults):
        return True
    outside = "compressed-outside" if entry.is_compressed else "data-outside"
    return code == outside and view.census.outside_of(entry) is not None
