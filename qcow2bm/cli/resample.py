"""`qcow2bm resample`: another granularity, in place."""

from __future__ import annotations

from typing import Annotated

import typer

from .change import How, change, changing, chosen
from .options import BitmapsArgument, ImageArgument, MatchOption
from .sizes import parse_size

NewGranularityOption = Annotated[
    int,
    typer.Option(
        "--granularity", "-g", metavar="SIZE", parser=parse_size, show_default=False,
        help="Bytes of the disk for each bit from now on: a power of two from 512 to 2G.",
    ),
]  # fmt: skip


@changing("resample")
def resample(
    image: ImageArgument,
    bitmaps: BitmapsArgument = None,
    *,
    granularity: NewGranularityOption,
    match: MatchOption = None,
    how: How,
) -> int:
    """Give bitmaps another granularity, all of them or none. They keep their names and record if they did.

    No dirty byte is lost. A coarser bitmap calls more dirty than there is, and resampling it back does not undo that.
    """
    return change(image, lambda _, draft: draft.resample(*chosen(draft, bitmaps, match), granularity=granularity), how)
