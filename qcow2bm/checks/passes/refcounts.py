"""Refcount blocks, and the refcounts on disk against the references that were counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from heapq import merge

from ...format.entries import REFCOUNT_BLOCK_RESERVED, refcount_block_offset
from ..census import Overlap
from ..clusters import mismatch, overlap
from ..model import Finding, Location
from ..problems import found
from ..view import View

_KEPT_LEAKS = 1 << 16
"""Runs of leaked clusters, and of overcounted ones, that are kept for a closer look."""


def refcount_blocks(view: View) -> Iterator[Finding]:
    """The entries of the refcount table; counts the blocks they name."""
    geometry, census = view.geometry, view.census
    entries = [entry for entry in view.stored.table if entry]
    if all(geometry.is_aligned(entry) for entry in entries) and census.add_unshared(entries):
        return
    counted: dict[int, int] = {}
    blocks: list[int] = []
    for index, entry in enumerate(view.stored.table):
        if not entry:
            continue
        offset = refcount_block_offset(entry)
        where = Location("refcount table", view.header.refcount_table_offset + 8 * index, index)
        if entry & REFCOUNT_BLOCK_RESERVED:
            text = f"refcount table entry {index} ({entry:#x}) has reserved bits set"
            yield found("refcount-block-reserved", text, where, index=index)
        elif not geometry.is_aligned(offset):
            text = f"refcount block {index} at {offset:#x} is not cluster-aligned"
            yield found("refcount-block-unaligned", text, where, index=index, offset=offset)
        elif geometry.cluster_of(offset) >= census.clusters:
            text = f"refcount block {index} at {offset:#x} lies outside the file"
            yield found("refcount-block-outside", text, where, index=index, offset=offset)
        elif census.reaches_outside(offset, geometry.cluster_size):
            text = f"refcount block {index} at {offset:#x} ends outside the file"
            size = geometry.cluster_size
            yield found("refcount-block-outside", text, where, index=index, offset=offset, size=size)
        else:
            cluster = geometry.cluster_of(offset)
            counted[cluster] = counted.get(cluster) or census.references(cluster)
            counted[cluster] += 1
            blocks.append(cluster)
            references = min(counted[cluster], census.most)
            if references != 1:
                text = f"refcount block {index} at {offset:#x} is referred to {references} times"
                yield found("refcount-block-shared", text, where, index=index, refcount=references)
    census.count_each(blocks, 1)


def refcounts(view: View) -> Iterator[Finding]:
    """The comparison, cluster by cluster. Leaves `leaks`, `overcounted`, `undercounted` and the image's end."""
    census = view.census
    for cluster, references in census.overflows():
        offset = view.geometry.offset_of(cluster)
        text = f"the cluster at {offset:#x} has {references} references, a refcount holds {census.most}"
        yield found(
            "refcount-overflow", text, Location("cluster", offset), count=references - census.most, offset=offset
        )
    # In the order of clusters, as qemu-img goes.
    yield from merge(_unreadable(view), _compared(view), key=lambda finding: finding.values["first"])
    end = view.geometry.offset_of(census.highest + 1)
    view.allocation = replace(view.allocation, image_end_offset=end)


def _compared(view: View) -> Iterator[Finding]:
    for run in view.census.compare():
        if isinstance(run, Overlap):
            yield overlap(view, run)
        elif run.stored > run.references and not view.as_qemu:
            kept = view.overcounted if run.references else view.leaks
            if len(kept) < _KEPT_LEAKS:
                kept.append(run)
                continue
            view.leak_doubt = "there are too many to see what each of them holds"
            yield mismatch(view, run)
        else:
            view.undercounted += run.count
            yield mismatch(view, run)


def _unreadable(view: View) -> Iterator[Finding]:
    """Refcounts that cannot be read, a block at a time."""
    per_block = view.geometry.refcounts_per_block
    for index in view.stored.indices():
        first, stop = index * per_block, min((index + 1) * per_block, view.census.clusters)
        if first >= stop or view.stored.is_readable(index):
            continue
        offset = refcount_block_offset(view.stored.table[index])
        text = f"the refcounts of {stop - first} clusters cannot be read: their block {index} is at {offset:#x}"
        where = Location("refcount block", offset, index)
        yield found("refcount-unreadable", text, where, count=stop - first, first=first, index=index, offset=offset)
