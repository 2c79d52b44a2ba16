"""What depends on where output goes: colour, width, characters, and text that comes from an image.

A bitmap's name is any bytes. Printed as it is, one could move the cursor, retitle the window or hide another
line, so everything that is not plainly visible is shown as an escape.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_BYTE = range(0xDC80, 0xDD00)
"""Surrogates that stand for bytes that are not UTF-8."""

COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34"}


def printable(text: object) -> str:
    r"""`text` with everything invisible as a backslash escape; bytes that are not UTF-8 as `\xNN`."""
    plain = str(text)
    return plain if plain.isprintable() else "".join(map(_escaped, plain))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if code in _BYTE:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return _SHORT.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def columns(text: str) -> int:
    """Terminal columns of a printable text: East Asian characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def shortened(text: str, width: int) -> str:
    """`text` cut to `width` columns, with an ellipsis where something is missing."""
    if columns(text) <= width:
        return text
    mark = "…" if speaks_unicode(sys.stdout) else "~"
    kept = ""
    for char in text:
        if columns(kept + char) >= width:
            break
        kept += char
    return kept + mark


def is_terminal(stream: TextIO) -> bool:
    """True if a human is at the other end."""
    return not stream.closed and stream.isatty()


def speaks_unicode(stream: TextIO) -> bool:
    """True if block elements arrive as such."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") in {"utf8", "utf16", "utf32"}


def painted(text: str, colour: str | None, stream: TextIO | None = None) -> str:
    """`text` in a colour, if it goes to a terminal that wants any (https://no-color.org)."""
    if colour is None or not wants_colour(stream or sys.stdout):
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def wants_colour(stream: TextIO) -> bool:
    """True if `stream` is a terminal, and neither NO_COLOR nor a dumb terminal speaks against colour."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width(stream: TextIO) -> int | None:
    """Columns of the terminal, or None where output is piped and may be as wide as it likes."""
    return shutil.get_terminal_size().columns if is_terminal(stream) else None


_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*%@"


def heat_strip(shares: Sequence[float], stream: TextIO) -> str:
    """One character for each share of 0 to 1. Only nothing is blank, and only everything is full."""
    levels = _BLOCKS if speaks_unicode(stream) else _ASCII
    top = len(levels) - 1
    return "".join(levels[0 if not share else top if share >= 1 else 1 + int(share * (top - 1))] for share in shares)
