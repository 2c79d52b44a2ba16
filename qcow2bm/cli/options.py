"""The arguments and options that several commands share, each in one place with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .completion import bitmap_names
from .output import Output
from .sizes import Range, parse_range, parse_size

ImageArgument = Annotated[
    Path, typer.Argument(metavar="IMAGE", help="A qcow2 image: a file or a block device.", show_default=False)
]
BitmapArgument = Annotated[
    str,
    typer.Argument(metavar="BITMAP", help="The bitmap's name.", show_default=False, autocompletion=bitmap_names),
]
BitmapsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[BITMAP]...", help="Their names.", show_default=False, autocompletion=bitmap_names),
]
NewNameArgument = Annotated[
    str, typer.Argument(metavar="BITMAP", help="Its name, 1 to 1023 bytes.", show_default=False)
]

OutputOption = Annotated[Output, typer.Option("--output", help="For reading, or for programs: one JSON object.")]
ForceShareOption = Annotated[
    bool,
    typer.Option(
        "--force-share", "-U", help="Read an image that a VM writes to; what is shown may be stale.", show_default=False
    ),
]

MatchOption = Annotated[
    list[str] | None,
    typer.Option("--match", metavar="GLOB", help="All bitmaps whose names match, as 'backup-*'.", show_default=False),
]
GranularityOption = Annotated[
    int | None,
    typer.Option(
        "--granularity", "-g", metavar="SIZE", parser=parse_size, show_default=False,
        help="Bytes of the disk for each bit: a power of two from 512 to 2G.",
    ),
]  # fmt: skip
RangesOption = Annotated[
    list[Range] | None,
    typer.Option(
        "--range", metavar="OFF+LEN", parser=parse_range, show_default=False,
        help="Bytes of the disk, for example 1G+64k.",
    ),
]  # fmt: skip

DryRunOption = Annotated[
    bool, typer.Option("--dry-run", "-n", help="Print what would be written where; write nothing.", show_default=False)
]
UndoOption = Annotated[
    Path | None,
    typer.Option("--undo", metavar="FILE", help="Keep what is replaced in this new file.", show_default=False),
]
NoLockOption = Annotated[
    bool,
    typer.Option("--no-lock", help="Take no locks. You answer for it that nothing uses the image.", show_default=False),
]
ProgressOption = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", help="A progress bar for long work.", show_default="on a terminal"),
]
