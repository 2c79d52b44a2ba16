"""Lists of extents as other programs print them: which ranges of the disk do they mean?

A bitmap can be marked from a list that somebody else made. Four kinds of list are understood, each with its own way
to say what a row is about:

=====================================  ===========================================  ==============================
list                                   rows that count by default                   other choices
=====================================  ===========================================  ==============================
`qemu-img map --output=json`           data                                         zero, present, allocated, all
`nbdinfo --map --json`                 dirty (`qemu:dirty-bitmap:`), data           dirty: all; data: zero, all;
                                       (`base:allocation`), allocated               allocated: present, all
                                       (`qemu:allocation-depth`)
`qcow2bm show --extents`, JSON or CSV  dirty                                        all
CSV or JSON of offset and length       all                                          none
=====================================  ===========================================  ==============================

A list that lies leads to a bitmap that misses a dirty byte, so nothing is guessed: rows must be in order, apart and
within the disk, and all of one kind; a list that was cut short is refused wherever that can be told.

Lists of `qemu-img map`, `base:allocation` and `qemu:allocation-depth` are *maps*: what there is, not what was written.
Zeroes that a guest wrote are no data, and yet a backup that leaves them out brings back what was there before. So a map
with rows that may be such zeroes is not taken by default: somebody has to say which rows are meant. To call ranges
clean by a map, somebody always has to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

from ..errors import UsageError
from ..format.limits import MAX_FILE_SIZE
from .extent_rows import KNOWN, Row, rows

MAX_LIST_BYTES = 256 << 20
"""The largest list that is read: some four million rows."""


class Where(StrEnum):
    """Which rows of a list count."""

    DATA = "data"
    """What reads as data, from whatever layer."""
    ZERO = "zero"
    """What reads as zeroes."""
    PRESENT = "present"
    """What is allocated in any layer."""
    ALLOCATED = "allocated"
    """What is allocated in the image itself and not in its backing chain."""
    DIRTY = "dirty"
    """What a bitmap marks."""
    ALL = "all"
    """Every row."""


class _Kind(NamedTuple):
    """A kind of list: how its rows say where they begin, and what may be asked of a row; the first is the default.

    A map has a test for rows that the default leaves out though they may have been written, and words for them: what
    such a row is, and the choices.
    """

    title: str
    start: str
    choices: Mapping[Where, Callable[[Row], bool]]
    doubtful: Callable[[Row], bool] | None = None
    doubt: str = ""
    advice: str = ""


def parse_extents(
    data: bytes | str, *, where: Where | str | None = None, size: int | None = None, to_unset: bool = False
) -> Iterator[tuple[int, int]]:
    """The ranges (offset, length), in bytes, of the rows that count, in order and apart; row by row.

    Args:
        data: the list, as another program printed it, or the text that `decoded` made of it.
        where: which rows count; by default what the kind of list is about, if that leaves out nothing written.
        size: bytes of the disk that the list is about.
        to_unset: the ranges are to be called clean; then no default of a map is safe.

    Raises:
        UsageError: it is no such list, its rows contradict each other, it goes past the end of the disk, or it is a map
            and `where` is needed.
    """
    text = data if isinstance(data, str) else decoded(data)
    return _chosen(rows(text, size), where, MAX_FILE_SIZE if size is None else size, to_unset=to_unset)


def decoded(data: bytes) -> str:
    """The text of a list, so that its bytes need not be kept.

    Raises:
        UsageError: it is empty, too large, or no text.
    """
    if len(data) > MAX_LIST_BYTES:
        raise UsageError(f"the list of extents is above {MAX_LIST_BYTES} bytes", hint="split it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError("the list of extents is no text in UTF-8", hint=KNOWN) from None
    if not text or text.isspace():  # a strip would make a copy of it
        raise UsageError("the list of extents is empty", hint="did the program that makes it fail?")
    return text


def read_extents(
    data: bytes | str, *, where: Where | str | None = None, size: int | None = None, to_unset: bool = False
) -> list[tuple[int, int]]:
    """All ranges at once, ranges that touch as one; raises as `parse_extents`.

    Ranges for `Edit.unset_ranges` are read with `to_unset`.
    """
    ranges: list[tuple[int, int]] = []
    for offset, length in parse_extents(data, where=where, size=size, to_unset=to_unset):
        if ranges and sum(ranges[-1]) == offset:
            ranges[-1] = ranges[-1][0], ranges[-1][1] + length
        else:
            ranges.append((offset, length))
    return ranges


def _chosen(
    found: Iterator[tuple[str, Row]], where: Where | str | None, size: int, *, to_unset: bool
) -> Iterator[tuple[int, int]]:
    """The ranges of the rows that count; each row comes with its name for error messages."""
    kind: _Kind | None = None
    counts: Callable[[Row], bool] = _every
    end = 0
    for place, row in found:
        known = _kind(place, row)
        if kind is None:
            kind, counts = known, _choice(known, where, to_unset=to_unset)
        if known is not kind:
            raise UsageError(f"{place} is of another kind ({known.title}) than those before it ({kind.title})")
        if where is None and kind.doubtful is not None and kind.doubtful(row):
            raise UsageError(f"{place} {kind.doubt}", hint=kind.advice)
        offset, length = _number(place, row, kind.start), _number(place, row, "length")
        if not length:
            raise UsageError(f"{place} has length 0")
        if offset < end:
            raise UsageError(f"{place} begins at {offset}, before the end {end} of the row before it")
        end = offset + length
        if end > size:
            raise UsageError(f"{place} ends at {end}, past the end of the disk, which is {size}")
        if counts(row):
            yield offset, length


def _choice(kind: _Kind, where: Where | str | None, *, to_unset: bool) -> Callable[[Row], bool]:
    """Which rows of a list count."""
    if where is None and to_unset and kind.doubtful is not None:
        raise UsageError(
            f"{kind.title} says what there is, and not what is clean",
            hint=f"say which rows are clean with --where: {', '.join(kind.choices)}",
        )
    counts = next((counts for name, counts in kind.choices.items() if where in (None, name)), None)
    if counts is None:
        raise UsageError(f"{kind.title} cannot tell '{where}'", hint=f"it can tell {', '.join(kind.choices)}")
    return counts


def _number(place: str, row: Row, key: str) -> int:
    value = row.get(key)
    if type(value) is not int or value < 0:  # True is an int as well
        raise UsageError(f"'{key}' of {place} is no number of bytes: {value!r:.40}")
    return value


# Kinds of lists


def _is(key: str) -> Callable[[Row], bool]:
    return lambda row: row[key] is True


def _has(bits: int, *, off: bool = False) -> Callable[[Row], bool]:
    return lambda row: bool(row["type"] & bits) is not off


def _every(_: Row) -> bool:
    return True


def _none(_: Row) -> bool:
    return False


_MAP = _Kind(
    "a list of `qemu-img map`",
    "start",
    {
        Where.DATA: _is("data"),
        Where.ZERO: _is("zero"),
        Where.PRESENT: _is("present"),
        Where.ALLOCATED: lambda row: row["present"] is True and row["depth"] == 0,
        Where.ALL: _every,
    },
    lambda row: row["present"] is True and row["depth"] == 0 and row["data"] is False,
    "is allocated in the image itself and is no data: zeroes that may have been written",
    "--where allocated counts all that the image holds itself, --where present what any layer holds, "
    "--where data leaves such rows out",
)
_DIRTY_BITMAP = _Kind("a list of qemu:dirty-bitmap", "offset", {Where.DIRTY: _has(1), Where.ALL: _every})
# QEMU's server calls a hole whatever reads as no data, allocated or not.
_ALLOCATION = _Kind(
    "a list of base:allocation",
    "offset",
    {Where.DATA: _has(1, off=True), Where.ZERO: _has(2), Where.ALL: _every},
    _has(1),
    "is a hole, and nothing tells whether it is zeroes that were written",
    "--where data leaves holes out, --where all counts every row; `qemu-img map` and qemu:allocation-depth can tell",
)
_DEPTH = _Kind(
    "a list of qemu:allocation-depth",
    "offset",
    {Where.ALLOCATED: lambda row: row["type"] == 1, Where.PRESENT: lambda row: row["type"] > 0, Where.ALL: _every},
    _none,  # written zeroes are allocated, and so are in the default
)
_SHOWN = _Kind("a list of `qcow2bm show --extents`", "offset", {Where.DIRTY: _is("dirty"), Where.ALL: _every})
_PLAIN = _Kind("a plain list of offset and length", "offset", {Where.ALL: _every})

_FLAGS = {"data": 0, "hole": 1, "zero": 2, "hole,zero": 3}
_DIRT = {"clean": 0, "dirty": 1}
_DEPTHS = {"absent": 0, "unallocated": 0, "local": 1}
_BACKING = re.compile(r"backing depth ([0-9]{1,9})", re.ASCII)


def _kind(place: str, row: Row) -> _Kind:
    """What kind of list a row belongs to. All that any choice looks at is there, and of the right type.

    Raises:
        UsageError: it belongs to none.
    """
    if "start" in row:
        if all(type(row.get(key)) is bool for key in ("data", "zero", "present")) and type(row.get("depth")) is int:
            return _MAP
        if "data" in row and "present" not in row:
            raise UsageError(f"{place} has no 'present'", hint="take `qemu-img map` of QEMU 6.1 or newer")
    elif "type" in row:
        return _of_nbdinfo(place, row)
    elif "dirty" in row:
        if type(row["dirty"]) is bool:
            return _SHOWN
    elif row.keys() == {"offset", "length"}:
        return _PLAIN
    raise UsageError(f"{place} is no extent that is known", hint=KNOWN)


def _of_nbdinfo(place: str, row: Row) -> _Kind:
    """By the description: a type 1 alone may be a hole, dirty, or allocated."""
    number, text = row["type"], row.get("description")
    if type(number) is int and isinstance(text, str):
        depth = _BACKING.fullmatch(text)
        if _DIRT.get(text) == number:
            return _DIRTY_BITMAP
        if _FLAGS.get(text) == number:
            return _ALLOCATION
        if _DEPTHS.get(text) == number or (depth is not None and int(depth[1]) == number > 1):
            return _DEPTH
    raise UsageError(f"{place} is of no metadata context that is known: type {number!r:.40}, {text!r:.40}", hint=KNOWN)
