"""A plan: everything a change would write, as a value.

Features compute plans and never write. The commit engine carries a plan out, a dry run prints it, the undo file
keeps what it replaces, the proof looks at which clusters it touches, and the tests take it apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTOR = 512
"""Bytes that reach a disk all or none, the unit of the crash model."""

Data = bytes | Callable[[], bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Write:
    """`length` bytes at `offset`.

    Attributes:
        data: the bytes, or how to make them when they are written: bulk data is never held for a whole plan.
        old: what is there now, checked before it is overwritten. None for a cluster that is free: its content means
            nothing.
    """

    offset: int
    length: int
    data: Data
    purpose: str
    old: bytes | None = None

    @classmethod
    def replace(cls, offset: int, old: bytes, new: bytes, purpose: str) -> Write:
        """Overwrite bytes of a structure that is in use."""
        return cls(offset, len(new), new, purpose, old)

    @classmethod
    def fresh(cls, offset: int, data: bytes, purpose: str) -> Write:
        """Fill clusters that are free."""
        return cls(offset, len(data), data, purpose)

    @property
    def end(self) -> int:
        """Offset after the last byte."""
        return self.offset + self.length

    def read(self) -> bytes | memoryview:
        """The bytes to write."""
        return self.data() if callable(self.data) else self.data


@dataclass(frozen=True, slots=True)
class Stage:
    """Writes that may reach the disk in any order; a barrier follows them.

    Attributes:
        journaled: part of a rewrite that one sector does not hold; the commit engine keeps a journal of these stages.
    """

    name: str
    writes: tuple[Write, ...]
    journaled: bool = False

    @property
    def fits_a_sector(self) -> bool:
        """True if the disk itself keeps the stage whole."""
        return fits_a_sector(self.writes)

    @property
    def is_atomic(self) -> bool:
        """True if after a crash all of its writes are seen or none, once the journal that there may be is settled."""
        return self.journaled or self.fits_a_sector


def fits_a_sector(writes: Iterable[Write]) -> bool:
    """True if one sector holds all the writes, so that the disk keeps them whole if they are made as one."""
    sectors = {sector for write in writes for sector in (write.offset // SECTOR, (write.end - 1) // SECTOR)}
    return len(sectors) <= 1


@dataclass(frozen=True, slots=True)
class Switch:
    """Stages that make a new state the valid one, `commit` being the index of the stage that does it."""

    stages: tuple[Stage, ...]
    commit: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """A range of the file whose bytes the undo file keeps although nothing overwrites them.

    Offset and length are in bytes of the file as it is before the plan; what lies past its end is not kept.

    Attributes:
        label: what it is, for whoever asked for it: the undo file only gives it back.
    """

    label: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DataFile:
    """An external data file whose length goes with a change. Sizes in bytes.

    Attributes:
        extend_to: its length while the change is made, at least `size_before`.
        cut_to: its length in the end, if nothing is to be undone.
        use_locks: lock it as the image is locked.
    """

    path: Path
    size_before: int
    extend_to: int
    cut_to: int
    use_locks: bool


@dataclass(frozen=True, slots=True)
class DiskSize:
    """The virtual size that a change gives a disk. Sizes in bytes.

    Attributes:
        not_zero: how many of the new bytes do not read as zeroes, or may not.
    """

    old: int
    new: int
    not_zero: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in order, and what the image is before and after.

    Attributes:
        commit_stage: index of the stage that makes the new state the valid one. Before it the old state is, so a
            failure rolls back.
        size_before: file length in bytes.
        size_after: the same once the plan is done.
        freed: numbers of the clusters that nothing uses any more then.
        summary: what the change does, a line per edit.
        kept: what the undo file keeps beside all that the plan overwrites.
        cut_to: length that the file is cut to when all is done, unless there is an undo file, which could not give the
            rest back.
        data_file: the external data file, where its length changes too.
        disk: the virtual size, where that changes.
        then: what to plan and carry out next, in a change of its own, unless there is an undo file. It never makes the
            file longer.
    """

    cluster_size: int
    size_before: int
    size_after: int
    stages: tuple[Stage, ...] = ()
    commit_stage: int = 0
    freed: Collection[int] = field(default_factory=frozenset)
    summary: tuple[str, ...] = ()
    kept: tuple[Kept, ...] = ()
    cut_to: int | None = None
    data_file: DataFile | None = None
    disk: DiskSize | None = None
    then: Callable[[Any], Plan] | None = None  # of the open image, which stands on plans: no import leads back

    def __bool__(self) -> bool:
        return bool(self.stages)

    def __str__(self) -> str:
        lines = list(self.summary) or ["nothing to do"]
        for number, stage in enumerate(self.stages, 1):
            mark = " (the new state becomes the valid one)" if number - 1 == self.commit_stage else ""
            lines.append(f"stage {number}: {stage.name}{mark}")
            lines += [f"  {write.offset:#014x} {write.length:>9}  {write.purpose}" for write in stage.writes]
        lines.append(f"{self.bytes_written} bytes written, the file grows by {self.growth} bytes")
        return "\n".join(lines)

    def writes(self) -> Iterator[Write]:
        """All writes, in order."""
        for stage in self.stages:
            yield from stage.writes

    @property
    def growth(self) -> int:
        """Bytes the file grows by."""
        return self.size_after - self.size_before

    @property
    def bytes_written(self) -> int:
        """Bytes all stages write together."""
        return sum(write.length for write in self.writes())

    @property
    def journaled(self) -> tuple[Stage, ...]:
        """The stages that a crash could tear, which is why they need a journal; nearly always none."""
        return tuple(stage for stage in self.stages if stage.journaled)
