"""`qcow2bm add`: a new bitmap."""

from __future__ import annotations

from typing import Annotated

import typer

from .change import How, change
from .options import (
    DryRunOption,
    GranularityOption,
    ImageArgument,
    NewNameArgument,
    NoLockOption,
    OutputOption,
    ProgressOption,
    UndoOption,
)
from .output import Output

DisabledOption = Annotated[bool, typer.Option("--disabled", help="QEMU shall not record in it.", show_default=False)]
AllDirtyOption = Annotated[
    bool, typer.Option("--all-dirty", help="Everything dirty: the next backup is a full one.", show_default=False)
]


def add(
    image: ImageArgument,
    bitmap: NewNameArgument,
    *,
    granularity: GranularityOption = None,
    disabled: DisabledOption = False,
    all_dirty: AllDirtyOption = False,
    dry_run: DryRunOption = False,
    undo: UndoOption = None,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Add a bitmap, by default an empty one that records, with the granularity QEMU would give it."""
    how = How("add", dry_run, undo, not no_lock, output, progress)
    return change(
        image,
        lambda _, draft: draft.add(bitmap, granularity=granularity, recording=not disabled, all_dirty=all_dirty),
        how,
    )
