"""`qcow2bm copy`: a bitmap under another name, in another image, at another granularity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import api
from ..bitmap.edit import Edit
from .change import How, change, changing
from .completion import references
from .options import GranularityOption
from .references import parse_reference, split_reference
from .sources import Sources

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SRC#BITMAP", help="An image and the bitmap to copy.", show_default=False, autocompletion=references
    ),
]
TargetArgument = Annotated[
    str,
    typer.Argument(metavar="DST[#NAME]", help="The image that gets it, and its name there.", show_default=False),
]


@changing("copy")
def copy(source: SourceArgument, target: TargetArgument, *, granularity: GranularityOption = None, how: How) -> int:
    """Copy a bitmap: to another image of the same disk size, or within one under another name.

    With -g the copy has another granularity; whatever is dirty in the source is dirty in the copy.
    """
    source_image, source_name = parse_reference(source)
    target_image, target_name = split_reference(target)
    with Sources(Path(target_image), use_locks=how.use_locks) as others:

        def edit(_: api.Image, draft: Edit) -> None:
            found = others.bitmap(source_image, source_name)
            draft.copy(found, target_name or source_name, granularity=granularity)

        return change(Path(target_image), edit, how)
