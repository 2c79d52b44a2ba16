"""Bringing quarantined bitmaps back from the undo file of the repair that took them out of the image.

A bitmap that records is worth something only as long as it has seen every write. In the undo file it has seen none,
so it comes back as it was only to an image that nobody has written to since.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from ..errors import BitmapExistsError, BitmapInconsistentError, BitmapNotFoundError, UndoError, UsageError
from ..image.file import ImageFile
from ..image.undo_layout import State
from ..image.undo_reader import UndoReader
from ..image.undo_standing import Since, since, standing
from .draft import Source
from .edit import Edit
from .quarantine import Quarantined, quarantined

_SINCE = {
    Since.NOTHING: None,
    Since.TOUCHED: "the image has been written to since, and it lacks those writes",
    Since.CHANGED: "the image has been changed since, and it lacks what was written",
    Since.UNKNOWN: "nothing tells whether the image has been written to since",
    Since.RESTARTED: "the machine was started again since, and a crash may have lost the time stamp of other writes",
}


class Quarantine:
    """The bitmaps that an undo file keeps. A context manager, to be left only when a plan with their bits is done.

    Attributes:
        undo: the open undo file.
        bitmaps: in the order in which they were kept.
    """

    def __init__(self, path: Path) -> None:
        """Open an undo file.

        Raises:
            UndoError: it is none, or is damaged.
        """
        self.undo = UndoReader(path)
        try:
            self.bitmaps = quarantined(self.undo.kept())
        except BaseException:
            self.undo.close()
            raise
        self._since: Since | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def choose(self, names: Iterable[str] = (), numbers: Iterable[int] = ()) -> tuple[Quarantined, ...]:
        """The bitmaps of these names, then those of these numbers, each once.

        Raises:
            BitmapNotFoundError: one is not there.
            UsageError: several have one of the names.
        """
        chosen: dict[int, Quarantined] = {}
        for name in names:
            found = [bitmap for bitmap in self.bitmaps if bitmap.name == name]
            if len(found) > 1:
                known = " or ".join(str(bitmap.number) for bitmap in found)
                text = f"{self.undo.path} keeps {len(found)} bitmaps called '{name}'"
                raise UsageError(text, hint=f"choose with --number {known}")
            chosen.update({bitmap.number: bitmap for bitmap in self._require(found, f"called '{name}'")})
        for number in numbers:
            found = [bitmap for bitmap in self.bitmaps if bitmap.number == number]
            chosen.update({bitmap.number: bitmap for bitmap in self._require(found, f"with the number {number}")})
        return tuple(chosen.values())

    def _require(self, found: list[Quarantined], what: str) -> list[Quarantined]:
        if not found:
            raise BitmapNotFoundError(f"{self.undo.path} keeps no bitmap {what}", hint="--list shows those it keeps")
        return found

    def bring_back(
        self, edit: Edit, bitmap: Quarantined, name: str | None = None, *, stale: bool = False
    ) -> str | None:
        """Draft the bitmap as a new one of the image: its granularity, its bits, and recording if it was.

        Args:
            name: another name for it.
            stale: also one that may lack writes. It then comes back without recording.

        Returns:
            Why its bits may be stale, if `stale` was needed.

        Raises:
            UndoError: the change that took it out of the image was undone, or was never finished.
            BitmapBrokenError: its bits cannot be read.
            BitmapInconsistentError: its bits may be stale, and `stale` is off.
            BitmapExistsError, BitmapSizeMismatchError, UsageError: the image cannot take it, or not under that name.
        """
        self._require_done(edit.image.file)
        bits = bitmap.bits
        # One that did not record was never meant to see what was written since.
        doubt = bitmap.doubt or self._foreign(edit.image.file)
        doubt = doubt or (self._lacks(edit.image.file) if bitmap.recording else None)
        if doubt is not None and not stale:
            raise BitmapInconsistentError(
                f"bitmap '{bitmap.name}' may be stale: {doubt}",
                hint="--stale brings it back without recording; only a full backup makes up for what it lacks",
            )
        label = f"{self.undo.path}#{bitmap.name}"
        recording = bitmap.recording and doubt is None
        source = Source(label, bitmap.virtual_size, bitmap.granularity, bits, recording)
        try:
            edit.copy(source, bitmap.name if name is None else name)
        except (BitmapExistsError, UsageError) as error:
            if name is None and error.hint is None:
                error.hint = "--as gives it another name"
            raise
        return doubt

    def _require_done(self, image: ImageFile) -> None:
        path, state = self.undo.path, self.undo.state
        if state is State.UNDONE:
            raise UndoError(f"{path} has been used: the image is as it was, and so are its bitmaps")
        if state is State.IN_PROGRESS and not standing(self.undo, image).finished:
            raise UndoError(f"the change that {path} belongs to is not in the image, and so its bitmaps still are")

    def _foreign(self, image: ImageFile) -> str | None:
        """Why a bitmap may be about another disk."""
        return "the undo file was made for another file than this one" if self.undo.is_of_another(image) else None

    def _lacks(self, image: ImageFile) -> str | None:
        """Why a bitmap that records may lack writes; the image is looked at once for all of them."""
        if self._since is None:
            self._since = since(self.undo, image)
        return _SINCE[self._since]
