"""The forms in which ranges of a disk are listed, and the options about them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Form(StrEnum):
    """Forms of the result; csv is for extents only."""

    HUMAN = "human"
    JSON = "json"
    CSV = "csv"


FormOption = Annotated[Form, typer.Option("--output", help="For reading, or for programs. csv goes with --extents.")]
ExtentsOption = Annotated[
    bool,
    typer.Option("--extents", help="List the ranges of the disk, clean and dirty, in order.", show_default=False),
]
DirtyOnlyOption = Annotated[
    bool, typer.Option("--dirty-only", help="With --extents: leave the clean ranges out.", show_default=False)
]
