"""Refcount blocks, and the refcounts on disk against the references that were counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from heapq import merge
from typing import NamedTuple

from ...format.entries import REFCOUNT_BLOCK_RESERVED, equal_entries, refcount_block_offset
from ..census import Overlap
from ..clusters import mismatch, overlap
from ..model import Finding, Location
from ..problems import found
from ..view import View

_LARGE = 1 << 10
"""Refcount blocks above which the table is judged as a whole."""
_KEPT_LEAKS = 1 << 16
"""Runs of leaked clusters, and of overcounted ones, that are kept for a closer look."""


def refcount_blocks(view: View) -> Iterator[Finding]:
    """The entries of the refcount table; counts the blocks they name."""
    geometry, census = view.geometry, view.census
    if view.telling.folds and len(view.stored.indices()) > _LARGE:
        yield from _in_bulk(view)
        return
    entries = [entry for entry in view.stored.table if entry]
    if all(geometry.is_aligned(entry) for entry in entries) and census.add_unshared(entries):
        return
    blocks: list[int] = []
    for run in _wrong(view, blocks):
        yield _of_table(view, run)
    census.count_each(blocks, 1)


class _Run(NamedTuple):
    """Equal entries of the refcount table in a row, wrong in the same way.

    Attributes:
        references: how often the block is referred to, up to the last of them.
    """

    code: str
    entry: int
    first: int
    length: int
    references: int


def _wrong(view: View, blocks: list[int]) -> Iterator[_Run]:
    """The entries of the refcount table that are wrong; the clusters that the others name go into `blocks`.

    Neighbours that are the same are one run, but not for QEMU: a table may have a million of them.
    """
    geometry, census = view.geometry, view.census
    counted: dict[int, int] = {}
    for entry, start, stop in equal_entries(view.stored.table):
        if not entry:
            continue
        code, before, sound, length = _fault(view, entry), 0, 0, stop - start
        if code is None:
            code, cluster = "refcount-block-shared", geometry.cluster_of(entry)
            before = counted.get(cluster) or census.references(cluster)
            counted[cluster] = before + length
            blocks += [cluster] * length
            sound = length if census.most == 1 else int(not before)
        step = 1 if view.as_qemu else length
        for first in range(start + sound, stop, step):
            end = min(first + step, stop)
            yield _Run(code, entry, first, end - first, min(before + end - start, census.most))


def _in_bulk(view: View) -> Iterator[Finding]:
    """The same of a large table, judged as a whole."""
    from ..blocks import BlockRuns

    runs = BlockRuns(view.stored.table, view.bulk)
    told: list[Finding] = []
    rest: list[Finding] = []
    for code, wrong in runs.wrong.items():
        places = wrong.nonzero()[0]
        taken = view.telling.take(code, places.size)
        for place in places[:taken].tolist():
            stop = int(runs.firsts[place]) + int(runs.lengths[place])
            length, references = int(wrong[place]), int(runs.references[place])
            told.append(_of_table(view, _Run(code, int(runs.values[place]), stop - length, length, references)))
        if taken < places.size:
            count, first = int(wrong[places[taken:]].sum()), int(runs.firsts[places[taken]])
            text = f"{count} more entries of the refcount table are like this, from entry {first} on"
            where = Location("refcount table", view.header.refcount_table_offset + 8 * first, first)
            rest.append(replace(found(code, text, where, count=count), folded=True))
    view.bulk.count_blocks(runs.blocks)
    yield from sorted(told, key=lambda finding: finding.values["index"])
    yield from rest


def _fault(view: View, entry: int) -> str | None:
    """What is wrong with an entry as such."""
    offset = refcount_block_offset(entry)
    if entry & REFCOUNT_BLOCK_RESERVED:
        return "refcount-block-reserved"
    if not view.geometry.is_aligned(offset):
        return "refcount-block-unaligned"
    return "refcount-block-outside" if view.census.reaches_outside(offset, view.geometry.cluster_size) else None


def _of_table(view: View, run: _Run) -> Finding:
    geometry, values = view.geometry, {"index": run.first, "entries": run.length}
    offset = refcount_block_offset(run.entry)
    block = f"refcount block {run.first} at {offset:#x}"
    match run.code:
        case "refcount-block-reserved":
            text = f"refcount table entry {run.first} ({run.entry:#x}) has reserved bits set"
        case "refcount-block-unaligned":
            text, values["offset"] = f"{block} is not cluster-aligned", offset
        case "refcount-block-outside" if geometry.cluster_of(offset) >= view.census.clusters:
            text, values["offset"] = f"{block} lies outside the file", offset
        case "refcount-block-outside":
            text = f"{block} ends outside the file"
            values |= {"offset": offset, "size": geometry.cluster_size}
        case _:
            text, values["refcount"] = f"{block} is referred to {run.references} times", run.references
    if run.length > 1:
        text += f", and the {run.length - 1} entries behind it are the same"
    where = Location("refcount table", view.header.refcount_table_offset + 8 * run.first, run.first)
    return replace(found(run.code, text, where, count=run.length), values=values)


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
    per_block, counts_any = view.geometry.refcounts_per_block, cache(partial(_counts_any, view))
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
            if not run.stored and len(view.uncounted) < _KEPT_LEAKS and counts_any(run.first // per_block):
                view.uncounted.append(run)
            yield mismatch(view, run)


def _counts_any(view: View, index: int) -> bool:
    """False for a refcount block that counts nothing at all: it is lost, and says nothing of any cluster."""
    block = view.stored.block(index)
    return block is not None and block.count(0) < len(block)


def _unreadable(view: View) -> Iterator[Finding]:
    """Refcounts that cannot be read, a block at a time."""
    per_block = view.geometry.refcounts_per_block
    for index in view.stored.indices():
        first, stop = index * per_block, min((index + 1) * per_block, view.census.clusters)
        if first >= stop:
            return
        if view.stored.is_readable(index):
            continue
        offset = refcount_block_offset(view.stored.table[index])
        text = f"the refcounts of {stop - first} clusters cannot be read: their block {index} is at {offset:#x}"
        where = Location("refcount block", offset, index)
        yield found("refcount-unreadable", text, where, count=stop - first, first=first, index=index, offset=offset)
