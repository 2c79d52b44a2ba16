"""Where two disks differ, exactly, at a granularity.

What is zero in both, or stored as the same bytes of one file, is never read. The rest is read in blocks and compared
by sectors. Of a granule that is known to differ nothing more is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..bitmap.bits import BitVector
from ..errors import UsageError
from ..format.geometry import is_power_of_two, round_up
from ..image.plan import SECTOR
from .disk import Disk, read_into
from .layers import Extent
from .marks import Marks

BLOCK = 1 << 20
"""Bytes that are read from each disk at once."""

Progress = Callable[[int, int], None]
"""Called with bytes of the disk done and in all."""


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
    for first, stop in differing(old, new, granularity, progress=progress):
        marks.mark(first, stop)
    return marks.vector()


def differing(
    old: Disk, new: Disk, granularity: int, *, progress: Progress = lambda _done, _total: None
) -> Iterator[tuple[int, int]]:
    """The same as runs of granules (first, end), in order; runs that touch are one. Raises as `compare`."""
    if not is_power_of_two(granularity) or granularity < SECTOR:
        raise UsageError(f"granularity {granularity} is not a power of two from 512 bytes on")
    pending: tuple[int, int] | None = None
    for first, stop in _runs(old, new, granularity, progress):
        if pending is not None and first <= pending[1]:
            pending = pending[0], max(stop, pending[1])
            continue
        if pending is not None:
            yield pending
        pending = first, stop
    if pending is not None:
        yield pending


def _runs(old: Disk, new: Disk, granularity: int, progress: Progress) -> Iterator[tuple[int, int]]:
    common = min(old.size, new.size)
    blocks = _Blocks(granularity, lambda done: progress(done, new.size))
    for left, right in _pairs(old.extents(0, common), new.extents(0, common)):
        if not left.is_stored_as(right):
            yield from blocks.differing(left, right)
        progress(right.end, new.size)
    if new.size > common:
        yield common // granularity, -(-new.size // granularity)
        progress(new.size, new.size)


def _pairs(left: Iterator[Extent], right: Iterator[Extent]) -> Iterator[tuple[Extent, Extent]]:
    """Two rows of extents over one range, cut where either ends."""
    mine, theirs = next(left, None), next(right, None)
    while mine is not None and theirs is not None:
        stop = min(mine.end, theirs.end)
        start = max(mine.offset, theirs.offset)
        yield mine.part(start, stop), theirs.part(start, stop)
        mine = next(left, None) if mine.end == stop else mine
        theirs = next(right, None) if theirs.end == stop else theirs


class _Blocks:
    """Reads and compares; remembers the last granule that differs."""

    def __init__(self, granularity: int, done: Callable[[int], None]) -> None:
        self._granularity = granularity
        self._done = done
        self._known = -1
        self._left, self._right = bytearray(BLOCK), bytearray(BLOCK)

    def differing(self, left: Extent, right: Extent) -> Iterator[tuple[int, int]]:
        """Runs of granules in which two extents over one range differ."""
        at = left.offset
        while at < left.end:
            if at // self._granularity == self._known:
                at = (self._known + 1) * self._granularity
                continue
            stop = min(left.end, (at // BLOCK + 1) * BLOCK)
            for first, end in self._block(left, right, at, stop):
                self._known = end - 1
                yield first, end
            at = stop
            self._done(at)

    def _block(self, left: Extent, right: Extent, start: int, stop: int) -> Iterator[tuple[int, int]]:
        length = stop - start
        whole = round_up(length, SECTOR)
        for extent, buffer in ((left, self._left), (right, self._right)):
            view = memoryview(buffer)
            read_into(extent, start, view[:length])
            view[length:whole] = bytes(whole - length)
        unequal = (
            np.frombuffer(self._left, np.uint64)[: whole // 8] != np.frombuffer(self._right, np.uint64)[: whole // 8]
        )
        if not unequal.any():
            return
        sectors = np.flatnonzero(unequal.reshape(-1, SECTOR // 8).any(axis=1))
        granules = np.unique((sectors * SECTOR + start) // self._granularity)
        edges = np.flatnonzero(np.diff(granules) != 1) + 1
        for run in np.split(granules, edges):
            yield int(run[0]), int(run[-1]) + 1
