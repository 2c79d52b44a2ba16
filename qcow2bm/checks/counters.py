"""How often clusters are referred to, as arrays: near the front of the file a counter for each, far out a list.

Memory: two bytes for each near cluster that is touched, and eight for each reference to a far one. Which clusters are
near follows from how many tables the image has, so a sparse file that claims exabytes takes what its tables take.
"""

from __future__ import annotations

from array import array
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..format.vectors import Clusters, Words

_PIECE = 1 << 14
"""References that are counted by index at once: their number bounds what one cluster can gain."""

_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")

Array = npt.NDArray[np.unsignedinteger[Any]]


class Counters:
    """Counters of one use. They widen when a count outgrows them.

    Attributes:
        array: the counters of near clusters, None while all are 0.
        peak: no counter of a near cluster is above this.
    """

    def __init__(self, near: int) -> None:
        self._near = near
        self._far: list[tuple[int, Clusters]] = []
        self._far_runs = array("q")  # of each first, end and weight: there may be a million
        self._sorted: tuple[Clusters, Words] | None = None
        self._steps: tuple[Clusters, Clusters] | None = None
        self.array: Array | None = None
        self.peak = 0
        self._limit = np.iinfo(np.uint16).max

    def add_run(self, first: int, stop: int, weight: int) -> None:
        """Count the clusters from `first` up to `stop`."""
        if stop > self._near:
            self._far_runs.extend((max(first, self._near), stop, weight))
            self._steps = None
        if first < self._near:
            self._add_slice(first, min(stop, self._near), weight, weight)

    def add_counts(self, base: int, counts: Clusters, weight: int) -> None:
        """Count cluster `base + i` as often as `counts` says at i, times `weight`."""
        stop = base + counts.size
        if stop <= self._near:
            highest = int(counts.max(initial=0)) * weight
            self._add_slice(base, stop, counts if weight == 1 else counts * weight, highest)
        else:
            self.add_each(np.repeat(np.arange(base, stop, dtype=np.int64), counts), weight)

    def add_each(self, clusters: Clusters, weight: int, *, ascending: bool = False) -> None:
        """Count clusters, each as often as it comes; no oftener than once if they are `ascending`."""
        if clusters.size and int(clusters.max()) >= self._near:
            far = clusters >= self._near
            self._far.append((weight, clusters[far]))
            self._sorted = None
            clusters = clusters[~far]
        for start in range(0, clusters.size, _PIECE):
            piece = clusters[start : start + _PIECE]
            array = self._room(piece, weight * (1 if ascending else piece.size))
            if ascending:
                array[piece] += array.dtype.type(weight)
            else:
                np.add.at(array, piece, array.dtype.type(weight))

    def slice(self, first: int, stop: int) -> Array | None:
        """The counts of the clusters from `first` up to `stop`; None if all are 0."""
        if stop <= self._near:
            return None if self.array is None else self.array[first:stop]
        clusters, weights = self._far_sorted()
        begin, end = np.searchsorted(clusters, [first, stop])
        near = self.array is not None and first < self._near
        if begin == end and not near and not self._run_in(first, stop):
            return None
        counts = self._runs_at(np.arange(first, stop))
        if self.array is not None and near:
            counts[: self._near - first] = self.array[first:]
        np.add.at(counts, clusters[begin:end] - first, weights[begin:end])
        return counts if counts.any() else None

    def at(self, clusters: Clusters) -> Words:
        """The counts of these clusters."""
        counts = self._runs_at(clusters)
        near = clusters < self._near
        if self.array is not None:
            counts[near] = self.array[clusters[near]]
        if not near.all():
            far, weights = self._far_sorted()
            sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(weights, dtype=np.uint64)])
            begin, end = (np.searchsorted(far, clusters[~near], side) for side in _SIDES)
            counts[~near] += sums[end] - sums[begin]
        return counts

    def any_of(self, clusters: Clusters) -> bool:
        """True if any of these clusters is counted."""
        near, far = clusters[clusters < self._near], clusters[clusters >= self._near]
        if self.array is not None and self.array[near].any():
            return True
        if not far.size:
            return False
        return bool(self._runs_at(far).any()) or bool(np.isin(far, self._far_sorted()[0]).any())

    def far_blocks(self, per_block: int) -> Clusters:
        """Indices of the refcount blocks that count far clusters which are referred to; some may come twice."""
        blocks = self._far_sorted()[0] // per_block
        firsts, stops, _ = self._runs()
        firsts //= per_block
        lengths = (stops - 1) // per_block + 1 - firsts
        of_runs = np.repeat(firsts + lengths - np.cumsum(lengths), lengths) + np.arange(lengths.sum())
        return np.concatenate([blocks[np.diff(blocks, prepend=-1) != 0], of_runs])

    def tighten(self) -> None:
        """Make `peak` exact."""
        self.peak = int(self.array.max(initial=0)) if self.array is not None else 0

    def _far_sorted(self) -> tuple[Clusters, Words]:
        if self._sorted is None:
            clusters = np.concatenate([np.empty(0, np.int64), *(part for _, part in self._far)])
            weights = np.array([weight for weight, _ in self._far], np.uint64)
            if (weights == weights[:1]).all():  # as a rule, and there may be millions: in one array
                clusters.sort()
                self._far = [(int(weight), clusters) for weight in weights[:1]]
                self._sorted = clusters, np.broadcast_to(weights[:1], clusters.shape) if weights.size else weights
            else:
                weights = np.repeat(weights, [part.size for _, part in self._far])
                order = np.argsort(clusters, kind="stable")
                self._sorted = clusters[order], weights[order]
        return self._sorted

    def _runs_at(self, clusters: Clusters) -> Words:
        """How often the far runs count each of these clusters."""
        places, heights = self._far_steps()
        return heights[np.searchsorted(places, clusters, "right")].view(np.uint64)

    def _run_in(self, first: int, stop: int) -> bool:
        """True if a far run counts any cluster from `first` up to `stop`."""
        places, heights = self._far_steps()
        begin, end = np.searchsorted(places, [first, stop - 1], "right")
        return bool(heights[begin : end + 1].any())

    def _runs(self) -> Clusters:
        """The far runs: a row with where they begin, one with where they end, and one of their weights."""
        return np.array(self._far_runs).reshape(-1, 3).T

    def _far_steps(self) -> tuple[Clusters, Clusters]:
        """Where far runs begin or end, in order, and how many there are before the first, after it, and so on."""
        if self._steps is None:
            firsts, stops, weights = self._runs()
            places = np.concatenate([firsts, stops])
            order = np.argsort(places, kind="stable")
            heights = np.cumsum(np.concatenate([weights, -weights])[order])
            self._steps = places[order], np.concatenate([np.zeros(1, np.int64), heights])
        return self._steps

    def _add_slice(self, first: int, stop: int, counts: Clusters | int, highest: int) -> None:
        if self.peak + highest > self._limit:
            self.tighten()
            self._widen(self.peak + highest)
        self.peak += highest
        array = self._counters()
        np.add(array[first:stop], counts, out=array[first:stop], casting="unsafe")

    def _room(self, clusters: Clusters, gain: int) -> Array:
        """The counters, wide enough for these clusters to gain so much."""
        most = int(self._counters()[clusters].max()) + gain
        self.peak = max(self.peak, most)
        self._widen(most)
        return self._counters()

    def _counters(self) -> Array:
        if self.array is None:
            self.array = np.zeros(self._near, np.uint16)  # the kernel gives the pages when they are written to
        return self.array

    def _widen(self, most: int) -> None:
        if most > self._limit:
            wider = np.uint32 if most < 1 << 32 else np.uint64
            self.array = self._counters().astype(wider)
            self._limit = np.iinfo(wider).max
