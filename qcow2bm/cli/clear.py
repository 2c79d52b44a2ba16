"""`qcow2bm clear`: start bitmaps over."""

from __future__ import annotations

from .change import How, change, chosen
from .options import (
    BitmapsArgument,
    DryRunOption,
    ImageArgument,
    MatchOption,
    NoLockOption,
    OutputOption,
    ProgressOption,
    UndoOption,
)
from .output import Output


def clear(
    image: ImageArgument,
    bitmaps: BitmapsArgument = None,
    *,
    match: MatchOption = None,
    dry_run: DryRunOption = False,
    undo: UndoOption = None,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Mark the whole disk clean in bitmaps, all of them or none. They keep recording if they did."""
    how = How("clear", dry_run, undo, not no_lock, output, progress)
    return change(image, lambda _, draft: draft.clear(*chosen(draft, bitmaps, match)), how)
