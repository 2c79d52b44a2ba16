"""From a draft of the bitmaps to a plan of writes.

Nothing that is in use is overwritten, but for refcounts, the header's pointer and flags within one sector. New
data, tables and directory go to free clusters in the first stage; the header then switches to the new directory in
one sector; what the old one used is given back in the last. A crash at any moment leaves the old bitmaps or the new
ones, and at worst leaked clusters.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from ..errors import RUN_CHECK, BitmapBrokenError, BitmapLimitError, CorruptImageError
from ..format.bitmap_directory import BitmapEntry, BitmapFlag
from ..format.entries import ALL_ONES, BitmapTableEntry, table_bytes
from ..format.extensions import BitmapsExtension
from ..format.limits import MAX_BITMAP_DIRECTORY_BYTES
from ..image.image import Qcow2Image
from ..image.plan import Plan, Stage, Write
from ..image.proof import prove
from ..image.refcounts import Allocator, Refcounts
from . import header_area
from .bits import BitVector
from .chunks import ONES, ZEROES
from .store import BitmapDirectory, StoredBitmap, decode_name


class Wanted(Protocol):
    """A bitmap as it shall be: `bits` None means as stored."""

    name: bytes
    granularity_bits: int
    flags: BitmapFlag
    bits: BitVector | None
    stored: StoredBitmap | None


def plan_changes(
    image: Qcow2Image, directory: BitmapDirectory, wanted: Sequence[Wanted], summary: tuple[str, ...]
) -> Plan:
    """The plan that leads from the stored bitmaps to the wanted ones; an empty plan if they are the same.

    Raises:
        ProofError, CorruptImageError: the image is not what the plan would rely on.
        NoSpaceError: no room for the result.
        BitmapLimitError: the directory would be too large.
    """
    refcounts = Refcounts(image)
    change = _Change(image, directory, Allocator(image, refcounts))
    plan = change.plan(wanted, summary)
    if plan:
        prove(image, plan, directory.references(), refcounts)
    return plan


@dataclass
class _Change:
    """One plan in the making: what is written into free clusters, and what is given back."""

    image: Qcow2Image
    directory: BitmapDirectory
    allocator: Allocator

    def __post_init__(self) -> None:
        self._fresh: list[Write] = []

    def plan(self, wanted: Sequence[Wanted], summary: tuple[str, ...]) -> Plan:
        entries = [self._entry(bitmap) for bitmap in wanted]
        kept = {id(bitmap.stored) for bitmap in wanted}
        for stored in self.directory.bitmaps:
            if id(stored) not in kept:
                self._free_bitmap(stored)
        stages: list[Stage] = []
        commit = None
        if entries != [stored.entry for stored in self.directory.bitmaps]:
            new_only = bool(wanted) and all(bitmap.stored is None for bitmap in wanted)
            switch = self._switch(entries, attach=new_only and not self.directory.attached)
            self.allocator.finish()
            commit = switch.stages[switch.commit]
            prepare = (*header_area.clear_unknown_autoclear(self.image), *self._fresh, *self.allocator.prepare())
            stages = [
                Stage("prepare what nothing refers to yet", prepare),
                *(Stage("link the new refcount blocks", tuple(writes)) for writes in self.allocator.link()),
                *switch.stages,
                Stage("give the old clusters back", tuple(self.allocator.release())),
            ]
            stages = [stage for stage in stages if stage.writes]
        return Plan(
            cluster_size=self.image.geometry.cluster_size,
            size_before=self.image.file.size,
            size_after=self.allocator.size_after(),
            stages=tuple(stages),
            commit_stage=stages.index(commit) if commit is not None else 0,
            freed=frozenset(self.allocator.freed),
            summary=summary,
        )

    # Tables and data

    def _entry(self, bitmap: Wanted) -> BitmapEntry:
        """The directory entry of a bitmap, with a table of its own where its bits are new."""
        stored = bitmap.stored
        entry = (
            stored.entry
            if stored is not None
            else BitmapEntry(0, 0, bitmap.flags, bitmap.granularity_bits, bitmap.name)
        )
        if (bitmap.name, bitmap.flags) != (entry.name, entry.flags):
            entry = replace(entry, name=bitmap.name, flags=bitmap.flags, padding=b"")
        if bitmap.bits is None or (stored is not None and bitmap.bits is stored.bits):
            return entry
        table = self._table(bitmap.bits, stored, decode_name(bitmap.name))
        if stored is not None:
            if table == stored.table:
                return entry
            self._free(stored.entry.bitmap_table_offset, 8 * len(stored.table))
        offset = self._put(table_bytes(table), f"table of bitmap '{decode_name(bitmap.name)}'")
        return replace(entry, bitmap_table_offset=offset, bitmap_table_size=len(table))

    def _table(self, bits: BitVector, stored: StoredBitmap | None, name: str) -> array[int]:
        """A bitmap's new table.

        Unchanged chunks keep their clusters, new ones get free clusters, replaced ones are given back.
        """
        old_bits = stored.bits if stored is not None else None
        table = array("Q", stored.table) if stored is not None else array("Q", bytes(8 * len(bits.chunks)))
        cluster_size = self.image.geometry.cluster_size
        for index, old in enumerate(table):
            chunk = bits.settle(index, old_bits)
            if old_bits is not None and chunk is old_bits.chunks[index]:
                continue
            if chunk is ZEROES or chunk is ONES:
                table[index] = ALL_ONES if chunk is ONES else 0
            else:
                table[index] = offset = self.allocator.take()
                make = partial(_chunk_bytes, bits, index)
                self._fresh.append(Write(offset, cluster_size, make, f"data of bitmap '{name}', chunk {index}"))
            if BitmapTableEntry(old).offset:
                self._free(BitmapTableEntry(old).offset, cluster_size)
        return table

    def _free_bitmap(self, stored: StoredBitmap) -> None:
        """Give back everything of a removed bitmap.

        Raises:
            BitmapBrokenError: it is so broken that its clusters cannot be told.
        """
        try:
            table = stored.table
        except CorruptImageError as error:
            raise BitmapBrokenError(
                f"bitmap '{stored.name}' cannot be removed: {error.message}", hint=RUN_CHECK
            ) from error
        for value in table:
            entry = BitmapTableEntry(value)
            fault = entry.fault(self.image.geometry)
            if fault is not None:
                raise BitmapBrokenError(
                    f"bitmap '{stored.name}' cannot be removed: its table's {fault}", hint=RUN_CHECK
                )
            if entry.offset:
                self._free(entry.offset, self.image.geometry.cluster_size)
        self._free(stored.entry.bitmap_table_offset, 8 * len(table))

    def _free(self, offset: int, length: int) -> None:
        self.allocator.free(offset, length)

    def _put(self, data: bytes, purpose: str) -> int:
        """Write `data` into free clusters, filled up with zeroes; returns their offset."""
        clusters = self.image.geometry.clusters(len(data))
        offset = self.allocator.take(clusters)
        padded = data + bytes(clusters * self.image.geometry.cluster_size - len(data))
        self._fresh.append(Write.fresh(offset, padded, purpose))
        return offset

    # The directory

    def _switch(self, entries: list[BitmapEntry], *, attach: bool) -> header_area.HeaderChange:
        """What makes the new directory the valid one; `attach` where the old one did not count."""
        directory = b"".join(entry.build() for entry in entries)
        if len(directory) > MAX_BITMAP_DIRECTORY_BYTES:
            raise BitmapLimitError(f"the bitmap directory would be above {MAX_BITMAP_DIRECTORY_BYTES} bytes")
        extension, pointer = self.directory.extension, self.directory.pointer
        if extension is None or pointer is None:
            return header_area.attach(self.image, self._new_directory(entries, directory))
        if len(entries) == pointer.nb_bitmaps and not attach:
            write = self._within_a_sector(pointer.bitmap_directory_offset, directory)
            if write is not None:
                return header_area.HeaderChange((Stage("switch the directory entry", (write,), atomic=True),), 0)
        self._free(pointer.bitmap_directory_offset, pointer.bitmap_directory_size)
        if not entries:
            return header_area.detach(self.image, extension)
        return header_area.switch(self.image, extension, self._new_directory(entries, directory), attach=attach)

    def _new_directory(self, entries: list[BitmapEntry], directory: bytes) -> BitmapsExtension:
        return BitmapsExtension(len(entries), len(directory), self._put(directory, "bitmap directory"))

    def _within_a_sector(self, offset: int, directory: bytes) -> Write | None:
        """The one write that turns the stored directory into the new one, if a single sector holds all that differs."""
        old = b"".join(stored.entry.build() for stored in self.directory.bitmaps)
        if len(old) != len(directory):
            return None
        differing = [place for place, pair in enumerate(zip(old, directory, strict=True)) if pair[0] != pair[1]]
        start, stop = differing[0], differing[-1] + 1
        write = Write.replace(offset + start, old[start:stop], directory[start:stop], "bitmap directory entry")
        return write if Stage("", (write,)).fits_a_sector else None


def _chunk_bytes(bits: BitVector, index: int) -> memoryview:
    return memoryview(bits.read(index))
