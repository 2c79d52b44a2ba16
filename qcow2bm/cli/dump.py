"""`qcow2bm dump`: the on-disk structures, field by field, with their offsets; above all those of a damaged image."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from ..bitmap.structures import STRUCTURES, Part, Structure, raw_image
from ..errors import CorruptImageError
from ..format.layout import Field
from .failures import BROKEN_BITMAP, worst
from .meanings import meaning, shown
from .options import ForceShareOption, ImageArgument, OutputOption
from .output import JsonObject, Output, complain, print_json, warn
from .reading import warn_unlocked
from .terminal import painted, printable


class Name(StrEnum):
    """Structures to choose from."""

    HEADER = "header"
    EXTENSIONS = "extensions"
    BITMAP_DIRECTORY = "bitmap-directory"
    BITMAP_TABLES = "bitmap-tables"
    SNAPSHOTS = "snapshots"
    L1 = "l1"
    REFCOUNT_TABLE = "refcount-table"


StructureOption = Annotated[
    list[Name] | None,
    typer.Option("--structure", help="Only this one; may be repeated. All by default.", show_default=False),
]


def dump(
    image: ImageArgument,
    *,
    structure: StructureOption = None,
    force_share: ForceShareOption = False,
    output: OutputOption = Output.HUMAN,
) -> int:
    """Print the raw on-disk structures with their offsets, field by field, as the specification names the fields.

    Works as far as the bytes allow on an image too damaged to be opened: what is wrong is told on stderr, with exit
    status 2, or 4 if it is the bitmaps. Entries of tables that are zero are left out.
    """
    with raw_image(image, force_share=force_share) as raw:
        if force_share:
            warn("read without keeping writers out: what is shown may be stale", image)
        elif not raw.locked:
            warn_unlocked(image)
        found = [raw.read(name) for name in structure or STRUCTURES]
    status = worst(map(_status, found))
    if output is Output.JSON:
        print_json({"image": str(image), "structures": [_json(item) for item in found]})
    else:
        _print(found)
    # A fault of the header is in the way of everything behind it; it is told once.
    for error in {str(item.error): item.error for item in found}.values():
        if error is not None:
            complain(error)
    return status


def _status(item: Structure) -> int:
    if item.error is None:
        return 0
    of_bitmaps = item.name.startswith("bitmap") and isinstance(item.error, CorruptImageError)
    return BROKEN_BITMAP if of_bitmaps else item.error.exit_status


def _print(found: Sequence[Structure]) -> None:
    separator = ""
    for item in found:
        for part in item.parts:
            print(f"{separator}{painted(printable(part.title), 'bold')}")
            _print_fields(item.name, part)
            separator = "\n"


def _print_fields(structure: str, part: Part) -> None:
    """Offset, bytes, name, value, meaning. Names and values line up within a part."""
    names = max((len(field.name) for field in part.fields), default=0)
    values = max((len(shown(field)) for field in part.fields if isinstance(field.value, int)), default=0)
    for field in part.fields:
        line = f"  {field.offset:#012x}  {field.length:>4}  {field.name:<{names}}  {shown(field):<{values}}"
        print(f"{line}  {printable(meaning(structure, field))}".rstrip())


def _json(item: Structure) -> JsonObject:
    return {
        "structure": item.name,
        "error": None if item.error is None else item.error.message,
        "parts": [
            {"title": part.title, "fields": [_field(item.name, field) for field in part.fields]} for part in item.parts
        ],
    }


def _field(structure: str, field: Field) -> JsonObject:
    """Bytes are hexadecimal digits."""
    value = field.value.hex() if isinstance(field.value, bytes) else field.value
    text = meaning(structure, field)
    return {
        "name": field.name,
        "offset": field.offset,
        "length": field.length,
        "value": value,
        **({"meaning": text} if text else {}),
    }
