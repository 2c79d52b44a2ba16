"""Bitmaps are sets of bytes: every operation is held against Python's sets, byte by byte, at any granularities.

The clusters here have 1 to 8 bytes and a granule may be one byte, so that small disks have many chunks and borders.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from itertools import pairwise

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bitmap.algebra import Grained, Ranges, combine, covering, joined, marking, regrained
from qcow2bm.bitmap.bits import BitVector
from qcow2bm.bitmap.chunks import ONES, ZEROES, Chunk, Inverted, Op, combined, inverted
from qcow2bm.format.geometry import Geometry, div_up
from tests.strategies import Bits, bit_vectors

EXACT: dict[Op, Callable[[set[int], set[int]], set[int]]] = {
    Op.OR: operator.or_,
    Op.AND: operator.and_,
    Op.XOR: operator.xor,
    Op.SUBTRACT: operator.sub,
}

sizes = st.integers(1, 300) | st.sampled_from([1, 64, 256])
geometries = st.builds(Geometry, st.integers(0, 3), sizes)
granularities = st.integers(0, 7).map(lambda power: 1 << power)
ops = st.sampled_from(Op)


def bytes_of(bitmap: Grained, size: int) -> set[int]:
    """The bytes of the dirty granules, up to the end of the disk."""
    grain = bitmap.granularity
    dirty = bitmap.bits.slice(0, bitmap.bits.length).search(1)
    return {byte for bit in dirty for byte in range(bit * grain, min(size, (bit + 1) * grain))}


def rounded_out(dirty: set[int], granularity: int, size: int) -> set[int]:
    """The bytes of all granules that hold one of these: the smallest set of granules around them."""
    granules = {byte // granularity for byte in dirty}
    return {byte for byte in range(size) if byte // granularity in granules}


def ranges_of(dirty: set[int]) -> list[tuple[int, int]]:
    """The bytes as ranges (start, end)."""
    return list(joined((byte, byte + 1) for byte in sorted(dirty)))


@st.composite
def bitmaps(draw: st.DrawFn, geometry: Geometry) -> Grained:
    """A bitmap of some granularity; its chunks may be of another image's size, as those of a source are."""
    grain = draw(granularities)
    chunk_bytes = draw(st.sampled_from([1, 2, 8]))
    return Grained(draw(bit_vectors(geometry.bitmap_bits(grain), chunk_bytes)), grain)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, Grained, list[Grained]]:
    """A target in the shape of its image, and sources of any."""
    geometry = draw(geometries)
    grain = draw(granularities)
    target = Grained(draw(bit_vectors(geometry.bitmap_bits(grain), geometry.cluster_size)), grain)
    return geometry, target, draw(st.lists(bitmaps(geometry), min_size=1, max_size=3))


# ---- combining ----


@given(cases(), ops)
def test_the_result_is_the_smallest_that_holds_the_exact_one(
    case: tuple[Geometry, Grained, list[Grained]], op: Op
) -> None:
    geometry, target, sources = case
    size = geometry.virtual_size
    before = [bytes_of(bitmap, size) for bitmap in (target, *sources)]
    exact = functools.reduce(EXACT[op], before)
    found = Grained(combine(op, target, sources, geometry), target.granularity)
    assert bytes_of(found, size) == rounded_out(exact, target.granularity, size)
    assert (found.bits.length, found.bits.chunk_bytes) == (
        geometry.bitmap_bits(target.granularity), geometry.cluster_size,
    )  # fmt: skip
    assert [bytes_of(bitmap, size) for bitmap in (target, *sources)] == before


@given(cases(), ops, st.data())
def test_the_result_reads_alike_whole_and_in_parts(
    case: tuple[Geometry, Grained, list[Grained]], op: Op, data: st.DataObject
) -> None:
    geometry, target, sources = case
    vector = combine(op, target, sources, geometry)
    index = data.draw(st.integers(0, len(vector.chunks) - 1))
    start = data.draw(st.integers(0, vector.chunk_bytes - 1))
    length = data.draw(st.integers(1, vector.chunk_bytes - start))
    assert vector.read(index, start, length) == vector.read(index)[8 * start : 8 * (start + length)]


def test_two_halves_take_a_granule_out_and_one_does_not() -> None:
    """What rounding each source by itself would get wrong."""
    geometry = Geometry(3, 64)
    whole = Grained(BitVector.filled(4, 8, ONES), 16)
    halves = [Grained(BitVector.marked(8, 8, [(place, place + 1)]), 8) for place in (2, 3)]
    assert list(combine(Op.SUBTRACT, whole, halves[:1], geometry).runs()) == [(0, 4)]
    assert list(combine(Op.SUBTRACT, whole, halves, geometry).runs()) == [(0, 1), (2, 4)]
    one = Grained(BitVector.marked(4, 8, [(1, 2)]), 16)
    nothing = Grained(BitVector.filled(4, 8), 16)
    assert list(combine(Op.XOR, nothing, [halves[0], one], geometry).runs()) == [(1, 2)]
    assert not combine(Op.XOR, nothing, [*halves, one], geometry).count()
    assert not combine(Op.AND, one, halves, geometry).count()


def test_what_lies_past_the_end_of_the_disk_does_not_count() -> None:
    """The source covers all of the last granule that there is: three bytes of sixteen."""
    geometry = Geometry(3, 35)
    whole = Grained(BitVector.filled(3, 8, ONES), 16)
    tail = Grained(BitVector.marked(35, 8, [(32, 35)]), 1)
    assert list(combine(Op.SUBTRACT, whole, [tail], geometry).runs()) == [(0, 2)]


# ---- laws, on bitmaps of one granularity ----


@st.composite
def alike(draw: st.DrawFn) -> list[BitVector]:
    """Three vectors of one shape, which may share chunks."""
    length = draw(st.integers(1, 150))
    one, two, three = (draw(bit_vectors(length, 8)) for _ in range(3))
    keep = draw(st.integers(0, len(one.chunks)))
    return [one, BitVector(length, 8, [*one.chunks[:keep], *two.chunks[keep:]]), three]


def same(one: BitVector, two: BitVector) -> bool:
    return list(one.runs()) == list(two.runs())


@given(alike())
def test_laws(vectors: list[BitVector]) -> None:
    a, b, c = vectors
    assert same(a.inverted().inverted(), a)
    assert a.count() + a.inverted().count() == a.length
    assert same(a.combined(Op.AND, b).inverted(), a.inverted().union(b.inverted()))
    assert same(a.combined(Op.SUBTRACT, b), a.combined(Op.AND, b.inverted()))
    assert same(a.combined(Op.SUBTRACT, b, c), a.combined(Op.SUBTRACT, b.union(c)))
    assert same(a.combined(Op.XOR, b), a.union(b).combined(Op.SUBTRACT, a.combined(Op.AND, b)))
    assert same(a.combined(Op.XOR, b).combined(Op.XOR, b), a)
    assert same(a.combined(Op.XOR, b, c), c.combined(Op.XOR, b.combined(Op.XOR, a)))
    assert same(a.combined(Op.AND, b.union(c)), a.combined(Op.AND, b).union(a.combined(Op.AND, c)))
    for op in Op:
        assert same(a.combined(op), a)


class Unreadable:
    """A chunk that nobody needs to read."""

    def read(self, start: int, length: int) -> bitarray:
        raise AssertionError((start, length))


@pytest.mark.parametrize(
    ("op", "first", "second", "expected"),
    [
        (Op.OR, "x", "0", "x"), (Op.OR, "0", "x", "x"), (Op.OR, "1", "x", "1"), (Op.OR, "x", "1", "1"),
        (Op.OR, "x", "x", "x"), (Op.AND, "x", "0", "0"), (Op.AND, "0", "x", "0"), (Op.AND, "1", "x", "x"),
        (Op.AND, "x", "1", "x"), (Op.AND, "x", "x", "x"), (Op.XOR, "x", "0", "x"), (Op.XOR, "0", "x", "x"),
        (Op.XOR, "1", "x", "~x"), (Op.XOR, "x", "1", "~x"), (Op.XOR, "x", "x", "0"), (Op.XOR, "1", "1", "0"),
        (Op.SUBTRACT, "x", "0", "x"), (Op.SUBTRACT, "0", "x", "0"), (Op.SUBTRACT, "1", "x", "~x"),
        (Op.SUBTRACT, "x", "1", "0"), (Op.SUBTRACT, "x", "x", "0"), (Op.SUBTRACT, "1", "0", "1"),
        (Op.SUBTRACT, "0", "1", "0"), (Op.SUBTRACT, "1", "1", "0"),
    ],
)  # fmt: skip
def test_constants_go_through_without_reading(op: Op, first: str, second: str, expected: str) -> None:
    chunk = Unreadable()
    known: dict[str, Chunk] = {"0": ZEROES, "1": ONES, "x": chunk}
    result = combined(op, known[first], known[second])
    if expected == "~x":
        assert isinstance(result, Inverted)
        assert result.base is chunk
        assert inverted(result) is chunk
    else:
        assert result is known[expected]
    assert (inverted(ONES), inverted(ZEROES)) == (ZEROES, ONES)


@pytest.mark.parametrize("op", Op)
def test_a_thousand_sources_do_not_nest(op: Op) -> None:
    total = BitVector.filled(8000, 1000, ONES).combined(Op.XOR, BitVector.marked(8000, 1000, [(7999, 8000)]))
    truth = set(range(7999))
    for index in range(2000):
        bits = bitarray(8000, "little")
        bits.setall(op is Op.AND)
        bits[index] = op is not Op.AND
        total = total.combined(op, BitVector(8000, 1000, [Bits(bits)]))
        truth = EXACT[op](truth, {index} if op is not Op.AND else set(range(8000)) - {index})
    assert {bit for first, end in total.runs() for bit in range(first, end)} == truth


# ---- granularity ----


@given(cases(), granularities)
def test_another_granularity_is_the_smallest_that_loses_nothing(
    case: tuple[Geometry, Grained, list[Grained]], granularity: int
) -> None:
    geometry, _, sources = case
    size = geometry.virtual_size
    for source in sources:
        truth = bytes_of(source, size)
        found = Grained(regrained(source, granularity, geometry), granularity)
        assert bytes_of(found, size) == rounded_out(truth, granularity, size)
        back = Grained(regrained(found, source.granularity, geometry), source.granularity)
        assert truth <= bytes_of(back, size)
        if granularity <= source.granularity:
            assert truth == bytes_of(back, size)


# ---- ranges ----


@st.composite
def some_ranges(draw: st.DrawFn) -> tuple[Geometry, list[tuple[int, int]]]:
    geometry = draw(geometries)
    size = geometry.virtual_size
    pairs = draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), max_size=12))
    return geometry, [(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]]


@given(some_ranges(), granularities)
def test_marking_touches_and_covering_fits(case: tuple[Geometry, list[tuple[int, int]]], granularity: int) -> None:
    geometry, ranges = case
    size = geometry.virtual_size
    within = {byte for start, end in ranges for byte in range(start, end)}
    packed = Ranges.of(ranges)
    touched = Grained(marking(packed, granularity, geometry), granularity)
    assert bytes_of(touched, size) == rounded_out(within, granularity, size)
    inside = Grained(covering(packed, granularity, geometry), granularity)
    outside = set(range(size)) - within
    assert bytes_of(inside, size) == set(range(size)) - rounded_out(outside, granularity, size)


@given(some_ranges())
def test_packed_ranges_are_in_order_and_apart_however_they_come(case: tuple[Geometry, list[tuple[int, int]]]) -> None:
    _, ranges = case
    expected = ranges_of({byte for start, end in ranges for byte in range(start, end)})
    for given_ones in (ranges, sorted(ranges), sorted(ranges, reverse=True)):
        packed = Ranges.of(iter(given_ones))
        assert list(packed) == expected
        assert len(packed) == len(expected)
        assert packed.total == sum(end - start for start, end in expected)


@given(some_ranges())
def test_joined_ranges_are_in_order_and_apart(case: tuple[Geometry, list[tuple[int, int]]]) -> None:
    _, ranges = case
    found = list(joined(sorted(ranges)))
    assert found == ranges_of({byte for start, end in ranges for byte in range(start, end)})
    assert all(one[1] < two[0] for one, two in pairwise(found))


@given(some_ranges(), st.integers(1, 100), st.data())
def test_marked_bits_are_the_runs(
    case: tuple[Geometry, list[tuple[int, int]]], chunk_bytes: int, data: st.DataObject
) -> None:
    geometry, ranges = case
    runs = list(joined(sorted(ranges)))
    vector = BitVector.marked(geometry.virtual_size, chunk_bytes, runs)
    assert list(vector.runs()) == runs
    assert vector.count() == sum(end - start for start, end in runs)
    index = data.draw(st.integers(0, len(vector.chunks) - 1))
    start = data.draw(st.integers(0, chunk_bytes - 1))
    assert vector.read(index, start, 1) == vector.read(index)[8 * start : 8 * start + 8]


def test_a_million_runs_take_little_memory_and_no_chunk_more_than_asked_for() -> None:
    """Every other bit of 2 Mi: 16 bytes for a run, shared by the chunks."""
    runs = [(bit, bit + 1) for bit in range(0, 2 << 20, 2)]
    vector = BitVector.marked(2 << 20, 4096, runs)
    assert len(vector.chunks) == div_up(2 << 20, 8 * 4096)
    assert vector.count() == 1 << 20
    assert vector.read(5, 17, 3).tobytes() == b"\x55\x55\x55"
