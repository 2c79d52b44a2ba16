"""`qcow2bm merge`: one bitmap out of several: their union, or what another operation makes of them."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import api
from ..bitmap.chunks import Op
from ..bitmap.draft import Source
from ..bitmap.edit import Edit
from ..errors import UsageError
from .change import How, change, changing
from .completion import bitmap_names
from .completion import sources as complete_sources
from .options import GranularityOption, ImageArgument
from .sources import Sources

TargetArgument = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="The bitmap to merge into.", show_default=False, autocompletion=bitmap_names),
]
SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...", show_default=False, autocompletion=complete_sources,
        help="Bitmaps of IMAGE, or OTHER.qcow2#BITMAP from another image of the same disk size.",
    ),
]  # fmt: skip
OpOption = Annotated[
    Op,
    typer.Option(
        "--op", help="Dirty is then: what is dirty in any; in all; in an odd number; in TARGET and in no SOURCE."
    ),
]
CreateOption = Annotated[bool, typer.Option("--create", help="Add TARGET if it is not there.", show_default=False)]


@changing("merge")
def merge(
    image: ImageArgument,
    target: TargetArgument,
    source: SourcesArgument,
    *,
    op: OpOption = Op.OR,
    create: CreateOption = False,
    granularity: GranularityOption = None,
    how: How,
) -> int:
    """Mark in one bitmap what is dirty in any of others, whatever their granularities. The sources stay as they are.

    Other operations with --op, one SOURCE after the other. A granule of TARGET stays dirty as long as the result holds
    a byte of it, so `subtract` clears only what the sources cover wholly.

    With --create a missing TARGET is added, with the smallest granularity among the sources unless -g says
    otherwise; it records if one of them does. Other images are only read, and kept locked until all is written.
    """
    if granularity is not None and not create:
        raise UsageError("-g is for a target that --create adds", hint="`qcow2bm resample` changes a granularity")
    if create and op in (Op.AND, Op.SUBTRACT):
        text = f"--create adds an empty target, of which --op {op} would leave nothing"
        raise UsageError(text, hint="`qcow2bm copy` the first source, then merge the others into the copy")
    with Sources(image, use_locks=how.use_locks) as others:

        def edit(opened: api.Image, draft: Edit) -> None:
            found = [others.find(word, opened.bitmaps) for word in source]
            if create and target not in opened.bitmaps.names:
                _add_target(opened, draft, target, found, granularity)
            draft.merge(target, found, op=op)

        return change(image, edit, how)


def _add_target(
    image: api.Image, draft: Edit, target: str, sources: list[str | Source], granularity: int | None
) -> None:
    """A bitmap that is to hold the union: of no coarser grain than any source, and recording if one of them is."""
    known = [image.bitmaps[source] if isinstance(source, str) else source for source in sources]
    chosen = min(source.granularity for source in known) if granularity is None else granularity
    draft.add(target, granularity=chosen, recording=any(source.recording for source in known))
