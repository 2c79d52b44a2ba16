"""Runs of L2 entries stand for just the entries that they were made of."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.checks.plain import PlainCensus
from qcow2bm.checks.stored import StoredRefcounts
from qcow2bm.format.entries import COMPRESSED, COPIED, table_bytes
from qcow2bm.format.geometry import Geometry

CLUSTER = 512
GEOMETRY = Geometry(cluster_bits=9, virtual_size=1 << 20)

# Few values, so that they follow each other often: nothing, the first clusters of the file, flags, odd ones.
values = st.builds(
    lambda cluster, flags: cluster * CLUSTER | flags,
    st.integers(0, 5),
    st.sampled_from([0, 0, 0, COPIED, COPIED, 1, COMPRESSED, 2]),
)


class _NoRefcounts(StoredRefcounts):
    def __init__(self) -> None:
        pass


@given(st.lists(values, min_size=1, max_size=64))
def test_runs_are_the_entries(entries: list[int]) -> None:
    entries += [0] * (CLUSTER // 8 - len(entries))
    census = PlainCensus(GEOMETRY, 1 << 30, _NoRefcounts(), version=3, data_file=False)
    found = [
        entry.value + number * CLUSTER
        for entry, length in census._entry_runs(table_bytes(array("Q", entries)))
        for number in range(length)
    ]
    assert found == [entry for entry in entries if entry]
