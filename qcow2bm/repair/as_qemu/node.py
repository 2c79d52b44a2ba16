"""An image as QEMU has it open for writing: what it has read once and works with, and what it will not overwrite.

Before QEMU writes to a place of metadata it looks whether that is part of other metadata; if so it does not write, but
marks the image corrupt and lets nobody use it any more.
"""

from __future__ import annotations

import errno
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from enum import Enum

from ...checks.plain import PLAIN_ENTRIES
from ...checks.view import Root, View
from ...format.entries import OFFSET_MASK, REFCOUNT_BLOCK_MASK
from ...format.header import INCOMPATIBLE_FIELD, REFCOUNT_TABLE_FIELDS, Incompatible
from ...format.snapshot_table import SnapshotEntry
from ...image.overlay import OverlayFile
from .model import Event, GivenUpError, Notice


class Structure(Enum):
    """What QEMU protects from being overwritten, under the names in its messages."""

    HEADER = "qcow2_header"
    ACTIVE_L1 = "active L1 table"
    ACTIVE_L2 = "active L2 table"
    REFCOUNT_TABLE = "refcount table"
    REFCOUNT_BLOCK = "refcount block"
    SNAPSHOT_TABLE = "snapshot table"
    INACTIVE_L1 = "inactive L1 table"
    BITMAP_DIRECTORY = "bitmap directory"


class Node:
    """An open image.

    Attributes:
        file: the image as it would be.
        view: the image as it was opened.
        table: the refcount table's entries; it lies at `table_offset`.
        snapshots: those that count, and their table's place, `snapshots_length` bytes.
        filled: clusters that were free and have been written to.
        dead: True once QEMU would let nobody use the image any more.
    """

    def __init__(self, file: OverlayFile, view: View) -> None:
        self.file = file
        self.view = view
        self.geometry = view.geometry
        self.table = array("Q", view.stored.table)
        self.table_offset = view.header.refcount_table_offset
        self.snapshots: list[SnapshotEntry] = []
        self.snapshots_offset = view.header.snapshots_offset
        self.snapshots_length = 0
        self.filled: set[int] = set()
        self.dead = False
        self._signaled = False
        self._features = int(view.header.incompatible_features)
        self._l2_tables: _Places | None = None
        self._blocks: _Places | None = None

    # Marks in the header

    @property
    def is_marked(self) -> bool:
        """True if the dirty or the corrupt bit is set."""
        return bool(self._features & (Incompatible.DIRTY | Incompatible.CORRUPT))

    @property
    def is_dirty(self) -> bool:
        """True if the dirty bit is set."""
        return bool(self._features & Incompatible.DIRTY)

    def unmark(self) -> None:
        """Clear the dirty and the corrupt bit."""
        self._mark(self._features & ~(Incompatible.DIRTY | Incompatible.CORRUPT))

    def signal(self, notice: Notice, **values: int | str) -> Iterator[Event]:
        """Mark the image corrupt, and say why unless that has been said."""
        if self._signaled and self._features & Incompatible.CORRUPT:
            return
        yield Event(notice, values=values)
        self._mark(self._features | Incompatible.CORRUPT)
        self.dead = self._signaled = True

    def _mark(self, features: int) -> None:
        self._features = features
        if self.view.header.version >= 3:
            self.file.write_at(INCOMPATIBLE_FIELD, features.to_bytes(8, "big"))

    # Writing

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Write.

        Raises:
            GivenUpError: a device ends before that.
        """
        if not self.has_room(offset + len(data)):
            raise GivenUpError(errno.ENOSPC)
        self.file.write_at(offset, data)

    def fill(self, offset: int, data: bytes | bytearray) -> None:
        """Write to free clusters."""
        self.write(offset, data)
        first = self.geometry.cluster_of(offset)
        self.filled.update(range(first, first + self.geometry.clusters(len(data))))

    def has_room(self, end: int) -> bool:
        """False if a device ends before."""
        return not self.file.is_device or end <= self.file.size

    def set_refcount_table(self, offset: int, table: array[int]) -> None:
        """Make another refcount table the valid one."""
        clusters = 8 * len(table) // self.geometry.cluster_size
        self.file.write_at(REFCOUNT_TABLE_FIELDS, offset.to_bytes(8, "big") + clusters.to_bytes(4, "big"))
        self.table_offset, self.table, self._blocks = offset, table, None

    def add_block(self, index: int, offset: int) -> None:
        """Make a refcount block valid that there was none of."""
        self.table[index] = offset
        self.file.write_at(self.table_offset + 8 * index, offset.to_bytes(8, "big"))
        self._blocks = None

    # What must not be overwritten

    def overlapped(self, offset: int, length: int, *ignored: Structure) -> Structure | None:
        """What a write would overwrite at least a part of, the first in QEMU's order.

        Source: `qcow2_check_metadata_overlap` with the default template.
        """
        geometry, size = self.geometry, self.geometry.cluster_size
        if offset < size:
            return Structure.HEADER
        start = offset & -size
        end = start + geometry.clusters(offset - start + length) * size
        for structure, first, extent in self._ranges():
            if extent and structure not in ignored and first < end and start < first + extent:
                return structure
        if Structure.ACTIVE_L2 not in ignored and self._active_l2_tables().touches(start, end):
            return Structure.ACTIVE_L2
        if Structure.REFCOUNT_BLOCK not in ignored and self._refcount_blocks().touches(start, end):
            return Structure.REFCOUNT_BLOCK
        pointer = self.view.directory.pointer
        if pointer is not None and self.view.directory.attached:
            first = pointer.bitmap_directory_offset
            if first < end and start < first + pointer.bitmap_directory_size:
                return Structure.BITMAP_DIRECTORY
        return None

    def _ranges(self) -> Iterator[tuple[Structure, int, int]]:
        header = self.view.header
        yield Structure.ACTIVE_L1, header.l1_table_offset, 8 * header.l1_size
        yield Structure.REFCOUNT_TABLE, self.table_offset, 8 * len(self.table)
        yield Structure.SNAPSHOT_TABLE, self.snapshots_offset, self.snapshots_length
        for entry in self.snapshots:
            yield Structure.INACTIVE_L1, entry.l1_table_offset, 8 * entry.l1_size

    def _active_l2_tables(self) -> _Places:
        if self._l2_tables is None:
            header = self.view.header
            entries = self.view.read_l1(Root(header.l1_table_offset, header.l1_size))
            self._l2_tables = _Places(entries, OFFSET_MASK, self.geometry.cluster_size)
        return self._l2_tables

    def _refcount_blocks(self) -> _Places:
        if self._blocks is None:
            self._blocks = _Places(self.table, REFCOUNT_BLOCK_MASK, self.geometry.cluster_size)
        return self._blocks


class _Places:
    """Where the structures of one cluster each lie that a table names; `mask` has the bits of an offset in it."""

    def __init__(self, table: array[int], mask: int, size: int) -> None:
        self._size = size
        if len(table) <= PLAIN_ENTRIES:
            self._offsets = array("Q", sorted({entry & mask for entry in table if entry & mask}))
        else:
            from ...checks.wrong import distinct

            self._offsets = array("Q", distinct(table, mask).tobytes())

    def touches(self, start: int, end: int) -> bool:
        """True if one of them is part of a range."""
        place = bisect_left(self._offsets, start - self._size + 1)
        return place < len(self._offsets) and self._offsets[place] < end
