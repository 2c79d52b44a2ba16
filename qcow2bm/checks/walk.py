"""Every L2 table once, however many L1 tables name it, in batches of those that are named equally often."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..format.entries import l1_offset
from .census import Batch
from .plain import PLAIN_BLOCKS, PLAIN_ENTRIES, PlainCensus
from .view import Root, View

_BATCH = 128 << 10
"""Bytes of L2 tables that are read at once."""
_READ_ANYWAY = 256 << 20
"""Bytes of L2 tables that are read without asking the file system for holes: zeroes are quick to read."""

Groups = Sequence[tuple[int, int, Sequence[int]]]
"""How many entries of the active L1 table and of others name some tables, and their offsets, sorted."""


class TableWalk:
    """Counts all L2 tables of an image and what they refer to. `run` does it.

    Attributes:
        suspects: offsets of the tables to look at entry by entry, each with how many entries of the active L1 table
            and of others name it.
        miscopied: offsets of the tables of the active disk with copied flags that contradict the refcounts, each with
            how many entries of the active L1 table name it.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._geometry = view.geometry
        self.suspects: dict[int, tuple[int, int]] = {}
        self.miscopied: dict[int, int] = {}
        self._buffer = memoryview(bytearray(max(_BATCH, view.geometry.cluster_size)))

    def run(self) -> None:
        """Choose the census, fill it, and leave the statistics in the view."""
        view = self._view
        groups = self._groups()
        tables = [(active, others, list(self._present(offsets))) for active, others, offsets in groups]
        entries = sum(len(offsets) for _, _, offsets in tables) * self._geometry.l2_entries
        version, data_file = view.header.version, view.header.has_data_file
        view.l2_tables = sum(len(offsets) for _, _, offsets in groups)
        bitmap_entries = sum(bitmap.entry.bitmap_table_size for bitmap in view.bitmaps)
        l1_entries = sum(root.entries for root in view.roots if root.fault is None)
        many = max(entries, l1_entries, bitmap_entries) > PLAIN_ENTRIES
        if many or view.bitmaps_in_bulk or self._many_blocks():
            from .bulk import BulkCensus

            view.census = BulkCensus(
                self._geometry,
                view.file_size,
                view.stored,
                version=version,
                data_file=data_file,
                entries=entries + bitmap_entries,
                as_qemu=view.as_qemu,
            )
        else:
            view.census = PlainCensus(
                self._geometry,
                view.file_size,
                view.stored,
                version=version,
                data_file=data_file,
                as_qemu=view.as_qemu,
            )
        for active, others, offsets in groups:
            view.census.add_l2_tables(offsets, active + others)
        total = sum(len(offsets) for _, _, offsets in tables) * self._geometry.cluster_size
        done = 0
        for active, others, offsets in tables:
            for batch in self._batches(offsets, active, others):
                self._count(batch)
                done += len(batch.data)
                view.progress(done, total)

    def _many_blocks(self) -> bool:
        """True if so many refcounts are there that comparing them one by one would take long."""
        return len(self._view.stored.indices()) > PLAIN_BLOCKS

    def _count(self, batch: Batch) -> None:
        facts = self._view.census.add_tables(batch)
        old, active = self._view.allocation, batch.active
        self._view.allocation = replace(
            old,
            allocated=old.allocated + active * facts.allocated,
            fragmented=old.fragmented + active * facts.fragmented,
            compressed=old.compressed + active * facts.compressed,
        )
        for index in facts.suspects:
            self.suspects[batch.offsets[index]] = active, batch.others
        for index in facts.miscopied:
            self.miscopied[batch.offsets[index]] = active

    # Which tables

    def _groups(self) -> Groups:
        roots = [root for root in self._view.roots if root.fault is None]
        if sum(root.entries for root in roots) > PLAIN_ENTRIES:
            return self._groups_in_bulk(roots)
        named: dict[int, list[int]] = {}
        for root in roots:
            for entry in self._view.read_l1(root):
                if entry and (l1_offset(entry) or self._view.as_qemu):
                    named.setdefault(l1_offset(entry), [0, 0])[root.snapshot is not None] += 1
        groups: dict[tuple[int, int], list[int]] = {}
        for offset in sorted(named):
            active, others = named[offset]
            groups.setdefault((active, others), []).append(offset)
        return [(active, others, offsets) for (active, others), offsets in groups.items()]

    def _groups_in_bulk(self, roots: list[Root]) -> Groups:
        from ..format.vectors import weigh_tables

        views = ((self._view.read_l1(root), root.snapshot is None) for root in roots)
        found = weigh_tables(views)
        # Sorted, so that an offset of 0, which the guest takes for nothing, comes first.
        skip = 0 if self._view.as_qemu else 1
        return [(active, others, offsets if offsets[0] else offsets[skip:]) for active, others, offsets in found]

    def _present(self, offsets: Sequence[int]) -> Iterator[int]:
        """The tables that may hold entries: those in holes and past the end of the file are all zeroes."""
        file, size = self._view.file, self._geometry.cluster_size
        cut = size - 1
        odd = sum(1 for offset in offsets if offset & cut)
        if odd * size > _READ_ANYWAY:  # any number of these may lie in the same few bytes
            self._view.complete = False
            offsets = array("Q", (offset for offset in offsets if not offset & cut))
        if len(offsets) * size <= _READ_ANYWAY:
            yield from (offset for offset in offsets if offset < file.size)
            return
        place = 0
        while place < len(offsets) and offsets[place] < file.size:
            data = file.next_data(offsets[place])
            if offsets[place] + size > data:
                yield offsets[place]
                place += 1
            else:
                place = bisect_right(offsets, data - size, place)

    def _batches(self, offsets: Sequence[int], active: int, others: int) -> Iterator[Batch]:
        size = self._geometry.cluster_size
        at_once = max(1, _BATCH // size)
        for start in range(0, len(offsets), at_once):
            chosen = offsets[start : start + at_once]
            data = self._buffer[: len(chosen) * size]
            self._view.file.read_pieces(_joined(chosen, size), data)
            yield Batch(chosen, data, active, others)


def _joined(offsets: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Tables that follow each other as one range."""
    first, length = offsets[0], 0
    for offset in offsets:
        if offset != first + length:
            yield first, length
            first, length = offset, 0
        length += size
    yield first, length
