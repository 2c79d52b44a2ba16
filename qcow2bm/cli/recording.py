"""`qcow2bm enable` and `qcow2bm disable`: whether QEMU records writes in a bitmap."""

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


def enable(
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
    """Make QEMU record writes in bitmaps, from the next start of the VM on. All of them or none."""
    how = How("enable", dry_run, undo, not no_lock, output, progress)
    return change(image, lambda _, draft: draft.enable(*chosen(draft, bitmaps, match)), how)


def disable(
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
    """Make QEMU leave bitmaps as they are. All of them or none."""
    how = How("disable", dry_run, undo, not no_lock, output, progress)
    return change(image, lambda _, draft: draft.disable(*chosen(draft, bitmaps, match)), how)
