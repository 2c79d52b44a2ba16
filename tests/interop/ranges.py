"""Dirty ranges as arithmetic: what set, unset and guest writes must make of them, worked out without any bits."""

from tests.support.qemu import Ranges


def mark(ranges: Ranges, offset: int, length: int, *, granularity: int, size: int) -> Ranges:
    """A range made dirty: every granule that it touches, none past the end of a disk of `size` bytes."""
    start = offset // granularity * granularity
    end = min(-(-(offset + length) // granularity) * granularity, size)
    return joined([*ranges, (start, end - start)])


def unmark(ranges: Ranges, offset: int, length: int, *, granularity: int, size: int) -> Ranges:
    """A range made clean: only granules wholly within it; the last one ends with the disk."""
    end = offset + length
    start = -(-offset // granularity) * granularity
    stop = size if end == size else end // granularity * granularity
    if stop <= start:
        return ranges
    kept = [(max(at, low), min(at + count, high)) for at, count in ranges for low, high in ((0, start), (stop, size))]
    return joined([(low, high - low) for low, high in kept if low < high])


def joined(ranges: Ranges) -> Ranges:
    """Ranges in order, those that touch or overlap made one."""
    result: Ranges = []
    for offset, length in sorted(ranges):
        if result and offset <= sum(result[-1]):
            start, known = result.pop()
            result.append((start, max(known, offset + length - start)))
        else:
            result.append((offset, length))
    return result


def covers(ranges: Ranges, offset: int, length: int) -> bool:
    """Whether one of the ranges, which do not touch each other, holds all of `offset`+`length`."""
    return any(at <= offset and offset + length <= at + count for at, count in ranges)
