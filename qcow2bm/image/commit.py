"""The commit engine: carries a plan out so that at every moment the old or the new state is valid on disk.

Each stage's writes are followed by a barrier. Up to the stage that commits, a failure puts everything back; after it,
what is left undone is a leak and nothing worse. A failed flush is different: what reached the disk is unknown, so
nothing more is written.

Stages that a crash could tear are journaled: what they replace is on disk before the first of them begins, and the
journal goes as soon as the last is done, so that it can never be applied to an image that somebody used since.
"""

from __future__ import annotations

import contextlib
import errno
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import (
    RUN_CHECK,
    ChangeDoneError,
    FlushError,
    ImageIOError,
    NoSpaceError,
    OutdatedPlanError,
    Qcow2bmError,
    UndoError,
    UsageError,
    from_os_error,
    naming,
)
from ..format.geometry import runs
from .data_file import FollowingFile
from .file import JOURNAL_SUFFIX, ImageFile
from .image import Qcow2Image
from .plan import Kept, Plan, Stage, Write
from .roll_back import Replaced, roll_back
from .spill import Spill

if TYPE_CHECKING:
    from .undo_writer import UndoWriter

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IN_MEMORY = 8 << 20
"""Bytes to put back that are held in memory; the rest lies in a temporary file."""

_NEXT_COMMAND = "the next command that opens the image for writing"

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes to write."""


def commit(image: Qcow2Image, plan: Plan, *, undo: Path | None = None, progress: Progress | None = None) -> None:
    """Carry out a plan on an image opened for writing.

    Args:
        undo: keep what is replaced, and what the plan wants kept, in this file, which must not exist yet.

    Raises:
        UsageError: the image is open read-only.
        OutdatedPlanError: the image has changed since the plan was made; nothing was written, or all was put back.
        NoSpaceError: the file system has not the room; nothing was written, or everything was put back.
        UndoError: the undo file or the journal cannot be written; nothing was changed.
        ImageIOError: a write failed, and the message says whether everything was put back.
        FlushError: a flush failed, and what is on the disk is unknown.
        ChangeDoneError: the change is done; what failed came after it.
    """
    carry_out(image.file, plan, undo=undo, progress=progress)
    with naming(image.file.path), _afterwards():
        image.reload()
        following = plan.then(image) if plan.then is not None and undo is None and not image.file.is_device else None
        if following:
            commit(image, following)


@contextlib.contextmanager
def _afterwards() -> Iterator[None]:
    """What fails in here does not take the change back, and says so."""
    try:
        yield
    except ChangeDoneError:  # of a change that follows this one: both are done
        raise
    except (Qcow2bmError, OSError) as error:
        cause = from_os_error(error) if isinstance(error, OSError) else error
        text = f"the change is done, but not what was to follow it: {cause.message}"
        raise ChangeDoneError(text, hint=RUN_CHECK) from error


def carry_out(file: ImageFile, plan: Plan, *, undo: Path | None = None, progress: Progress | None = None) -> None:
    """As `commit`, of a file whose image may be too damaged to be opened."""
    with naming(file.path):
        if not file.writable:
            raise UsageError("the image is open read-only", hint="open it with writable=True")
        _require_as_planned(file, plan)
        _require_space(file, plan)
        if undo is not None and undo.name.endswith(JOURNAL_SUFFIX):
            raise UndoError(f"{undo} is the name of an image's journal", hint="give the undo file another one")
        if plan.journaled and file.is_device and undo is None:
            raise UndoError("this change needs a journal", hint="name a file for it on another disk with --undo")
        with FollowingFile(plan.data_file) as data_file, contextlib.ExitStack() as files:
            writer: UndoWriter | None = None
            engine: _Engine | None = None
            try:
                data_file.extend()
                writer = _undo_writer(file, plan, undo, data_file.noted())
                if writer is not None:
                    files.callback(writer.close)
                engine = _Engine(file, plan, progress, writer)
                engine.run()
            except BaseException:
                if engine is None or engine.untouched:
                    if writer is not None:
                        # The image is as it was, and an undo file that stays does no harm: what failed before counts.
                        with contextlib.suppress(Qcow2bmError, OSError):
                            writer.discard()
                    data_file.restore()
                raise
            with _afterwards():
                if writer is not None:
                    writer.complete(file)
                else:
                    _cut(file, plan)
                    data_file.cut()


def _cut(file: ImageFile, plan: Plan) -> None:
    """Drop the end of the file, which nothing uses any more. A crash before that leaves it longer than need be."""
    if plan.cut_to is not None and plan.cut_to < file.size:
        file.truncate(plan.cut_to)
        file.barrier()


def _require_as_planned(file: ImageFile, plan: Plan) -> None:
    """Look at everything the plan rewrites before the first byte is written.

    Free clusters that it fills are not looked at: that they still are free the refcounts say, which it rewrites too.
    """
    outdated = OutdatedPlanError("the image has changed since the change was planned", hint="nothing was written")
    if file.size != plan.size_before:
        raise outdated
    rewrites = [write for write in plan.writes() if write.old is not None]
    touching: dict[int, list[int]] = defaultdict(list)
    for number, write in enumerate(rewrites):
        # Where two stages rewrite a place, the second expects what the first leaves.
        now = bytearray(file.read_padded(write.offset, write.length))
        clusters = range(write.offset // plan.cluster_size, (write.end - 1) // plan.cluster_size + 1)
        for earlier in sorted({earlier for cluster in clusters for earlier in touching[cluster]}):
            _overlay(now, write.offset, rewrites[earlier])
        for cluster in clusters:
            touching[cluster].append(number)
        if now != (write.old or b""):
            raise outdated


def _overlay(data: bytearray, offset: int, write: Write) -> None:
    """Make `data`, which lies at `offset`, what it is after `write`."""
    start, end = max(offset, write.offset), min(offset + len(data), write.end)
    if start < end:
        data[start - offset : end - offset] = write.read()[start - write.offset : end - write.offset]


def _require_space(file: ImageFile, plan: Plan) -> None:
    free = file.free_space()
    if free is not None and plan.growth > free:
        raise NoSpaceError(
            f"the change needs {plan.growth} bytes more and the file system has {free}", hint="nothing was changed"
        )


def _undo_writer(file: ImageFile, plan: Plan, path: Path | None, noted: tuple[Kept, ...]) -> UndoWriter | None:
    if path is None:
        return None
    from .undo_writer import UndoWriter  # rarely needed, and its structures take time to declare

    kept, freed = (*noted, *plan.kept), _freed_ranges(plan)
    return UndoWriter.create(path, file, plan.stages, plan.size_after, kept=kept, given_up=freed)


def _freed_ranges(plan: Plan) -> Iterator[tuple[int, int]]:
    """The clusters that a plan frees, there may be millions, as ranges of the file (start, end)."""
    size = plan.cluster_size
    return ((first * size, (first + count) * size) for first, count in runs(sorted(plan.freed)))


class _OldBytes:
    """Old bytes, to put back if the plan fails: a few MiB in memory, the rest in a temporary file."""

    def __init__(self) -> None:
        self._held = 0
        self._spill = Spill()

    def keep(self, data: bytes) -> Callable[[], bytes]:
        """How to get `data` back."""
        if data.count(0) == len(data):
            return partial(bytes, len(data))
        self._held += len(data)
        if self._held <= _IN_MEMORY:
            return lambda: data
        return partial(self._spill.get, self._spill.put(data), len(data))  # which does not hold the data

    def close(self) -> None:
        """Forget everything."""
        self._spill.close()


class _Engine:
    """One run of a plan."""

    def __init__(self, file: ImageFile, plan: Plan, progress: Progress | None, undo: UndoWriter | None) -> None:
        self._file = file
        self._plan = plan
        self._undo = undo
        self._progress = progress
        self._total = plan.bytes_written
        self._done: list[list[Replaced]] = []
        self._kept = _OldBytes()
        self._written = 0
        self._journal: UndoWriter | None = None
        self.untouched = True  # or so again, when all is put back

    def run(self) -> None:
        self.untouched = False
        try:
            self._run()
        finally:
            self._kept.close()
            if self._journal is not None:
                self._journal.close()  # what could not be put back needs it: it stays where it is

    def _run(self) -> None:
        for number, stage in enumerate(self._plan.stages):
            self._done.append([])
            try:
                self._keep_journal(stage)
                self._write(stage)
                self._file.barrier()
                if number == self._plan.commit_stage:
                    self._drop_journal()
            except FlushError:
                raise
            except BaseException as error:  # also a signal: whatever stops us, the old state is put back
                if number <= self._plan.commit_stage:
                    self._roll_back()
                if isinstance(error, OSError) or (isinstance(error, Qcow2bmError) and number > self._plan.commit_stage):
                    raise self._explain(error, number) from error
                raise

    def _keep_journal(self, stage: Stage) -> None:
        # A device has no place beside it that outlives a crash: there the user's undo file is the journal.
        if not stage.journaled or self._journal is not None or self._file.is_device:
            return
        self._file.require_its_name()
        journal, plan = self._file.journal, self._plan
        # Where all stages are journaled the undo file says the same as the journal would: a second name makes it both.
        if self._undo is not None and len(plan.journaled) == len(plan.stages) and self._undo.link(journal):
            self._journal = self._undo
            return
        from .undo_writer import UndoWriter

        self._journal = UndoWriter.create(journal, self._file, plan.journaled, plan.size_after)

    def _drop_journal(self) -> None:
        journal = self._journal
        if journal is not None and journal is not self._undo:  # `carry_out` ends the undo file, and with it that name
            journal.discard()
        self._journal = None  # until then it may have to be told of

    def _write(self, stage: Stage) -> None:
        for write in stage.writes:
            if write.old is not None and self._file.read_padded(write.offset, write.length) != write.old:
                raise OutdatedPlanError(f"the image has changed at {write.offset:#x} since the change was planned")
            # Noted first: a write that fails may have written some of it.
            self._done[-1].append((write, self._kept.keep(self._old(write))))
            self._file.write_at(write.offset, write.read())
            self._written += write.length
            if self._progress is not None:
                self._progress(self._written, self._total)

    def _old(self, write: Write) -> bytes:
        """What is where a write goes, free clusters included, as far as the file reached before the plan began."""
        if write.old is not None:
            return write.old
        reached = min(write.end, self._plan.size_before) - write.offset
        return self._file.read_at(write.offset, reached) if reached > 0 else b""

    def _roll_back(self) -> None:
        """Put back what was there, and cut the file to its old length: every byte is as it was.

        Raises:
            ImageIOError: not all of it could be put back.
        """
        outcome = roll_back(self._file, self._done, self._plan.size_before)
        cause = None if outcome.error is None else from_os_error(outcome.error).message
        if outcome.stuck is not None:
            text = f"writing failed, and so did putting back what was written ({cause})"
            raise ImageIOError(text, hint=self._way_back(outcome.stuck)) from outcome.error
        self.untouched = True
        try:
            self._drop_journal()
        except OSError as error:
            text = f"writing failed; the old state was put back, but its journal stays ({from_os_error(error).message})"
            raise ImageIOError(text, hint=f"{_NEXT_COMMAND} removes it") from error
        if outcome.error is not None:
            text = f"writing failed, and some of what was written could not be taken back ({cause})"
            hint = "nothing refers to that: bitmaps and disk are the old ones"
            raise ImageIOError(text, hint=hint) from outcome.error

    def _way_back(self, stuck: int) -> str:
        """What becomes of an image that could not be put back: `stuck` is the stage where that ended."""
        if self._journal is not None and self._plan.stages[stuck].journaled:
            return f"{_NEXT_COMMAND} puts the rest back"
        if self._undo is not None:
            return f"`qcow2bm undo --force` with {self._undo.path} puts the rest back, if nobody uses the image before"
        which = "the old ones or the new ones" if stuck == self._plan.commit_stage else "the old ones"
        return f"the bitmaps are {which}, clusters may be leaked; {RUN_CHECK}"

    def _explain(self, error: OSError | Qcow2bmError, number: int) -> Qcow2bmError:
        cause = from_os_error(error) if isinstance(error, OSError) else error
        if number <= self._plan.commit_stage:
            kind = NoSpaceError if isinstance(error, OSError) and error.errno in _FULL else ImageIOError
            return kind(f"writing failed ({cause.message})", hint="everything was put back as it was")
        return ChangeDoneError(
            f"the change is done, but giving clusters back failed ({cause.message})",
            hint="`qcow2bm repair --only leaks` gives them back",
        )
