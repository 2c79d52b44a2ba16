"""Sizes and ranges as users write them, and bytes as users read them. Units are binary throughout."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import UsageError

_UNITS = "kMGTPE"
_SIZE = re.compile(r"(?:([0-9]+)(?:([kmgtpe])(?:ib)?|b)?|0x([0-9a-f]+))", re.ASCII | re.IGNORECASE)
_HINT = "sizes are written 512, 64k, 1M, 10G or 2T (powers of 1024), or 0x10000"


def parse_size(text: str) -> int:
    """Bytes from `512`, `64k`, `64KiB`, `1M`, `10G`, `2T` or `0x10000`.

    Raises:
        UsageError: it is none of these.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UsageError(f"'{text}' is not a size", hint=_HINT)
    number, unit, hexadecimal = found.groups()
    if hexadecimal is not None:
        return int(hexadecimal, 16)
    if len(number) > 20:
        raise UsageError(f"'{text}' is larger than any disk")
    return int(number) << 10 * (_UNITS.lower().index(unit.lower()) + 1 if unit else 0)


class Resizing(NamedTuple):
    """A new size, or how far it is from the old one; `sign` is 0 for a size as such."""

    size: int
    sign: int

    def of(self, old: int) -> int:
        """The new size of what has `old` bytes; below 0 is no size, which others say."""
        return old + self.sign * self.size if self.sign else self.size


def parse_resizing(text: str) -> Resizing:
    """A new size as `parse_size` takes it, or `+SIZE` or `-SIZE`.

    Raises:
        UsageError: it is none of these.
    """
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    return Resizing(parse_size(text[1:] if sign else text), sign)


class Range(NamedTuple):
    """Bytes of the disk."""

    offset: int
    length: int


def parse_range(text: str) -> Range:
    """A range from `OFF+LEN`, both as `parse_size` takes them.

    Raises:
        UsageError: it is no range.
    """
    offset, plus, length = text.partition("+")
    if not plus:
        raise UsageError(f"'{text}' is not a range", hint="ranges are written OFFSET+LENGTH, for example 1G+64k")
    return Range(parse_size(offset), parse_size(length))


def human_size(number: int) -> str:
    """Bytes in the largest unit that keeps the number at 1 or above: `64 KiB`, `1.5 GiB`."""
    amount, unit = float(number), "B"
    for prefix in _UNITS:
        # 1023.95 would print as 1024.0: it belongs to the next unit.
        if amount < 1023.95:
            break
        amount, unit = amount / 1024, f"{prefix.upper()}iB"
    text = f"{amount:.0f}" if unit == "B" else f"{amount:.1f}".removesuffix(".0")
    return f"{text} {unit}"


def exact_size(number: int) -> str:
    """Bytes for reading and for copying: `1.5 GiB (1610612736 bytes)`."""
    return f"{human_size(number)} ({number} bytes)" if number >= 1024 else f"{number} bytes"


def percent(part: int, whole: int) -> str:
    """A share. Only nothing is `0 %` and only everything `100 %`: in a backup the difference matters."""
    if not part or not whole:
        return "0 %"
    if part == whole:
        return "100 %"
    share = 100 * part / whole
    return "<0.1 %" if share < 0.1 else ">99.9 %" if share > 99.9 else f"{share:.1f} %"
