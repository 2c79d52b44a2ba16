"""What `qcow2bm repair` takes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..repair.model import Salvage, Scope
from .disks import DiskFormat


class Allow(StrEnum):
    """Classes of steps, from harmless to risky."""

    LOSSLESS = "lossless"
    LOSSY = "lossy"
    GUESS = "guess"


AllowOption = Annotated[
    Allow, typer.Option("--allow", help="The riskiest class of steps to take; guess includes lossy.")
]
OnlyOption = Annotated[
    list[Scope] | None,
    typer.Option("--only", help="Mend this part only; may be given more than once.", show_default="everything"),
]
InUseOption = Annotated[
    Salvage, typer.Option("--in-use", help="What becomes of bitmaps whose last writer died.", metavar="POLICY")
]
DetachedOption = Annotated[
    Salvage,
    typer.Option("--detached", help="What becomes of bitmaps that a foreign writer has made void.", metavar="POLICY"),
]
NamesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bitmap", metavar="NAME", show_default="all",
        help="The bitmap that --in-use or --detached is about; may be given again.",
    ),
]  # fmt: skip
AgainstOption = Annotated[
    Path | None,
    typer.Option(
        "--against",
        metavar="BASE",
        help="For rebuild: the disk exactly as it was when the bitmap began.",
        show_default=False,
    ),
]  # fmt: skip


AgainstFormatOption = Annotated[
    DiskFormat | None,
    typer.Option(
        "--against-format", show_default=False,
        help="The format of BASE. A raw copy need not say so; what looks like qcow2 may be a raw disk with one inside.",
    ),
]  # fmt: skip
DataFileOption = Annotated[
    Path | None,
    typer.Option(
        "--data-file", metavar="FILE", help="For rebuild: the image's external data file.", show_default=False
    ),
]
SnapshotOption = Annotated[
    str | None,
    typer.Option("--snapshot", metavar="ID", help="For snapshot: id or name of a snapshot.", show_default=False),
]
LayerOption = Annotated[
    bool,
    typer.Option(
        "--layer-is-newer", show_default=False,
        help="For allocated: your word that the image held nothing when the bitmap began, its backing file as now.",
    ),
]  # fmt: skip
StartOption = Annotated[
    bool,
    typer.Option(
        "--snapshot-is-start", show_default=False,
        help="For snapshot: your word that it was taken just when the bitmap began, over the same backing file.",
    ),
]  # fmt: skip
StaleOption = Annotated[
    bool | None,
    typer.Option(
        "--stale/--no-stale", help="Unite salvaged bits with the stale ones on the disk.",
        show_default="as is right for the policy",
    ),
]  # fmt: skip
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.", show_default=False)]
InteractiveOption = Annotated[
    bool, typer.Option("--interactive", "-i", help="Ask about every step.", show_default=False)
]
UndoFileOption = Annotated[
    Path | None,
    typer.Option(
        "--undo", metavar="FILE", help="Keep what is replaced in this new file.", show_default="IMAGE.qcow2bm-undo"
    ),
]
NoUndoOption = Annotated[bool, typer.Option("--no-undo", help="Keep nothing.", show_default=False)]
SaveOption = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="Save the plan in a new file; write nothing.", show_default=False),
]
ApplyOption = Annotated[
    Path | None,
    typer.Option("--apply", metavar="FILE", help="Carry out a plan that --plan saved.", show_default=False),
]
