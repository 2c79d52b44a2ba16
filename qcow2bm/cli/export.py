"""`qcow2bm export`: bitmaps as a file of their own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from .. import api
from ..bitmap.sidecar import Exported, choose, export_to
from ..bitmap.sidecar_json import exported_json, lineage_json
from ..bitmap.sidecar_lineage import Lineage
from ..bitmap.sidecar_text import KNOWN_BY, Form, lines
from ..bitmap.store import StoredBitmap
from ..errors import UsageError, naming
from ..image.export_file import NewFile
from .completion import bitmap_names
from .options import ImageArgument, MatchOption, OutputOption, ProgressOption
from .output import Output, print_json, warn
from .progress import ProgressBar
from .reading import reading_alone
from .references import same_file
from .sizes import human_size
from .terminal import is_terminal, printable

STREAM = Path("-")

NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[BITMAP]...", show_default=False, autocompletion=bitmap_names,
        help="Their names; without any all that are ready.",
    ),
]  # fmt: skip
FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="The new file; - for standard output.", show_default=False)
]
FormOption = Annotated[
    Form, typer.Option("--format", help="Of the file. All but qcow2bm hold one bitmap; csv and raw know no lineage.")
]
StaleOption = Annotated[
    bool,
    typer.Option(
        "--stale", help="Also bitmaps whose bits may lack writes: in use, or detached. They are marked.",
        show_default=False,
    ),
]  # fmt: skip
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace FILE, if it is an export; raw is known by nothing.", show_default=False)
]


def export(
    image: ImageArgument,
    *,
    bitmaps: NamesArgument = None,
    target: FileArgument,
    match: MatchOption = None,
    form: FormOption = Form.QCOW2BM,
    stale: StaleOption = False,
    force: ForceOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Write bitmaps into a file of their own, from which `qcow2bm import` takes them.

    The file has a checksum for every part of it, and knows the image: its virtual size, and a digest of where its
    clusters are. FILE comes last; it is there whole or not at all.
    """
    file = Path(target)
    _require_sense(image, file, output)
    hint = "shut the VM down first: a bitmap that it records in is not whole before that"
    with reading_alone(image, hint) as opened:
        with naming(image):
            chosen = _chosen(opened, bitmaps or [], match or [], stale=stale)
        _require_file(opened, target, form, chosen)
        with ProgressBar(wanted=progress) as bar, _stream(file, form, force=force) as out:
            lineage, said = _write(out, opened, chosen, form, bar)
    for one in said:
        if one.stale:
            warn(f"bitmap '{one.name}' is marked as stale: it may lack writes", image)
    if file != STREAM:
        head = {"image": str(image), "file": str(file), "format": form.value, "file-bytes": file.stat().st_size}
        _report(head, lineage, said, output)
    return 0


def _require_sense(image: Path, file: Path, output: Output) -> None:
    if file == STREAM and output is Output.JSON:
        raise UsageError("standard output cannot take both the bitmaps and a report", hint="name a file")
    if file != STREAM and same_file(image, file):
        raise UsageError(f"{file} is the image itself", hint="the file to write comes last")


def _chosen(
    image: api.Image, names: Sequence[str], patterns: Sequence[str], *, stale: bool
) -> tuple[StoredBitmap, ...]:
    """The bitmaps asked for, or all, with a warning for each that is left out of all."""
    matching = image.draft().names(*patterns) if patterns else []
    chosen = choose(image.qcow2, [*names, *matching], stale=stale)
    if not names and not patterns:
        exported = {bitmap.place for bitmap in chosen}
        for bitmap in image.bitmaps:
            if bitmap.stored.place not in exported:
                warn(f"bitmap '{bitmap.name}' is {bitmap.state.value} and left out", image.path)
    return chosen


def _require_file(image: api.Image, target: str, form: Form, chosen: Sequence[StoredBitmap]) -> None:
    if target in image.bitmaps.names:
        raise UsageError(
            f"'{target}' is a bitmap of {image.path}, and would be the name of the file",
            hint=f"the file comes last; write ./{target} if that is what it shall be called",
        )
    if form is not Form.QCOW2BM and len(chosen) != 1:
        raise UsageError(f"{form.value} holds one bitmap, and {len(chosen)} are to be exported", hint="name one")
    if target == str(STREAM) and form in (Form.QCOW2BM, Form.RAW) and is_terminal(sys.stdout):
        raise UsageError("this would fill the terminal with bytes", hint="name a file, or lead the output into one")


@contextlib.contextmanager
def _stream(file: Path, form: Form, *, force: bool) -> Iterator[BinaryIO]:
    if file == STREAM:
        if not hasattr(sys.stdout, "buffer"):
            raise UsageError("standard output is closed", hint="name a file")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with NewFile(file, force=force, like=KNOWN_BY[form]) as out:
        yield out


def _write(
    out: BinaryIO,
    image: api.Image,
    chosen: Sequence[StoredBitmap],
    form: Form,
    progress: Callable[[int, int], object],
) -> tuple[Lineage, tuple[Exported, ...]]:
    if form is Form.QCOW2BM:
        return export_to(out, image.qcow2, chosen, progress=progress)
    lineage, said, pieces = lines(image.qcow2, chosen[0], form, progress=progress)
    out.writelines(pieces)
    return lineage, (said,)


def _report(head: dict[str, str | int], lineage: Lineage, said: Sequence[Exported], output: Output) -> None:
    if output is Output.JSON:
        print_json({**head, "lineage": lineage_json(lineage), "bitmaps": [exported_json(one) for one in said]})
        return
    for one in said:
        print(
            f"'{printable(one.name)}': {human_size(one.dirty_bytes)} dirty, granularity {human_size(one.granularity)}"
        )
    print(f"wrote {human_size(int(head['file-bytes']))} to {printable(head['file'])}")
