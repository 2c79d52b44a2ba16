"""References that a change takes away by the million: counted per refcount block, and subtracted from it at the end.

What a change gives back otherwise has exactly one owner and is a set of cluster numbers. Guest clusters may be shared
with snapshots, and several compressed clusters lie in one, so here each reference that goes lowers a refcount by one.
That is sound where every refcount is at least the number of references, which whoever drops them has checked.

Memory: for each refcount block concerned one counter per refcount, as wide as that, at least a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..errors import RUN_CHECK, ProofError
from ..format.geometry import Geometry
from ..format.vectors import Clusters, pack_refcounts, refcounts

Counters = npt.NDArray[np.unsignedinteger]


class Lowering:
    """How many references each cluster loses."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._per_block = geometry.refcounts_per_block
        self._type = np.dtype(f"u{max(1, geometry.refcount_bits // 8)}")
        self._counts: dict[int, Counters] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def blocks(self) -> list[int]:
        """The refcount blocks concerned, in order."""
        return sorted(self._counts)

    def drop(self, first: Clusters, last: Clusters) -> None:
        """Take away a reference to every cluster from `first` to `last` of each element; none where last < first."""
        longest = int(np.max(last - first, initial=-1))
        for step in range(longest + 1):
            self._count(first[last - first >= step] + step)

    def drop_one(self, cluster: int) -> None:
        """Take away one reference."""
        self._count(np.array([cluster], np.int64))

    def _count(self, clusters: Clusters) -> None:
        index = clusters // self._per_block
        if index.size and int(index.min()) != int(index.max()):
            order = np.argsort(index, kind="stable")
            clusters, index = clusters[order], index[order]
        edges = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), index.size] if index.size else []
        for start, stop in pairwise(edges):
            block = int(index[start])
            if block not in self._counts:
                self._counts[block] = np.zeros(self._per_block, self._type)
            np.add.at(self._counts[block], clusters[start:stop] - block * self._per_block, 1)

    def dropped(self) -> int:
        """References taken away, of all clusters together."""
        return sum(int(counts.sum(dtype=np.uint64)) for counts in self._counts.values())

    def lowered(self, index: int, block: bytes) -> bytes:
        """What refcount block `index` is once the references are gone.

        Raises:
            ProofError: a refcount is below the references that go.
        """
        counts = self._counts.get(index)
        if counts is None:
            return block
        old = refcounts(block or bytes(self._geometry.cluster_size), self._geometry.refcount_order)
        if (counts > old).any():
            cluster = index * self._per_block + int(np.flatnonzero(counts > old)[0])
            raise ProofError(
                f"the cluster at {self._geometry.offset_of(cluster):#x} is used more often than its refcount says",
                hint=RUN_CHECK,
            )
        return pack_refcounts(old - counts, self._geometry.refcount_order)


def differing(old: bytes, new: bytes, gap: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of the bytes that differ; those less than `gap` apart are one."""
    places = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    if not places.size:
        return
    breaks = np.flatnonzero(np.diff(places) >= gap)
    starts = np.concatenate([places[:1], places[breaks + 1]])
    stops = np.concatenate([places[breaks], places[-1:]]) + 1
    yield from zip(starts.tolist(), stops.tolist(), strict=True)


def highest_used(block: bytes, order: int) -> int:
    """The index of the last refcount of a block that is not zero; -1 if all are."""
    used = np.flatnonzero(refcounts(block, order))
    return int(used[-1]) if used.size else -1
