"""Undo files: what stages of a plan replace, written down and flushed before the first byte is overwritten.

While a plan runs its undo file says "in progress"; once the plan is done it says "complete", and the user may put the
old bytes back as long as nobody has touched the image since. They are put back stage by stage, last stage first, so
that a crash on the way leaves no more than leaked clusters, and the same command finishes what it began.

A journal is the same file for the few stages that a crash could tear. Whoever opens the image for writing next settles
it: what was torn is rolled back, what was finished is kept. Where all stages are journaled, the user's undo file is the
journal, by a second name beside the image. Meanwhile the mark is set (`mark.py`), which keeps QEMU out. It tells a torn
image from one that somebody has mended, replaced or used since: without it nothing is rolled back.

An external data file is no part of it; how the change left that is noted (`undo_data_file.py`), and looked at.

The layout is in `undo_layout.py`. The old and the new bytes of a rewrite are both kept: by them the file recognises its
image, also one that a crash left half-way. Of a free cluster that is filled it has a checksum of the new content, to
see whether it has changed since.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

from ..errors import RUN_CHECK, ImageIOError, UndoError, from_os_error
from .file import ImageFile
from .mark import is_marked
from .roll_back import put_back
from .undo_layout import State
from .undo_reader import Record, UndoReader
from .undo_standing import Since, Standing, fills, is_own_work, sets_mark, since, standing, to_put_back
from .undo_writer import drop, second_copy, second_name, sync_folder, write_summary

_CHANGED = "the image has changed since the undo file was written"


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of the journal that a crash had left.

    Attributes:
        rolled_back: the change was torn, and the image is as it was before.
        set_aside: where the journal is now, if it was not this image's.
    """

    rolled_back: bool = False
    set_aside: Path | None = None


class UndoFile(UndoReader):
    """An undo file opened to put the old bytes back. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open it for writing, and read the header.

        Raises:
            UndoError: it is no undo file, or a damaged one.
        """
        super().__init__(path, writable=True)

    def restore(
        self, image: ImageFile, *, force: bool = False, judge: Callable[[UndoReader, ImageFile], None] | None = None
    ) -> None:
        """Put the old bytes and the old length back; what was interrupted half-way is rolled back the same way.

        Args:
            force: do it although the time stamp of the image or of its data file says that it was touched. Changed
                content of the image is refused all the same.
            judge: raises UndoError where undoing by force would harm what is in the image now, if nothing else tells.

        Raises:
            UndoError: the file is damaged, has been used already, or the image or its data file has changed since.
            ImageIOError, FlushError: not all is put back; it is "in progress", and can be done again.
        """
        # Reading every record here also means that a damaged file is refused before the first byte is written.
        found = require_restorable(self, image, force=force)
        # Else a guest may have written in place, and an older undo file would go by the stamp and believe it was not.
        stamp = since(self, image, found) is Since.NOTHING
        if judge is not None and not stamp and not is_marked(image):
            judge(self, image)
        try:
            with self._journaled(image):
                self._put_back(image, stamp=stamp)
                self._set_state(State.UNDONE)
        except OSError as error:
            cause = from_os_error(error).message
            if self.state is State.UNDONE:
                text, hint = f"all was put back, but not what was to follow ({cause})", RUN_CHECK
            else:
                text, hint = f"not all was put back ({cause})", "the same `qcow2bm undo` again puts back the rest"
            raise ImageIOError(text, hint=hint) from error

    @contextlib.contextmanager
    def _journaled(self, image: ImageFile) -> Iterator[None]:
        """In progress, and where a crash could tear the image on the way, its journal until all is put back.

        Raises:
            ImageIOError: the journal cannot be made, and nothing was begun.
        """
        if not self._summary.journaled or image.is_device:
            self._set_state(State.IN_PROGRESS)
            yield
            return
        image.require_its_name()
        journal, before = image.journal, self.state
        # As long as it says "complete" a journal does nothing, so it may be there before the undoing begins.
        named = (image.has_journal and journal.samefile(self.path)) or second_name(self.path, journal)
        self._set_state(State.IN_PROGRESS)
        if not named:
            try:
                second_copy(self._fd, journal, os.fstat(image.fd))
            except OSError as error:
                self._set_state(before)
                cause = from_os_error(error).message
                text = f"cannot write the journal {journal} ({cause}), so nothing is put back"
                raise ImageIOError(text) from error
        yield
        drop(journal)

    def settle(self, image: ImageFile) -> bool:
        """Finish with a journal that a crash left: True if what it journals was torn and is rolled back.

        Raises:
            UndoError: the journal is damaged, or the image is not as the crash left it.
        """
        if not is_torn(self, image):
            if self.state is State.IN_PROGRESS and self.mtime_ns and standing(self, image).finished:
                self._set_state(State.COMPLETE)  # the change was done long ago, and its undoing had not begun
            return False
        self._put_back(image, stamp=False)
        self._set_state(State.UNDONE)
        return True

    def _put_back(self, image: ImageFile, *, stamp: bool) -> None:
        first = min((record.stage for record in self.records), default=0)
        for stage in sorted({first, *(record.stage for record in self.records)}, reverse=True):
            # Before the first stage, which set the mark: what is left is to be recognised until all is done.
            if stage == first and image.size > self.size_before and not image.is_device:
                image.truncate(self.size_before)
                image.barrier()
            for record in reversed(self.records):
                if record.stage == stage:
                    self._put_back_one(image, record)
            image.barrier()
        # With the bytes of then goes the time stamp of then, by which an older undo file knows the image; but never
        # over the traces of a guest. Only the file's owner may set it; for others an older undo file needs --force.
        if stamp:
            with contextlib.suppress(PermissionError):
                os.utime(image.fd, ns=(os.fstat(image.fd).st_atime_ns, self.mtime_before_ns))

    def _put_back_one(self, image: ImageFile, record: Record) -> None:
        for start, stop in to_put_back(record, image, min(record.end, self.size_before)):
            put_back(image, start, partial(self.old, record, start, stop))

    def _set_state(self, state: State) -> None:
        self._summary = replace(self._summary, state=state)
        write_summary(self._fd, self._summary)


def is_torn(journal: UndoReader, image: ImageFile) -> bool:
    """True if a crash has left what the journal must put back.

    False for an image that the change did not reach, one where it was finished, and one that has been mended, replaced
    or used since: without the mark (`mark.py`) there is nothing left of the change to be put back.

    Raises:
        UndoError: the journal is damaged, or nobody can tell.
    """
    if journal.state is not State.IN_PROGRESS:
        return False
    found, marked = standing(journal, image), is_marked(image)
    if found.finished or (sets_mark(journal) and not marked):
        return False
    if found.untouched:
        # Nothing refers to a free cluster that was filled; but what somebody else has put there since is his.
        changed, ours = fills(journal, image)
        return changed and ours and is_own_work(journal, image)
    if not marked:
        raise UndoError(
            f"a change was cut short by a crash, and nothing has kept others from the image since: see {journal.path}",
            hint="`qcow2bm undo --force` with that file puts the old bytes back if nobody has used the image; "
            "else move the file away and check the image",
        )
    _require_familiar(journal, found)
    return True


def require_restorable(undo: UndoReader, image: ImageFile, *, force: bool = False) -> Standing:
    """Refuse to put old bytes over what somebody has written since; else say how the image stands to the change.

    Raises:
        UndoError: the undo file is damaged or was used, or the image has changed since.
    """
    if undo.state is State.UNDONE:
        raise UndoError(f"{undo.path} has been used already")
    found = standing(undo, image)
    undone_in_part = not (undo.mtime_ns and found.finished)  # with a time stamp it was complete once
    if undo.state is State.IN_PROGRESS and undone_in_part:
        _require_half_way(undo, image, found, force=force)
    else:
        _require_undisturbed(undo, image, found, force=force)
    noted = undo.data_file
    changed = noted is not None and noted.has_changed()
    if noted is not None and changed is not False and not force:
        raise UndoError(
            f"its data file {noted.path} was written to since the undo file was made, which the image does not show"
            if changed
            else f"nothing tells whether its data file {noted.path} was written to since the undo file was made",
            hint="guest data may be newer; --force puts the image back, and leaves the data file as it is",
        )
    return found


def _require_undisturbed(undo: UndoReader, image: ImageFile, found: Standing, *, force: bool) -> None:
    """The change was done, and nobody may have touched the image since."""
    happened = since(undo, image, found)
    if happened is Since.CHANGED:
        raise UndoError(_CHANGED, hint="nothing was put back")
    if happened is Since.RESTARTED and not force:
        raise UndoError(
            "the machine was started again since the undo file was made, and a crash may have lost the time stamp of"
            " what a guest has written",
            hint="guest data may be newer; use --force if you know that nothing has used the image, or that it was"
            " shut down in order",
        )
    if happened is Since.UNKNOWN and not force:
        raise UndoError(
            "nothing tells whether the image was used since the undo file was made: no time stamp shows what is written"
            " to a device or to a data file",
            hint="guest data may be newer; use --force if you know that nothing has used the image",
        )
    if happened is Since.TOUCHED and not force:
        raise UndoError(
            "the image was written to since the undo file was made, though the places it knows are unchanged",
            hint="guest data may be newer; use --force if you know that only the time stamp changed",
        )


def _require_half_way(undo: UndoReader, image: ImageFile, found: Standing, *, force: bool) -> None:
    """A change, or an undo of it, was cut short. The image must be as that left it."""
    _require_familiar(undo, found)
    if is_marked(image):
        return  # it has kept everybody out
    if not found.finished:
        _require_own_work(undo, image)
    # Nobody has noted the time stamp that the crash left.
    if not (found.untouched or force):
        raise UndoError(
            "a crash came before the end was noted, so nobody knows what was written since",
            hint="guest data may be newer; use --force if you know that nothing has used the image",
        )


def _require_own_work(undo: UndoReader, image: ImageFile) -> None:
    if not is_own_work(undo, image):
        raise UndoError(
            "the image has been used since a crash cut the change short: free clusters hold something else",
            hint=f"nothing was put back; move {undo.path} away, then `qcow2bm check` says how the image is",
        )


def _require_familiar(undo: UndoReader, found: Standing) -> None:
    if not found.familiar:
        raise UndoError(_CHANGED, hint=f"nothing was put back; if you know better, move {undo.path} away")


def settle_journal(image: ImageFile) -> Settled:
    """Finish with the journal that a crash left beside an image.

    What was torn is rolled back. A journal that has nothing to do with what the image is now may be all that leads back
    another file, which was moved away before this one got its name: it is set aside.

    The caller holds the write lock.

    Raises:
        UndoError: the journal is damaged, or the image is not as the crash left it.
        ImageIOError: the image is not the file of that name any more, or what lies beside it cannot be changed.
    """
    image.require_its_name()
    path, rolled_back, belongs = image.journal, False, True
    try:
        if UndoFile.was_begun(path):
            _require_ours(path, image)
            with UndoFile(path) as journal:
                belongs = _belongs(journal, image)
                rolled_back = journal.settle(image)
        if rolled_back or belongs:
            drop(path)
            return Settled(rolled_back)
        return Settled(set_aside=_set_aside(path))
    except OSError as error:
        raise from_os_error(error, path) from error
    except UndoError as error:
        raise _as_journal(error) from error.__cause__


def _require_ours(path: Path, image: ImageFile) -> None:
    """Refuse a journal that somebody else has put there: it could make anything of the image.

    Raises:
        UndoError: it belongs neither to root, nor to the image's owner, nor to whoever asks.
    """
    owner = path.stat(follow_symlinks=False).st_uid
    if owner not in (0, os.geteuid(), os.fstat(image.fd).st_uid):
        raise UndoError(
            f"{path} belongs to user {owner}, who is not the image's owner, so it is not taken for its journal",
            hint="give it to the owner if a change by that user was cut short, else move it away",
        )


def _as_journal(error: UndoError) -> UndoError:
    """An error about a file that has a journal's name, with advice where nobody can use it as one."""
    # One that may not be opened may be a good one.
    if error.hint is None and not isinstance(error.__cause__, OSError):
        error.hint = "move it away: it is no journal that can be used, and `qcow2bm check` says how the image is"
    return error


def _belongs(journal: UndoReader, image: ImageFile) -> bool:
    """False if a change is under way elsewhere: this image has not been reached by it, or no longer shows any of it."""
    if journal.state is not State.IN_PROGRESS:
        return True
    found = standing(journal, image)
    return found.finished or (found.untouched and journal.is_of(image))


def _set_aside(path: Path) -> Path:
    """Give a journal a name by which no image has it."""
    numbers = (f".stale-{number}" if number else ".stale" for number in count())
    aside = next(name for end in numbers if not os.path.lexists(name := path.with_name(path.name + end)))
    path.rename(aside)
    sync_folder(aside)
    return aside


def has_torn(image: ImageFile) -> bool:
    """True if a crash has left an image that no reader can make sense of, until `settle_journal` has put it right.

    Raises:
        UndoError: what lies in the journal's place is none.
    """
    try:
        if not UndoReader.was_begun(image.journal):
            return False
        _require_ours(image.journal, image)
        with UndoReader(image.journal) as journal:
            return is_torn(journal, image)
    except OSError:
        return True
    except UndoError as error:
        if error.hint is None:  # no command could settle it
            raise _as_journal(error) from error.__cause__
        return True
