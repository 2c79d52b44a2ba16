"""The commit engine: carries a plan out so that at every moment the old or the new state is valid on disk.

Each stage's writes are followed by a barrier. Up to the stage that commits, a failure puts everything back; after
it, what is left undone is a leak and nothing worse. A failed flush is different: what reached the disk is unknown,
so nothing more is written.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import (
    RUN_CHECK,
    FlushError,
    ImageIOError,
    NoSpaceError,
    Qcow2bmError,
    UndoError,
    UnsupportedImageError,
    from_os_error,
    naming,
)
from .image import Qcow2Image
from .plan import Plan, Stage, Write

if TYPE_CHECKING:
    from .undo import UndoWriter

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes to write."""


def commit(image: Qcow2Image, plan: Plan, *, undo: Path | None = None, progress: Progress | None = None) -> None:
    """Carry out a plan on an image opened for writing.

    Args:
        undo: keep what is replaced in this file, which must not exist yet.

    Raises:
        NoSpaceError: the file system has not the room; nothing was written, or everything was put back.
        UnsupportedImageError: the image has changed since the plan was made.
        UndoError: the undo file cannot be written; nothing was changed.
        ImageIOError: a write failed and everything was put back, or a flush failed and the state is unknown.
    """
    with naming(image.file.path):
        _require_as_planned(image, plan)
        _require_space(image, plan)
        undo_file, journal = _open_undo(image, plan, undo)
        engine = _Engine(image, plan, progress)
        try:
            engine.run()
        except BaseException:
            # A journal that stays would put back a change that is done.
            if journal is not None and (engine.rolled_back or engine.committed):
                journal.discard()
            if undo_file is not None and engine.rolled_back:
                undo_file.discard()
            raise
        if journal is not None:
            journal.discard()
        if undo_file is not None:
            undo_file.complete(image.file)
        image.reload()


def _require_as_planned(image: Qcow2Image, plan: Plan) -> None:
    if image.file.size != plan.size_before:
        raise UnsupportedImageError("the image has changed since the change was planned")


def _require_space(image: Qcow2Image, plan: Plan) -> None:
    free = image.file.free_space()
    if free is not None and plan.growth > free:
        raise NoSpaceError(
            f"the change needs {plan.growth} bytes more and the file system has {free}", hint="nothing was changed"
        )


def _open_undo(image: Qcow2Image, plan: Plan, undo: Path | None) -> tuple[UndoWriter | None, UndoWriter | None]:
    """The user's undo file, and the journal beside the image, where whoever opens it next looks for one."""
    needs_journal = plan.needs_journal
    if needs_journal and image.file.is_device:
        if undo is None:
            raise UndoError("this change needs a journal", hint="name a file for it on another disk with --undo")
        needs_journal = False
    if undo is None and not needs_journal:
        return None, None
    from .undo import UndoWriter  # rarely needed, and its structures take time to declare

    undo_file = UndoWriter.create(undo, image.file, plan) if undo is not None else None
    try:
        journal = UndoWriter.create(image.file.journal, image.file, plan) if needs_journal else None
    except BaseException:
        if undo_file is not None:
            undo_file.discard()
        raise
    return undo_file, journal


class _Engine:
    """One run of a plan."""

    def __init__(self, image: Qcow2Image, plan: Plan, progress: Progress | None) -> None:
        self._file = image.file
        self._plan = plan
        self._progress = progress
        self._total = plan.bytes_written
        self._done: list[list[Write]] = []
        self._written = 0
        self.rolled_back = False
        self.committed = False

    def run(self) -> None:
        for number, stage in enumerate(self._plan.stages):
            self._done.append([])
            try:
                self._write(stage)
                self._file.barrier()
            except FlushError:
                raise
            except BaseException as error:  # also a signal: whatever stops us, the old state is put back
                if number <= self._plan.commit_stage:
                    self._roll_back()
                if isinstance(error, OSError):
                    raise self._explain(error, number) from error
                raise
            self.committed = self.committed or number == self._plan.commit_stage

    def _write(self, stage: Stage) -> None:
        for write in stage.writes:
            if write.old is not None and self._file.read_at(write.offset, write.length) != write.old:
                raise UnsupportedImageError(f"the image has changed at {write.offset:#x} since the change was planned")
            # Noted first: a write that fails may have written some of it.
            self._done[-1].append(write)
            self._file.write_at(write.offset, write.read())
            self._written += write.length
            if self._progress is not None:
                self._progress(self._written, self._total)

    def _roll_back(self) -> None:
        """Put back what is in use, newest first, and cut the file to its old length. Free clusters need nothing."""
        try:
            for writes in reversed(self._done):
                for write in reversed(writes):
                    if write.old is not None:
                        self._file.write_at(write.offset, write.old)
                self._file.barrier()
            if self._file.size > self._plan.size_before:
                self._file.truncate(self._plan.size_before)
                self._file.barrier()
        except OSError as error:
            cause = from_os_error(error)
            raise ImageIOError(
                f"writing failed, and so did putting back what was written ({cause.message})",
                hint=f"the bitmaps are the old ones, clusters may be leaked; {RUN_CHECK}",
            ) from error
        self.rolled_back = True

    def _explain(self, error: OSError, number: int) -> Qcow2bmError:
        cause = from_os_error(error)
        if number <= self._plan.commit_stage:
            kind = NoSpaceError if error.errno in _FULL else ImageIOError
            return kind(f"writing failed ({cause.message})", hint="everything was put back as it was")
        return ImageIOError(
            f"the change is done, but giving clusters back failed ({cause.message})",
            hint="`qcow2bm qemu-img check -r leaks` gives them back",
        )
