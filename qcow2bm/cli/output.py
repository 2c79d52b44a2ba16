"""Printing: tables, pairs and JSON on stdout, warnings on stderr. Nothing else in `cli/` knows how output looks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path

from ..errors import Qcow2bmError
from .terminal import columns, painted, printable, shortened, speaks_unicode, width

FORMAT_VERSION = 1
"""Of every JSON document; rises when a key changes its meaning or goes. New keys may come at any time."""

JsonObject = Mapping[str, object]

_ROWS = 1000
"""Of a JSON array that are written at once."""


class Output(StrEnum):
    """Forms of a result."""

    HUMAN = "human"
    JSON = "json"


def print_json(document: JsonObject, rows: tuple[str, Iterable[JsonObject]] | None = None) -> None:
    r"""One object on stdout, in ASCII: bytes of a name that are not UTF-8 are lone surrogates, `\udcXX`.

    Args:
        rows: name and members of a last array, printed one by one as they come, a line each. There may be millions.
    """
    import json

    text = json.dumps({"format-version": FORMAT_VERSION, **document}, indent=2)
    if rows is None:
        print(text)
        return
    name, members = rows
    print(f"{text[:-2]},\n  {json.dumps(name)}: [", end="")
    encoded, separator = map(json.dumps, members), "\n    "
    while some := list(islice(encoded, _ROWS)):
        print(separator, ",\n    ".join(some), sep="", end="")
        separator = ",\n    "
    print("\n  ]\n}")


def warn(text: str, image: Path | None = None) -> None:
    """A line on stderr, in the form of the errors."""
    place = f"{image}: " if image is not None else ""
    label = painted("warning:", "yellow", sys.stderr)
    print(f"qcow2bm: {printable(place)}{label} {printable(text)}", file=sys.stderr)


def complain(error: Qcow2bmError) -> None:
    """An error on stderr, when the command goes on after it or knows no better place for it."""
    print(f"{painted('qcow2bm:', 'red', sys.stderr)} {printable(error)}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        right: numbers line up at their ends.
        flexible: is shortened on a terminal that is too narrow.
    """

    title: str
    right: bool = False
    flexible: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A text with a colour."""

    text: str
    colour: str | None = None


def print_table(headings: Sequence[Column], rows: Iterable[Sequence[str | Cell]]) -> None:
    """Aligned rows under their headings, two spaces apart, no space at the end of a line."""
    cells = [[_cell(value) for value in row] for row in rows]
    limits = _limits(headings, cells)
    titles = [Cell(column.title, "bold") for column in headings]
    for row in [titles, *cells]:
        print("  ".join(_aligned(headings, row, limits)).rstrip())


_WIDEST = 48


def _cell(value: str | Cell) -> Cell:
    cell = value if isinstance(value, Cell) else Cell(value)
    text = printable(cell.text)
    if not speaks_unicode(sys.stdout):
        # The stream would escape what it lacks only after it was measured.
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return Cell(text, cell.colour)


def _limits(headings: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> list[int]:
    """How wide each column is: as its widest cell, but on a terminal the flexible ones share what is left."""
    widths = [
        max([columns(column.title), *(columns(row[index].text) for row in rows)])
        for index, column in enumerate(headings)
    ]
    available = width(sys.stdout)
    if available is None:
        # Nothing is shortened for a program, but one long name must not push all other rows apart.
        return [min(wide, _WIDEST) if column.flexible else wide for wide, column in zip(widths, headings, strict=True)]
    flexible = [index for index, column in enumerate(headings) if column.flexible]
    excess = sum(widths) + 2 * (len(widths) - 1) - available
    for index in sorted(flexible, key=lambda index: -widths[index]):
        cut = max(0, min(excess, widths[index] - 12))
        widths[index] -= cut
        excess -= cut
    return widths


def _aligned(headings: Sequence[Column], row: Sequence[Cell], limits: Sequence[int]) -> Iterator[str]:
    for column, cell, limit in zip(headings, row, limits, strict=True):
        text = shortened(cell.text, limit) if width(sys.stdout) else cell.text
        padding = " " * (limit - columns(text))
        shown = painted(text, cell.colour)
        yield padding + shown if column.right else shown + padding


def print_pairs(pairs: Iterable[tuple[str, str | Cell]], *, indent: str = "") -> None:
    """A label and a value on each line, the values below each other."""
    known = [(label, _cell(value)) for label, value in pairs]
    widest = max((len(label) for label, _ in known), default=0)
    for label, cell in known:
        print(f"{indent}{painted(label.ljust(widest), 'dim')}  {painted(cell.text, cell.colour)}".rstrip())
