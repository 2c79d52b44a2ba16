"""The bits of a bitmap follow its disk: none is lost that stays, and none appears that was not asked for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bitmap.bits import BitVector
from qcow2bm.errors import ProofError
from qcow2bm.format.entries import get_refcount
from qcow2bm.format.geometry import Geometry
from qcow2bm.format.vectors import pack_refcounts, refcounts
from qcow2bm.image.lowering import Lowering, differing, highest_used
from qcow2bm.resize.bits import resized, with_unknown_end
from tests.strategies import bit_vectors


def members(vector: BitVector) -> set[int]:
    """The set bits, by whole chunks as they would be written."""
    bits = bitarray(endian="little")
    for index in range(len(vector.chunks)):
        bits += vector.read(index)
    return {index for index, bit in enumerate(bits) if bit}


@st.composite
def vectors(draw: st.DrawFn) -> BitVector:
    length = draw(st.integers(1, 150))
    return draw(bit_vectors(length, draw(st.sampled_from([1, 2, 8]))))


@given(vectors(), st.integers(1, 400), st.booleans())
def test_resized_bits_are_the_old_ones_and_a_tail(bits: BitVector, length: int, tail: bool) -> None:
    found = resized(bits, length, tail=tail)
    kept = {bit for bit in members(bits) if bit < length}
    assert members(found) == kept | (set(range(bits.length, length)) if tail else set())
    assert found.length == length
    assert len(found.chunks) == -(-length // bits.chunk_bits)


@given(vectors(), st.integers(1, 400), st.integers(1, 400))
def test_there_and_back_again_keeps_what_both_have(bits: BitVector, first: int, second: int) -> None:
    found = resized(resized(bits, first, tail=False), second, tail=False)
    assert members(found) == {bit for bit in members(bits) if bit < min(first, second)}


@given(vectors())
def test_an_unknown_end_is_a_superset_of_every_end_it_may_have(bits: BitVector) -> None:
    """Whatever size of disk the bits were made for: a bit of the disk that is set stays, and what came after is set."""
    whole = resized(bits, len(bits.chunks) * bits.chunk_bits, tail=False)
    found = members(with_unknown_end(whole, tail=True))
    old = members(whole)
    assert old <= found
    last = (len(bits.chunks) - 1) * bits.chunk_bits
    ends = range(max([last, *(bit + 1 for bit in old)]), whole.length)
    assert found == old | set(ends)
    assert with_unknown_end(whole, tail=False) is whole


# ---- references that go ----

ORDERS = st.integers(0, 6)


@given(st.binary(min_size=32, max_size=32), ORDERS)
def test_packed_refcounts_are_what_was_unpacked(block: bytes, order: int) -> None:
    counts = refcounts(block, order)
    assert pack_refcounts(counts, order) == block
    used = [index for index in range(counts.size) if get_refcount(block, index, order)]
    assert highest_used(block, order) == (used[-1] if used else -1)


@given(ORDERS, st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3)), max_size=60))
def test_lowering_subtracts_each_reference(order: int, ranges: list[tuple[int, int]]) -> None:
    geometry = Geometry(9, 1 << 20, order)
    lowering, times = Lowering(geometry), dict[int, int]()
    most = (1 << (1 << order)) - 1
    chosen = []
    for first, more in ranges:
        inside = range(first, first + more + 1)
        if all(times.get(cluster, 0) < most for cluster in inside):
            chosen.append((first, first + more))
            times.update({cluster: times.get(cluster, 0) + 1 for cluster in inside})
    if chosen:
        first, last = np.array(chosen, np.int64).T
        lowering.drop(first, last)
    assert lowering.dropped() == sum(times.values())
    per_block = geometry.refcounts_per_block
    assert lowering.blocks() == sorted({cluster // per_block for cluster in times})
    for index in lowering.blocks():
        left = refcounts(lowering.lowered(index, b"\xff" * 512), order).tolist()
        inside = range(index * per_block, (index + 1) * per_block)
        assert left == [most - times.get(cluster, 0) for cluster in inside]
        with pytest.raises(ProofError, match="more often than its refcount says"):
            lowering.lowered(index, bytes(512))


@given(st.binary(min_size=1, max_size=200), st.data(), st.integers(1, 50))
def test_differing_ranges_hold_every_difference(old: bytes, data: st.DataObject, gap: int) -> None:
    new = bytearray(old)
    for place in data.draw(st.lists(st.integers(0, len(old) - 1), max_size=5)):
        new[place] ^= 1
    found = list(differing(old, bytes(new), gap))
    patched = bytearray(old)
    for start, stop in found:
        patched[start:stop] = new[start:stop]
    assert patched == new
    assert all(later[0] - earlier[1] >= gap - 1 for earlier, later in pairwise(found))
