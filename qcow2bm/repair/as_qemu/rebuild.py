"""New refcount structures from the references alone, in the places where QEMU puts them.

Source: `rebuild_refcount_structure`. For each range of clusters with references a block goes into the lowest free
cluster from the range's beginning on; then the refcount table goes into the lowest free clusters of all, and the blocks
that count these are written again. What the old structures took becomes a leak.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator

from ...checks.view import View
from ...format.entries import table_bytes
from ...format.geometry import round_up
from .model import Event, GivenUpError, Notice
from .node import Node
from .references import References


class Rebuilding:
    """One rebuild.

    Attributes:
        clusters: how many clusters the image has, those included that new structures take past its end.
    """

    def __init__(self, node: Node, view: View) -> None:
        self._node = node
        self._geometry = node.geometry
        self._references = References(view)
        self._table = array("Q")
        self.clusters = view.census.clusters

    def run(self) -> Iterator[Event]:
        """Make the structures, and point the header to them.

        Raises:
            GivenUpError: something would be overwritten, or a device is full.
        """
        yield from self._write_blocks(0, self.clusters)
        while True:
            entries = len(self._table)
            length = 8 * entries
            first = self._take(0, self._geometry.clusters(length))
            yield from self._write_blocks(first, first + self._geometry.clusters(length))
            if len(self._table) == entries:
                break
        offset = self._geometry.offset_of(first)
        yield from self._require_place(offset, length, "reftable")
        self._node.fill(offset, table_bytes(array("Q", self._table)))
        self._node.set_refcount_table(offset, self._table)

    def _take(self, start: int, wanted: int) -> int:
        first = self._references.take(start, wanted)
        self.clusters = max(self.clusters, first + wanted)
        return first

    def _write_blocks(self, first: int, end: int) -> Iterator[Event]:
        """Write the blocks that count the clusters in use from `first` up to `end`; more if a new block lies after."""
        geometry, per_block, lowest = self._geometry, self._geometry.refcounts_per_block, 0
        while (cluster := self._references.next_used(first, end)) is not None:
            index = cluster // per_block
            offset = self._table[index] if index < len(self._table) else 0
            if not offset:
                lowest = self._take(max(lowest, index * per_block), 1)
                end = max(end, lowest + 1)
                offset = self._enter(index, lowest)
            yield from self._require_place(offset, geometry.cluster_size, "refblock")
            self._node.fill(offset, self._references.block(index))
            first = (index + 1) * per_block

    def _enter(self, index: int, cluster: int) -> int:
        """Enter a new block into the table, which grows by whole clusters; returns its offset."""
        if index >= len(self._table):
            entries = round_up(8 * (index + 1), self._geometry.cluster_size) // 8
            self._table.extend([0] * (entries - len(self._table)))
        self._table[index] = self._geometry.offset_of(cluster)
        return self._table[index]

    def _require_place(self, offset: int, length: int, what: str) -> Iterator[Event]:
        """Give up if something else lies where a structure is to go, or nothing can lie there."""
        reason = 0 if self._node.has_room(offset + length) else errno.ENOSPC
        structure = self._node.overlapped(offset, length)
        if structure is not None:
            yield from self._node.signal(Notice.CORRUPT_OVERLAP, structure=structure.value)
            reason = errno.EIO
        if reason:
            yield Event(Notice.REBUILD_FAILED, values={"what": what, "reason": reason})
            raise GivenUpError(reason)
