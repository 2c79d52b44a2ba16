"""The refcounts of an image that may be damaged, or torn by a crash: one by one, and nothing else of it is believed.

They tell whose a cluster is that a change found free and was to fill. What a crash left in it may be torn, so its
content does not tell; but a change fills clusters before it counts them, and whoever else takes one counts it, or says
by the dirty bit that he counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Qcow2bmError
from ..format.entries import get_refcount, refcount_block_offset
from ..format.faults import Weight
from ..format.header import Header, Incompatible
from ..format.limits import MAX_CLUSTER_BITS
from .file import ImageFile


class DiskRefcounts:
    """The refcounts as they are on the disk, by what the header says of them.

    Attributes:
        cluster_size: in bytes; the largest there is where the header cannot be read.
        is_dirty: refcounts on the disk may be too low.
    """

    def __init__(self, image: ImageFile) -> None:
        self._image = image
        self._header = _header(image)
        self.cluster_size = self._header.geometry.cluster_size if self._header else 1 << MAX_CLUSTER_BITS
        self._blocks = self._header.refcount_table_clusters * self.cluster_size // 8 if self._header else 0
        self.is_dirty = bool(self._header and self._header.incompatible_features & Incompatible.DIRTY)

    def clusters(self, start: int, stop: int) -> range:
        """The clusters that a range of host offsets touches."""
        return range(start // self.cluster_size, -(-stop // self.cluster_size))

    def get(self, cluster: int) -> int:
        """A refcount; 0 where that cannot be told."""
        header = self._header
        index, within = divmod(cluster, header.geometry.refcounts_per_block) if header else (0, 0)
        block = self._block(index)
        if header is None or not block:
            return 0
        first = within << header.refcount_order >> 3  # the byte in which it begins
        data = self._image.read_padded(block + first, max(1, 1 << header.refcount_order >> 3))
        return get_refcount(data, within - (first << 3 >> header.refcount_order), header.refcount_order)

    def counted(self, start: int, stop: int) -> Iterator[int]:
        """The clusters from `start` up to `stop` that have a refcount, in order. The range may be of any length."""
        header = self._header
        if header is None:
            return
        per_block, order = header.geometry.refcounts_per_block, header.refcount_order
        seen = {0}  # no block, and blocks that a damaged table may name any number of times
        for index in range(start // per_block, min(-(-stop // per_block), self._blocks)):
            block, first = self._block(index), index * per_block
            if block in seen or self._image.is_hole(block, self.cluster_size):
                continue
            seen.add(block)
            data = self._image.read_padded(block, self.cluster_size)
            for cluster in range(max(start, first), min(stop, first + per_block)):
                if get_refcount(data, cluster - first, order):
                    yield cluster

    def _block(self, index: int) -> int:
        """Offset of a refcount block; 0 if there is none, or none that can be."""
        header = self._header
        if header is None or index >= self._blocks:
            return 0
        entry = self._image.read_padded(header.refcount_table_offset + 8 * index, 8)
        block = refcount_block_offset(int.from_bytes(entry, "big"))
        return block if header.geometry.is_aligned(block) else 0


def _header(image: ImageFile) -> Header | None:
    """The header, if it has a geometry."""
    try:
        header = Header.parse(image.read_padded(0, 1 << MAX_CLUSTER_BITS))
    except Qcow2bmError:
        return None
    return None if any(fault.weight is Weight.FATAL for fault in header.faults()) else header
