"""The entries of a large refcount table, judged as a whole with numpy: as runs of entries that are the same."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator

import numpy as np

from ..format.vectors import Clusters, Words, clusters_at
from .bulk import BulkCensus
from .wrong import Mask, block_faults, words

SHARED = "refcount-block-shared"


class BlockRuns:
    """Runs of equal entries that are not zero.

    Attributes:
        values, firsts, lengths: the entry of each run, the index where it begins, and how many there are.
        wrong: how many entries of each run are wrong, by problem, which are the last ones of the run.
        references: of each run that can be followed, how often its block is referred to, up to its last entry.
        blocks: the clusters of the blocks that can be followed, each as often as an entry names it.
    """

    def __init__(self, table: array[int], census: BulkCensus, *, counted: bool = False) -> None:
        """Looks at a refcount table; `counted`: what these runs refer to has been counted already."""
        entries = words(table)
        starts = np.flatnonzero(np.diff(entries, prepend=~entries[:1]))
        lengths = np.diff(starts, append=entries.size)
        used = entries[starts] != 0
        self.firsts, self.lengths = starts[used], lengths[used]
        self.values: Words = entries[self.firsts]
        masks = block_faults(self.values, census.geometry, census.file_size)
        self.wrong = {code: np.where(mask, self.lengths, 0) for code, mask in masks.items()}
        self.references: Words = np.zeros(self.values.size, np.uint64)
        sound: Mask = ~np.logical_or.reduce([*masks.values()])
        clusters = clusters_at(self.values[sound], census.geometry)
        before = _before(clusters, self.lengths[sound], census, counted=counted)
        self.references[sound] = np.minimum(before + self.lengths[sound].view(np.uint64), np.uint64(census.most))
        self.wrong[SHARED] = np.zeros_like(self.lengths)
        if census.most > 1:
            self.wrong[SHARED][sound] = self.lengths[sound] - (before == 0)
        self.blocks: Clusters = np.repeat(clusters, self.lengths[sound])

    def entries(self, codes: Collection[str]) -> Iterator[tuple[int, int]]:
        """The entries with these problems, neighbours as one: index of the first, and how many."""
        wrong: Clusters = np.sum([self.wrong[code] for code in codes], axis=0)  # a run has one problem at most
        places = wrong.nonzero()[0]
        stops = self.firsts[places] + self.lengths[places]
        starts = stops - wrong[places]
        new = np.flatnonzero(np.append(True, starts[1:] != stops[:-1]))[: places.size]
        last = np.append(new[1:], places.size) - 1
        yield from zip(starts[new].tolist(), (stops[last] - starts[new]).tolist(), strict=True)


def _before(clusters: Clusters, lengths: Clusters, census: BulkCensus, *, counted: bool) -> Words:
    """How often the block of each run is referred to before the run."""
    order = np.argsort(clusters, kind="stable")
    ordered, times = clusters[order], lengths[order]
    new = np.flatnonzero(np.diff(ordered, prepend=-1))
    of_each = np.diff(new, append=ordered.size)
    sums = np.cumsum(times) - times  # of all runs before this one; less those of lower clusters
    sums -= np.repeat(sums[new], of_each)
    if counted:
        sums -= np.repeat(np.add.reduceat(times, new), of_each) if new.size else 0
    before: Words = np.empty(clusters.size, np.uint64)
    before[order] = (sums + census.references_of(ordered).view(np.int64)).view(np.uint64)
    return before
