"""What a sample promises, and how granules are drawn."""

from __future__ import annotations

import random
from itertools import pairwise
from math import prod

from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bitmap.bits import BitVector
from qcow2bm.chain.marks import Marks
from qcow2bm.chain.prove import Sample, _drawn, _nth_set


def vector(bits: list[bool]) -> BitVector:
    marks = Marks(len(bits), 1, 2)
    for place, bit in enumerate(bits):
        if bit:
            marks.mark(place, place + 1)
    return marks.vector()


@given(st.integers(1, 300), st.data())
def test_one_of_each_equal_part_is_drawn(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    drawn = list(_drawn(total, count, random.Random(data.draw(st.integers()))))
    assert len(drawn) == count
    for part, number in enumerate(drawn):
        assert part * total // count <= number < (part + 1) * total // count
    if count == total:
        assert drawn == list(range(total))


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.data())
def test_set_bits_by_number(bits: list[bool], data: st.DataObject) -> None:
    places = [place for place, bit in enumerate(bits) if bit]
    wanted = sorted(data.draw(st.sets(st.sampled_from(range(len(places)))))) if places else []
    assert list(_nth_set(vector(bits), wanted)) == [places[number] for number in wanted]


@given(st.lists(st.booleans(), min_size=1, max_size=120), st.data())
def test_a_sample_finds_at_least_as_likely_as_it_says(missed: list[bool], data: st.DataObject) -> None:
    """The chance, worked out exactly for any place of the misses, is never below what is promised."""
    total = len(missed)
    count = data.draw(st.integers(1, total))
    edges = [part * total // count for part in range(count + 1)]
    parts = [missed[first:stop] for first, stop in pairwise(edges)]
    to_miss_all = prod(1 - sum(part) / len(part) for part in parts)
    sample = Sample(0, total, count)
    assert 1 - to_miss_all >= sample.chance_to_find(sum(missed)) - 1e-9
    for chance in (0.5, 0.95, 0.99):
        least = sample.would_be_found(chance)
        if least is not None and sum(missed) >= least:
            assert 1 - to_miss_all >= chance - 1e-9


def test_the_ends_of_the_scale() -> None:
    whole = Sample(1, 100, 100)
    assert whole.is_complete
    assert (whole.chance_to_find(0), whole.chance_to_find(1), whole.would_be_found(0.99)) == (0.0, 1.0, 1)
    nothing = Sample(1, 0, 0)
    assert (nothing.is_complete, nothing.would_be_found(0.99)) == (True, 1)
    one = Sample(1, 1000, 1)
    assert one.would_be_found(0.95) == 950
    assert 0.49 < one.chance_to_find(500) <= 0.5
