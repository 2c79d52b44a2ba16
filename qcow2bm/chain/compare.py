"""Where two disks differ, exactly, at a granularity.

What is zero in both, or stored as the same bytes of one file, is never read. The rest is read in blocks and compared
by sectors. Of a granule that is known to differ no more is read, but for what threads have begun by then.

The mapping is walked in one thread, which cuts what must be read into batches. A few threads read, decompress and
compare them while the walk goes on, which halves the time even of plain data out of the page cache. A batch ends where
a cluster of any size does, so no compressed cluster is decompressed twice. What is in memory is a few batches, none of
them much longer than `BATCH` bytes or `BATCH_PAIRS` pairs, whatever lies where.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Self

import numpy as np

from ..bitmap.bits import BitVector
from ..bitmap.draft import require_granularity
from ..format.geometry import round_up
from ..format.vectors import Words
from ..image.plan import SECTOR
from .batches import Batch, batches, pairs
from .disk import Disk, read_into
from .layers import Extent
from .marks import Marks
from .tables import Mask

BLOCK = 512 << 10
"""Bytes that are read from each disk at once: two such buffers stay in a processor's cache."""

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
    zero_tail: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> BitVector:
    """The granules of `new` that differ from `old`; what lies past the end of `old` differs.

    Args:
        granularity: bytes, a power of two of at least 512.
        chunk_bytes: as `BitVector.chunk_bytes`: the cluster size of the image that the bits are for.
        zero_tail: as of `differing`.

    Raises:
        UsageError: the granularity is none.
        BitmapLimitError: as `Marks`.
        CorruptImageError: one of the disks cannot be read.
    """
    require_granularity(granularity)
    marks = Marks(new.size, granularity, chunk_bytes)
    with contextlib.closing(differing(old, new, granularity, zero_tail=zero_tail, progress=progress)) as runs:
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
    end = new.size if stop is None else min(stop, new.size)
    rows = pairs(old, new, start, end, zero_tail=zero_tail)
    tail = (
        None
        if zero_tail or end <= max(old.size, start)
        else (max(old.size, start) // granularity, -(-end // granularity))
    )
    with contextlib.closing(
        differing_pairs(old, new, rows, granularity, length=end - start, progress=progress)
    ) as runs:
        yield from _joined(chain(runs, [tail] if tail is not None else []))
    progress(end, new.size)


def differing_pairs(
    old: Disk,
    new: Disk,
    rows: Iterator[tuple[Extent, Extent]],
    granularity: int,
    *,
    length: int,
    progress: Progress = lambda _done, _total: None,
) -> Generator[Granules, None, None]:
    """Runs of granules in which pairs of extents of two disks differ, as they are found, by one set of threads.

    Neighbouring runs may touch, or name one granule twice.

    Args:
        rows: as `pairs` gives them, of one range or of several in order.
        length: bytes of all of them.
        progress: called with the offset up to which the rows are done, and the size of `new`.

    Raises as `compare`.
    """
    require_granularity(granularity)
    parallel = old.is_shareable and new.is_shareable
    with _Comparison(granularity, length, parallel=parallel) as comparison:
        for batch, runs in comparison.results(batches(rows)):
            yield from runs
            progress(batch.end, new.size)


def _joined(runs: Iterable[Granules]) -> Iterator[Granules]:
    """Runs that touch as one."""
    pending: Granules | None = None
    for first, last in runs:
        if pending is not None and first <= pending[1]:
            pending = pending[0], max(last, pending[1])
            continue
        if pending is not None:
            yield pending
        pending = first, last
    if pending is not None:
        yield pending


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

    def results(self, portions: Iterator[Batch]) -> Iterator[tuple[Batch, list[Granules]]]:
        """Each batch with the granules in which it differs, in order."""
        first = next(portions)
        second = next(portions, None) if self._threads > 1 else None
        waiting: deque[tuple[Batch, Future[list[Granules]]]] = deque()
        if second is not None:
            self._pool = ThreadPoolExecutor(self._threads)
            for batch in chain((first, second), portions):
                waiting.append((batch, self._pool.submit(self._batch, batch)))
                if len(waiting) > 2 * self._threads:
                    done, future = waiting.popleft()
                    yield done, future.result()
            yield from ((done, future.result()) for done, future in waiting)
            return
        for batch in chain((first,), portions):
            yield batch, self._batch(batch)

    def _batch(self, batch: Batch) -> list[Granules]:
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
