"""Ranges of a disk as a table or as CSV, one by one as they come: there may be millions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice

from .sizes import human_size

_ROWS = 1000
_SIZES = 4096

Row = tuple[int, int, bool]
"""Offset, length, and whether it is dirty."""


def rows(ranges: Iterable[tuple[int, int]], size: int, *, dirty_only: bool) -> Iterator[Row]:
    """Dirty ranges (offset, length), with the clean ones between them unless only dirty ones are wanted."""
    end = 0
    for offset, length in ranges:
        if offset > end and not dirty_only:
            yield end, offset - end, False
        yield offset, length, True
        end = offset + length
    if end < size and not dirty_only:
        yield end, size - end, False


def members(found: Iterable[Row]) -> Iterator[dict[str, object]]:
    """The rows of a JSON document."""
    return ({"offset": offset, "length": length, "dirty": dirty} for offset, length, dirty in found)


def print_csv(found: Iterable[Row]) -> None:
    """One row a line, below their names."""
    print("offset,length,dirty")
    _print_lines(f"{offset},{length},{'true' if dirty else 'false'}" for offset, length, dirty in found)


def print_rows(found: Iterable[Row], size: int) -> None:
    """A table, wide enough for a disk of `size` bytes."""
    digits = max(len(str(size)), len("OFFSET"))
    print(f"{'OFFSET':>{digits}}  {'LENGTH':>{digits}}  {'SIZE':>10}  DIRTY")

    @lru_cache(_SIZES)  # of a million rows most have one of a few lengths
    def told(length: int, dirty: bool) -> str:
        return f"{length:>{digits}}  {human_size(length):>10}  {'yes' if dirty else 'no'}"

    _print_lines(f"{offset:>{digits}}  {told(length, dirty)}" for offset, length, dirty in found)


def _print_lines(lines: Iterator[str]) -> None:
    """Some at once: line by line most of the time would be spent in printing."""
    while some := list(islice(lines, _ROWS)):
        print("\n".join(some))
