"""`qcow2bm rename`: give a bitmap another name."""

from __future__ import annotations

from typing import Annotated

import typer

from .change import How, change
from .completion import bitmap_names
from .options import DryRunOption, ImageArgument, NoLockOption, OutputOption, ProgressOption, UndoOption
from .output import Output

OldArgument = Annotated[
    str, typer.Argument(metavar="OLD", help="Its name.", show_default=False, autocompletion=bitmap_names)
]
NewArgument = Annotated[str, typer.Argument(metavar="NEW", help="The name it gets.", show_default=False)]


def rename(
    image: ImageArgument,
    old: OldArgument,
    new: NewArgument,
    *,
    dry_run: DryRunOption = False,
    undo: UndoOption = None,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Give a bitmap another name. Its bits, granularity and recording stay as they are."""
    how = How("rename", dry_run, undo, not no_lock, output, progress)
    return change(image, lambda _, draft: draft.rename(old, new), how)
