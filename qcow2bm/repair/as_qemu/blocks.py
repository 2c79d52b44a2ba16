"""Refcounts as a repair sets them, run by run, in the blocks where they stand."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import compress, decompress

from ...format.entries import get_refcount, refcount_block_offset, set_refcount
from .model import Event, Notice
from .node import Node, Structure


def put_run(block: bytearray, order: int, first: int, count: int, value: int) -> None:
    """Make `count` refcounts of a refcount block, from index `first` on, all the same."""
    if order >= 3:
        width = 1 << order - 3
        block[first * width : (first + count) * width] = value.to_bytes(width, "big") * count
        return
    bits = 1 << order
    each, stop = 8 // bits, first + count
    low, high = min(stop, -(-first // each) * each), stop // each * each
    for index in (*range(first, low), *range(max(low, high), stop)):
        set_refcount(block, index, order, value)
    if high > low:
        pattern = sum(value << bits * place for place in range(each))
        block[low // each : high // each] = bytes([pattern]) * ((high - low) // each)


class RefcountBlocks:
    """The refcount blocks of an open image, written as they are left for another one.

    QEMU holds them in memory until the image is closed. A block that is part of something else it does not write then,
    and none at all once it would let nobody use the image any more. So what was there is kept, for `close` to put back.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._index = -1
        self._offset = 0
        self._block = bytearray()
        self._before: dict[int, bytes] = {}
        self._doomed: dict[int, Structure] = {}

    def set_run(self, first: int, count: int, value: int) -> None:
        """Set the refcounts of clusters whose blocks all are there."""
        per_block = self._node.geometry.refcounts_per_block
        while count:
            index, within = divmod(first, per_block)
            length = min(count, per_block - within)
            self._load(index)
            put_run(self._block, self._node.geometry.refcount_order, within, length, value)
            first, count = first + length, count - length

    def add(self, first: int, count: int, change: int) -> None:
        """Change the refcounts of clusters whose blocks all are there, each by the same number."""
        geometry = self._node.geometry
        for cluster in range(first, first + count):
            index, within = divmod(cluster, geometry.refcounts_per_block)
            self._load(index)
            old = get_refcount(self._block, within, geometry.refcount_order)
            set_refcount(self._block, within, geometry.refcount_order, old + change)
        self.settle()

    def _load(self, index: int) -> None:
        if index == self._index:
            return
        self.settle()
        node, size = self._node, self._node.geometry.cluster_size
        offset = refcount_block_offset(node.table[index])
        self._block = bytearray(node.file.read_padded(offset, size))
        self._index, self._offset = index, offset
        if offset not in self._before:
            self._before[offset] = compress(self._block, 1)
            structure = node.overlapped(offset, size, Structure.REFCOUNT_BLOCK)
            if structure is not None:
                self._doomed[offset] = structure

    def settle(self) -> None:
        """Write the block at hand."""
        if self._index >= 0:
            self._node.write(self._offset, self._block)
            self._index = -1

    @property
    def may_be_written(self) -> bool:
        """False if some block is part of something else."""
        return not self._doomed

    def close(self) -> Iterator[Event]:
        """Put back what is not to be overwritten."""
        self.settle()
        lost = sorted(self._before if self._node.dead else self._doomed)
        if not self._node.dead:
            for offset in lost[:1]:
                yield from self._node.signal(Notice.CORRUPT_OVERLAP, structure=self._doomed[offset].value)
        for offset in lost:
            self._node.file.write_at(offset, decompress(self._before[offset]))
        self._before.clear()
        self._doomed.clear()
