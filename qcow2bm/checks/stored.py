"""The refcounts as they are on disk, read as far as they make sense.

As QEMU reads them: what lies past the end of the file is zeroes, what has no block is 0, and a block whose entry is
not aligned cannot be read at all.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ..format.entries import REFCOUNT_BLOCK_MASK, get_refcount, refcount_block_offset, table_entries
from ..format.limits import MAX_REFCOUNT_TABLE_BYTES
from ..image.image import Qcow2Image

if TYPE_CHECKING:
    from ..format.vectors import Refcounts
    from .wrong import Mask

_KEPT_BYTES = 4 << 20
_FEW = 1 << 12
"""Refcount blocks that are looked at without asking the file system for holes."""
_COMPARED = 1 << 18
"""Bytes of refcount blocks that are compared at once."""


class StoredRefcounts:
    """Refcount table and blocks of an image that may be damaged.

    Attributes:
        table: the refcount table's entries; empty if the header says nothing sensible about it.
    """

    def __init__(self, image: Qcow2Image, table: array[int]) -> None:
        self._file = image.file
        self._geometry = image.geometry
        self.table = table
        self._kept: OrderedDict[int, bytes | None] = OrderedDict()
        self._room = max(4, _KEPT_BYTES // self._geometry.cluster_size)

    @classmethod
    def read(cls, image: Qcow2Image) -> StoredRefcounts:
        """Read the refcount table."""
        header, length = image.header, image.header.refcount_table_clusters * image.geometry.cluster_size
        if length > MAX_REFCOUNT_TABLE_BYTES or not image.geometry.may_start(header.refcount_table_offset, length):
            return cls(image, array("Q"))
        return cls(image, table_entries(image.file.read_padded(header.refcount_table_offset, length)))

    def indices(self) -> Sequence[int]:
        """The refcount blocks that the table names."""
        return self._known

    @cached_property
    def occupied(self) -> Sequence[int]:
        """Those that may hold something else than zeroes.

        Of very many each block once, none in a hole, none behind the end.
        """
        if len(self._known) <= _FEW:
            return self._known
        from .wrong import first_inside

        size, data, found = self._geometry.cluster_size, 0, list[int]()
        for offset, index in first_inside(self.table, self._file.size):
            if offset >= data:
                data = max(self._file.next_data(offset), offset + 1)
            if offset + size > data or offset % size:
                found.append(index)
        return sorted(found)

    @cached_property
    def distinct(self) -> int:
        """How many refcount blocks there are, however often the table names each."""
        if len(self._known) <= _FEW:
            return len({refcount_block_offset(self.table[index]) for index in self._known})
        from .wrong import distinct

        return distinct(self.table, REFCOUNT_BLOCK_MASK).size

    def block(self, index: int) -> bytes | None:
        """The bytes of a refcount block: zeroes where there is none; None if it cannot be read."""
        size = self._geometry.cluster_size
        offset = refcount_block_offset(self.table[index]) if index < len(self.table) else 0
        if not offset:
            return bytes(size)
        if not self.is_readable(index):
            return None
        return self._file.read_padded(offset, size)

    def is_readable(self, index: int) -> bool:
        """False if the entry of a refcount block cannot be an offset."""
        return index >= len(self.table) or self._geometry.may_start(
            refcount_block_offset(self.table[index]), self._geometry.cluster_size
        )

    def row(self, start: int, stop: int) -> tuple[memoryview, list[bool]]:
        """The bytes of the blocks from `start` up to `stop`, zeroes for those there are not; which can be read."""
        size = self._geometry.cluster_size
        table = self.table[start:stop]
        offsets = [refcount_block_offset(entry) for entry in table] + [0] * (stop - start - len(table))
        readable = [self.is_readable(index) for index in range(start, stop)]
        buffer = memoryview(bytearray(size * (stop - start)))
        nowhere = self._file.size
        places = (offset if offset and sound else nowhere for offset, sound in zip(offsets, readable, strict=True))
        self._file.read_pieces(((offset, size) for offset in places), buffer)
        return buffer, readable

    def counts(self, start: int, stop: int, clusters: int) -> tuple[Refcounts, Mask | None]:
        """The refcounts of the first clusters that the blocks from `start` up to `stop` count, so many, as arrays.

        And where they can be read, None if everywhere.
        """
        import numpy as np  # only those who use arrays get here

        from ..format.vectors import refcounts

        blocks, readable = self.row(start, stop)
        found = refcounts(blocks, self._geometry.refcount_order)[:clusters]
        if all(readable):
            return found, None
        return found, np.repeat(readable, self._geometry.refcounts_per_block)[:clusters]

    def get(self, cluster: int) -> int | None:
        """The refcount of a cluster; None if it cannot be read."""
        index, within = divmod(cluster, self._geometry.refcounts_per_block)
        block = self._kept_block(index)
        return None if block is None else get_refcount(block, within, self._geometry.refcount_order)

    def all_are(self, value: int, first: int, stop: int) -> bool:
        """True if the clusters from `first` up to `stop` all have this refcount; what cannot be read does."""
        order, per_block = self._geometry.refcount_order, self._geometry.refcounts_per_block
        for start, end, block in self.pieces(first, stop):
            begin, length = start % per_block, end - start
            if block is None:
                continue
            if order >= 3:
                width = 1 << order - 3
                if block[begin * width : (begin + length) * width] != value.to_bytes(width, "big") * length:
                    return False
            elif any(get_refcount(block, begin + at, order) != value for at in range(length)):
                return False
        return True

    def pieces(self, first: int, stop: int, *, every: bool = True) -> Iterator[tuple[int, int, bytes | None]]:
        """The clusters from `first` up to `stop`, cut where refcount blocks end, each piece with its block.

        Args:
            every: also where the refcount table names no block; there are as many pieces then as the range is long.
        """
        per_block = self._geometry.refcounts_per_block
        indices: Iterable[int] = range(first // per_block, -(-stop // per_block))
        if not every:
            indices = [index for index in self._known if index in indices]
        for index in indices:
            start, end = max(first, index * per_block), min(stop, (index + 1) * per_block)
            if start < end:
                yield start, end, self._kept_block(index)

    @cached_property
    def _known(self) -> Sequence[int]:
        return array("L", (index for index, entry in enumerate(self.table) if refcount_block_offset(entry)))

    def _kept_block(self, index: int) -> bytes | None:
        if index in self._kept:
            self._kept.move_to_end(index)
        else:
            self._kept[index] = self.block(index)
            if len(self._kept) > self._room:
                self._kept.popitem(last=False)
        return self._kept[index]


def block_rows(indices: Sequence[int], cluster_size: int) -> Iterator[tuple[int, int]]:
    """Refcount blocks in a row as (first, last + 1), as many together as are compared at once."""
    start, most = 0, max(1, _COMPARED // cluster_size)
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1 or place - start >= most:
            yield indices[start], indices[place - 1] + 1
            start = place
