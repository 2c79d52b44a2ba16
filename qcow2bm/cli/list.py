"""`qcow2bm list`: the bitmaps of one or many images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..errors import Qcow2bmError, naming
from .failures import BROKEN_BITMAP, worst
from .options import ForceShareOption, OutputOption
from .output import Cell, Column, Output, complain, print_json, print_table, warn
from .reading import bitmap_json, complaints, dirty_bytes, dirty_text, reading, state_cell
from .sizes import human_size

ImagesArgument = Annotated[
    list[Path], typer.Argument(metavar="IMAGE...", help="qcow2 images: files or block devices.", show_default=False)
]

_COLUMNS = (
    Column("NAME", flexible=True),
    Column("STATE"),
    Column("RECORDING"),
    Column("GRANULARITY", right=True),
    Column("DIRTY", right=True),
    Column("SHARE", right=True),
    Column("ON DISK", right=True),
)


@dataclass(frozen=True, slots=True)
class Listing:
    """What one image had to say.

    Attributes:
        rows: for the table, one per bitmap.
        document: for JSON.
    """

    path: Path
    status: int
    document: dict[str, object]
    rows: Sequence[Sequence[str | Cell]] = ()


def list_bitmaps(
    images: ImagesArgument, *, force_share: ForceShareOption = False, output: OutputOption = Output.HUMAN
) -> int:
    """List the bitmaps of images: name, state, whether it records, granularity, dirty bytes, bytes on disk.

    Each image is judged by itself: one that cannot be read does not hide the others, and the worst exit status
    counts. Listing is not checking: an inconsistent bitmap is listed with status 0; a broken one, or a damaged
    directory, is reported on stderr with status 4.
    """
    listings = [_listing(path, force_share=force_share) for path in images]
    if output is Output.JSON:
        print_json({"images": [listing.document for listing in listings]})
    else:
        _print(listings)
    return worst(listing.status for listing in listings)


def _listing(path: Path, *, force_share: bool) -> Listing:
    try:
        return _read(path, force_share=force_share)
    except Qcow2bmError as error:
        complain(error)
        problem = {"message": error.message, "hint": error.hint}
        return Listing(path, error.exit_status, {"image": str(path), "status": error.exit_status, "error": problem})


def _read(path: Path, *, force_share: bool) -> Listing:
    with reading(path, force_share=force_share) as image, naming(path):
        found, rows, size = [], [], image.virtual_size
        for bitmap in image.bitmaps:
            dirty = dirty_bytes(bitmap)
            found.append({**bitmap_json(bitmap), "dirty-bytes": dirty})
            rows.append(
                [
                    bitmap.name,
                    state_cell(bitmap),
                    "yes" if bitmap.recording else "no",
                    human_size(bitmap.granularity),
                    *dirty_text(dirty, size),
                    human_size(bitmap.bytes_on_disk),
                ]
            )
        warnings = complaints(image.bitmaps)
    for text in warnings:
        warn(text, path)
    status = BROKEN_BITMAP if warnings else 0
    head = {"image": str(path), "status": status, "virtual-size": size, "warnings": warnings}
    return Listing(path, status, {**head, "bitmaps": found}, rows)


def _print(listings: Sequence[Listing]) -> None:
    """One table for all images; of several, each row begins with its image."""
    readable = [listing for listing in listings if "error" not in listing.document]
    if len(listings) > 1:
        rows = [[str(listing.path), *row] for listing in readable for row in listing.rows or [["-", *[""] * 6]]]
        if rows:
            print_table([Column("IMAGE", flexible=True), *_COLUMNS], rows)
    elif readable and readable[0].rows:
        print_table(_COLUMNS, readable[0].rows)
    elif readable and not readable[0].status:
        print("no bitmaps")
