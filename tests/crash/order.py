"""In which order things must reach the disk, as rules about what a command was recorded to do.

A power cut that comes at the wrong moment shows a missing flush only where what is lost then matters to somebody. These
rules hold whether it does or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qcow2bm.image.file import JOURNAL_SUFFIX
from qcow2bm.image.undo_layout import State
from tests.crash.disk import Folder, Op

_STATE = 16
"""Offset of the state in an undo file, 4 bytes, little-endian."""


@dataclass(frozen=True)
class History:
    """What was done to a folder in which an image lies.

    Attributes:
        before: the folder as it was then.
        image: number of the image's inode.
    """

    before: Folder
    ops: Sequence[Op]
    image: int

    def certain(self, file: int, number: int) -> bytes:
        """What is on the disk of a file for certain when operation `number` begins."""
        flushed = (at for at in reversed(range(number)) if self.ops[at].kind == "flush" and self.ops[at].file == file)
        return self.before.after(self.ops[: next(flushed, -1) + 1]).files.get(file, b"")

    def state(self, file: int, number: int) -> int:
        """State of an undo file, or of a journal, that is certain when operation `number` begins; 0 if it has none."""
        return int.from_bytes(self.certain(file, number)[_STATE : _STATE + 4], "little")

    def named(self, name: str, number: int) -> int:
        """The file that has a name when operation `number` begins."""
        return self.before.after(self.ops[:number]).names[name]

    def writes(self) -> list[int]:
        """Numbers of the operations that change the image."""
        return [at for at, op in enumerate(self.ops) if op.file == self.image and op.kind in ("write", "truncate")]

    def is_flushed(self, first: int, last: int) -> bool:
        """True if the image is flushed between two operations."""
        return any(op.kind == "flush" and op.file == self.image for op in self.ops[first:last])


def names_are_made_certain(seen: History) -> Iterator[str]:
    """Whatever name comes or goes, the folder is flushed before the command ends."""
    for at, op in enumerate(seen.ops):
        if op.kind in ("link", "unlink") and not any(later.kind == "flush folder" for later in seen.ops[at:]):
            yield f"{op.kind} {op.name} is not certain"


def a_journal_outlives_what_it_journals(seen: History) -> Iterator[str]:
    """Before its name goes all of the image is on the disk, and a file that stays says that it is none any more."""
    for at, op in enumerate(seen.ops):
        if op.kind != "unlink" or not op.name.endswith(JOURNAL_SUFFIX):
            continue
        before = [number for number in seen.writes() if number < at]
        if before and not seen.is_flushed(before[-1], at):
            yield "the journal goes before the image is flushed"
        file = seen.named(op.name, at)
        if file in seen.before.after(seen.ops).names.values() and seen.state(file, at) == State.IN_PROGRESS:
            yield "the second name goes while the undo file still says that it is in progress"


def it_is_noted_first(seen: History, undo: int) -> Iterator[str]:
    """Before the first byte of the image is written, an undo file says that something is in progress."""
    first = seen.writes()[0]
    if seen.state(undo, first) != State.IN_PROGRESS:
        yield "the image is written to before the undo file says so"


def stages_are_put_back_one_by_one(seen: History, stages: Sequence[tuple[range, int]]) -> Iterator[str]:
    """Last stage first, and each is on the disk before the one before it begins.

    Args:
        stages: ranges of the image in bytes, each with the number of the stage that changed it.
    """
    last, reached = 0, max(stage for _, stage in stages)
    for at in seen.writes():
        op = seen.ops[at]
        if op.kind == "truncate":
            found = {-1}
        else:
            found = {stage for place, stage in stages if place.start < op.end and op.offset < place.stop}
        if reached not in found:  # two stages may have changed the same place
            stage = max((stage for stage in found if stage < reached), default=None)
            if stage is None:
                yield f"a write of stage {found} comes after stage {reached}"
                return
            if not seen.is_flushed(last, at):
                yield f"stage {stage} begins before stage {reached} is flushed"
            reached = stage
        last = at
