"""The mapping tables of a disk of another size: new ones beside those in use, which stay as they are.

What lies past the end of the smaller of the two disks is dropped: by a shrink because it is gone, by a growth because
it was never there for the guest, and must not appear in what is added. What is added has no entries, or such that read
as zeroes where a longer backing file would show through, or those of a raw data file, where each cluster has its place.

Only tables that change are written, to clusters of their own, and the last of them is the L1 table, which the header
then names. Clusters lose one reference for each entry dropped; what snapshots share keeps theirs.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from ..format.entries import COPIED, OFFSET_MASK, ZERO, L2Entry, l1_offset, table_bytes, table_entries
from ..format.geometry import ALL_SUBCLUSTERS, SUBCLUSTERS, Geometry
from ..image.change import Change
from ..image.image import Qcow2Image
from ..image.mapping import read_l1, read_l2, tables_in_a_row
from .counted import require_counted

if TYPE_CHECKING:
    from ..image.lowering import Lowering  # with numpy, which a growth does not need

_RUN = 1 << 20
"""Bytes of new L2 tables that are put together."""


class Filling(Enum):
    """What the entries of new clusters are."""

    NOTHING = "nothing"
    """Unallocated."""
    ZEROES = "zeroes"
    """Zero clusters: a longer backing file must not show through."""
    IN_PLACE = "in place"
    """Each cluster of a raw data file at its guest offset."""


@dataclass(slots=True)
class NewMapping:
    """The mapping of the new disk as it is being put into a change.

    Attributes:
        keep: guest clusters whose entries stay.
        total: guest clusters of the new disk.
        filling: of the entries from `keep` on.
        replaced: guest cluster to the entry it gets instead of its old one, whose cluster the caller has given back.
        limit: no table stays that lies at this host offset or behind it, unless snapshots share it.
        dropped: references that go, None if there are none.
    """

    change: Change
    keep: int
    total: int
    filling: Filling = Filling.NOTHING
    replaced: dict[int, L2Entry] = field(default_factory=dict)
    limit: int | None = None
    dropped: Lowering | None = None

    @property
    def image(self) -> Qcow2Image:
        """The image as it is."""
        return self.change.image

    @property
    def geometry(self) -> Geometry:
        """Its geometry; only the virtual size will be another."""
        return self.image.geometry

    def put(self) -> tuple[int, int]:
        """Put the new tables into the change; returns entries and offset of the L1 table.

        Raises:
            NoSpaceError: no room for them.
            CorruptImageError: a mapping table cannot be read.
            ProofError: what is given back has other owners than one.
        """
        header, per_table = self.image.header, self.geometry.l2_entries
        old = read_l1(self.image)
        new = array("Q", old)
        needed = -(-self.total // per_table)
        new.extend([0] * (needed - len(new)))
        whole = -(-self.keep // per_table)
        partly = {self.keep // per_table} if self.keep % per_table else set()
        for index in sorted(partly | {cluster // per_table for cluster in self.replaced}):
            self._rewrite(new, index)
        self._drop_tables(new, whole)
        for index in range(needed):
            offset = l1_offset(new[index])
            if offset and self._must_move(offset) and self.change.refcount(offset) == 1:
                new[index] = COPIED | self.change.put(read_l2(self.image, offset), "L2 table, further in front")
                self.give_back(offset)
        if self.filling is not Filling.NOTHING:
            self._fill_tables(new, whole, needed)
        if new == old and not self._must_move(header.l1_table_offset):
            return header.l1_size, header.l1_table_offset
        offset = self.change.put(table_bytes(new[:needed]), "new L1 table")
        if header.l1_size:
            self.change.free(header.l1_table_offset, 8 * header.l1_size)
        return needed, offset

    def _must_move(self, offset: int) -> bool:
        return self.limit is not None and offset >= self.limit

    # The table at the old or new end

    def _rewrite(self, l1_table: array[int], index: int) -> None:
        """Give an L1 entry a copy of its table with the entries that change."""
        offset = l1_offset(l1_table[index])
        old = read_l2(self.image, offset) if offset else bytes(self.geometry.cluster_size)
        new = bytearray(old)
        width, first = self.geometry.l2_entry_size, index * self.geometry.l2_entries
        inside = range(first, first + self.geometry.l2_entries)
        for cluster, entry in self.replaced.items():
            if cluster in inside:
                new[(cluster - first) * width : (cluster - first + 1) * width] = entry.build(self.geometry)
        if self.keep in inside:
            self._drop_entries(old[(self.keep - first) * width :])
            new[(self.keep - first) * width :] = self._entries(self.keep, inside.stop)
        if new == old:
            return
        if offset:
            self.give_back(offset)
        l1_table[index] = COPIED | self.change.put(bytes(new), "copy of an L2 table") if any(new) else 0

    def give_back(self, offset: int) -> None:
        """Give up one reference to a cluster: the only one, or one of those that snapshots share."""
        if self.change.refcount(offset) == 1:
            self.change.free(offset, self.geometry.cluster_size)
        else:
            self.lowering().drop_one(self.geometry.cluster_of(offset))

    def give_back_stream(self, entry: L2Entry) -> None:
        """Give up the references of a compressed cluster."""
        self._drop_entries(entry.build(self.geometry))

    # Tables past the end

    def _drop_tables(self, l1_table: array[int], first: int) -> None:
        """Drop the tables from an L1 entry on, with all that they refer to."""
        offsets = array("Q", filter(None, map(l1_offset, l1_table[first:])))  # there may be millions
        l1_table[first:] = array("Q", bytes(8 * (len(l1_table) - first)))
        if offsets:
            self.lowering()  # looks at the whole image first: the tables may be nonsense
        for group in tables_in_a_row(offsets, self.geometry.cluster_size):
            length = len(group) * self.geometry.cluster_size
            for offset in group:
                self.lowering().drop_one(self.geometry.cluster_of(offset))
            if not self.image.header.has_data_file and not self.image.file.is_hole(group[0], length):
                self._drop_entries(self.image.file.read_at(group[0], length))

    def _drop_entries(self, entries: bytes) -> None:
        """Give up what the entries of a table, or of some, refer to in this file."""
        if self.image.header.has_data_file or entries.count(0) == len(entries):
            return
        from ..format.vectors import host_clusters

        self.lowering().drop(*host_clusters(entries, self.geometry))

    def lowering(self) -> Lowering:
        """The references that go; raises CorruptImageError before the first if the refcounts do not allow for it."""
        if self.dropped is None:
            require_counted(self.image)
            from ..image.lowering import Lowering

            self.dropped = Lowering(self.geometry)
        return self.dropped

    # What is added

    def _fill_tables(self, l1_table: array[int], first: int, stop: int) -> None:
        """New tables for the L1 entries from `first` up to `stop`, in runs."""
        size, per_table = self.geometry.cluster_size, self.geometry.l2_entries
        most = max(1, min(_RUN // size, self.geometry.refcounts_per_block // 2))
        for start in range(first, stop, most):
            end = min(start + most, stop)
            make = partial(self._entries, start * per_table, end * per_table)
            offset = self.change.put_run(end - start, make, f"L2 tables of new clusters, {end - start} of them")
            for index in range(start, end):
                l1_table[index] = COPIED | offset + (index - start) * size

    def _entries(self, first: int, stop: int) -> bytes:
        """The entries of the guest clusters from `first` up to `stop`, none past the new end."""
        words = self.geometry.l2_entry_words
        end = max(first, min(stop, self.total))
        filled = b""
        if self.filling is Filling.ZEROES:
            filled = zero_entry(self.geometry).build(self.geometry) * (end - first)
        elif self.filling is Filling.IN_PLACE:
            values = array("Q", bytes(8 * words * (end - first)))
            size = self.geometry.cluster_size
            values[::words] = array("Q", range(COPIED | first * size, COPIED | end * size, size))
            if words == 2:
                values[1::2] = array("Q", [ALL_SUBCLUSTERS] * (end - first))
            filled = table_bytes(values)
        return filled.ljust((stop - first) * self.geometry.l2_entry_size, b"\0")


def zero_entry(geometry: Geometry) -> L2Entry:
    """A cluster that reads as zeroes and has no place in the file."""
    return L2Entry(0, ALL_SUBCLUSTERS << SUBCLUSTERS) if geometry.extended_l2 else L2Entry(ZERO)


def entry_at(image: Qcow2Image, cluster: int) -> L2Entry:
    """The L2 entry of a guest cluster of the active disk; raises CorruptImageError as `read_l2`."""
    geometry = image.geometry
    index, within = divmod(cluster, geometry.l2_entries)
    l1_table = read_l1(image)
    offset = l1_offset(l1_table[index]) if index < len(l1_table) else 0
    if not offset:
        return L2Entry(0)
    return L2Entry.of(table_entries(read_l2(image, offset)), within, geometry)


def end_in_data_file(image: Qcow2Image, keep: int) -> int:
    """Where the last cluster in the data file ends that one of the first `keep` guest clusters has elsewhere.

    In bytes; 0 if each has its place at its guest offset, which QEMU asks for and the specification does not.
    """
    import numpy as np

    geometry = image.geometry
    end = 0
    for index, value in enumerate(read_l1(image)[: -(-keep // geometry.l2_entries)]):
        offset = l1_offset(value)
        if not offset or image.file.is_hole(offset, geometry.cluster_size):
            continue
        kept = min(geometry.l2_entries, keep - index * geometry.l2_entries)
        words = np.frombuffer(read_l2(image, offset), ">u8")[:: geometry.l2_entry_words][:kept]
        places = words.astype(np.uint64) & np.uint64(OFFSET_MASK)
        at_home = index * geometry.l2_span + np.arange(kept, dtype=np.uint64) * np.uint64(geometry.cluster_size)
        away = places[(places != 0) & (places != at_home)]
        end = max(end, int(away.max(initial=0)) + geometry.cluster_size) if away.size else end
    return end
