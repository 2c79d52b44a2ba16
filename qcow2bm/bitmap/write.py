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
    if _are_stored(wanted, entries, directory):
        return no_change(image, summary)
    kept = {id(bitmap.stored) for bitmap in wanted}
    for stored in directory.bitmaps:
        if id(stored) not in kept:
            writer.free_bitmap(stored)
    new_only = all(bitmap.stored is None for bitmap in wanted)
    switch = writer.switch(entries, attach=new_only and not directory.attached)
    return writer.change.plan(switch, directory.references(), summary)


def replace_directory(
    change: Change, directory: BitmapDirectory, wanted: Sequence[Wanted], *, limit: int | None = None
) -> tuple[int, BitmapsExtension] | None:
    """Put the wanted bitmaps, which are as many as before, into a change that needs more than them.

    Args:
        limit: nothing stays that lies at this host offset or behind it.

    Returns:
        Where the header has the pointer to their directory, and what it shall be; None if nothing changes.

    Raises:
        ProofError, NoSpaceError, BitmapLimitError: as `plan_changes`.
    """
    writer = _Writer(change, directory, limit)
    entries = [writer.entry(bitmap) for bitmap in wanted]
    assert directory.extension is not None
    assert directory.pointer is not None
    may_stay = not writer.must_move(directory.pointer.bitmap_directory_offset)
    if _are_stored(wanted, entries, directory) and may_stay:
        return None
    return directory.extension.data_offset, writer.renewed_directory(entries)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Puts tables, data and directory into a change."""

    change: Change
    directory: BitmapDirectory
    limit: int | None = None

    def must_move(self, offset: int) -> bool:
        """True if what lies at `offset` must not stay there."""
        return self.limit is not None and offset >= self.limit

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
        if stored is not None and bitmap.granularity_bits != entry.granularity_bits:
            # At another granularity no chunk is what it was: everything is new, but for the entry's place.
            self.free_bitmap(stored)
            entry, stored = replace(entry, granularity_bits=bitmap.granularity_bits), None
        if bitmap.bits is None:
            return entry
        old_bits = self._reusable_bits(stored)
        if bitmap.bits is old_bits:
            return entry
        table, is_new = self._table(bitmap.bits, old_bits, stored, decode_name(bitmap.name))
        if stored is not None:
            if not is_new and not self.must_move(stored.entry.bitmap_table_offset):
                return entry
            self.change.free(stored.entry.bitmap_table_offset, 8 * len(stored.table))
        offset = self.change.put(table_bytes(table), f"table of bitmap '{decode_name(bitmap.name)}'")
        return replace(entry, bitmap_table_offset=offset, bitmap_table_size=len(table))

    def _reusable_bits(self, stored: StoredBitmap | None) -> BitVector | None:
        """The stored bits whose clusters the new table may go on with: those of a table that fits the disk.

        Of one that does not fit nobody knows what has been done to it: all of it is written anew, and what it had is
        given back, which is proved.
        """
        if stored is None:
            return None
        fitting = self.change.image.geometry.bitmap_table_entries(stored.granularity)
        return stored.bits if len(stored.table) == fitting else None

    def _table(
        self, bits: BitVector, old_bits: BitVector | None, stored: StoredBitmap | None, name: str
    ) -> tuple[array[int], bool]:
        """A bitmap's new table, and whether it says anything else than the old one.

        Unchanged chunks keep their clusters, new ones get free clusters, replaced ones are given back. Where refcounts
        lie a new cluster may be the very one that the old entry names: equal entries do not mean equal bits.
        """
        old_table = stored.table if stored is not None else array("Q")
        table = array("Q", bytes(8 * len(bits.chunks)))
        cluster_size = self.change.image.geometry.cluster_size
        is_new = len(table) != len(old_table)
        for index in range(max(len(table), len(old_table))):
            old = old_table[index] if index < len(old_table) else 0
            if index < len(table):
                entry = self._entry_of(bits, old_bits, index, old, name)
                table[index] = old if entry is None else entry
                if entry is None:
                    continue
            is_new = True
            if BitmapTableEntry(old).offset:
                self.change.free(BitmapTableEntry(old).offset, cluster_size)
        return table, is_new

    def _entry_of(self, bits: BitVector, old_bits: BitVector | None, index: int, old: int, name: str) -> int | None:
        """What the new table says of a chunk, `old` being what the old one did; None if that stays."""
        if self.must_move(BitmapTableEntry(old).offset):
            old_bits = None
        same_shape = old_bits is None or old_bits.length == bits.length
        if old_bits is not None and index < len(old_bits.chunks):
            stored = old_bits.chunks[index]
            if bits.chunks[index] is stored and bits.valid_bits(index) == old_bits.valid_bits(index):
                return None
            # Where the disk ends elsewhere a cluster can stay if all of it is right: its old tail may be none now.
            if not same_shape and bits.read(index) == stored.read(0, bits.chunk_bytes):
                return None
        chunk = bits.settle(index, old_bits if same_shape else None)
        if same_shape and old_bits is not None and chunk is old_bits.chunks[index]:
            return None
        if chunk is ZEROES or chunk is ONES:
            entry = ALL_ONES if chunk is ONES else 0
            return None if entry == old else entry
        return self.change.put_run(1, partial(_chunk_bytes, bits, index), f"data of bitmap '{name}', chunk {index}")

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
        directory = _built(entries)
        extension, pointer = self.directory.extension, self.directory.pointer
        if extension is None or pointer is None:
            return partial(header_area.attach, pointer=self._new_directory(entries, directory))
        if len(entries) == pointer.nb_bitmaps and not attach:
            write = self._within_a_sector(pointer.bitmap_directory_offset, directory)
            if write is not None:
                in_place = Switch((Stage("switch the directory entry", (write,)),))
                return lambda _: in_place
        self.change.free(pointer.bitmap_directory_offset, pointer.bitmap_directory_size)
        if not entries:
            return partial(header_area.detach, extension=extension)
        new = self._new_directory(entries, directory)
        return partial(header_area.switch, extension=extension, pointer=new, attach=attach)

    def renewed_directory(self, entries: list[BitmapEntry]) -> BitmapsExtension:
        """A directory of its own for the entries; the old one is given back."""
        pointer = self.directory.pointer
        assert pointer is not None
        directory = _built(entries)
        self.change.free(pointer.bitmap_directory_offset, pointer.bitmap_directory_size)
        return self._new_directory(entries, directory)

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


def _are_stored(wanted: Sequence[Wanted], entries: list[BitmapEntry], directory: BitmapDirectory) -> bool:
    """True if nothing is new: each bitmap comes from the stored one in its place, and says what that says."""
    return len(entries) == len(directory.bitmaps) and all(
        bitmap.stored is stored and entry == stored.entry
        for bitmap, entry, stored in zip(wanted, entries, directory.bitmaps, strict=True)
    )


def _built(entries: Sequence[BitmapEntry]) -> bytes:
    """The bytes of a directory; raises BitmapLimitError if there would be too many."""
    directory = b"".join(entry.build() for entry in entries)
    if len(directory) > MAX_BITMAP_DIRECTORY_BYTES:
        raise BitmapLimitError(f"the bitmap directory would be above {MAX_BITMAP_DIRECTORY_BYTES} bytes")
    return directory


def _chunk_bytes(bits: BitVector, index: int) -> memoryview:
    return memoryview(bits.read(index))
