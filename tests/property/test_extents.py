"""Lists of extents, as each program prints them, mean the ranges that they were made from; anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bitmap.extents import Where, parse_extents, read_extents
from qcow2bm.errors import UsageError

Rows = list[tuple[int, int, int]]
"""Offset, length and a number from 0 to 3 that says what there is."""


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Rows in order, with gaps or without."""
    edges = sorted(draw(st.sets(st.integers(0, 1 << 62), min_size=2, max_size=12)))
    spans = [(start, end - start) for start, end in pairwise(edges) if draw(st.integers(0, 3))]
    return [(start, length, draw(st.integers(0, 3))) for start, length in spans]


def ranges(chosen: Rows) -> list[tuple[int, int]]:
    """Those that touch as one."""
    found: list[tuple[int, int]] = []
    for offset, length, _ in chosen:
        if found and sum(found[-1]) == offset:
            found[-1] = found[-1][0], found[-1][1] + length
        else:
            found.append((offset, length))
    return found


def as_map(found: Rows) -> str:
    """As `qemu-img map --output=json`: bit 0 of the number is data, bit 1 that it lies in a backing file."""
    lines = [
        f'{{ "start": {start}, "length": {length}, "depth": {number >> 1}, "present": {json.dumps(number != 2)}, '
        f'"zero": {json.dumps(not number & 1)}, "data": {json.dumps(bool(number & 1))}, "offset": {start + 7}}}'
        for start, length, number in found
    ]
    return "[" + ",\n".join(lines) + "]\n"


def as_nbdinfo(words: tuple[str, ...]) -> Callable[[Rows], str]:
    """As `nbdinfo --map --json` describes the types of a context."""

    def build(found: Rows) -> str:
        lines = [
            f'{{ "offset": {start}, "length": {length}, "type": {number % len(words)}, '
            f'"description": "{words[number % len(words)]}"}}'
            for start, length, number in found
        ]
        return "[\n" + ",\n".join(lines) + "\n]\n"

    return build


def as_shown(found: Rows) -> str:
    members = [{"offset": start, "length": length, "dirty": bool(number & 1)} for start, length, number in found]
    return json.dumps({"name": "b", "virtual-size": 1 << 62, "density": None, "extents": members}, indent=2) + "\n"


def as_csv(found: Rows) -> str:
    lines = [f"{start},{length},{'true' if number & 1 else 'false'}\n" for start, length, number in found]
    return "offset,length,dirty\n" + "".join(lines)


def as_plain(found: Rows) -> str:
    return "".join(f"{start},{length}\r\n" for start, length, _ in found)


DIRTY = ("clean", "dirty")
STATUS = ("data", "hole", "zero", "hole,zero")
DEPTH = ("absent", "local", "backing depth 2", "backing depth 3")

FORMS: list[tuple[Callable[[Rows], str], Where | None, Callable[[int], bool]]] = [
    (as_map, Where.DATA, lambda n: n & 1 == 1),
    (as_map, Where.ZERO, lambda n: n & 1 == 0),
    (as_map, Where.PRESENT, lambda n: n != 2),
    (as_map, Where.ALLOCATED, lambda n: n in (0, 1)),
    (as_map, Where.ALL, lambda _: True),
    (as_nbdinfo(DIRTY), None, lambda n: n & 1 == 1),
    (as_nbdinfo(DIRTY), Where.ALL, lambda _: True),
    (as_nbdinfo(STATUS), Where.DATA, lambda n: n in (0, 2)),
    (as_nbdinfo(STATUS), Where.ZERO, lambda n: n in (2, 3)),
    (as_nbdinfo(DEPTH), None, lambda n: n == 1),
    (as_nbdinfo(DEPTH), Where.PRESENT, lambda n: n > 0),
    (as_shown, None, lambda n: n & 1 == 1),
    (as_csv, None, lambda n: n & 1 == 1),
    (as_csv, Where.ALL, lambda _: True),
    (as_plain, None, lambda _: True),
]


@pytest.mark.parametrize(("form", "where", "counts"), FORMS)
@given(found=rows())
def test_a_list_means_what_it_was_made_from(
    form: Callable[[Rows], str], where: Where | None, counts: Callable[[int], bool], found: Rows
) -> None:
    data = form(found).encode()
    if data:
        expected = [row for row in found if counts(row[2])]
        assert list(parse_extents(data, where=where, size=1 << 62)) == [row[:2] for row in expected]
        assert read_extents(data, where=where) == ranges(expected)


MAPS: list[tuple[Callable[[Rows], str], Callable[[int], bool], Callable[[int], bool]]] = [
    (as_map, lambda n: n & 1 == 1, lambda n: n == 0),
    (as_nbdinfo(STATUS), lambda n: n in (0, 2), lambda n: n in (1, 3)),
    (as_nbdinfo(DEPTH), lambda n: n == 1, lambda _: False),
]
"""Maps: what counts by default, and what may be zeroes that were written and is in no default."""


@pytest.mark.parametrize(("form", "counts", "doubtful"), MAPS)
@given(found=rows())
def test_a_map_is_taken_by_default_only_if_nothing_written_is_left_out(
    form: Callable[[Rows], str], counts: Callable[[int], bool], doubtful: Callable[[int], bool], found: Rows
) -> None:
    data = form(found).encode()
    if any(doubtful(number) for *_, number in found):
        with pytest.raises(UsageError) as caught:
            read_extents(data)
        assert "--where data" in str(caught.value.hint)
    else:
        assert read_extents(data) == ranges([row for row in found if counts(row[2])])
    if found:
        with pytest.raises(UsageError, match="says what there is, and not what is clean"):
            read_extents(data, to_unset=True)
    assert read_extents(data, where=Where.ALL, to_unset=True) == ranges(found)


@pytest.mark.parametrize("form", [as_map, as_nbdinfo(DIRTY), as_shown, as_csv, as_plain])
@given(found=rows(), data=st.data())
def test_a_list_that_was_cut_short_is_refused_or_ends_with_a_row(
    form: Callable[[Rows], str], found: Rows, data: st.DataObject
) -> None:
    text = form(found).rstrip("\r\n") + "\n"
    cut = data.draw(st.integers(0, max(0, len(text) - 2)))
    try:
        seen = read_extents(text[:cut].encode(), where=Where.ALL)
    except UsageError:
        return
    assert form in (as_csv, as_plain)
    assert text[:cut].endswith("\n")
    assert seen == ranges([row for row in found if seen and row[0] < sum(seen[-1])])


texts = st.text('[]{}",:0159-+.eE\n \\truefalsnNdioxlgthyp', max_size=60)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["offset", "start", "length", "type", "description", "dirty", "data", "extents"]), inner
    ),
    max_leaves=8,
)  # fmt: skip


@given(st.binary(max_size=80) | texts.map(str.encode) | values.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused_with_words(data: bytes) -> None:
    try:
        found = read_extents(data, where=Where.ALL, size=1 << 40)
    except UsageError as refusal:
        message = refusal.message
    else:
        message = ""
        assert all(0 <= offset < offset + length <= 1 << 40 for offset, length in found)
    assert "\n" not in message
    assert len(message) < 300
