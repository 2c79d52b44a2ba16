"""Putting back what the writes of a plan have replaced, as far as that can be done.

Only sectors that differ are written: on a full disk there is room for what is there already, and not for the holes
around it. What cannot be put back does not keep the rest from it, as long as that leaves a state that a power cut could
have left as well: within a stage any part may be missing, but a stage stands on those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .file import ImageFile
from .plan import SECTOR, Write

_BLOCK = 4096
"""Bytes that are compared at a time; where they differ, sector by sector."""

Replaced = tuple[Write, Callable[[], bytes]]
"""A write, and how to get what was there before it, as far as the file reached."""


@dataclass(slots=True)
class Outcome:
    """How far everything was put back.

    Attributes:
        error: the first one that was met; None if every byte is as it was.
        stuck: number of the stage where something that is in use could not be put back; those before it were left as
            they are. None if what is left is nothing that the old state refers to.
    """

    error: OSError | None = None
    stuck: int | None = None


def roll_back(file: ImageFile, stages: Sequence[Sequence[Replaced]], size: int) -> Outcome:
    """Put back what stages have replaced, newest first, and cut the file to `size`, its old length.

    The first stage comes last of all: it may have set the mark, by which a crash on the way is recognised.

    Raises:
        FlushError: nothing more may be written.
    """
    outcome = Outcome()
    for number in reversed(range(1, len(stages))):
        _put_stage_back(file, stages[number], number, outcome)
        if outcome.stuck is not None:
            return outcome
    error = _attempt(_cut, file, size)
    outcome.error = outcome.error or error
    if stages:
        _put_stage_back(file, stages[0], 0, outcome)
    return outcome


def _put_stage_back(file: ImageFile, stage: Sequence[Replaced], number: int, outcome: Outcome) -> None:
    for write, old in reversed(stage):
        error = _attempt(put_back, file, write.offset, old)
        outcome.error = outcome.error or error
        if error is not None and write.old is not None:
            outcome.stuck = number
    file.barrier()


def put_back(file: ImageFile, offset: int, old: Callable[[], bytes]) -> None:
    """Make the file hold again what it held at `offset`; an error is raised when all else has been put back."""
    before = old()
    now = file.read_padded(offset, len(before))
    failed: OSError | None = None
    for start, stop in _differing(now, before, offset):
        error = _attempt(file.write_at, offset + start, before[start:stop])
        failed = failed or error
    if failed is not None:
        raise failed


def _attempt(work: Callable[..., None], *arguments: object) -> OSError | None:
    try:
        work(*arguments)
    except OSError as error:
        return error
    return None


def _cut(file: ImageFile, size: int) -> None:
    if file.size > size:
        file.truncate(size)
        file.barrier()


def _differing(now: bytes, before: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """The sectors of the file that differ, neighbours as one range (start, stop); both contents lie at `offset`."""
    first = last = 0
    for start, stop in _parts(0, len(before), offset, _BLOCK):
        if now[start:stop] == before[start:stop]:
            continue
        for low, high in _parts(start, stop, offset, SECTOR):
            if now[low:high] == before[low:high]:
                continue
            if low != last:
                if first < last:
                    yield first, last
                first = low
            last = high
    if first < last:
        yield first, last


def _parts(start: int, stop: int, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """A range in parts that end where a block of the file ends, which need not be where the range begins."""
    while start < stop:
        end = min(stop, ((offset + start) // size + 1) * size - offset)
        yield start, end
        start = end
