"""Where two disks differ, exactly, at a granularity.

What is zero in both, or stored as the same bytes of one file, is never read. The rest is read in blocks and compared
by sectors. Of a granule that is known to differ no more is read, but for what threads have begun by then.

The mapping is walked in one thread, which cuts what must be read into batches. A few threads read, decompress and
compare them while the walk goes on, which halves the time even of plain data out of the page cache. A batch ends where
a cluster of any size does, so no compressed cluster is decompressed twice. What is in memory is a few batches.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Self

import numpy as np

from ..bitmap.bits import BitVector
from ..errors import UsageError
from ..format.geometry import is_power_of_two, round_up
from ..format.limits import MAX_CLUSTER_BITS
from ..format.vectors import Words
from ..image.plan import SECTOR
from .disk import Disk, read_into
from .layers import Extent, Kind
from .marks import Marks
from .tables import Mask

BLOCK = 512 << 10
"""Bytes that are read from each disk at once: two such buffers stay in a processor's cache."""

BATCH = 4 << 20
"""Bytes that a thread is given at once, about."""

_BATCH_PAIRS = 4096
_LARGEST_CLUSTER = 1 << MAX_CLUSTER_BITS
_MOST_THREADS = 4

Progress = Callable[[int, int], None]
"""Called with bytes of the disk done and in all."""

Granules = tuple[int, int]
"""A run of granules: the first, and the end."""


def compare(
    old: Disk,
    new: Disk,
    granularity: int,
    *,
    chunk_bytes: int = 1 << 16,
    progress: Progress = lambda _done, _total: None,
) -> BitVector:
    """The granules of `new` that differ from `old`; what lies past the end of `old` differs.

    Args:
        granularity: bytes, a power of two of at least 512.
        chunk_bytes: as `BitVector.chunk_bytes`: the cluster size of the image that the bits are for.

    Raises:
        UsageError: the granularity is none.
        BitmapLimitError: as `Marks`.
        CorruptImageError: one of the disks cannot be read.
    """
    marks = Marks(new.size, granularity, chunk_bytes)
    with contextlib.closing(differing(old, new, granularity, progress=progress)) as runs:
        for first, stop in runs:
            marks.mark(first, stop)
    return marks.vector()


def differing(
    old: Disk,
    new: Disk,
    granularity: int,
    *,
    start: int = 0,
    stop: int | None = None,
    zero_tail: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Generator[Granules, None, None]:
    """The same as runs of granules (first, end), in order; runs that touch are one. Raises as `compare`.

    Args:
        start: the first byte to look at, and `stop` the end, by default that of `new`; whole sectors.
        zero_tail: what lies past the end of `old` counts as zeroes there, and differs only where `new` has others.
    """
    if not is_power_of_two(granularity) or granularity < SECTOR:
        raise UsageError(f"granularity {granularity} is not a power of two from 512 bytes on")
    end = new.size if stop is None else min(stop, new.size)
    pending: Granules | None = None
    with contextlib.closing(_runs(old, new, granularity, (start, end, zero_tail), progress)) as runs:
        for first, last in runs:
            if pending is not None and first <= pending[1]:
                pending = pending[0], max(last, pending[1])
                continue
            if pending is not None:
                yield pending
            pending = first, last
    if pending is not None:
        yield pending


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


def _runs(
    old: Disk, new: Disk, granularity: int, what: tuple[int, int, bool], progress: Progress
) -> Generator[Granules, None, None]:
    """Runs of granules as they are found; neighbours may touch, or name one granule twice."""
    start, end, zero_tail = what
    parallel = old.is_shareable and new.is_shareable
    with _Comparison(granularity, end - start, parallel=parallel) as comparison:
        for batch, runs in comparison.results(_batches(pairs(old, new, start, end, zero_tail=zero_tail))):
            yield from runs
            progress(batch.end, new.size)
    if not zero_tail and end > max(old.size, start):
        yield max(old.size, start) // granularity, -(-end // granularity)
    progress(end, new.size)


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


# What a thread is given


@dataclass(slots=True)
class _Batch:
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
        return self.length >= BATCH or self.walked >= _BATCH_PAIRS


def _batches(rows: Iterator[tuple[Extent, Extent]]) -> Iterator[_Batch]:
    """What must be read of the rows, in portions. One ends only where a cluster of any size would."""
    batch = _Batch()
    for left, right in rows:
        if batch.is_full and batch.end // _LARGEST_CLUSTER != left.offset // _LARGEST_CLUSTER:
            yield batch
            batch = _Batch()
        batch.walked += 1
        if left.is_stored_as(right):
            batch.end = right.end
            continue
        at, end = left.offset, left.end
        while at < end:
            stop = min(end, (at // BATCH + 1) * BATCH)
            is_whole = stop - at == left.length
            batch.pairs.append((left, right) if is_whole else (left.part(at, stop), right.part(at, stop)))
            batch.length += stop - at
            batch.end = at = stop
            if batch.is_full and at % _LARGEST_CLUSTER == 0:
                yield batch
                batch = _Batch(end=at)
    yield batch


class _Comparison:
    """Compares batches, in threads where that is possible and there is more than one.

    Args:
        length: bytes of the disk that are compared: for a few a small buffer will do.
    """

    def __init__(self, granularity: int, length: int, *, parallel: bool) -> None:
        self._granularity = granularity
        self._threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS) if parallel else 1
        self._pool: ThreadPoolExecutor | None = None
        self._room = min(BLOCK, round_up(max(length, 0), SECTOR) + SECTOR)
        self._known = -1
        self._own = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def results(self, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, list[Granules]]]:
        """Each batch with the granules in which it differs, in order."""
        first = next(batches)
        second = next(batches, None) if self._threads > 1 else None
        waiting: deque[tuple[_Batch, Future[list[Granules]]]] = deque()
        if second is not None:
            self._pool = ThreadPoolExecutor(self._threads)
            for batch in chain((first, second), batches):
                waiting.append((batch, self._pool.submit(self._batch, batch)))
                if len(waiting) > 2 * self._threads:
                    done, future = waiting.popleft()
                    yield done, future.result()
            yield from ((done, future.result()) for done, future in waiting)
            return
        for batch in chain((first,), batches):
            yield batch, self._batch(batch)

    def _batch(self, batch: _Batch) -> list[Granules]:
        return [run for left, right in batch.pairs for run in self._pair(left, right)]

    def _pair(self, left: Extent, right: Extent) -> Iterator[Granules]:
        """Runs of granules in which two extents over one range differ."""
        at = left.offset
        while at < left.end:
            # A granule may reach over many batches, and another thread may know of it.
            known = self._known
            if at // self._granularity == known:
                at = (known + 1) * self._granularity
                continue
            stop = min(left.end, (at // BLOCK + 1) * BLOCK)
            for first, end in self._block(left, right, at, stop):
                self._known = end - 1
                yield first, end
            at = stop

    def _block(self, left: Extent, right: Extent, start: int, stop: int) -> Iterator[Granules]:
        mine, theirs = self._words(left, start, stop, 0), self._words(right, start, stop, 1)
        if mine is None or theirs is None:
            words = mine if mine is not None else theirs
            assert words is not None, "two ranges of zeroes are stored alike"
            unequal: Mask = words != 0
        elif stop - start == self._room and operator.eq(*self._buffers()):
            return  # the common case, by memcmp: three times as fast as numpy
        else:
            unequal = mine != theirs
        if not unequal.any():
            return
        sectors = np.flatnonzero(unequal.reshape(-1, SECTOR // 8).any(axis=1))
        granules = np.unique((sectors + start // SECTOR) // (self._granularity // SECTOR))
        edges = np.flatnonzero(np.diff(granules) != 1) + 1
        for run in np.split(granules, edges):
            yield int(run[0]), int(run[-1]) + 1

    def _words(self, extent: Extent, start: int, stop: int, side: int) -> Words | None:
        """The sectors that hold a range of an extent, zeroes around it; None for zeroes alone."""
        if extent.store is None:
            return None
        buffer = self._buffers()[side]
        lead = start % SECTOR  # a disk may end within a sector
        end = lead + stop - start
        whole = round_up(end, SECTOR)
        view = memoryview(buffer)
        if whole != stop - start:
            view[:lead], view[end:whole] = bytes(lead), bytes(whole - end)
        read_into(extent, start, view[lead:end])
        words: Words = np.frombuffer(buffer, np.uint64)[: whole // 8]
        return words

    def _buffers(self) -> tuple[bytearray, bytearray]:
        """Those of this thread, one for each disk."""
        found: tuple[bytearray, bytearray] | None = getattr(self._own, "buffers", None)
        if found is None:
            found = self._own.buffers = bytearray(self._room), bytearray(self._room)
        return found
