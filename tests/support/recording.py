"""A stand-in for qcow2bm's file that writes down what is done with it, or lets it fail or lose power half-way."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from qcow2bm.image.file import ImageFile

SECTOR = 512


class PowerCutError(BaseException):
    """No error to be handled: from here on nothing reaches the disk."""


@dataclass(frozen=True)
class Event:
    """One thing done to a file."""

    kind: Literal["write", "barrier", "truncate"]
    offset: int = 0
    data: bytes = b""

    @property
    def end(self) -> int:
        return self.offset + len(self.data)

    def sectors(self) -> Iterator["Event"]:
        """The write as the disk sees it: a sector at a time."""
        at = self.offset
        while at < self.end:
            stop = min(self.end, (at // SECTOR + 1) * SECTOR)
            yield Event("write", at, self.data[at - self.offset : stop - self.offset])
            at = stop


@dataclass
class Tape:
    """What happened to the files opened through `open`.

    Attributes:
        fail_at: number of the write that fails, from 0; None for never.
        sticky: every later write fails too.
        partial: a failing write has written half of its sectors.
        power_cut: it fails by a power cut: later barriers and truncations are lost as well.
        journal: the journal beside the image when the last write was made that found one, or when power was cut.
        journaled: numbers of the epochs in which it was there.
        device: call the file a block device.
    """

    fail_at: int | None = None
    sticky: bool = False
    partial: bool = False
    power_cut: bool = False
    device: bool = False
    code: int = errno.EIO
    events: list[Event] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    journal: bytes | None = None
    journaled: set[int] = field(default_factory=set)
    writes: int = 0
    dead: bool = False

    def open(self, path: str | os.PathLike[str], *, writable: bool = False) -> ImageFile:
        """Open a file that records here: for `open_file=`."""
        file = _RecordingFile.open(path, writable=writable)
        file.tape = self
        if self.device:
            file.is_device = True
        return file

    @property
    def bytes_read(self) -> int:
        return sum(length for _, length in self.reads)

    @property
    def bytes_written(self) -> int:
        return sum(len(event.data) for event in self.events)

    def epochs(self) -> list[list[Event]]:
        """The writes between barriers; without the empty epoch after the last one."""
        epochs: list[list[Event]] = [[]]
        for event in self.events:
            if event.kind == "barrier":
                epochs.append([])
            else:
                epochs[-1].append(event)
        return epochs if epochs[-1] else epochs[:-1]


class _RecordingFile(ImageFile):
    tape: Tape

    def read_at(self, offset: int, length: int) -> bytes:
        self.tape.reads.append((offset, length))
        return super().read_at(offset, length)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        tape, number = self.tape, self.tape.writes
        tape.writes += 1
        if self.journal.exists():
            tape.journal = self.journal.read_bytes()
            tape.journaled.add(sum(event.kind == "barrier" for event in tape.events))
        self._require_power()
        if tape.fail_at is not None and (number == tape.fail_at or (tape.sticky and number > tape.fail_at)):
            if tape.partial:
                half = (offset + len(data) // 2) // SECTOR * SECTOR - offset
                super().write_at(offset, bytes(data)[: max(0, half)])
            if tape.power_cut:
                tape.dead = True
                tape.journal = self.journal.read_bytes() if self.journal.exists() else None
                raise PowerCutError
            raise OSError(tape.code, os.strerror(tape.code))
        tape.events.append(Event("write", offset, bytes(data)))
        super().write_at(offset, data)

    def barrier(self) -> None:
        self._require_power()
        self.tape.events.append(Event("barrier"))

    def truncate(self, size: int) -> None:
        self._require_power()
        self.tape.events.append(Event("truncate", size))
        super().truncate(size)

    def _require_power(self) -> None:
        if self.tape.dead:
            raise PowerCutError


# ---- what a crash leaves ----


def apply(data: bytes, events: list[Event]) -> bytes:
    """A file's bytes after writes."""
    image = bytearray(data)
    for event in events:
        image.extend(bytes(max(0, event.end - len(image))))
        image[event.offset : event.end] = event.data
    return bytes(image)


def crash_states(before: bytes, epochs: list[list[Event]], *, subsets_up_to: int = 5) -> Iterator[tuple[str, bytes]]:
    """What a disk may hold when power fails, each with a name: every barrier reached, and torn epochs.

    Of the sectors that an epoch changes any may have reached the disk. All subsets of up to `subsets_up_to` sectors;
    of more, each alone and all but one of them, at most 12 of either, and the half of them on either side.
    """
    for number, epoch in enumerate(epochs):
        yield f"epoch {number}", before
        changed = [sector for event in epoch for sector in event.sectors() if _changes(before, sector)]
        for name, chosen in _torn(changed, subsets_up_to):
            yield f"epoch {number}, {name}", apply(before, chosen)
        before = apply(before, epoch)
    yield "done", before


def _changes(data: bytes, sector: Event) -> bool:
    return data[sector.offset : sector.end] != sector.data


def _torn(sectors: list[Event], limit: int) -> Iterator[tuple[str, list[Event]]]:
    if len(sectors) <= limit:
        for size in range(1, len(sectors)):
            yield from (("sectors " + _names(some), list(some)) for some in combinations(sectors, size))
        return
    step = max(1, len(sectors) // 12)
    half = len(sectors) // 2
    yield "first half", sectors[:half]
    yield "second half", sectors[half:]
    for index in range(0, len(sectors), step):
        yield f"only {sectors[index].offset:#x}", [sectors[index]]
        yield f"all but {sectors[index].offset:#x}", sectors[:index] + sectors[index + 1 :]


def _names(sectors: tuple[Event, ...]) -> str:
    return " ".join(f"{sector.offset:#x}" for sector in sectors)
