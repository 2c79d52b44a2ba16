"""Refcounts: damaged refcount structures are dropped, missing blocks made, and every count set to what is referred to.

A block or a table that breaks the format says nothing that the references do not say better. Its entry is cleared,
and where clusters then have no count a new block is put into a free cluster. Sound blocks stay where they are.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from ..checks.doubts import has_wrong_pointers
from ..checks.lost import Leaked
from ..checks.model import Finding, RepairClass
from ..checks.stored import StoredRefcounts
from ..checks.view import Root, View
from ..errors import NoSpaceError
from ..format.entries import l1_offset, refcount_block_offset, set_refcount, table_bytes
from ..format.geometry import Geometry, div_up, runs
from ..format.header import REFCOUNT_TABLE_FIELDS
from ..format.limits import MAX_REFCOUNT_TABLE_BYTES
from ..image.plan import SECTOR
from .model import Proposal, Scope, Step
from .workshop import Workshop

_BAD_TABLE = ("refcount-table-missing", "refcount-table-size", "refcount-table-offset", "refcount-table-outside")
_BAD_BLOCK = ("refcount-block-reserved", "refcount-block-unaligned", "refcount-block-outside", "refcount-block-shared")
_LEAKS = {
    "leak": (RepairClass.LOSSLESS, "give leaked clusters back"),
    "leak-lost-bitmap": (RepairClass.LOSSY, "give the clusters of lost bitmaps back"),
    "leak-lost-table": (RepairClass.GUESS, "give clusters back that look like a lost L2 table and its data"),
    "leak-unproven": (RepairClass.GUESS, "give clusters back that damage may have cut off"),
    "leak-doubtful": (RepairClass.GUESS, "give clusters back that may be no leaks"),
}


def structures(shop: Workshop) -> Iterator[Proposal]:
    """Drop refcount blocks and tables that break the format, and a table that something else uses too."""
    table, blocks = shop.found(*_BAD_TABLE), shop.found(*_BAD_BLOCK)
    codes: Counter[str] = Counter()
    for finding in (*table, *blocks, *shop.found("refcount-unreadable")):
        codes[finding.code] += finding.count
    if table or not _owns_table(shop):
        step = Step("start a new refcount table", RepairClass.LOSSLESS, Scope.REFCOUNTS, codes)
        yield step, partial(_Table(shop).replace, 0)
    elif blocks:
        count = sum(finding.count for finding in blocks)
        title = f"drop {count} damaged refcount blocks: the references say what they counted"
        yield Step(title, RepairClass.LOSSLESS, Scope.REFCOUNTS, codes), partial(_drop_blocks, shop, blocks)


def _owns_table(shop: Workshop) -> bool:
    header, size = shop.view.header, shop.view.geometry.cluster_size
    return all(
        shop.owns(header.refcount_table_offset + index * size) for index in range(header.refcount_table_clusters)
    )


def _drop_blocks(shop: Workshop, found: list[Finding]) -> None:
    start, geometry = shop.image.header.refcount_table_offset, shop.seen.geometry
    if any(finding.folded for finding in found):
        wrong = _all_wrong(shop, {finding.code for finding in found})
    else:
        wrong = iter(sorted({(finding.values["index"], finding.values["entries"]) for finding in found}))
    last = div_up(geometry.clusters(shop.file.base.size), geometry.refcounts_per_block)
    for first, entries in wrong:
        shop.write(start + 8 * first, bytes(8 * entries), f"refcount table: entry {first}")
        shop.uncounted.update(range(first, min(first + entries, last)))


def _all_wrong(shop: Workshop, codes: set[str]) -> Iterator[tuple[int, int]]:
    """The entries of the refcount table with these problems: index of the first of a run, and how many."""
    from ..checks.blocks import BlockRuns

    judged = BlockRuns(shop.seen.stored.table, shop.seen.bulk, counted=True)
    yield from judged.entries(codes)


def raised(shop: Workshop) -> Iterator[Proposal]:
    """Raise the counts that are too low."""
    found = shop.found("refcount-too-low")
    own, foreign = _told_apart(found, shop.taken)
    if own:
        step = Step("count the clusters that were filled", RepairClass.LOSSLESS, None)
        yield step, partial(_set, shop, own)
    if tables := _doubtful_tables(shop):
        # Counted, it would look as if the disk, or the snapshot, held what is there.
        doubtful, _ = _told_apart(found, tables)
        foreign = _told_apart(found, shop.taken | tables)[1]
        count = sum(run.clusters for run in doubtful)
        title = f"raise the refcounts of {count} clusters of what may be no L1 table"
        step = Step(title, RepairClass.GUESS, Scope.REFCOUNTS, {"refcount-too-low": count})
        yield step, partial(_set, shop, doubtful)
    if foreign:
        count = sum(run.clusters for run in foreign)
        title = f"raise the refcounts of {count} clusters to their references"
        step = Step(title, RepairClass.LOSSLESS, Scope.REFCOUNTS, {"refcount-too-low": count})
        yield step, partial(_set, shop, [*foreign, *_held(shop)])


def _doubtful_tables(shop: Workshop) -> set[int]:
    """Clusters of L1 tables that nobody counts, where the pointers to them may be wrong.

    An L1 table that names an L2 table which is counted is vouched for by that.
    """
    view = shop.seen
    if not has_wrong_pointers(view):
        return set()
    uncounted, geometry = Leaked(view.uncounted), view.geometry
    places: dict[tuple[int, int], Root] = {}
    for root in view.roots:
        if root.fault is None and (root.offset, root.entries) not in places and not _is_vouched_for(view, root):
            places[root.offset, root.entries] = root
    return {
        cluster
        for offset, entries in places
        for cluster in uncounted.within(geometry.cluster_of(offset), geometry.clusters(offset + 8 * entries))
    } - shop.taken


def _is_vouched_for(view: View, root: Root) -> bool:
    return any(view.stored.get(view.geometry.cluster_of(l1_offset(entry))) for entry in view.read_l1(root) if entry)


def _held(shop: Workshop) -> Iterator[_Run]:
    """Clusters that lost their count, have no reference and hold something.

    While part of the image cannot be followed they may be what it refers to: they stay counted.
    """
    if not shop.blind:
        return
    geometry, per_block = shop.seen.geometry, shop.seen.geometry.refcounts_per_block
    for index in sorted(shop.uncounted):
        for cluster in range(index * per_block, min((index + 1) * per_block, geometry.clusters(shop.file.base.size))):
            hole = shop.file.is_hole(geometry.offset_of(cluster), geometry.cluster_size)
            if not hole and cluster not in shop.taken and not shop.seen.census.references(cluster):
                yield _Run(cluster, 1, 1)


def lowered(shop: Workshop) -> Iterator[Proposal]:
    """Lower the counts that are too high: leaks."""
    for code in _LEAKS:
        kind, title = _LEAKS[_as_sure_as_ever(shop) if code == "leak" else code]
        found = shop.found(code)
        own, foreign = _told_apart([run for run in found if run.values["refcount"] == 1], shop.given_up)
        foreign += _told_apart([run for run in found if run.values["refcount"] != 1], set())[1]
        if own:
            step = Step("give back the clusters of what was taken out", RepairClass.LOSSLESS, None, {})
            yield step, partial(_set, shop, own)
        if foreign:
            count = sum(run.clusters for run in foreign)
            step = Step(f"{title} ({count})", kind, Scope.LEAKS, {code: count})
            if code == "leak-unproven":
                step.refused = "what may have cut them off is still there"
            # A plain leak is nobody's; of others the old state may be what refers to them, and an undo goes by that.
            yield step, partial(_set if code == "leak" else _give_back, shop, foreign)


def _give_back(shop: Workshop, wanted: list[_Run]) -> None:
    _set(shop, wanted)
    for run in wanted:
        if not run.target:
            shop.freed.update(range(run.first, run.first + run.clusters))


def _as_sure_as_ever(shop: Workshop) -> str:
    """What plain leaks are taken for.

    What could not be followed may have been given up meanwhile, and is no better known for that. Nor is a doubt gone
    that a step has made invisible.
    """
    if shop.blind:
        return "leak-unproven"
    return "leak-doubtful" if shop.doubtful else "leak"


class _Run(NamedTuple):
    """`clusters` clusters from `first` on that shall have the refcount `target`."""

    first: int
    clusters: int
    target: int


def _told_apart(found: list[Finding], chosen: set[int]) -> tuple[list[_Run], list[_Run]]:
    """The clusters of findings about refcounts: those among the chosen, and the others."""
    inside: list[_Run] = []
    outside: list[_Run] = []
    for finding in found:
        first, target = finding.values["first"], finding.values["references"]
        clusters = range(first, first + finding.count)
        few = sorted(cluster for cluster in chosen if cluster in clusters) if len(chosen) < finding.count else None
        mine = [cluster for cluster in clusters if cluster in chosen] if few is None else few
        inside += [_Run(start, count, target) for start, count in runs(mine)]
        at = first
        for start, count in (*runs(mine), (first + finding.count, 0)):
            if start > at:
                outside.append(_Run(at, start - at, target))
            at = start + count
    return inside, outside


def _set(shop: Workshop, wanted: list[_Run]) -> None:
    """Set refcounts, with new blocks where there are none, and a larger table if they need one."""
    table = _Table(shop)
    pending = deque(wanted)
    pieces: dict[int, list[_Run]] = defaultdict(list)
    while pending:
        for index, piece in _by_block(pending.popleft(), shop.seen.geometry):
            pieces[index].append(piece)
            if piece.target and not table.block(index):
                pending += table.add_block(index)
    for index, block_runs in sorted(pieces.items()):
        if table.block(index):
            _write_block(shop, table.block(index), index, block_runs)


def _by_block(run: _Run, geometry: Geometry) -> Iterator[tuple[int, _Run]]:
    per_block = geometry.refcounts_per_block
    at, stop = run.first, run.first + run.clusters
    while at < stop:
        index = at // per_block
        end = min(stop, (index + 1) * per_block)
        yield index, _Run(at, end - at, run.target)
        at = end


def _write_block(shop: Workshop, offset: int, index: int, wanted: list[_Run]) -> None:
    geometry = shop.seen.geometry
    order, per_block = geometry.refcount_order, geometry.refcounts_per_block
    old = shop.file.read_padded(offset, geometry.cluster_size)
    new = bytearray(old)
    for run in wanted:
        begin = run.first % per_block
        if order >= 3:
            width = 1 << order - 3
            new[begin * width : (begin + run.clusters) * width] = run.target.to_bytes(width, "big") * run.clusters
        else:
            for within in range(begin, begin + run.clusters):
                set_refcount(new, within, order, run.target)
    differing = [at for at in range(0, len(old), SECTOR) if old[at : at + SECTOR] != new[at : at + SECTOR]]
    for first, sectors in runs(at // SECTOR for at in differing):
        start, stop = first * SECTOR, (first + sectors) * SECTOR
        shop.write(offset + start, bytes(new[start:stop]), f"refcount block {index}")


class _Table:
    """The refcount table as it is now."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop
        self._geometry = shop.seen.geometry
        self._entries: list[int] | None = None
        self._offset = 0

    @property
    def _loaded(self) -> list[int]:
        if self._entries is None:
            self._offset = self._shop.image.header.refcount_table_offset
            self._entries = list(StoredRefcounts.read(self._shop.image).table)
        return self._entries

    def block(self, index: int) -> int:
        """Host offset of a refcount block, 0 if there is none."""
        return refcount_block_offset(self._loaded[index]) if index < len(self._loaded) else 0

    def add_block(self, index: int) -> list[_Run]:
        """Make a block; what has to be counted for it.

        Raises:
            NoSpaceError: no room for it, or the table would grow above QEMU's limit.
        """
        counted: list[_Run] = []
        if index >= len(self._loaded):
            counted += self.replace(index + 1)
        place = self._shop.put(bytes(self._geometry.cluster_size), f"new refcount block {index}")
        self._shop.write(self._offset + 8 * index, place.to_bytes(8, "big"), f"refcount table: entry {index}")
        self._loaded[index] = place
        counted.append(_Run(self._geometry.cluster_of(place), 1, 1))
        return counted

    def replace(self, entries: int) -> list[_Run]:
        """Start a new table, with the old one's entries if it has room for more than none; what has to be counted."""
        old = self._loaded if entries else []
        used = self._geometry.clusters(self._shop.file.size)
        # Half as much again, for the clusters that the table and its blocks take themselves, and for later.
        length = 8 * max(entries + entries // 2, div_up(used, self._geometry.refcounts_per_block) + 2)
        if length > MAX_REFCOUNT_TABLE_BYTES:
            raise NoSpaceError("the refcount table would grow above 8 MiB", hint="convert the image to larger clusters")
        clusters = self._geometry.clusters(length)
        self._entries = [*old, *[0] * (clusters * self._geometry.cluster_size // 8 - len(old))]
        if not old:
            self._shop.uncounted.update(range(div_up(used, self._geometry.refcounts_per_block)))
        else:
            first = self._geometry.cluster_of(self._offset)
            self._shop.given_up.update(range(first, first + len(old) * 8 // self._geometry.cluster_size))
        self._offset = self._shop.put(table_bytes(array("Q", self._entries)), "new refcount table")
        fields = self._offset.to_bytes(8, "big") + clusters.to_bytes(4, "big")
        self._shop.write(REFCOUNT_TABLE_FIELDS, fields, "header: the refcount table")
        return [_Run(self._geometry.cluster_of(self._offset), clusters, 1)]
