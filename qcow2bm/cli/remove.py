"""`qcow2bm remove`: take bitmaps away and give their clusters back."""

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


def remove(
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
    """Remove bitmaps, all of them or none, whatever their state. Guest data is not touched."""
    how = How("remove", dry_run, undo, not no_lock, output, progress)
    return change(image, lambda _, draft: draft.remove(*chosen(draft, bitmaps, match)), how)
