"""`qcow2bm resize`: another virtual size, with every bitmap following."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import api
from ..errors import UsageError
from ..image.plan import Plan
from .change import How, change_as_planned, changing
from .options import ImageArgument
from .sizes import Resizing, parse_resizing

SizeArgument = Annotated[
    Resizing,
    typer.Argument(
        metavar="SIZE", parser=parse_resizing, show_default=False,
        help="The disk's new size, or +SIZE or -SIZE: that much more or less.",
    ),
]  # fmt: skip
ShrinkOption = Annotated[
    bool, typer.Option("--shrink", help="A smaller size is meant: the end of the disk is lost.", show_default=False)
]
DirtyTailOption = Annotated[
    bool,
    typer.Option(
        "--dirty-tail",
        help="Mark new bytes in the bitmaps. Done without it where a bitmap did not fit the disk.",
        show_default=False,
    ),
]
CleanTailOption = Annotated[
    bool,
    typer.Option("--clean-tail", help="Do not, even where a bitmap did not fit the disk.", show_default=False),
]
DataFileOption = Annotated[
    Path | None,
    typer.Option(
        "--data-file", metavar="FILE", show_default=False,
        help="Where the external data file is. The name in the image is not believed.",
    ),
]  # fmt: skip


@changing("resize")
def resize(
    image: ImageArgument,
    size: SizeArgument,
    *,
    shrink: ShrinkOption = False,
    dirty_tail: DirtyTailOption = False,
    clean_tail: CleanTailOption = False,
    data_file: DataFileOption = None,
    how: How,
) -> int:
    """Change the size of the disk, with every bitmap following.

    A bitmap keeps its bits; those past a smaller disk's end are dropped, and bytes that are new are clean. The
    backup that an incremental one builds on must be given the same size before it is restored onto.

    With the size that the disk has, bitmaps whose tables do not fit it are made to. One that does not proves that
    something resized the disk behind them: then all of them are dirty where they may lack the growth.
    """
    if dirty_tail and clean_tail:
        raise UsageError("--dirty-tail and --clean-tail contradict each other")
    tail = True if dirty_tail else False if clean_tail else None

    def planned(opened: api.Image) -> Plan:
        wanted = size.of(opened.virtual_size)
        return api.plan_resize(opened, wanted, shrink=shrink, dirty_tail=tail, data_file=data_file)

    return change_as_planned(image, planned, how)
