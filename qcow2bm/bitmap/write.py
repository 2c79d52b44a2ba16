"""From a draft of the bitmaps to a plan of writes.

Nothing that is in use is overwritten, but for refcounts, the header's pointer and flags within one sector. New
data, tables and directory go to free clusters in the first stage; the header then switches to the new directory in
one sector; what the old one used is given back in the last. A crash at any moment leaves the old bitmaps or the new
ones, and at worst leaked clusters.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from ..errors import RUN_CHECK, BitmapBrokenError, BitmapLimitError, CorruptImageError
from ..format.bitmap_directory import BitmapEntry, BitmapFlag
from ..format.entries import ALL_ONES, BitmapTableEntry, table_bytes
from ..format.extensions import BitmapsExtension
from ..format.limits import MAX_BITMAP_DIRECTORY_BYTES
from ..format.text import decode_name
from ..image.change import Change, no_change
from ..image.header_draft import HeaderDraft
from ..image.image import Qcow2Image
from ..image.plan import Plan, Stage, Switch, Write, fits_a_sector
from . import header_area
from .bits import BitVector
from .chunks import ONES, ZEROES
from .store import BitmapDirectory, StoredBitmap


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
    writer = _Writer(Change(image), directory)
    entries = [writer.entry(bitmap) for bitmap in wanted]
    if entries == [stored.entry for stored in directory.bitmaps]:
        return no_change(image, summary)
    kept = {id(bitmap.stored) for bitmap in wanted}
    for stored in directory.bitmaps:
        if id(stored) not in kept:
            writer.free_bitmap(stored)
    new_only = all(bitmap.stored is None for bitmap in wanted)
    switch = writer.switch(entries, attach=new_only and not directory.attached)
    return writer.change.plan(switch, directory.references(), summary)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Puts tables, data and directory into a change."""

    change: Change
    directory: BitmapDirectory

    # Tables and data

    def entry(self, bitmap: Wanted) -> BitmapEntry:
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
            self.change.free(stored.entry.bitmap_table_offset, 8 * len(stored.table))
        offset = self.change.put(table_bytes(table), f"table of bitmap '{decode_name(bitmap.name)}'")
        return replace(entry, bitmap_table_offset=offset, bitmap_table_size=len(table))

    def _table(self, bits: BitVector, stored: StoredBitmap | None, name: str) -> array[int]:
        """A bitmap's new table.

        Unchanged chunks keep their clusters, new ones get free clusters, replaced ones are given back.
        """
        old_bits = stored.bits if stored is not None else None
        table = array("Q", stored.table) if stored is not None else array("Q", bytes(8 * len(bits.chunks)))
        cluster_size = self.change.image.geometry.cluster_size
        for index, old in enumerate(table):
            chunk = bits.settle(index, old_bits)
            if old_bits is not None and chunk is old_bits.chunks[index]:
                continue
            if chunk is ZEROES or chunk is ONES:
                table[index] = ALL_ONES if chunk is ONES else 0
            else:
                make = partial(_chunk_bytes, bits, index)
                table[index] = self.change.put_cluster(make, f"data of bitmap '{name}', chunk {index}")
            if BitmapTableEntry(old).offset:
                self.change.free(BitmapTableEntry(old).offset, cluster_size)
        return table

    def free_bitmap(self, stored: StoredBitmap) -> None:
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
            fault = entry.fault(self.change.image.geometry)
            if fault is not None:
                raise BitmapBrokenError(
                    f"bitmap '{stored.name}' cannot be removed: its table's {fault.message}", hint=RUN_CHECK
                )
            if entry.offset:
                self.change.free(entry.offset, self.change.image.geometry.cluster_size)
        self.change.free(stored.entry.bitmap_table_offset, 8 * len(table))

    # The directory

    def switch(self, entries: list[BitmapEntry], *, attach: bool) -> Callable[[HeaderDraft], Switch]:
        """What makes the new directory the valid one; `attach` where the old one did not count."""
        directory = b"".join(entry.build() for entry in entries)
        if len(directory) > MAX_BITMAP_DIRECTORY_BYTES:
            raise BitmapLimitError(f"the bitmap directory would be above {MAX_BITMAP_DIRECTORY_BYTES} bytes")
        extension, pointer = self.directory.extension, self.directory.pointer
        if extension is None or pointer is None:
            return partial(header_area.attach, pointer=self._new_directory(entries, directory))
        if len(entries) == pointer.nb_bitmaps and not attach:
            write = self._within_a_sector(pointer.bitmap_directory_offset, directory)
            if write is not None:
                in_place = Switch((Stage("switch the directory entry", (write,), atomic=True),))
                return lambda _: in_place
        self.change.free(pointer.bitmap_directory_offset, pointer.bitmap_directory_size)
        if not entries:
            return partial(header_area.detach, extension=extension)
        new = self._new_directory(entries, directory)
        return partial(header_area.switch, extension=extension, pointer=new, attach=attach)

    def _new_directory(self, entries: list[BitmapEntry], directory: bytes) -> BitmapsExtension:
        return BitmapsExtension(len(entries), len(directory), self.change.put(directory, "bitmap directory"))

    def _within_a_sector(self, offset: int, directory: bytes) -> Write | None:
        """The one write that turns the stored directory into the new one, if a single sector holds all that differs."""
        old = b"".join(stored.entry.build() for stored in self.directory.bitmaps)
        if len(old) != len(directory):
            return None
        differing = [place for place, pair in enumerate(zip(old, directory, strict=True)) if pair[0] != pair[1]]
        start, stop = differing[0], differing[-1] + 1
        write = Write.replace(offset + start, old[start:stop], directory[start:stop], "bitmap directory entry")
        return write if fits_a_sector([write]) else None


def _chunk_bytes(bits: BitVector, index: int) -> memoryview:
    return memoryview(bits.read(index))
