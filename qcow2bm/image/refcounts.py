"""The refcounts of an image as they are on disk."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import count

from bitarray.util import intervals

from ..errors import CorruptImageError
from ..format.entries import get_refcount, refcount_block_offset, table_entries, used_clusters
from .image import Qcow2Image

_FULL_BLOCKS = 1 << 16
"""Offsets of refcount blocks without a free cluster that a search remembers: many entries may name one block."""


class Refcounts:
    """The refcounts as they are on disk. Reads the refcount table once, and blocks when they are asked for."""

    def __init__(self, image: Qcow2Image) -> None:
        self._image = image
        self._table: array[int] | None = None
        self._blocks: dict[int, bytes] = {}

    @property
    def table(self) -> array[int]:
        """The refcount table's entries.

        Raises:
            TruncatedImageError: it lies outside the file.
        """
        if self._table is None:
            header, geometry = self._image.header, self._image.geometry
            length = header.refcount_table_clusters * geometry.cluster_size
            self._table = table_entries(self._image.file.read_at(header.refcount_table_offset, length))
        return self._table

    def block_offset(self, index: int) -> int:
        """Host offset of refcount block `index`, 0 if there is none.

        Raises:
            CorruptImageError: the refcount table entry is not aligned.
        """
        offset = refcount_block_offset(self.table[index]) if index < len(self.table) else 0
        if not self._image.geometry.is_aligned(offset):
            raise CorruptImageError(f"refcount table entry {index} is not cluster-aligned")
        return offset

    def read_block(self, index: int) -> bytes | None:
        """The bytes of refcount block `index`, or None if there is none; they are not kept.

        Raises:
            CorruptImageError: the refcount table entry is not aligned, or the block lies outside the file.
        """
        offset = self.block_offset(index)
        return self._image.file.read_at(offset, self._image.geometry.cluster_size) if offset else None

    def get(self, cluster: int) -> int:
        """The refcount of a cluster; 0 where there is no block."""
        index, within = divmod(cluster, self._image.geometry.refcounts_per_block)
        if index not in self._blocks:
            self._blocks[index] = self.read_block(index) or b""
        block = self._blocks[index]
        return get_refcount(block, within, self._image.header.refcount_order) if block else 0

    def free_runs(self) -> Iterator[tuple[int, int]]:
        """Runs (first cluster, clusters) whose refcount is 0, from the lowest on, without end.

        Each lies within the range of one refcount block.
        """
        per_block = self._image.geometry.refcounts_per_block
        full: set[int] = set()
        for index in count():
            offset = self.block_offset(index)
            if offset in full:
                continue
            runs = _zero_intervals(self.read_block(index), self._image.header.refcount_order, per_block)
            found = False
            for start, stop in runs:
                found = True
                yield index * per_block + start, stop - start
            if not found and len(full) < _FULL_BLOCKS:
                full.add(offset)


def _zero_intervals(block: bytes | None, order: int, count: int) -> Iterator[tuple[int, int]]:
    if block is None:
        yield 0, count
        return
    used = used_clusters(block, order)
    if not used.all():
        yield from ((start, stop) for value, start, stop in intervals(used) if not value)
