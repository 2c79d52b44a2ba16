"""Bitmaps as sets of bytes, combined whatever their granularities.

A bitmap says that some byte in a granule may have changed, and so stands for the set of all bytes of its dirty
granules, up to the end of the disk. An operation means what it means on these sets, folded from left to right, and its
result in a bitmap is the smallest set of that bitmap's granules that holds all of the exact one. So it never misses a
byte, and marks no granule in which there is none. docs/bitmap-algebra.md works out what follows from that.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

from ..format.geometry import Geometry, div_up
from .bits import BitVector
from .chunks import Op


class Grained(NamedTuple):
    """Bits, and the bytes of the disk that each stands for."""

    bits: BitVector
    granularity: int


def regrained(source: Grained, granularity: int, geometry: Geometry) -> BitVector:
    """The bits at another granularity, in the shape of a bitmap of an image: a dirty byte is always kept."""
    return source.bits.resampled(
        geometry.bitmap_bits(granularity),
        geometry.cluster_size,
        refine=max(1, source.granularity // granularity),
        coarsen=max(1, granularity // source.granularity),
    )


def combine(op: Op, target: Grained, sources: Sequence[Grained], geometry: Geometry) -> BitVector:
    """The sources folded into the target, at its granularity.

    Rounding each source to the target's granularity would do for `or` alone. A source that covers half of a granule
    takes nothing out of it, but two halves do; and half a granule exclusively or-ed with the whole one leaves the other
    half. So all are combined at the finest granularity, which says all of them exactly, and rounded out once.
    """
    work = min((target.granularity, *(source.granularity for source in sources)))
    if op is Op.OR:  # the same, and cheaper
        work = target.granularity
    bits = regrained(target, work, geometry).combined(op, *(regrained(source, work, geometry) for source in sources))
    return regrained(Grained(bits, work), target.granularity, geometry)


class Ranges:
    """Byte ranges (start, end) in order and apart, those that touch or overlap made one; 16 bytes for each."""

    def __init__(self) -> None:
        """None yet; see `of`."""
        self._starts, self._ends = array("Q"), array("Q")

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Self:
        """Take any ranges. There may be millions: those that come in order are never held otherwise."""
        found = cls()
        starts, ends = found._starts, found._ends
        in_order, last, reach = True, 0, -1
        for start, end in ranges:
            if start < last:
                in_order = False
            last = start
            if in_order and start <= reach:
                ends[-1] = reach = max(reach, end)
            else:
                starts.append(start)
                ends.append(end)
                reach = end
        return found if in_order else cls.of(sorted(found))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def total(self) -> int:
        """Bytes in all of them."""
        return sum(self._ends) - sum(self._starts)


def marking(ranges: Ranges, granularity: int, geometry: Geometry) -> BitVector:
    """Every bit that one of the byte ranges, all within the disk, touches."""
    touched = ((start // granularity, div_up(end, granularity)) for start, end in ranges)
    return BitVector.marked(geometry.bitmap_bits(granularity), geometry.cluster_size, joined(touched))


def covering(ranges: Ranges, granularity: int, geometry: Geometry) -> BitVector:
    """Every bit whose bytes all lie in the byte ranges; the last one's end with the disk."""
    last = geometry.bitmap_bits(granularity)
    whole = (
        (div_up(start, granularity), last if end == geometry.virtual_size else end // granularity)
        for start, end in ranges
    )
    return BitVector.marked(last, geometry.cluster_size, (run for run in whole if run[0] < run[1]))


def joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges (start, end), sorted by their start, with those that touch or overlap made one."""
    pending: tuple[int, int] | None = None
    for start, end in ranges:
        if pending is not None and start <= pending[1]:
            pending = pending[0], max(pending[1], end)
            continue
        if pending is not None:
            yield pending
        pending = start, end
    if pending is not None:
        yield pending
