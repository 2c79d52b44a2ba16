"""The tables of the mapping: snapshot table, L1 tables, and the L2 tables that they name, each L1 table walked once.

The work is bounded by what is there. Many L1 entries may name one L2 table, and many snapshots one L1 table; a sparse
file may claim any number of tables in its holes, of which none is read.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import RUN_CHECK, CorruptImageError
from ..format.entries import l1_offset
from ..format.limits import MAX_L1_ENTRIES
from .image import Qcow2Image
from .mapping import read_l1, require_l2_aligned
from .references import Kind, Reference, l1_owner

if TYPE_CHECKING:
    from ..format.vectors import NamedTables

_SMALL = 1 << 15
"""L1 entries up to which plain Python is faster than loading numpy."""
_SPARE = 1 << 19


def room_for_l1_tables(sizes: Iterable[int]) -> int:
    """Entries that L1 tables may have beyond what the file holds: the largest may be a hole but for one block.

    And some more, as a copy that left zeroes out, or a file system that packs, may hold less than was written.
    """
    return max(_SPARE, min(max(sizes, default=0), MAX_L1_ENTRIES))


class MappingTables:
    """The tables of an image's mapping.

    Attributes:
        roots: references of the snapshot table and of every L1 table.
    """

    def __init__(self, image: Qcow2Image) -> None:
        """Read the snapshot table.

        Raises:
            CorruptImageError: it cannot be read, or the L1 tables together are larger than what the file holds.
        """
        self._image = image
        header, snapshots = image.header, image.snapshots()
        tables = [(header.l1_table_offset, header.l1_size, l1_owner(None))]
        tables += [(entry.l1_table_offset, entry.l1_size, l1_owner(entry)) for entry in snapshots.entries]
        self.roots = [Reference(snapshots.offset, snapshots.length, Kind.SNAPSHOT_TABLE, "the snapshot table")]
        self.roots += [Reference(offset, size * 8, Kind.L1_TABLES, owner) for offset, size, owner in tables]
        # A table is walked once, and a hole not at all: any number of snapshots may name one.
        self._walked: dict[tuple[int, int], str] = {}
        for offset, size, owner in tables:
            if not image.file.is_hole(offset, size * 8):
                self._walked.setdefault((offset, size), owner)
        sizes = [size for _, size in self._walked]
        if sum(sizes) > image.file.present // 8 + room_for_l1_tables(sizes):
            raise CorruptImageError("the L1 tables together are larger than the file", hint=RUN_CHECK)

    @cached_property
    def _is_small(self) -> bool:
        return sum(size for _, size in self._walked) <= _SMALL

    def _l1_tables(self) -> Iterator[tuple[array[int], str]]:
        for (offset, size), owner in self._walked.items():
            yield read_l1(self._image, offset, size), owner

    @cached_property
    def _named(self) -> NamedTables:
        """The L2 tables, if there are many."""
        from ..format.vectors import NamedTables

        named = NamedTables(self._l1_tables())
        odd = named.unaligned(self._image.geometry)
        if odd is not None:
            require_l2_aligned(self._image, odd)
        return named

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        """L2 tables, one for each L1 entry that names one: offset, index of the entry, owner of the L1 table."""
        for l1_table, owner in self._l1_tables():
            for index, value in enumerate(l1_table if any(l1_table) else ()):
                offset = l1_offset(value)
                if offset:
                    require_l2_aligned(self._image, offset)
                    yield offset, index, owner

    def count(self) -> int:
        """How many L2 tables there are.

        Raises:
            CorruptImageError: an L1 table cannot be read, or names an L2 table that is not cluster-aligned.
        """
        return len({offset for offset, _, _ in self._entries()}) if self._is_small else self._named.count

    def l2_references(self, wanted: Collection[int]) -> Iterator[Reference]:
        """L2 tables at these offsets, once for each L1 entry that names them; of very many entries in a row twice.

        Raises:
            CorruptImageError: as `count`.
        """
        for offset, index, owner in self._entries() if self._is_small else self._named.entries(wanted):
            if offset in wanted:
                size = self._image.geometry.cluster_size
                yield Reference(offset, size, Kind.L2_TABLES, f"an L2 table ({owner}, index {index})")

    def l2_tables(self) -> dict[int, int]:
        """The L2 tables that may hold entries, each with the index of the first L1 entry that names it.

        Raises:
            CorruptImageError: as `count`.
        """
        tables: dict[int, int] = {}
        file, size = self._image.file, self._image.geometry.cluster_size
        if self._is_small:
            for offset, index, _ in self._entries():
                tables.setdefault(offset, index)
            return {offset: index for offset, index in tables.items() if not file.is_hole(offset, size)}
        place = 0
        while (found := self._named.at(place)) is not None:
            offset, index = found
            data = file.next_data(offset) if offset < file.size else offset
            if offset + size > data:
                tables[offset] = index
                place += 1
            else:
                place = max(place + 1, self._named.place(data - size + 1))
        return tables
