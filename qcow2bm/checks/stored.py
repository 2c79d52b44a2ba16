"""The refcounts as they are on disk, read as far as they make sense.

As QEMU reads them: what lies past the end of the file is zeroes, what has no block is 0, and a block whose entry is
not aligned cannot be read at all.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator

from ..format.entries import get_refcount, refcount_block_offset, table_entries
from ..format.limits import MAX_REFCOUNT_TABLE_BYTES
from ..image.image import Qcow2Image

_KEPT_BYTES = 4 << 20


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

    def indices(self) -> Iterator[int]:
        """The refcount blocks that the table names."""
        return (index for index, entry in enumerate(self.table) if refcount_block_offset(entry))

    def block(self, index: int) -> bytes | None:
        """The bytes of a refcount block: zeroes where there is none; None if it cannot be read."""
        size = self._geometry.cluster_size
        offset = refcount_block_offset(self.table[index]) if index < len(self.table) else 0
        if not offset:
            return bytes(size)
        if not self._geometry.may_start(offset, size):
            return None
        return self._file.read_padded(offset, size)

    def get(self, cluster: int) -> int | None:
        """The refcount of a cluster; None if it cannot be read."""
        index, within = divmod(cluster, self._geometry.refcounts_per_block)
        if index in self._kept:
            self._kept.move_to_end(index)
        else:
            self._kept[index] = self.block(index)
            if len(self._kept) > self._room:
                self._kept.popitem(last=False)
        block = self._kept[index]
        return None if block is None else get_refcount(block, within, self._geometry.refcount_order)
