"""Two disks side by side, and what of them must be read to be compared, in portions that a thread can be given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from ..format.limits import MAX_CLUSTER_BITS
from .disk import Disk
from .layers import Extent, Kind

BATCH = 4 << 20
"""Bytes that a thread is given at once, about."""

BATCH_PAIRS = 4096
"""Pairs of extents that it is given at once, about; with those that it need not read."""

_LARGEST_CLUSTER = 1 << MAX_CLUSTER_BITS


def pairs(
    old: Disk, new: Disk, start: int = 0, stop: int | None = None, *, zero_tail: bool = False
) -> Iterator[tuple[Extent, Extent]]:
    """Both disks between two offsets as extents that begin and end together, as far as both go.

    Args:
        zero_tail: `old` goes on with zeroes.

    Raises:
        CorruptImageError: a mapping table cannot be read.
    """
    end = new.size if stop is None else min(stop, new.size)
    common = min(old.size, end)
    left: Iterator[Extent] = old.extents(start, common)
    if zero_tail and end > max(common, start):
        tail = max(common, start)
        left = chain(left, [Extent(tail, end - tail, Kind.ZERO)])
        common = end
    return _pairs(left, new.extents(start, common))


def _pairs(left: Iterator[Extent], right: Iterator[Extent]) -> Iterator[tuple[Extent, Extent]]:
    """Two rows of extents over one range, cut where either ends."""
    mine, theirs = next(left, None), next(right, None)
    while mine is not None and theirs is not None:
        if mine.offset == theirs.offset and mine.length == theirs.length:  # nearly always, and there may be millions
            yield mine, theirs
            mine, theirs = next(left, None), next(right, None)
            continue
        stop = min(mine.end, theirs.end)
        start = max(mine.offset, theirs.offset)
        yield mine.part(start, stop), theirs.part(start, stop)
        mine = next(left, None) if mine.end == stop else mine
        theirs = next(right, None) if theirs.end == stop else theirs


@dataclass(slots=True)
class Batch:
    """Pairs of extents that must be read to be compared, in order.

    Attributes:
        end: offset up to which the disks have been walked.
    """

    pairs: list[tuple[Extent, Extent]] = field(default_factory=list)
    length: int = 0
    walked: int = 0
    end: int = 0

    @property
    def is_full(self) -> bool:
        """True if it is time to hand it out, if only to tell how far the walk has come."""
        return self.length >= BATCH or self.walked >= BATCH_PAIRS

    def ends_before(self, offset: int) -> bool:
        """True if it is full, and a cluster of any size ends between what it has and an offset, or there."""
        return self.is_full and self.end // _LARGEST_CLUSTER != offset // _LARGEST_CLUSTER


def batches(rows: Iterator[tuple[Extent, Extent]]) -> Iterator[Batch]:
    """What must be read of the rows, in portions. One ends only where a cluster of any size would.

    Once it is full that is at the next multiple of the largest one, be it within a row, which may be long: so a
    portion is bounded, wherever rows begin and end.
    """
    batch = Batch()
    for left, right in rows:
        if batch.ends_before(left.offset):
            yield batch
            batch = Batch()
        batch.walked += 1
        if left.is_stored_as(right):
            is_past = batch.ends_before(right.end)
            batch.end = right.end
            if is_past:
                yield batch
                batch = Batch(end=right.end)
            continue
        at, end = left.offset, left.end
        while at < end:
            step = _LARGEST_CLUSTER if batch.is_full else BATCH
            stop = min(end, (at // step + 1) * step)
            is_whole = stop - at == left.length
            batch.pairs.append((left, right) if is_whole else (left.part(at, stop), right.part(at, stop)))
            batch.length += stop - at
            batch.end = at = stop
            if batch.is_full and at % _LARGEST_CLUSTER == 0:
                yield batch
                batch = Batch(end=at)
    yield batch
