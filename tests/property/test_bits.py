"""The bit vector engine does what sets of numbers do, and reads no more than it must."""

from __future__ import annotations

from itertools import pairwise

import pytest
from bitarray import bitarray
from bitarray.util import zeros
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bitmap.bits import BitVector
from qcow2bm.bitmap.chunks import ONES, ZEROES
from qcow2bm.bitmap.granularity import coarsen, refine
from tests.strategies import Bits, bit_vectors


def members(vector: BitVector) -> set[int]:
    """The set bits, one by one through `slice`."""
    return {index for index in range(vector.length) if vector.slice(index, index + 1)[0]}


def from_chunks(vector: BitVector) -> set[int]:
    """The set bits from the chunks themselves, knowing nothing of vectors."""
    bits = bitarray(endian="little")
    for chunk in vector.chunks:
        bits += chunk.read(0, vector.chunk_bytes)
    return {index for index in range(vector.length) if bits[index]}


@st.composite
def alike(draw: st.DrawFn) -> tuple[BitVector, BitVector, BitVector]:
    """Three vectors of one shape."""
    size, length = draw(st.sampled_from([1, 2, 8])), draw(st.integers(0, 150))
    one, two, three = (draw(bit_vectors(length, size)) for _ in range(3))
    return one, two, three


@st.composite
def with_ranges(draw: st.DrawFn) -> tuple[BitVector, int, int]:
    vector = draw(bit_vectors())
    start = draw(st.integers(0, vector.length))
    return vector, start, draw(st.integers(start, vector.length))


# ---- reading ----


@given(bit_vectors())
def test_count_and_slice_see_the_bits_of_the_chunks_up_to_the_end(vector: BitVector) -> None:
    truth = from_chunks(vector)
    assert members(vector) == truth
    assert vector.count() == len(truth)
    assert vector.slice(0, vector.length + 100).count() == len(truth)


@given(bit_vectors())
def test_read_gives_whole_chunks_with_zeroes_past_the_end(vector: BitVector) -> None:
    whole = bitarray(endian="little")
    for index in range(len(vector.chunks)):
        chunk = vector.read(index)
        assert len(chunk) == vector.chunk_bits
        parts = [vector.read(index, start, 1) for start in range(vector.chunk_bytes)]
        assert sum(parts, bitarray(endian="little")) == chunk
        whole += chunk
    assert set(whole.search(1)) == from_chunks(vector)


@given(bit_vectors())
def test_runs_are_the_set_bits_in_order_and_never_touch(vector: BitVector) -> None:
    runs = list(vector.runs())
    assert {bit for first, end in runs for bit in range(first, end)} == from_chunks(vector)
    assert all(first < end for first, end in runs)
    assert all(one[1] < two[0] for one, two in pairwise(runs))
    assert vector.count_runs() == len(runs)


@given(with_ranges())
def test_density_is_the_share_of_set_bits(case: tuple[BitVector, int, int]) -> None:
    vector, start, stop = case
    wanted = len(from_chunks(vector) & set(range(start, stop)))
    assert vector.density(start, stop) == pytest.approx(wanted / (stop - start) if stop > start else 0.0)


# ---- union ----


@given(alike())
def test_a_union_is_the_union_of_the_sets(case: tuple[BitVector, BitVector, BitVector]) -> None:
    one, two, three = case
    everything = from_chunks(one) | from_chunks(two) | from_chunks(three)
    assert from_chunks(one.union(two, three)) == everything
    assert from_chunks(one.union(two).union(three)) == everything
    assert from_chunks(one.union(two.union(three))) == everything
    assert from_chunks(three.union(two, one)) == everything
    assert from_chunks(one.union(one)) == from_chunks(one) == from_chunks(one.union())


@given(alike())
def test_a_union_changes_neither_side(case: tuple[BitVector, BitVector, BitVector]) -> None:
    one, two, _ = case
    before = from_chunks(one), from_chunks(two)
    one.union(two).read(0) if one.length else one.union(two)
    assert (from_chunks(one), from_chunks(two)) == before


def test_a_union_of_different_shapes_is_refused() -> None:
    vector = BitVector.filled(64, 8)
    for other in (BitVector.filled(63, 8), BitVector.filled(64, 4)):
        with pytest.raises(ValueError, match="of one shape"):
            vector.union(other)


def test_a_union_of_a_thousand_vectors_does_not_nest() -> None:
    total = BitVector.filled(8000, 1000)
    for index in range(3000):
        bits = zeros(8000, "little")
        bits[index] = True
        total = total.union(BitVector(8000, 1000, [Bits(bits)]))
    assert list(total.runs()) == [(0, 3000)]


# ---- ranges ----


@given(with_ranges(), st.booleans())
def test_with_range_changes_exactly_the_range(case: tuple[BitVector, int, int], value: bool) -> None:
    vector, start, stop = case
    before, changed = from_chunks(vector), set(range(start, stop))
    after = vector.with_range(start, stop, value=value)
    assert from_chunks(after) == (before | changed if value else before - changed)
    assert from_chunks(vector) == before
    outside = [i for i, _ in enumerate(vector.chunks) if not changed & set(range(*_span(vector, i)))]
    assert all(after.chunks[i] is vector.chunks[i] for i in outside)


def _span(vector: BitVector, index: int) -> tuple[int, int]:
    return index * vector.chunk_bits, index * vector.chunk_bits + vector.valid_bits(index)


def test_a_range_over_a_whole_chunk_leaves_a_constant() -> None:
    vector = BitVector.filled(70, 8).with_range(0, 70, value=True)
    assert vector.chunks == [ONES, ONES]
    assert vector.with_range(64, 70, value=False).chunks == [ONES, ZEROES]


# ---- other granularities ----

ratios = st.integers(0, 9).map(lambda power: 1 << power)


@given(bit_vectors(), ratios, st.sampled_from([1, 2, 4, 8]), st.data())
def test_a_coarser_vector_loses_no_bit_and_adds_none_beyond_rounding(
    vector: BitVector, ratio: int, chunk_bytes: int, data: st.DataObject
) -> None:
    length = -(-vector.length // ratio)
    coarse = vector.resampled(length, chunk_bytes, 1, ratio)
    assert from_chunks(coarse) == {bit // ratio for bit in from_chunks(vector)}
    _reads_alike_in_parts(coarse, data)


@given(bit_vectors(), ratios, st.sampled_from([1, 2, 4, 8]), st.data())
def test_a_finer_vector_says_the_same_up_to_the_end_of_the_disk(
    vector: BitVector, ratio: int, chunk_bytes: int, data: st.DataObject
) -> None:
    """The disk may end within the last coarse bit, so the fine vector may be up to ratio - 1 bits shorter."""
    short = data.draw(st.integers(0, ratio - 1)) if vector.length else 0
    length = vector.length * ratio - short
    fine = vector.resampled(length, chunk_bytes, ratio, 1)
    wanted = {bit * ratio + part for bit in from_chunks(vector) for part in range(ratio)}
    assert members(fine) == {bit for bit in wanted if bit < length}
    _reads_alike_in_parts(fine, data)


@given(bit_vectors(), ratios, st.booleans(), st.integers(0, 300), st.data())
def test_another_length_cuts_bits_off_or_adds_zeroes(
    vector: BitVector, ratio: int, finer: bool, length: int, data: st.DataObject
) -> None:
    chunk_bytes = data.draw(st.sampled_from([1, 2, 4, 8]))
    other = vector.resampled(length, chunk_bytes, *((ratio, 1) if finer else (1, ratio)))
    truth = from_chunks(vector)
    wanted = {bit for bit in range(length) if bit // ratio in truth} if finer else {bit // ratio for bit in truth}
    assert members(other) == from_chunks(other) == {bit for bit in wanted if bit < length}
    _reads_alike_in_parts(other, data)


@pytest.mark.parametrize("chunk_bytes", [1, 4, 16, 64])
def test_ones_end_where_the_source_ends(chunk_bytes: int) -> None:
    longer = BitVector.filled(100, chunk_bytes, ONES).resampled(200, chunk_bytes, 1, 1)
    assert (longer.count(), list(longer.runs())) == (100, [(0, 100)])
    assert all(chunk is ZEROES for chunk in longer.chunks[-(-100 // longer.chunk_bits) :])


@given(bit_vectors(), st.sampled_from([1, 2, 4, 8, 16]))
def test_another_chunk_size_keeps_the_bits(vector: BitVector, chunk_bytes: int) -> None:
    assert from_chunks(vector.resampled(vector.length, chunk_bytes, 1, 1)) == from_chunks(vector)


def _reads_alike_in_parts(vector: BitVector, data: st.DataObject) -> None:
    """Any range of bytes of a chunk reads as the same range of the whole chunk does."""
    if not vector.length:
        return
    index = data.draw(st.integers(0, min(20, len(vector.chunks)) - 1))
    start = data.draw(st.integers(0, vector.chunk_bytes - 1))
    length = data.draw(st.integers(1, vector.chunk_bytes - start))
    assert vector.read(index, start, length) == vector.read(index)[8 * start : 8 * (start + length)]


@given(st.binary(max_size=70), st.integers(0, 7), ratios)
def test_coarsen_and_refine_do_what_a_loop_does(raw: bytes, cut: int, ratio: int) -> None:
    bits = bitarray(endian="little")
    bits.frombytes(raw)
    bits = bits[: max(0, len(bits) - cut)]
    assert refine(bits, ratio).tolist() == [bit for bit in bits for _ in range(ratio)]
    groups = [bits[start : start + ratio].any() for start in range(0, len(bits), ratio)]
    assert [bool(bit) for bit in coarsen(bits, ratio)] == groups
    assert coarsen(refine(bits, ratio), ratio) == bits


# ---- which chunk to write ----


class Counted:
    """A chunk that counts the bytes read from it."""

    def __init__(self, bits: bitarray) -> None:
        self.bits = bits
        self.read_bytes = 0

    def read(self, start: int, length: int) -> bitarray:
        self.read_bytes += length
        return self.bits[8 * start : 8 * (start + length)]


@given(alike())
def test_settle_says_stored_zeroes_ones_or_the_chunk(case: tuple[BitVector, BitVector, BitVector]) -> None:
    vector, stored, _ = case
    for index, chunk in enumerate(vector.chunks):
        mine, theirs, valid = vector.read(index), stored.read(index), vector.valid_bits(index)
        verdict = vector.settle(index, stored)
        if chunk is ZEROES or chunk is ONES or chunk is stored.chunks[index]:
            assert verdict is chunk
        elif mine == theirs:
            assert verdict is stored.chunks[index]
        elif not mine.any():
            assert verdict is ZEROES
        elif mine.count() == valid:
            assert verdict is ONES
        else:
            assert verdict is chunk
        assert BitVector(valid, vector.chunk_bytes, [verdict]).read(0) == mine


SIZE = 64 << 10
PIECE = 4 << 10


@pytest.mark.parametrize("place", [0, 8 * PIECE - 1])
def test_settle_reads_one_piece_where_that_tells(place: int) -> None:
    """Set at the first and clear at the last bit of the first 4 KiB: neither empty, nor full, nor as stored."""
    bits = zeros(8 * SIZE, "little")
    bits[place] = True
    fresh, old = Counted(bits), Counted(zeros(8 * SIZE, "little"))
    vector, stored = (BitVector(8 * SIZE, SIZE, [chunk]) for chunk in (fresh, old))
    assert vector.settle(0, stored) is fresh
    assert (fresh.read_bytes, old.read_bytes) == (PIECE, PIECE)


def test_settle_stops_comparing_with_what_is_stored_once_they_differ() -> None:
    bits = zeros(8 * SIZE, "little")
    full, old = Counted(~bits), Counted(bits)
    vector, stored = (BitVector(8 * SIZE, SIZE, [chunk]) for chunk in (full, old))
    assert vector.settle(0, stored) is ONES
    assert (full.read_bytes, old.read_bytes) == (SIZE, PIECE)


def test_settle_reads_nothing_of_constants_and_of_the_stored_chunk() -> None:
    chunk = Counted(zeros(8 * SIZE, "little"))
    stored = BitVector(16 * SIZE, SIZE, [chunk, chunk])
    vector = BitVector(16 * SIZE, SIZE, [chunk, ZEROES])
    assert [vector.settle(index, stored) for index in range(2)] == [chunk, ZEROES]
    assert chunk.read_bytes == 0


def test_settle_reads_no_byte_past_the_end_of_the_vector() -> None:
    chunk = Counted(zeros(8 * SIZE, "little"))
    assert BitVector(9, SIZE, [chunk]).settle(0, None) is ZEROES
    assert chunk.read_bytes == 2


def test_count_and_runs_of_constants_read_nothing() -> None:
    """A bitmap over 8 PiB at 64 KiB, half of it dirty: 2 GiB of bits that nobody makes."""
    vector = BitVector(1 << 37, 1 << 16, [ZEROES, ONES] * (1 << 17))
    assert vector.count() == 1 << 36
    assert next(vector.runs()) == (1 << 19, 1 << 20)
    assert vector.density(0, 1 << 37) == 0.5
