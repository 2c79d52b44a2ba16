"""Counters far out: runs and single references, counted as if there were an array of them all."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.checks.counters import Counters

NEAR, END = 40, 120
RUNS = st.tuples(st.integers(0, END - 1), st.integers(1, 40), st.integers(1, 3)).map(
    lambda run: (run[0], min(END, run[0] + run[1]), run[2])
)


@given(
    runs=st.lists(RUNS, max_size=8),
    single=st.lists(st.integers(0, END - 1), max_size=8),
    weights=st.lists(st.integers(1, 3), max_size=3),
)
def test_far_counters_are_what_near_ones_would_be(
    runs: list[tuple[int, int, int]], single: list[int], weights: list[int]
) -> None:
    counters, expected = Counters(NEAR), np.zeros(END, np.uint64)
    for first, stop, weight in runs:
        counters.add_run(first, stop, weight)
        expected[first:stop] += np.uint64(weight)
    for weight in weights:
        counters.add_each(np.array(single, np.int64), weight)
        np.add.at(expected, single, np.uint64(weight))
        counters.at(np.arange(NEAR, END))  # which puts what came so far in order
    every = np.arange(END)
    assert counters.at(every).tolist() == expected.tolist()
    for first in range(0, END, 7):
        stop = min(END, first + 13)
        part = counters.slice(first, stop)
        assert (part.tolist() if part is not None else [0] * (stop - first)) == expected[first:stop].tolist()
        assert counters.any_of(every[first:stop]) == bool(expected[first:stop].any())
    blocks = {int(place) // 10 for place in np.flatnonzero(expected) if place >= NEAR}
    assert set(counters.far_blocks(10).tolist()) == blocks
