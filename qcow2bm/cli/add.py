"""`qcow2bm add`: a new bitmap."""

from __future__ import annotations

from typing import Annotated

import typer

from .change import How, change, changing
from .options import GranularityOption, ImageArgument, NewNameArgument

DisabledOption = Annotated[bool, typer.Option("--disabled", help="QEMU shall not record in it.", show_default=False)]
AllDirtyOption = Annotated[
    bool, typer.Option("--all-dirty", help="Everything dirty: the next backup is a full one.", show_default=False)
]


@changing("add")
def add(
    image: ImageArgument,
    bitmap: NewNameArgument,
    *,
    granularity: GranularityOption = None,
    disabled: DisabledOption = False,
    all_dirty: AllDirtyOption = False,
    how: How,
) -> int:
    """Add a bitmap, by default an empty one that records, with the granularity QEMU would give it."""
    return change(
        image,
        lambda _, draft: draft.add(bitmap, granularity=granularity, recording=not disabled, all_dirty=all_dirty),
        how,
    )
