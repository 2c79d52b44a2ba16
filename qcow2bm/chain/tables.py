"""L2 tables by the slice, with numpy: what `L2Entry` says of one entry, of some thousand at once.

Reading guest data looks up a range at a time, so a slice is all that is ever held of a table. A unit is what one kind
is said of: a cluster, or a subcluster where the image has extended L2 entries.

Source: qcow2 specification, "Cluster mapping", "Extended L2 Entries"; what cannot be read is what QEMU's
`qcow2_get_host_offset` gives an I/O error for.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from ..errors import RUN_CHECK, CorruptImageError
from ..format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from ..format.geometry import ALL_SUBCLUSTERS, SUBCLUSTERS, Geometry
from ..format.header import Autoclear, Header
from ..format.snapshot_table import SnapshotEntry
from ..format.vectors import Words
from ..image.image import Qcow2Image
from ..image.mapping import read_l1, require_l2_aligned

UNALLOCATED, ZEROES, DATA, STREAM = range(4)
"""Kinds of a unit: the backing file's, reads as zeroes, a host cluster's, a compressed cluster's."""

SLICE = 1 << 12
"""Entries of an L2 table that are looked at together."""

Kinds = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

_LOW = np.uint64(ALL_SUBCLUSTERS)


@dataclass(frozen=True, slots=True)
class Units:
    """Consecutive units of a guest's disk.

    Attributes:
        kinds: of each unit.
        places: its host offset, or the descriptor of its compressed cluster; 0 for the others.
    """

    kinds: Kinds
    places: Words


class Tables:
    """The L2 tables that one L1 table names.

    Attributes:
        indices: of the L1 entries that name a table, in order.
        offsets: host offsets of these tables.
        copied: whether the L1 entry says that the table's refcount is one.
    """

    def __init__(self, image: Qcow2Image, l1_table: array[int], owner: str) -> None:
        """Raises CorruptImageError if two entries name one table: the guest's ranges would be mixed up."""
        self.image = image
        values = np.frombuffer(l1_table, np.uint64)
        self.indices = np.flatnonzero(values & np.uint64(OFFSET_MASK))
        self.offsets = values[self.indices] & np.uint64(OFFSET_MASK)
        self.copied: Mask = values[self.indices] & np.uint64(COPIED) != 0
        if np.unique(self.offsets).size != self.offsets.size:
            raise CorruptImageError(f"{owner} names an L2 table twice", hint=RUN_CHECK)

    @classmethod
    def active(cls, image: Qcow2Image) -> Self:
        """Those of the disk as it is now; raises CorruptImageError for an L1 table that cannot be read."""
        return cls(image, read_l1(image)[: image.geometry.l1_entries], "the active L1 table")

    @classmethod
    def of_snapshot(cls, image: Qcow2Image, snapshot: SnapshotEntry) -> Self:
        """Those of an internal snapshot, as far as its table goes; raises as `active`."""
        table = read_l1(image, snapshot.l1_table_offset, snapshot.l1_size) if snapshot.l1_size else array("Q")
        return cls(image, table, "the L1 table of the snapshot")

    def find(self, index: int) -> tuple[int, bool]:
        """Host offset of the L2 table of an L1 entry and its copied flag; offset 0 for no table."""
        place = int(np.searchsorted(self.indices, index))
        if place == self.indices.size or int(self.indices[place]) != index:
            return 0, False
        return int(self.offsets[place]), bool(self.copied[place])

    def next_index(self, index: int) -> int | None:
        """The first L1 entry from `index` on that names a table."""
        place = int(np.searchsorted(self.indices, index))
        return int(self.indices[place]) if place < self.indices.size else None

    def words(self, offset: int, first: int, count: int) -> Words | None:
        """Entries `first` and following of the table at `offset`, extended ones as two words each; None for a hole.

        Raises:
            CorruptImageError: the table is not aligned or lies outside the file.
        """
        require_l2_aligned(self.image, offset)
        size = self.image.geometry.l2_entry_size
        if self.image.file.is_hole(offset + first * size, count * size):
            return None
        return np.frombuffer(self.image.file.read_at(offset + first * size, count * size), ">u8").astype(np.uint64)


def units(words: Words, geometry: Geometry, *, data_file: bool) -> Units:
    """What the entries mean, unit by unit. Matches `L2Entry.kind` and `L2Entry.subcluster_kind`."""
    entries = words[:: geometry.l2_entry_words]
    streams: Mask = entries & np.uint64(COMPRESSED) != 0
    hosts = entries & np.uint64(OFFSET_MASK)
    allocated = _allocated(entries, hosts, data_file=data_file)
    if geometry.extended_l2:
        return _subclusters(entries, words[1::2], streams, allocated, geometry)
    kinds = np.where(allocated, np.uint8(DATA), np.uint8(UNALLOCATED))
    kinds[entries & np.uint64(ZERO) != 0] = ZEROES
    kinds[streams] = STREAM
    places = np.where(kinds == DATA, hosts, np.uint64(0))
    places[streams] = entries[streams]
    return Units(kinds, places)


def _allocated(entries: Words, hosts: Words, *, data_file: bool) -> Mask:
    """Which standard entries have a host cluster; an offset of 0 is real in a data file."""
    allocated: Mask = hosts != 0
    if data_file:
        allocated |= entries & np.uint64(COPIED) != 0
    return allocated


def _subclusters(entries: Words, bitmaps: Words, streams: Mask, allocated: Mask, geometry: Geometry) -> Units:
    numbers = np.arange(SUBCLUSTERS, dtype=np.uint64)
    held = bitmaps[:, None] >> numbers & np.uint64(1)
    zero = bitmaps[:, None] >> numbers + np.uint64(SUBCLUSTERS) & np.uint64(1)
    kinds = np.where(allocated[:, None] & (held != 0), np.uint8(DATA), np.uint8(UNALLOCATED))
    kinds[zero != 0] = ZEROES
    kinds[streams] = STREAM
    hosts = (entries & np.uint64(OFFSET_MASK))[:, None] + numbers * np.uint64(geometry.subcluster_size)
    places = np.where(kinds == DATA, hosts, np.uint64(0))
    places[streams] = entries[streams, None]
    return Units(kinds.reshape(-1), places.reshape(-1))


def require_readable(words: Words, image: Qcow2Image, guest: int) -> None:
    """Raise CorruptImageError if QEMU would not read what one of the entries names; `guest` is where they begin."""
    header, geometry = image.header, image.geometry
    entries = words[:: geometry.l2_entry_words]
    bad = _unreadable(words, header, geometry)
    if not header.has_data_file:
        hosts = entries & np.uint64(OFFSET_MASK)
        holds_data = entries & np.uint64(COMPRESSED) == 0
        holds_data &= words[1::2] & _LOW != 0 if geometry.extended_l2 else entries & np.uint64(ZERO) == 0
        bad |= holds_data & (hosts >= np.uint64(image.file.size))
    elif header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA:
        hosts = entries & np.uint64(OFFSET_MASK)
        there = guest + np.arange(entries.size, dtype=np.uint64) * np.uint64(geometry.cluster_size)
        bad |= _allocated(entries, hosts, data_file=True) & (hosts != there)
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        where = guest + place * geometry.cluster_size
        raise CorruptImageError(
            f"the cluster at guest offset {where:#x} cannot be read: L2 entry {int(entries[place]):#x}", hint=RUN_CHECK
        )


def _unreadable(words: Words, header: Header, geometry: Geometry) -> Mask:
    """Entries that contradict themselves or the header."""
    entries = words[:: geometry.l2_entry_words]
    streams: Mask = entries & np.uint64(COMPRESSED) != 0
    hosts = entries & np.uint64(OFFSET_MASK)
    allocated = _allocated(entries, hosts, data_file=header.has_data_file)
    bad: Mask = allocated & (hosts & np.uint64(geometry.cluster_size - 1) != 0)
    if header.version < 3:
        bad |= entries & np.uint64(ZERO) != 0
    if geometry.extended_l2:
        bitmaps = words[1::2]
        bad |= np.where(allocated, bitmaps & bitmaps >> np.uint64(SUBCLUSTERS), bitmaps & _LOW) != 0
    bad &= ~streams
    return bad | streams if header.has_data_file else bad
