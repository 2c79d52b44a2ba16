"""Clusters that somebody has allocated since a crash cut a change short, by the refcounts on the disk.

A change fills free clusters before it counts them. What a crash left in them may be torn, so their content does not
tell whose they are; but whoever else takes one counts it, or says by the dirty bit that he counts nothing.
"""

from __future__ import annotations

from ..format.entries import get_refcount, refcount_block_offset
from ..format.header import MAGIC, Incompatible
from ..format.limits import MAX_CLUSTER_BITS, MIN_CLUSTER_BITS
from .file import ImageFile

_MAX_ORDER = 6


class DiskRefcounts:
    """The refcounts of an image that a crash may have torn: what its header says of them is believed, nothing else.

    Attributes:
        cluster_size: in bytes.
        is_dirty: refcounts on the disk may be too low.
    """

    def __init__(self, image: ImageFile) -> None:
        self._image = image
        head = image.read_padded(0, 104)
        version = int.from_bytes(head[4:8], "big")
        bits, order = int.from_bytes(head[20:24], "big"), int.from_bytes(head[96:100], "big") if version >= 3 else 4
        self._table = int.from_bytes(head[48:56], "big")
        self._known = head[:4] == MAGIC and MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS and order <= _MAX_ORDER
        self.cluster_size, self._order = 1 << bits if self._known else 1 << MAX_CLUSTER_BITS, order
        self._entries = (int.from_bytes(head[56:60], "big") << bits) // 8 if self._known else 0
        features = int.from_bytes(head[72:80], "big") if version >= 3 else 0
        self.is_dirty = bool(features & Incompatible.DIRTY)

    def clusters(self, start: int, stop: int) -> range:
        """The clusters that a range of host offsets touches."""
        return range(start // self.cluster_size, -(-stop // self.cluster_size))

    def get(self, cluster: int) -> int:
        """A refcount; 0 where that cannot be told."""
        if not self._known:
            return 0
        index, within = divmod(cluster, 8 * self.cluster_size >> self._order)
        if index >= self._entries:
            return 0
        block = refcount_block_offset(int.from_bytes(self._image.read_padded(self._table + 8 * index, 8), "big"))
        if not block or block % self.cluster_size:
            return 0
        first = within << self._order >> 3  # the byte in which it begins
        data = self._image.read_padded(block + first, max(1, 1 << self._order >> 3))
        return get_refcount(data, within - (first << 3 >> self._order), self._order)
