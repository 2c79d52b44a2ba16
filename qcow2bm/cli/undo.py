"""`qcow2bm undo`: put back what a command changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import api
from .failures import Postponed
from .options import ImageArgument, NoLockOption, OutputOption
from .output import Output, print_json
from .terminal import printable

UndoFileArgument = Annotated[
    Path, typer.Argument(metavar="UNDO-FILE", help="The file that --undo made.", show_default=False)
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", help="Do it although the image's time stamp says that it was written to.", show_default=False
    ),
]


def undo(
    image: ImageArgument,
    undo_file: UndoFileArgument,
    *,
    force: ForceOption = False,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
) -> int:
    """Put back what a command changed: the image is then, byte for byte, what it was before.

    Refused if the image has changed since. --force overrides a changed time stamp, not changed content.
    """
    with Postponed():  # done half, it would have to be done again
        api.undo(image, undo_file, force=force, use_locks=not no_lock)
    if output is Output.JSON:
        print_json({"command": "undo", "image": str(image), "undo-file": str(undo_file), "changed": True})
    else:
        print(f"{printable(image)} is as it was before")
    return 0
