"""`qcow2bm import`: bitmaps from a file into an image, or a look at what the file holds."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from .. import api
from ..bitmap.edit import Edit
from ..bitmap.extents import Where
from ..bitmap.sidecar_import import ImportPolicy
from ..bitmap.sidecar_import import import_bitmaps as add
from ..bitmap.sidecar_json import exported_json, lineage_json
from ..bitmap.sidecar_lineage import Lineage, Standing
from ..bitmap.sidecar_model import Export, ExportedBitmap
from ..bitmap.sidecar_reader import read_from
from ..bitmap.sidecar_text import LARGEST, Form, read_extent_file
from ..errors import BitmapNotFoundError, UsageError, naming
from ..image.export_file import Input
from .change import How, change, changing
from .options import GranularityOption, MatchOption
from .output import Column, Output, print_json, print_pairs, print_table, warn
from .reading import reading_alone
from .sizes import exact_size, human_size, percent

STREAM = Path("-")

ImageArgument = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGE", help="A qcow2 image: a file or a block device. With --list it may be left out.",
        show_default=False,
    ),
]  # fmt: skip
FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="What `export` made; - for standard input.", show_default=False),
]
NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[BITMAP]...", help="Their names in FILE; without any all.", show_default=False),
]
ListOption = Annotated[
    bool, typer.Option("--list", help="Show what FILE holds and check all of it; change nothing.", show_default=False)
]
FormOption = Annotated[Form, typer.Option("--format", help="Of FILE. raw needs --as and -g; csv needs --as.")]
AsOption = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="Another name for the bitmap.", show_default=False)
]
MergeOption = Annotated[
    bool,
    typer.Option("--merge", help="Add to bitmaps that are there, at their granularity.", show_default=False),
]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Remove bitmaps that are there, whatever their state.", show_default=False)
]
RecordingOption = Annotated[
    bool | None,
    typer.Option("--enabled/--disabled", help="Whether QEMU records writes in them.", show_default="as they did"),
]
StaleOption = Annotated[
    bool,
    typer.Option("--stale", help="Also bitmaps that may lack writes; they then do not record.", show_default=False),
]
LineageOption = Annotated[
    bool,
    typer.Option(
        "--force-lineage", show_default=False,
        help="You know that the bitmaps are right for this disk as it is now.",
    ),
]  # fmt: skip

UntouchedOption = Annotated[
    bool,
    typer.Option(
        "--untouched", help="Refuse also if the image file was written to at all since the export.", show_default=False
    ),
]
WhereOption = Annotated[
    Where | None,
    typer.Option(
        "--where", show_default=False,
        help="Which rows of another program's list count. Needed for a map with zeroes that may have been written.",
    ),
]  # fmt: skip

_COLUMNS = (
    Column("NAME", flexible=True),
    Column("STATE"),
    Column("RECORDING"),
    Column("GRANULARITY", right=True),
    Column("DIRTY", right=True),
    Column("%", right=True),
)
_STANDING = {
    Standing.UNTOUCHED: "untouched since the export",
    Standing.SAME_MAPPING: "the mapping is the same; the file was written to since the export, or has no time stamp "
    "that tells",
    Standing.OTHER: "another image, or one that a guest has written to since the export",
}
_IN_PLACE = (
    "its clusters are where they were, but the file was written to since the export, or has no time stamp that tells: "
    "if not only its bitmaps were changed, but a guest has rewritten clusters in place, the imported bitmaps lack that"
)


@changing("import")
def import_bitmaps(
    image: ImageArgument,
    file: FileArgument = None,
    bitmaps: NamesArgument = None,
    *,
    match: MatchOption = None,
    show: ListOption = False,
    form: FormOption = Form.QCOW2BM,
    where: WhereOption = None,
    new_name: AsOption = None,
    merge: MergeOption = False,
    replace: ReplaceOption = False,
    granularity: GranularityOption = None,
    recording: RecordingOption = None,
    stale: StaleOption = False,
    force_lineage: LineageOption = False,
    untouched: UntouchedOption = False,
    how: How,
) -> int:
    """Take bitmaps from a file that `qcow2bm export` made, all of them or none.

    Refused if anything in the file is damaged, or if the image is not the one they were exported from with its
    clusters where they were: by then a guest has written what they do not mark, and an incremental backup would miss
    it. Clusters that a guest has rewritten in place are not noticed; if the file was written to at all, a warning says
    so, and --untouched refuses. Changes of bitmaps, refcounts and snapshots do no harm. No time stamp tells of a block
    device or an external data file, and one that was set back deceives.

    With -g new bitmaps get another granularity; whatever was dirty stays dirty. Lists of extents as other programs
    print them (--format json or csv) and bare bits (raw) know no lineage and need --force-lineage.
    """
    policy = ImportPolicy(merge, replace, granularity, recording, stale, force_lineage, untouched)
    if where is not None and form not in (Form.JSON, Form.CSV):
        raise UsageError("--where is about lists that other programs made", hint="they are --format json or csv")
    if show:
        if bitmaps or match or new_name is not None or policy != ImportPolicy() or how.dry_run or how.undo is not None:
            raise UsageError("--list shows all and changes nothing: it goes without options of the import")
        return _list(image if file is not None else None, file or image, form, how.output)
    if file is None:
        raise UsageError("no FILE is named", hint="write `qcow2bm import IMAGE FILE`, - for standard input")
    with _opened(file) as source:
        # All is read before the image is opened: it may take long to come through a pipe, and from this very image.
        early = read_from(source) if form is Form.QCOW2BM else None
        if form is not Form.QCOW2BM:
            source.take_in(LARGEST[form])

        def edit(opened: api.Image, draft: Edit) -> None:
            held = early or _read_extents(source, form, opened, name=new_name, granularity=granularity, where=where)
            names = [*(bitmaps or []), *_matching(held, match or [])]
            # What knows no lineage does not know its granularity either: -g has said it.
            how_in = policy if held.lineage is not None else dataclasses.replace(policy, granularity=None)
            if add(draft, held, names, policy=how_in, name=new_name) is Standing.SAME_MAPPING:
                warn(_IN_PLACE, image)
            for one in held.bitmaps:
                if one.stale and (not names or one.name in names):
                    warn(f"bitmap '{one.name}' was stale when it was exported: it may lack writes", image)

        return change(image, edit, how)


def _opened(file: Path) -> Input:
    if file != STREAM:
        return Input.open(file)
    if sys.stdin is None:
        raise UsageError("standard input is closed", hint="name a file")
    return Input.of(sys.stdin.buffer, "standard input")


def _read_extents(
    source: Input, form: Form, image: api.Image, *, name: str | None, granularity: int | None, where: Where | None
) -> Export:
    """One bitmap in a form that other programs know. Ranges for a bitmap that is there are read as fine as it is."""
    if granularity is None and form is not Form.RAW and name is not None and name in image.bitmaps.names:
        granularity = image.bitmaps[name].granularity
    return read_extent_file(source, form, image.qcow2, name=name, granularity=granularity, where=where)


def _matching(held: Export, patterns: Sequence[str]) -> Iterator[str]:
    """The names that match a pattern; raises BitmapNotFoundError if a pattern matches none."""
    for pattern in patterns:
        matching = [one.name for one in held.bitmaps if fnmatchcase(one.name, pattern)]
        if not matching:
            raise BitmapNotFoundError(f"no bitmap of {held.name} matches '{pattern}'")
        yield from matching


# --list


def _list(image: Path | None, file: Path, form: Form, output: Output) -> int:
    """What an export file holds and, if there is an image, how that stands to it."""
    if form is not Form.QCOW2BM:
        raise UsageError("--list is for export files", hint="the other forms are text, or bare bits")
    with _opened(file) as source:
        held = read_from(source)
        assert held.lineage is not None, "an export file always has one"
        found = _standing(image, held.lineage)
        if output is Output.JSON:
            document: dict[str, object] = {
                "file": str(file),
                "file-bytes": source.at,
                "lineage": lineage_json(held.lineage),
                "image": None if image is None else str(image),
                "standing": None if found is None else found.value,
                "bitmaps": [exported_json(one) for one in held.bitmaps],
            }
            print_json(document)
            return 0
        print_pairs(_facts(held.lineage, file, source.at, found))
        print()
        print_table(_COLUMNS, [_row(one) for one in held.bitmaps])
    return 0


def _standing(image: Path | None, lineage: Lineage) -> Standing | None:
    if image is None:
        return None
    hint = "shut the VM down first, or list the file without the image"
    with reading_alone(image, hint) as opened, naming(image):
        return lineage.standing(opened.qcow2)


def _facts(lineage: Lineage, file: Path, length: int, found: Standing | None) -> Iterator[tuple[str, str]]:
    made = datetime.fromtimestamp(lineage.made_ns // 10**9, UTC)
    yield "file", f"{file}, {human_size(length)}, whole and undamaged"
    yield "made", f"{made:%Y-%m-%d %H:%M:%S} UTC by {lineage.tool}"
    yield "from", lineage.image
    yield "disk", exact_size(lineage.virtual_size)
    yield "image id", lineage.image_id.hex()
    if found is not None:
        yield "the image", _STANDING[found]


def _row(bitmap: ExportedBitmap) -> tuple[str, ...]:
    return (
        bitmap.name,
        "stale" if bitmap.stale else "ready",
        "yes" if bitmap.recording else "no",
        human_size(bitmap.granularity),
        human_size(bitmap.dirty_bytes),
        percent(bitmap.dirty_bytes, bitmap.virtual_size),
    )
