"""Free clusters by the refcounts on disk, the lowest first, with a new refcount block where there is none.

Source: `qcow2_alloc_clusters`, `update_refcount`, `alloc_refcount_block`. A new block goes into the first free cluster
after those that were asked for, and then the search begins again.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterator
from itertools import count

from bitarray.util import intervals

from ...checks.stored import StoredRefcounts
from ...format.entries import refcount_block_offset, set_refcount, used_clusters
from .blocks import RefcountBlocks
from .model import Event, GivenUpError, Notice
from .node import Node


class _Again(Exception):  # noqa: N818 - no error: the search begins again
    """A refcount block was added."""


def allocate(node: Node, blocks: RefcountBlocks, length: int) -> Generator[Event, None, int]:
    """Take clusters for `length` bytes, all in one piece; returns their offset.

    Raises:
        GivenUpError: a refcount cannot be read, the refcount table is full, or a device is.
    """
    wanted, start = node.geometry.clusters(length), 0
    while True:
        first = yield from _find(node, start, wanted)
        if not node.has_room(node.geometry.offset_of(first + wanted)):
            raise GivenUpError(errno.ENOSPC)
        try:
            for cluster in range(first, first + wanted):
                yield from _require_block(node, blocks, cluster, first + wanted)
        except _Again:
            start = min(start, first)
            continue
        blocks.add(first, wanted, 1)
        return node.geometry.offset_of(first)


def free(node: Node, blocks: RefcountBlocks, offset: int, length: int) -> Iterator[Event]:
    """Lower the refcounts of the clusters of a range by one: all, or none if one of them is 0."""
    if not length:
        return
    geometry = node.geometry
    clusters = range(geometry.cluster_of(offset), geometry.cluster_of(offset + length - 1) + 1)
    stored = StoredRefcounts(node.view.image, node.table)
    if not all(stored.get(cluster) for cluster in clusters):
        yield Event(Notice.FREE_FAILED, values={"reason": errno.EINVAL})
        return
    blocks.add(clusters.start, len(clusters), -1)


def _find(node: Node, start: int, wanted: int) -> Generator[Event, None, int]:
    """The first of the lowest clusters from `start` on, `wanted` in a row, whose refcounts are 0."""
    geometry, stored = node.geometry, StoredRefcounts(node.view.image, node.table)
    begin = end = start
    for index in count(start // geometry.refcounts_per_block):
        block = stored.block(index)
        if block is None:
            offset = refcount_block_offset(node.table[index])
            yield from node.signal(Notice.CORRUPT_BLOCK, offset=offset, index=index)
            raise GivenUpError(errno.EIO)
        base = index * geometry.refcounts_per_block
        for is_used, first, stop in intervals(used_clusters(block, geometry.refcount_order)):
            if is_used or base + stop <= start:
                continue
            if base + first > end:
                begin = max(start, base + first)
            end = base + stop
            if end - begin >= wanted:
                return begin
    raise AssertionError("clusters have no end")


def _require_block(node: Node, blocks: RefcountBlocks, cluster: int, after: int) -> Iterator[Event]:
    """See to it that a cluster has a refcount block; raises _Again if it had none."""
    geometry = node.geometry
    index = cluster // geometry.refcounts_per_block
    if index < len(node.table) and refcount_block_offset(node.table[index]):
        return
    if index >= len(node.table):
        raise GivenUpError(errno.EFBIG)
    place = yield from _find(node, after, 1)
    block = bytearray(geometry.cluster_size)
    if place // geometry.refcounts_per_block == index:
        set_refcount(block, place % geometry.refcounts_per_block, geometry.refcount_order, 1)
    else:
        yield from _require_block(node, blocks, place, place + 1)
        blocks.add(place, 1, 1)
    node.fill(geometry.offset_of(place), block)
    node.add_block(index, geometry.offset_of(place))
    raise _Again
