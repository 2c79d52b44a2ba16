"""vectors.py says of whole tables what entries.py says of each entry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.format.entries import L2Entry
from qcow2bm.format.geometry import Geometry
from qcow2bm.format.vectors import ClusterFilter, host_clusters
from tests.strategies import geometries, l2_values, u64


@st.composite
def tables(draw: st.DrawFn) -> tuple[Geometry, list[int]]:
    geometry = draw(geometries())
    return geometry, draw(st.lists(l2_values(geometry), min_size=1, max_size=12))


def touched(value: int, geometry: Geometry) -> list[int]:
    place = L2Entry(value).host_range(geometry)
    if place is None:
        return []
    offset, length = place
    return list(range(offset >> geometry.cluster_bits, (offset + length - 1 >> geometry.cluster_bits) + 1))


def packed(values: list[int], geometry: Geometry, bitmap: int) -> bytes:
    stride = [bitmap.to_bytes(8, "big")] if geometry.extended_l2 else []
    return b"".join(b"".join([value.to_bytes(8, "big"), *stride]) for value in values)


@given(tables(), u64)
def test_host_clusters_are_those_of_host_range(case: tuple[Geometry, list[int]], bitmap: int) -> None:
    geometry, values = case
    first, last = host_clusters(packed(values, geometry, bitmap), geometry)
    found = [list(range(low, high + 1)) for low, high in zip(first.tolist(), last.tolist(), strict=True)]
    assert found == [touched(value, geometry) for value in values]


@given(tables(), st.data())
def test_the_filter_finds_every_wanted_cluster_of_every_entry(
    case: tuple[Geometry, list[int]], data: st.DataObject
) -> None:
    geometry, values = case
    everything = sorted({cluster for value in values for cluster in touched(value, geometry)} | {0, 1, 5, 1 << 40})
    wanted = data.draw(st.sets(st.sampled_from(everything)))
    first, last = host_clusters(packed(values, geometry, 0), geometry)
    found = sorted(ClusterFilter(wanted).range_hits(first, last))
    assert found == sorted(
        (index, cluster) for index, value in enumerate(values) for cluster in touched(value, geometry)
        if cluster in wanted
    )  # fmt: skip


@given(st.sets(st.integers(0, 1 << 47), max_size=20), st.lists(st.integers(-1, 1 << 47), max_size=40))
def test_the_filter_agrees_with_a_set(wanted: set[int], clusters: list[int]) -> None:
    clusters += sorted(wanted)[::2] + [cluster + 1 for cluster in wanted] + [cluster ^ 1 for cluster in wanted]
    found = ClusterFilter(wanted).hits(np.array(clusters, np.int64))
    assert found.tolist() == [index for index, cluster in enumerate(clusters) if cluster in wanted]


def test_a_long_range_is_found_in_the_middle() -> None:
    """An unaligned compressed cluster of 2 MiB clusters spans two; a hand-made range may span more."""
    first, last = np.array([10, 0], np.int64), np.array([13, -1], np.int64)
    assert sorted(ClusterFilter([12, 13, 14]).range_hits(first, last)) == [(0, 12), (0, 13)]


@given(tables())
def test_extended_entries_take_the_same_clusters_as_standard_ones(case: tuple[Geometry, list[int]]) -> None:
    geometry, values = case
    wide, narrow = replace(geometry, extended_l2=True), replace(geometry, extended_l2=False)
    one = host_clusters(packed(values, wide, (1 << 64) - 1), wide)
    other = host_clusters(packed(values, narrow, 0), narrow)
    assert all((mine == theirs).all() for mine, theirs in zip(one, other, strict=True))


@given(tables(), st.data())
def test_the_quick_test_never_passes_over_a_wanted_cluster(
    case: tuple[Geometry, list[int]], data: st.DataObject
) -> None:
    geometry, values = case
    everything = sorted({cluster for value in values for cluster in touched(value, geometry)} | {0, 1, 5, 1 << 40})
    wanted = ClusterFilter(data.draw(st.sets(st.sampled_from(everything))))
    table = packed(values, geometry, 0)
    assert wanted.may_hit(table, geometry) or not list(wanted.range_hits(*host_clusters(table, geometry)))


def test_the_quick_test_is_not_fooled_by_unallocated_entries() -> None:
    """Header, refcount table and first block lie at the front of the file; an empty L2 table refers to none of them."""
    geometry = Geometry(cluster_bits=16, virtual_size=1 << 40)
    assert not ClusterFilter({0, 1, 2, 1 << 24}).may_hit(bytes(1 << 16), geometry)
    assert ClusterFilter({0, 1, 2, 1 << 24}).may_hit((1 << 40).to_bytes(8, "big") + bytes(8), geometry)
