"""How often each cluster is referred to, as runs, and where nothing refers to: what new refcounts are made of."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

from ...checks.census import Census, Mismatch
from ...checks.stored import StoredRefcounts
from ...checks.view import View
from .blocks import put_run


class References:
    """The references to all clusters, and clusters that are taken in addition, each of which counts one."""

    def __init__(self, view: View) -> None:
        """Take what the census of a view has counted."""
        self._geometry = view.geometry
        self._firsts, self._stops, self._counts = array("Q"), array("Q"), array("Q")
        for run in _counted(view, view.census):
            self._firsts.append(run.first)
            self._stops.append(run.first + run.count)
            self._counts.append(run.references)
        self._taken: list[int] = []

    def take(self, start: int, wanted: int) -> int:
        """The first of the lowest clusters from `start` on, `wanted` in a row, that are free; they are now taken."""
        begin = start
        for first, stop in self._in_use(start):
            if first >= begin + wanted:
                break
            begin = max(begin, stop)
        for cluster in range(begin, begin + wanted):
            insort(self._taken, cluster)
        return begin

    def _in_use(self, start: int) -> Iterator[tuple[int, int]]:
        """Runs (first, end) that are not free, in order, from those on that end after `start`."""
        run, taken = bisect_right(self._stops, start), bisect_left(self._taken, start)
        while run < len(self._firsts) or taken < len(self._taken):
            if taken == len(self._taken) or (run < len(self._firsts) and self._firsts[run] < self._taken[taken]):
                yield self._firsts[run], self._stops[run]
                run += 1
            else:
                yield self._taken[taken], self._taken[taken] + 1
                taken += 1

    def next_used(self, start: int, end: int) -> int | None:
        """The first cluster from `start` on and before `end` that is not free."""
        first, _ = next(self._in_use(start), (end, end))
        first = max(first, start)
        return first if first < end else None

    def block(self, index: int) -> bytearray:
        """A refcount block with the references as they are now."""
        geometry = self._geometry
        block, per_block = bytearray(geometry.cluster_size), geometry.refcounts_per_block
        base, end = index * per_block, (index + 1) * per_block
        run = bisect_right(self._stops, base)
        while run < len(self._firsts) and self._firsts[run] < end:
            first, stop = max(base, self._firsts[run]), min(end, self._stops[run])
            put_run(block, geometry.refcount_order, first - base, stop - first, self._counts[run])
            run += 1
        for cluster in self._taken[bisect_left(self._taken, base) : bisect_left(self._taken, end)]:
            put_run(block, geometry.refcount_order, cluster - base, 1, 1)
        return block


def _counted(view: View, census: Census) -> Iterator[Mismatch]:
    """All clusters with references, as the comparison with refcounts that are all 0 gives them."""
    stored, census.stored = census.stored, StoredRefcounts(view.image, array("Q"))
    try:
        for run in census.compare():
            if isinstance(run, Mismatch):
                yield run
    finally:
        census.stored = stored
