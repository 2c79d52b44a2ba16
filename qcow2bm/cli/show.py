"""`qcow2bm show`: everything about one bitmap."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from .. import api
from ..bitmap.store import State, require_ready
from ..errors import CorruptImageError, Qcow2bmError, UsageError, naming
from ..format.entries import BitmapTableEntry
from .extent_list import members, print_csv, print_rows, rows
from .failures import BROKEN_BITMAP
from .forms import DirtyOnlyOption, ExtentsOption, Form, FormOption
from .options import BitmapArgument, ForceShareOption, ImageArgument
from .output import Cell, JsonObject, complain, print_json, print_pairs
from .reading import bitmap_json, named, reading, state_cell
from .sizes import exact_size, human_size, percent
from .terminal import heat_strip, painted, width

_PIPED_CELLS = 64
_MOST_CELLS = 128


StaleOption = Annotated[
    bool,
    typer.Option(
        "--stale", help="With --extents: read the bits although they are not to be relied on.", show_default=False
    ),
]


def show(
    image: ImageArgument,
    bitmap: BitmapArgument,
    *,
    extents: ExtentsOption = False,
    dirty_only: DirtyOnlyOption = False,
    stale: StaleOption = False,
    force_share: ForceShareOption = False,
    output: FormOption = Form.HUMAN,
) -> int:
    """Show everything about one bitmap, with a heat strip of the disk, or list the ranges it marks.

    A bitmap that is inconsistent, broken or detached has no bits to rely on: it is described without them, with exit
    status 4, and --extents is refused unless --stale asks for what is stored all the same.
    """
    if output is Form.CSV and not extents:
        raise UsageError("csv is a form of extents only", hint="add --extents")
    if (dirty_only or stale) and not extents:
        raise UsageError("--dirty-only and --stale go with --extents")
    with reading(image, force_share=force_share) as opened:
        found = opened.bitmaps
        with naming(image):
            chosen = found[bitmap]
            if extents and not stale:
                require_ready(chosen.stored)
        if extents:
            _print_extents(opened, chosen, output, dirty_only=dirty_only)
            return 0
        return _report(opened, chosen, output)


# Everything about it


def _describe(image: api.Image, bitmap: api.Bitmap) -> dict[str, Any]:
    """The document of a bitmap; what depends on its bits is null if they are not to be relied on."""
    ready = bitmap.state is State.READY
    return {
        "image": str(image.path),
        **bitmap_json(bitmap),
        "virtual-size": image.virtual_size,
        "dirty-bytes": bitmap.dirty_bytes if ready else None,
        "dirty-extents": bitmap.stored.readable_bits().count_runs() if ready else None,
        "table": _table(bitmap),
        "density": [round(share, 6) for share in bitmap.density(_cells())] if ready else None,
    }


def _cells() -> int:
    """As many as fit beside the labels of the strip."""
    columns = width(sys.stdout)
    return _PIPED_CELLS if columns is None else max(8, min(columns - 24, _MOST_CELLS))


def _table(bitmap: api.Bitmap) -> JsonObject | None:
    """Where its table is and what is in it, or None if it cannot be read."""
    entry = bitmap.stored.entry
    try:
        entries = [BitmapTableEntry(value) for value in bitmap.stored.table]
    except CorruptImageError:
        return None
    return {
        "offset": entry.bitmap_table_offset,
        "entries": len(entries),
        "data-clusters": sum(1 for value in entries if value.offset),
        "all-ones": sum(1 for value in entries if value.all_ones),
    }


def _report(image: api.Image, bitmap: api.Bitmap, output: Form) -> int:
    with naming(image.path):
        document = _describe(image, bitmap)
    if output is Form.JSON:
        print_json(document)
    else:
        print_pairs(_facts(document, bitmap))
        if document["density"] is not None:
            _print_strip(document["density"], document["virtual-size"])
    try:
        require_ready(bitmap.stored)
    except Qcow2bmError as error:
        error.image = document["image"]
        complain(error)
        return 0 if bitmap.state is State.ACTIVE else BROKEN_BITMAP
    return 0


def _facts(document: dict[str, Any], bitmap: api.Bitmap) -> Iterator[tuple[str, str | Cell]]:
    yield "bitmap", Cell(document["name"], "bold")
    yield "image", document["image"]
    yield "state", state_cell(bitmap)
    if "fault" in document:
        yield "because", document["fault"]
    yield "recording", "yes" if document["recording"] else "no"
    yield "granularity", exact_size(bitmap.granularity)
    yield "disk", exact_size(document["virtual-size"])
    if document["dirty-bytes"] is not None:
        share = percent(document["dirty-bytes"], document["virtual-size"])
        yield "dirty", f"{exact_size(document['dirty-bytes'])}, {share} of the disk"
        yield "extents", str(document["dirty-extents"])
    table = document["table"]
    if table is not None:
        kinds = f"{table['data-clusters']} of {table['entries']} entries with data, {table['all-ones']} all ones"
        place = f"table at {table['offset']:#x}: {kinds}"
        yield "on disk", f"{human_size(document['bytes-on-disk'])}; {place}"


def _print_strip(density: list[float], virtual_size: int) -> None:
    """The disk from its start to its end, a character for each part: the taller, the more of it is dirty."""
    strip = painted(heat_strip(density, sys.stdout), "green")
    print(f"\n  0 |{strip}| {human_size(virtual_size)}")
    print(f"    each character is {human_size(virtual_size // len(density))} of the disk")


# The ranges it marks


def _print_extents(image: api.Image, bitmap: api.Bitmap, output: Form, *, dirty_only: bool) -> None:
    """One by one as they are read: there may be millions."""
    dirty = ((extent.offset, extent.length) for extent in bitmap.extents(stale=True))
    listed = named(image.path, rows(dirty, image.virtual_size, dirty_only=dirty_only))
    if output is Form.JSON:
        head = {"image": str(image.path), **bitmap_json(bitmap), "virtual-size": image.virtual_size}
        print_json(head, ("extents", members(listed)))
    elif output is Form.CSV:
        print_csv(listed)
    else:
        print_rows(listed, image.virtual_size)
