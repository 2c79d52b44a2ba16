"""`qcow2bm rebuild`: new bits for a bitmap, from an older copy of the disk."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import api
from ..bitmap.edit import Edit
from .change import How, change, changing
from .disks import (
    AgainstFormatOption,
    AgainstOption,
    DataFilesOption,
    DiskOption,
    format_of,
    require_place_for_undo,
    rules,
    shut_down_first,
    warn_if_outdated,
)
from .options import BitmapArgument, GranularityOption, ImageArgument
from .output import warn
from .progress import ProgressBar

CreateOption = Annotated[
    bool, typer.Option("--create", help="Add the bitmap if it is not there; it records.", show_default=False)
]
UnionOption = Annotated[
    bool | None,
    typer.Option(
        "--union/--no-union", help="Keep what is marked now beside what differs.",
        show_default="for a bitmap that does not record",
    ),
]  # fmt: skip


@changing("rebuild")
def rebuild(
    image: ImageArgument,
    bitmap: BitmapArgument,
    *,
    against: AgainstOption,
    against_format: AgainstFormatOption = None,
    data_file: DataFilesOption = None,
    disk: DiskOption = None,
    create: CreateOption = False,
    granularity: GranularityOption = None,
    union: UnionOption = None,
    how: How,
) -> int:
    """Compute a bitmap anew, by comparing the disk with a copy of it from when the bitmap began.

    Works on a bitmap in any state: ready, inconsistent, detached, broken, or with --create not there at all. It keeps
    its name, its granularity and whether it records. With the right copy the result is exact: a granule is marked if
    and only if it differs. Nobody can tell a wrong copy from a right one: one from before or after that moment makes
    a bitmap that misses changes.

    A bitmap that does not record stands for a time that is over. It keeps what it marks beside what differs now, for
    comparing knows nothing of what changed in that time and changed back since; with --no-union it marks what differs
    between BASE and now, and nothing else.
    """
    from ..repair.rebuild import draft_rebuild
    from ..repair.salvage import Terms

    terms = Terms(
        base=against,
        base_format=format_of(against, against_format),
        rules=rules(data_file, image, use_locks=how.use_locks),
        disk=disk,
        keep_stale=union,
    )
    require_place_for_undo(how)
    warn_if_outdated(disk, image)

    def edit(opened: api.Image, draft: Edit) -> None:
        found = opened.bitmaps
        if union is False and bitmap in found.names and not found[bitmap].recording:
            warn(f"bitmap '{bitmap}' does not record: what changed in its time and changed back is lost", image)
        with ProgressBar(wanted=how.progress) as bar:
            draft_rebuild(draft, bitmap, terms, create=create, granularity=granularity, progress=bar)

    with shut_down_first():
        return change(image, edit, how)
