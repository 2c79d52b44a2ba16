"""The cluster mapping: guest ranges to runs, and which host clusters the mapping tables refer to.

Every walk visits an L2 table once, however many L1 entries name it, so its work is bounded by the tables that are
really there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import RUN_CHECK, CorruptImageError
from ..format.entries import ClusterKind, L2Entry, l1_offset, table_entries
from ..format.geometry import SUBCLUSTERS
from ..format.limits import MAX_L1_ENTRIES
from .image import Qcow2Image

_AT_ONCE = 1 << 20
"""Bytes of tables that are read at once."""


@dataclass(frozen=True, slots=True)
class Run:
    """A guest range of one kind.

    `host_offset` is in the data file if the image has one; None where there is no host cluster.
    """

    kind: ClusterKind
    guest_offset: int
    length: int
    host_offset: int | None = None

    def continues(self, other: Run) -> bool:
        """True if `other` follows this run in the guest and, where there is one, on the host."""
        if self.kind is not other.kind or self.kind is ClusterKind.COMPRESSED:
            return False
        if self.guest_offset + self.length != other.guest_offset:
            return False
        if self.host_offset is None or other.host_offset is None:
            return self.host_offset is other.host_offset
        return self.host_offset + self.length == other.host_offset


def read_l1(image: Qcow2Image, offset: int | None = None, entries: int | None = None) -> array[int]:
    """An L1 table as native integers: the active one, or that of a snapshot.

    Raises:
        CorruptImageError: it is not aligned, too large, or lies outside the file.
    """
    where = image.header.l1_table_offset if offset is None else offset
    count = image.header.l1_size if entries is None else entries
    if not image.geometry.is_aligned(where):
        raise CorruptImageError(f"an L1 table at {where:#x} is not cluster-aligned")
    if count > MAX_L1_ENTRIES:
        raise CorruptImageError(f"the L1 table at {where:#x} has {count} entries, which is above 32 MiB")
    return table_entries(image.file.read_at(where, count * 8))


def require_l2_aligned(image: Qcow2Image, offset: int) -> None:
    """Raise CorruptImageError unless an L2 table may lie at `offset`."""
    if not image.geometry.is_aligned(offset):
        raise CorruptImageError(f"an L2 table at {offset:#x} is not cluster-aligned", hint=RUN_CHECK)


def read_l2(image: Qcow2Image, offset: int) -> bytes:
    """The raw bytes of the L2 table at `offset`.

    Raises:
        CorruptImageError: it is not aligned or lies outside the file.
    """
    require_l2_aligned(image, offset)
    return image.file.read_at(offset, image.geometry.cluster_size)


def tables_in_a_row(offsets: Iterable[int], size: int) -> Iterator[list[int]]:
    """Offsets of tables of `size` bytes in groups that lie in a row in the file, to be read at once: a MiB at most."""
    group: list[int] = []
    for offset in offsets:
        if group and (offset != group[-1] + size or len(group) * size >= _AT_ONCE):
            yield group
            group = []
        group.append(offset)
    if group:
        yield group


def runs(image: Qcow2Image) -> Iterator[Run]:
    """The whole disk as runs, in guest order, joined where they continue each other.

    The last one ends at the virtual size.
    """
    pending: Run | None = None
    for uncut in _raw_runs(image):
        run = _cut(uncut, image.geometry.virtual_size)
        if pending is not None and pending.continues(run):
            pending = Run(pending.kind, pending.guest_offset, pending.length + run.length, pending.host_offset)
            continue
        if pending is not None:
            yield pending
        pending = run
    if pending is not None:
        yield pending


def _cut(run: Run, end: int) -> Run:
    if run.guest_offset + run.length <= end:
        return run
    return Run(run.kind, run.guest_offset, end - run.guest_offset, run.host_offset)


def _raw_runs(image: Qcow2Image) -> Iterator[Run]:
    geometry = image.geometry
    for index, entry in enumerate(read_l1(image)[: geometry.l1_entries]):
        start = index * geometry.l2_span
        offset = l1_offset(entry)
        table = read_l2(image, offset) if offset else b""
        if table.count(0) == len(table):
            yield Run(ClusterKind.UNALLOCATED, start, geometry.l2_span)
        else:
            yield from _table_runs(image, table, start)


def _table_runs(image: Qcow2Image, table: bytes, start: int) -> Iterator[Run]:
    geometry, data_file = image.geometry, image.header.has_data_file
    values = table_entries(table)
    stride = geometry.l2_entry_words
    for index in range(geometry.l2_entries):
        guest = start + index * geometry.cluster_size
        if guest >= geometry.virtual_size:
            return
        entry = L2Entry(values[index * stride], values[index * stride + 1] if stride == 2 else 0)
        if stride == 2 and not entry.is_compressed:
            yield from _subcluster_runs(image, entry, guest)
            continue
        kind = entry.kind(geometry, data_file=data_file)
        host = entry.host_range(geometry)
        yield Run(kind, guest, geometry.cluster_size, _host_offset(kind, host[0] if host else 0))


def _subcluster_runs(image: Qcow2Image, entry: L2Entry, guest: int) -> Iterator[Run]:
    size = image.geometry.subcluster_size
    for index in range(SUBCLUSTERS):
        if guest + index * size >= image.geometry.virtual_size:
            return
        kind = entry.subcluster_kind(index, data_file=image.header.has_data_file)
        yield Run(kind, guest + index * size, size, _host_offset(kind, entry.host_offset + index * size))


def _host_offset(kind: ClusterKind, offset: int) -> int | None:
    return offset if kind in (ClusterKind.DATA, ClusterKind.ZERO_ALLOCATED, ClusterKind.COMPRESSED) else None
