"""Clusters with two uses that must not share one: each use gets a cluster of its own.

Who reads a cluster today reads the same bytes afterwards, so nothing is lost, whichever of the two was right. QEMU's
own repair raises the refcount instead, and the first write of the guest then decides. What moves is guest data, a
compressed stream or an L2 table; other tables stay where they are. Guest data under LUKS cannot move: where a cluster
lies is part of how it is encrypted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from ..checks.model import Finding, RepairClass
from ..checks.plain import PLAIN_ENTRIES
from ..checks.problems import SHARED
from ..checks.view import Root
from ..errors import NoSpaceError, UnsupportedImageError
from ..format.entries import COPIED, OFFSET_MASK, ZERO, CompressedDescriptor, L2Entry, l1_offset, table_entries
from .model import Proposal, Scope, Step
from .workshop import Workshop

if TYPE_CHECKING:
    from ..format.vectors import ClusterFilter

_MOST_CLUSTERS = 1 << 17
_MOST_BYTES = 4 << 30
"""Clusters, and bytes, that one repair copies; an image with more of them is better converted."""


def apart(shop: Workshop) -> Iterator[Proposal]:
    """One step that tells all shared clusters apart."""
    found = shop.found(*SHARED)
    if found:
        codes = {code: sum(f.count for f in found if f.code == code) for code in SHARED}
        step = Step(
            "copy shared clusters apart",
            RepairClass.LOSSLESS,
            Scope.MAPPINGS,
            {code: count for code, count in codes.items() if count},
        )
        yield step, partial(_Separation(shop, found).run, step)


@dataclass(frozen=True, slots=True)
class _Table:
    """An L2 table: where it lies, whose it is, and the index of the L1 entry that names it first."""

    offset: int
    index: int
    active: bool
    shared: bool


class _Separation:
    """Tells the uses of some clusters apart."""

    def __init__(self, shop: Workshop, found: list[Finding]) -> None:
        self._shop = shop
        self._view = shop.view
        self._geometry = self._view.geometry
        self._shared = _Ranges((f.values["first"], f.values["first"] + f.count) for f in found)
        self._occupied: Counter[int] = Counter()
        self._streamed: set[int] = set()
        self._claimed: set[int] = set()
        self._pending: list[tuple[int, bytes, str]] = []
        self._copied = self._met = 0
        self._most_met = _MOST_CLUSTERS + self._shared.count
        self._filter: ClusterFilter | None = None

    def run(self, step: Step) -> None:
        """Copy what must not stay; raises NoSpaceError if there is no room, or far too much to copy."""
        view = self._view
        for reference in chain(view.structures(), view.directory.references(view.bitmaps)):
            if reference.length > 0 and not view.census.reaches_outside(reference.offset, reference.length):
                self._occupied.update(self._touched(reference.offset, reference.length))
        tables = list(self._tables())
        for table in tables:
            self._note_streams(table)
        for table in tables:
            self._separate(table)
        # Only now, when everything has been copied: an L1 table may lie where guest data does.
        for offset, data, purpose in self._pending:
            self._write(offset, data, purpose)
        if self._copied:
            step.title = f"copy {self._copied} shared clusters apart"

    def _touched(self, offset: int, length: int) -> Iterator[int]:
        """The shared clusters that a host range touches."""
        return self._shared.within(self._geometry.cluster_of(offset), self._geometry.cluster_of(offset + length - 1))

    # L2 tables

    def _tables(self) -> Iterator[_Table]:
        """Every L2 table once; those that may not stay where they are are copied first."""
        moved: dict[int, int] = {}
        known: set[int] = set()
        others = {offset for root in self._view.roots[1:] for _, offset in self._named(root)}
        for root in self._view.roots:
            active = root.snapshot is None
            for index, offset in self._named(root):
                cluster, place = self._geometry.cluster_of(offset), moved.get(offset, offset)
                again = active and place in known
                if offset not in moved and cluster in self._occupied:
                    place = moved[offset] = self._copy(offset)
                    self._point_l1(root, index, place)
                elif again:
                    place = self._copy(offset)
                    self._point_l1(root, index, place)
                elif place != offset:
                    self._point_l1(root, index, place)
                if place in known:
                    continue
                known.add(place)
                yield _Table(place, index, active, active and offset in others and not again)
        # An entry that names a table's own cluster is what has to move.
        self._occupied.update(c for place in known for c in self._touched(place, self._geometry.cluster_size))

    def _named(self, root: Root) -> Iterator[tuple[int, int]]:
        """Index and L2 table of the entries of an L1 table that name one where one can be."""
        for index, entry in enumerate(self._view.read_l1(root)):
            offset = l1_offset(entry)
            outside = self._view.census.reaches_outside(offset, self._geometry.cluster_size)
            if offset and self._geometry.is_aligned(offset) and not outside:
                yield index, offset

    def _point_l1(self, root: Root, index: int, offset: int) -> None:
        flag = COPIED if root.snapshot is None else 0
        self._pending.append((root.offset + 8 * index, (offset | flag).to_bytes(8, "big"), f"L1 entry {index}"))

    # Entries

    def _note_streams(self, table: _Table) -> None:
        for _, entry in self._hits(table):
            self._met += table.active
            if self._met > self._most_met:
                raise _too_many(_MOST_CLUSTERS)  # one use of each may stay
            if entry.is_compressed:
                descriptor = CompressedDescriptor.parse(entry.value, self._geometry)
                touched = set(self._touched(descriptor.offset, descriptor.length))
                if not touched & self._occupied.keys():
                    self._streamed |= touched

    def _separate(self, table: _Table) -> None:
        for index, entry in self._hits(table):
            if entry.is_compressed:
                self._separate_stream(table, index, entry)
            else:
                self._separate_cluster(table, index, entry)

    def _separate_cluster(self, table: _Table, index: int, entry: L2Entry) -> None:
        cluster = self._geometry.cluster_of(entry.host_offset)
        if not (cluster in self._occupied or cluster in self._streamed or (table.active and cluster in self._claimed)):
            if table.active:
                self._claimed.add(cluster)
            return
        if entry.value & ZERO and not self._geometry.extended_l2:
            self._point(table, index, L2Entry(entry.value & ~(OFFSET_MASK | COPIED)))
            return
        if self._view.header.encrypts_by_place:
            text = "guest data encrypted with LUKS cannot be copied to another place without its key"
            raise UnsupportedImageError(text, hint="copy the disk with `qemu-img convert --object secret,…`")
        place = self._copy(entry.host_offset)
        flag = COPIED if table.active and not table.shared else 0
        self._point(table, index, L2Entry(entry.value & ~(OFFSET_MASK | COPIED) | place | flag, entry.bitmap))

    def _separate_stream(self, table: _Table, index: int, entry: L2Entry) -> None:
        old = CompressedDescriptor.parse(entry.value, self._geometry)
        if not any(cluster in self._occupied for cluster in self._touched(old.offset, old.length)):
            return
        data = self._shop.file.read_padded(old.offset, old.length)
        # From the start of a sector on, so that the length in whole sectors stays what it was.
        lead = old.offset % 512
        place = self._shop.put(bytes(lead) + data, "copy of a compressed cluster")
        self._count(1)
        new = CompressedDescriptor(place + lead, old.length).build(self._geometry)
        self._point(table, index, L2Entry(new, entry.bitmap))

    def _point(self, table: _Table, index: int, entry: L2Entry) -> None:
        place = table.offset + index * self._geometry.l2_entry_size
        self._pending.append((place, entry.build(self._geometry), f"L2 entry {index}"))

    def _write(self, offset: int, data: bytes, purpose: str) -> None:
        """Change an entry of a table that stays: whatever guest data shared its cluster moves."""
        stays = self._occupied[self._geometry.cluster_of(offset)] < 2  # else two tables share it, and none moves
        self._shop.write(offset, data, purpose, owned=stays)

    def _hits(self, table: _Table) -> Iterator[tuple[int, L2Entry]]:
        """The sound entries of an L2 table that refer to a shared cluster."""
        view, geometry = self._view, self._geometry
        if view.header.has_data_file or self._shop.file.is_hole(table.offset, geometry.cluster_size):
            return
        data = self._shop.file.read_padded(table.offset, geometry.cluster_size)
        values = table_entries(data)
        for index in self._candidates(data):
            entry = L2Entry.of(values, index, geometry)
            reach = entry.host_range(geometry)
            if reach is None or view.census.outside_of(entry) is not None or not geometry.is_aligned(entry.host_offset):
                continue
            if entry.is_compressed and not entry.is_stream():
                continue
            if next(self._touched(*reach), None) is not None:
                yield index, entry

    def _candidates(self, table: bytes) -> Iterable[int]:
        if self._view.l2_tables * self._geometry.l2_entries <= PLAIN_ENTRIES:
            return range(self._geometry.l2_entries)
        from ..format.vectors import ClusterFilter, host_clusters

        if self._filter is None:
            self._filter = ClusterFilter(self._shared.numbers())
        return sorted({index for index, _ in self._filter.range_hits(*host_clusters(table, self._geometry))})

    # Copies

    def _copy(self, offset: int) -> int:
        self._count(1)
        return self._shop.copy(offset)

    def _count(self, clusters: int) -> None:
        self._copied += clusters
        length = self._copied * self._geometry.cluster_size
        room = None if self._shop.file.is_device else self._shop.file.base.free_space()
        if self._copied > _MOST_CLUSTERS or length > (_MOST_BYTES if room is None else min(room, _MOST_BYTES)):
            raise _too_many(self._copied - 1)


def _too_many(clusters: int) -> NoSpaceError:
    text = f"more than {clusters} clusters would have to be copied"
    return NoSpaceError(text, hint="copy the disk with `convert`")


class _Ranges:
    """Clusters as sorted ranges."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._ranges = sorted(ranges)
        self._firsts = [first for first, _ in self._ranges]

    def within(self, first: int, last: int) -> Iterator[int]:
        """Those from `first` up to and including `last`."""
        place = max(0, bisect_right(self._firsts, first) - 1)
        while place < len(self._ranges) and self._ranges[place][0] <= last:
            start, stop = self._ranges[place]
            yield from range(max(first, start), min(last + 1, stop))
            place += 1

    @property
    def count(self) -> int:
        """How many there are, if none is in two ranges."""
        return sum(stop - start for start, stop in self._ranges)

    def numbers(self) -> Iterator[int]:
        """All of them; no more than a repair would copy."""
        for start, stop in self._ranges:
            yield from range(start, stop)
