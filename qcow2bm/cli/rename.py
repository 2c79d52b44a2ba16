"""`qcow2bm rename`: give a bitmap another name."""

from __future__ import annotations

from typing import Annotated

import typer

from .change import How, change, changing
from .completion import bitmap_names
from .options import ImageArgument

OldArgument = Annotated[
    str, typer.Argument(metavar="OLD", help="Its name.", show_default=False, autocompletion=bitmap_names)
]
NewArgument = Annotated[str, typer.Argument(metavar="NEW", help="The name it gets.", show_default=False)]


@changing("rename")
def rename(image: ImageArgument, old: OldArgument, new: NewArgument, *, how: How) -> int:
    """Give a bitmap another name. Its bits, granularity and recording stay as they are."""
    return change(image, lambda _, draft: draft.rename(old, new), how)
