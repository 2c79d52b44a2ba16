"""`qcow2bm set` and `qcow2bm unset`: mark ranges of the disk dirty or clean."""

from __future__ import annotations

from .. import api
from ..bitmap.edit import Edit
from .change import How, change
from .options import (
    BitmapArgument,
    DryRunOption,
    ImageArgument,
    NoLockOption,
    OutputOption,
    ProgressOption,
    RangesOption,
    UndoOption,
)
from .output import Output


def set_ranges(
    image: ImageArgument,
    bitmap: BitmapArgument,
    *,
    ranges: RangesOption,
    dry_run: DryRunOption = False,
    undo: UndoOption = None,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Mark ranges dirty: every bit that they touch, so that nothing in them is called clean."""

    def edit(_: api.Image, draft: Edit) -> None:
        for offset, length in ranges:
            draft.set_range(bitmap, offset, length)

    return change(image, edit, How("set", dry_run, undo, not no_lock, output, progress))


def unset_ranges(
    image: ImageArgument,
    bitmap: BitmapArgument,
    *,
    ranges: RangesOption,
    dry_run: DryRunOption = False,
    undo: UndoOption = None,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Mark ranges clean: only bits that lie wholly inside, so that nothing outside is called clean."""

    def edit(_: api.Image, draft: Edit) -> None:
        for offset, length in ranges:
            draft.unset_range(bitmap, offset, length)

    return change(image, edit, How("unset", dry_run, undo, not no_lock, output, progress))
