"""The rows of a list of extents, JSON or CSV, one by one: a list of a million rows is never held as a million objects.

What the rows mean is the business of `extents`. Here they are objects with keys, each with a name for error messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ..errors import UsageError

KNOWN = "lists are read as `qemu-img map --output=json`, `nbdinfo --map --json` and `qcow2bm show --extents` print them"

Row = Mapping[str, Any]


def rows(text: str, size: int | None) -> Iterator[tuple[str, Row]]:
    """The rows of a text that is not blank, each after what to call it.

    Args:
        size: bytes of the disk; a document that says another is refused.

    Raises:
        UsageError: it is neither JSON nor CSV, or ends in the middle of a row.
    """
    found = _VISIBLE.search(text)
    return _json_rows(text, size) if found is not None and found[0] in "[{" else _csv_rows(text)


_VISIBLE = re.compile(r"\S")

# JSON

_DIGITS = 20
"""A number of bytes has no more."""
_WHITESPACE = re.compile(r"[ \t\n\r]*")


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text:.40} is no number of bytes")


def _integer(text: str) -> int:
    return int(text) if len(text) <= _DIGITS else _refuse(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key is there twice")
    return row


_DECODER = json.JSONDecoder(
    object_pairs_hook=_once, parse_int=_integer, parse_float=_refuse, parse_constant=_refuse, strict=True
)


class _Reader:
    """Walks along a JSON text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.skip()

    def skip(self) -> None:
        found = _WHITESPACE.match(self._text, self._at)
        self._at = self._at if found is None else found.end()

    def take(self, character: str) -> bool:
        """Go past a character if it comes next."""
        if not self._text.startswith(character, self._at):
            return False
        self._at += 1
        self.skip()
        return True

    def require(self, character: str, place: str) -> None:
        if not self.take(character):
            found = repr(self._text[self._at : self._at + 20]) if self._at < len(self._text) else "the end"
            raise UsageError(f"the list of extents is no JSON at {place}: '{character}' is missing before {found}")

    def value(self, place: str) -> Any:  # noqa: ANN401 - whatever a JSON text may hold
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UsageError(f"the list of extents is no JSON at {place}: {reason}") from None
        self.skip()
        return value

    def end(self) -> None:
        if self._at != len(self._text):
            raise UsageError("there is more behind the list of extents", hint="it must be one JSON value")


def _json_rows(text: str, size: int | None) -> Iterator[tuple[str, Row]]:
    """The rows of a list, or of the `extents` of an object as `show` prints it."""
    reader = _Reader(text)
    if reader.take("["):
        yield from _array(reader)
    else:
        reader.require("{", "its start")
        yield from _document(reader, size)
    reader.end()


def _array(reader: _Reader) -> Iterator[tuple[str, Row]]:
    """The members of an array whose bracket is behind the reader."""
    if reader.take("]"):
        return
    number = 0
    while True:
        number += 1
        place = f"row {number}"
        row = reader.value(place)
        if not isinstance(row, dict):
            raise UsageError(f"{place} is no object", hint=KNOWN)
        yield place, row
        if reader.take("]"):
            return
        reader.require(",", f"the end of {place}")


def _document(reader: _Reader, size: int | None) -> Iterator[tuple[str, Row]]:
    """The extents of an object whose brace is behind the reader."""
    seen: set[str] = set()
    while not (seen and reader.take("}")):
        if seen:
            reader.require(",", "the end of a value")
        key = reader.value("a key")
        if not isinstance(key, str) or key in seen:
            raise UsageError(f"the list of extents is no JSON: {key!r:.40} is no key, or is there twice")
        seen.add(key)
        reader.require(":", "the end of a key")
        if key == "extents":
            reader.require("[", "its extents")
            yield from _array(reader)
            continue
        value = reader.value(f"'{key:.40}'")
        if key == "virtual-size" and size is not None and value != size:
            raise UsageError(f"the list is about a disk of {value!r:.40} bytes, this one has {size}")
    if "extents" not in seen:
        raise UsageError("the JSON object holds no list of extents", hint=KNOWN)


# CSV

_BOOLEANS = {"true": True, "false": False}
_HEADS = (("offset", "length"), ("offset", "length", "dirty"))


def _csv_rows(text: str) -> Iterator[tuple[str, Row]]:
    """Rows of offset and length, with a head or without, or with `dirty` under a head that says so."""
    if not text.endswith("\n"):
        raise UsageError(
            "the last line of the list of extents is not ended: it may be cut short", hint="end it with a newline"
        )
    names: tuple[str, ...] = _HEADS[0]
    at, number = 0, 0
    while at < len(text):
        end = text.index("\n", at)
        fields = [field.strip() for field in text[at:end].split(",")]
        at, number = end + 1, number + 1
        if number == 1 and tuple(fields) in _HEADS:
            names = tuple(fields)
            continue
        place = f"line {number}"
        if len(fields) != len(names):
            raise UsageError(f"{place} has {len(fields)} fields, not {len(names)} ({','.join(names)})", hint=KNOWN)
        yield place, dict(zip(names, map(_field, fields), strict=True))


def _field(text: str) -> object:
    """A number or a truth value; anything else stays text, which no row may hold."""
    if text.isdigit() and text.isascii() and len(text) <= _DIGITS:
        return int(text)
    return _BOOLEANS.get(text, text)
