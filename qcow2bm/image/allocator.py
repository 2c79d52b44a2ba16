"""Which clusters a plan takes and gives back, and the refcount writes that follow from it.

A plan's order keeps the refcount on disk at or above the number of references at every moment: too high is a leak,
too low is lost data later. So what is taken is counted in the first stage, long before anything refers to it, and
what is given back in the last. A new refcount block lies in the range it describes itself, so the one entry that
links it into the refcount table needs no other. Only where one run of clusters fills whole ranges their blocks lie
together in front of it, in ranges whose own blocks count before they are linked.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import RUN_CHECK, NoSpaceError, ProofError
from ..format.entries import set_refcount, table_bytes
from ..format.geometry import div_up
from ..format.header import REFCOUNT_TABLE_FIELDS
from ..format.limits import MAX_REFCOUNT_TABLE_BYTES
from .image import Qcow2Image
from .plan import SECTOR, Write
from .refcounts import Refcounts

if TYPE_CHECKING:
    from .lowering import Lowering  # with numpy, and only who drops guest clusters needs it


class Allocator:
    """Collects what a plan takes and gives back, then says which refcount writes that means.

    First fit: the lowest free cluster that does. A cluster that the plan gives back is not taken again by the same
    plan, because until the last stage the old state still needs it.

    Attributes:
        freed: clusters given back that have one owner each.
        lowering: references that go besides, of clusters that may have others.
    """

    def __init__(self, image: Qcow2Image, refcounts: Refcounts) -> None:
        self._image = image
        self._refcounts = refcounts
        self._unread = refcounts.free_runs()
        self._runs: list[tuple[int, int]] = []
        self._taken: set[int] = set()
        self._new_blocks: dict[int, int] = {}
        self._new_table: int | None = None
        self._table_clusters = image.header.refcount_table_clusters
        self.freed: set[int] = set()
        self.lowering: Lowering | None = None

    @property
    def highest(self) -> int:
        """The highest cluster taken, or -1."""
        return max(self._taken, default=-1)

    def take(self, count: int = 1) -> int:
        """Offset of `count` contiguous free clusters, which are now taken."""
        geometry = self._image.geometry
        spare = self._spare_blocks(count)
        while True:
            begin, last = self._find(count + spare)
            first = self._runs[begin][0]
            missing = self._missing_blocks(first, count + spare)
            if not missing:
                return geometry.offset_of(self._reserve(begin, last, count))
            if len(missing) <= spare:
                self._reserve(begin, last, len(missing))
                self._new_blocks.update(self._places(first, missing))
                return geometry.offset_of(self._reserve(begin, begin, count))
            self._add_block(missing[0])

    def _spare_blocks(self, count: int) -> int:
        """Clusters to keep free in front of a long run for the blocks of the ranges that it and they lie in."""
        per_block = self._image.geometry.refcounts_per_block
        return div_up(count, per_block - 1) + 4 if count >= per_block else 0

    def _missing_blocks(self, first: int, count: int) -> list[int]:
        """Indices of the refcount blocks that `count` clusters from `first` on need and that are not there."""
        per_block = self._image.geometry.refcounts_per_block
        indices = range(first // per_block, (first + count - 1) // per_block + 1)
        return [i for i in indices if i not in self._new_blocks and not self._refcounts.block_offset(i)]

    def _places(self, first: int, missing: list[int]) -> dict[int, int]:
        """A cluster for each missing block, from `first` on without gaps.

        A block whose range begins among these clusters takes the first of them in it. So each of the others lies in a
        range whose block is there already, or describes itself.
        """
        per_block = self._image.geometry.refcounts_per_block
        area = range(first, first + len(missing))
        places = {i: max(first, i * per_block) for i in missing if max(first, i * per_block) in area}
        rest = sorted(set(area) - set(places.values()))
        return places | dict(zip((i for i in missing if i not in places), rest, strict=True))

    def free(self, offset: int, length: int) -> None:
        """Give back the clusters that hold `length` bytes at `offset`.

        Raises:
            ProofError: a refcount is not exactly one, or a cluster is given back twice.
        """
        geometry = self._image.geometry
        first = geometry.cluster_of(offset)
        for cluster in range(first, geometry.cluster_of(offset + length - 1) + 1):
            count = self._refcounts.get(cluster)
            if count != 1 or cluster in self.freed:
                what = "is used twice" if cluster in self.freed else f"has refcount {count} instead of 1"
                raise ProofError(f"the cluster at {geometry.offset_of(cluster):#x} {what}", hint=RUN_CHECK)
            self.freed.add(cluster)

    def _find(self, count: int) -> tuple[int, int]:
        """Indices of the first and last of touching runs, the first that hold `count` clusters together."""
        begin, index, length, end = 0, 0, 0, -1
        while True:
            if index == len(self._runs):
                self._runs.append(next(self._unread))
            first, clusters = self._runs[index]
            if first != end:
                begin, length = index, 0
            length, end = length + clusters, first + clusters
            if length >= count:
                return begin, index
            index += 1

    def _reserve(self, begin: int, last: int, count: int) -> int:
        """Take `count` clusters from the start of runs `begin`..`last`; returns the first."""
        first = self._runs[begin][0]
        end = sum(self._runs[last])
        stop = first + count
        self._runs[begin : last + 1] = [(stop, end - stop)] if stop < end else []
        self._taken.update(range(first, stop))
        return first

    def _add_block(self, index: int) -> None:
        """Put a new refcount block into the first free cluster of the range it describes."""
        base = index * self._image.geometry.refcounts_per_block
        place = next(place for place, run in enumerate(self._runs) if run[0] >= base)
        self._new_blocks[index] = self._reserve(place, place, 1)

    def finish(self) -> None:
        """Make room in the refcount table for the new blocks; call once, after the last `take`.

        Raises:
            NoSpaceError: the table would be above 8 MiB.
        """
        entries = max(self._new_blocks, default=-1) + 1
        if entries <= len(self._refcounts.table):
            return
        geometry = self._image.geometry
        # The table's own clusters may need blocks too, a few at most: room for them, and half as much again for later.
        per_cluster = geometry.cluster_size // 8
        entries += div_up(entries, per_cluster) // geometry.refcounts_per_block + 2
        clusters = div_up(entries + entries // 2, per_cluster)
        if clusters * geometry.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            clusters = div_up(entries, per_cluster)
        if clusters * geometry.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise NoSpaceError("the refcount table would grow above 8 MiB", hint="convert the image to larger clusters")
        self._new_table = self.take(clusters)
        self._table_clusters = clusters
        if max(self._new_blocks) >= clusters * per_cluster:
            raise NoSpaceError("the refcount table would grow above 8 MiB", hint="convert the image to larger clusters")
        header = self._image.header
        self.free(header.refcount_table_offset, header.refcount_table_clusters * geometry.cluster_size)

    # The writes, in the order in which a plan has them.

    def prepare(self) -> list[Write]:
        """Count what is taken: existing blocks in place, new blocks and a new table in free clusters."""
        geometry = self._image.geometry
        writes: list[Write] = []
        taken = _by_block(self._taken, geometry.refcounts_per_block)
        for index in sorted({*taken, *self._new_blocks}):
            members = taken.get(index, [])
            if index in self._new_blocks:
                block = bytearray(geometry.cluster_size)
                for within in members:
                    set_refcount(block, within, geometry.refcount_order, 1)
                offset = geometry.offset_of(self._new_blocks[index])
                writes.append(Write.fresh(offset, bytes(block), f"new refcount block {index}"))
            else:
                old = self._refcounts.read_block(index) or b""
                writes += self._update(index, old, members, 1, "count new clusters")
        if self._new_table is not None:
            table = table_bytes(self._table_with_new_blocks())
            writes.append(Write.fresh(self._new_table, table, "new refcount table"))
        return writes

    def link(self) -> list[list[Write]]:
        """Make new blocks valid: their entries in the refcount table, or the header fields of a new table.

        In stages: a block that lies in another new block's range waits until that one counts.
        """
        header, geometry = self._image.header, self._image.geometry
        if self._new_table is not None:
            start, end = REFCOUNT_TABLE_FIELDS, REFCOUNT_TABLE_FIELDS + 12
            new = self._new_table.to_bytes(8, "big") + self._table_clusters.to_bytes(4, "big")
            return [[Write.replace(start, self._image.head[start:end], new, "header: the new refcount table")]]
        stages: list[list[Write]] = [[], []]
        for index, cluster in sorted(self._new_blocks.items()):
            write = Write.replace(
                header.refcount_table_offset + 8 * index,
                self._refcounts.table[index].to_bytes(8, "big"),
                geometry.offset_of(cluster).to_bytes(8, "big"),
                f"refcount table: block {index}",
            )
            stages[cluster // geometry.refcounts_per_block != index].append(write)
        return stages

    def release(self) -> list[Write]:
        """Set the refcounts of what is given back to zero, on top of what `prepare` wrote."""
        lowered = set(self.lowering.blocks()) if self.lowering else set()
        writes: list[Write] = []
        for index, members in self._by_blocks[1].items():
            if index not in lowered:
                writes += self._update(index, bytes(self._counted(index)), members, 0, "give clusters back")
        for index in sorted(lowered):
            old = bytes(self._counted(index))
            offset = self._refcounts.block_offset(index)
            writes += _changes(offset, old, self._released(index), f"refcount block {index}: give clusters back")
        return writes

    def unlink(self) -> list[list[Write]]:
        """Take refcount blocks that count nothing any more out of the refcount table, then give them back.

        In two stages, after `release`: a block that nobody links any more is a leak until its own refcount goes. Most
        lie in the range they describe, where it goes with them.
        """
        links: list[Write] = []
        homes: dict[int, list[int]] = {}
        for index in self._empty_blocks:
            entry = self._refcounts.table[index].to_bytes(8, "big")
            place = self._image.header.refcount_table_offset + 8 * index
            links.append(Write.replace(place, entry, bytes(8), f"refcount table: block {index} is empty"))
            cluster = self._image.geometry.cluster_of(self._refcounts.block_offset(index))
            home, within = divmod(cluster, self._image.geometry.refcounts_per_block)
            if home != index:
                homes.setdefault(home, []).append(within)
        given: list[Write] = []
        for home, members in homes.items():
            given += self._update(home, self._released(home), sorted(members), 0, "give refcount blocks back")
        return [links, given]

    def end(self) -> int:
        """Where the last cluster that is used when all is done ends, in bytes."""
        from .lowering import highest_used

        geometry = self._image.geometry
        gone = set(self._empty_blocks)
        blocks = {geometry.cluster_of(self._refcounts.block_offset(index)) for index in gone}
        for index in sorted(self._indices() - gone, reverse=True):
            block = bytearray(self._released(index))
            for cluster in blocks:
                if cluster // geometry.refcounts_per_block == index:
                    set_refcount(block, cluster % geometry.refcounts_per_block, geometry.refcount_order, 0)
            highest = highest_used(bytes(block), geometry.refcount_order)
            if highest >= 0:
                return geometry.offset_of(index * geometry.refcounts_per_block + highest + 1)
        return geometry.cluster_size

    def _indices(self) -> set[int]:
        """The refcount blocks that there are once the plan's own are linked."""
        known = (index for index in range(len(self._refcounts.table)) if self._refcounts.block_offset(index))
        return {*known, *self._new_blocks}

    @cached_property
    def _empty_blocks(self) -> list[int]:
        """Old refcount blocks that in the end count nothing, or themselves alone."""
        geometry = self._image.geometry
        if self._new_table is not None:
            return []
        empty = []
        for index in sorted(self._indices() - set(self._new_blocks)):
            block = bytearray(self._released(index))
            home, within = divmod(
                geometry.cluster_of(self._refcounts.block_offset(index)), geometry.refcounts_per_block
            )
            if home == index:
                set_refcount(block, within, geometry.refcount_order, 0)
            if block.count(0) == len(block):
                empty.append(index)
        return empty

    @cached_property
    def _by_blocks(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """What is taken and what is freed, by refcount block; asked for when both are complete."""
        per_block = self._image.geometry.refcounts_per_block
        return _by_block(self._taken, per_block), _by_block(self.freed, per_block)

    def _counted(self, index: int) -> bytearray:
        """A refcount block as `prepare` leaves it."""
        geometry = self._image.geometry
        block = bytearray(self._refcounts.read_block(index) or bytes(geometry.cluster_size))
        for within in self._by_blocks[0].get(index, ()):
            set_refcount(block, within, geometry.refcount_order, 1)
        return block

    def _released(self, index: int) -> bytes:
        """A refcount block as `release` leaves it."""
        block = self._counted(index)
        for within in self._by_blocks[1].get(index, ()):
            set_refcount(block, within, self._image.geometry.refcount_order, 0)
        return self.lowering.lowered(index, bytes(block)) if self.lowering else bytes(block)

    def _update(self, index: int, old: bytes, members: list[int], value: int, purpose: str) -> Iterator[Write]:
        """Replace refcounts of one block; bytes that lie close together become one write."""
        new = bytearray(old)
        order = self._image.header.refcount_order
        touched = [set_refcount(new, within, order, value) for within in members]
        width = max(1, (1 << order) // 8)
        offset = self._refcounts.block_offset(index)
        for start, stop in _joined(touched, width):
            yield Write.replace(
                offset + start, old[start:stop], bytes(new[start:stop]), f"refcount block {index}: {purpose}"
            )

    def _table_with_new_blocks(self) -> array[int]:
        table = array("Q", self._refcounts.table)
        table.extend([0] * (self._table_clusters * self._image.geometry.cluster_size // 8 - len(table)))
        for index, cluster in self._new_blocks.items():
            table[index] = self._image.geometry.offset_of(cluster)
        return table

    def size_after(self) -> int:
        """File length once everything taken is written, in bytes.

        Raises:
            NoSpaceError: a block device is too small for it.
        """
        file = self._image.file
        needed = self._image.geometry.offset_of(self.highest + 1)
        if file.is_device and needed > file.size:
            raise NoSpaceError(f"the device has {file.size} bytes, the change needs {needed}", hint="extend the device")
        return max(file.size, needed)


def _by_block(clusters: set[int], per_block: int) -> dict[int, list[int]]:
    """Block index to the indices of clusters within it, sorted."""
    blocks: dict[int, list[int]] = {}
    for cluster in sorted(clusters):
        index, within = divmod(cluster, per_block)
        blocks.setdefault(index, []).append(within)
    return blocks


def _changes(offset: int, old: bytes, new: bytes, purpose: str) -> Iterator[Write]:
    """The writes that turn the bytes at `offset` into others of the same length."""
    from .lowering import differing

    for start, stop in differing(old, new, SECTOR):
        yield Write.replace(offset + start, old[start:stop], new[start:stop], purpose)


def _joined(offsets: list[int], width: int) -> Iterator[tuple[int, int]]:
    """Sorted byte offsets of `width` bytes each as ranges; gaps below a sector are bridged."""
    start, stop = offsets[0], offsets[0] + width
    for offset in offsets[1:]:
        if offset - stop >= SECTOR:
            yield start, stop
            start = offset
        stop = offset + width
    yield start, stop
