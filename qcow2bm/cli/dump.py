"""`qcow2bm dump`: the on-disk structures, field by field, with their offsets; above all those of a damaged image."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import islice
from typing import Annotated

import typer

from ..bitmap.structures import STRUCTURES, Entries, Part, Structure, raw_image
from ..errors import CorruptImageError
from ..format.layout import Field
from .failures import BROKEN_BITMAP, worst
from .meanings import meaning, shown
from .options import ForceShareOption, ImageArgument, OutputOption
from .output import FORMAT_VERSION, Output, complain, warn
from .reading import warn_unlocked
from .terminal import painted, printable

_AT_ONCE = 1000
"""Lines of text, or fields, that are written at once."""


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
    _write(_json(str(image), found) if output is Output.JSON else _text(found))
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


def _write(pieces: Iterator[str]) -> None:
    """Write text as it comes, in pieces that are worth a call: of one structure there may be millions of fields."""
    while some := "".join(islice(pieces, _AT_ONCE)):
        sys.stdout.write(some)


def _text(found: Sequence[Structure]) -> Iterator[str]:
    separator = ""
    for item in found:
        for part in item.parts:
            yield f"{separator}{painted(printable(part.title), 'bold')}\n"
            yield from _field_lines(item.name, part)
            separator = "\n"


def _field_lines(structure: str, part: Part) -> Iterator[str]:
    """Offset, bytes, name, value, meaning. Names and values line up within a part."""
    names, values = _widths(part.fields)
    for field in part.fields:
        line = f"  {field.offset:#012x}  {field.length:>4}  {field.name:<{names}}  {shown(field):<{values}}"
        yield f"{line}  {printable(meaning(structure, field))}".rstrip() + "\n"


def _widths(fields: Sequence[Field] | Entries) -> tuple[int, int]:
    """Characters of the longest name and of the longest value."""
    if isinstance(fields, Entries):
        return len(f"[{fields.last}]"), len(f"{fields.largest:#x}")
    values = (len(shown(field)) for field in fields if isinstance(field.value, int))
    return max((len(field.name) for field in fields), default=0), max(values, default=0)


# JSON in pieces, laid out as `print_json` does it


def _json(image: str, found: Sequence[Structure]) -> Iterator[str]:
    head = json.dumps({"format-version": FORMAT_VERSION, "image": image}, indent=2)
    yield f'{head[:-2]},\n  "structures": '
    yield from _array(4, map(_structure_json, found))
    yield "\n}\n"


def _array(indent: int, members: Iterable[Iterable[str]]) -> Iterator[str]:
    """An array whose members come in pieces, each member on lines of its own."""
    margin = "\n" + indent * " "
    separator = "["
    for member in members:
        yield separator + margin
        yield from member
        separator = ","
    yield "[]" if separator == "[" else f"{margin[:-2]}]"


def _structure_json(item: Structure) -> Iterator[str]:
    error = None if item.error is None else item.error.message
    yield f'{{\n      "structure": {json.dumps(item.name)},\n      "error": {json.dumps(error)},\n      "parts": '
    yield from _array(8, (_part_json(item.name, part) for part in item.parts))
    yield "\n    }"


def _part_json(structure: str, part: Part) -> Iterator[str]:
    yield f'{{\n          "title": {json.dumps(part.title)},\n          "fields": '
    yield from _array(12, ((_field_json(structure, field),) for field in part.fields))
    yield "\n        }"


def _field_json(structure: str, field: Field) -> str:
    """Bytes are hexadecimal digits."""
    value = f'"{field.value.hex()}"' if isinstance(field.value, bytes) else field.value
    text = meaning(structure, field)
    said = f',\n              "meaning": {json.dumps(text)}' if text else ""
    return (
        f'{{\n              "name": {json.dumps(field.name)},\n              "offset": {field.offset},\n'
        f'              "length": {field.length},\n              "value": {value}{said}\n            }}'
    )
