"""The parts that reading a disk is made of: slices of L2 tables, marks, compressed streams."""

from __future__ import annotations

import contextlib
import random
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from qcow2bm.chain.marks import Marks
from qcow2bm.chain.streams import decompress
from qcow2bm.chain.tables import DATA, STREAM, UNALLOCATED, ZEROES, units
from qcow2bm.errors import BitmapLimitError, CorruptImageError
from qcow2bm.format.entries import ClusterKind, L2Entry
from qcow2bm.format.geometry import SUBCLUSTERS, Geometry
from tests.strategies import geometries, l2_values, u64

KINDS = {
    ClusterKind.UNALLOCATED: UNALLOCATED,
    ClusterKind.ZERO: ZEROES,
    ClusterKind.ZERO_ALLOCATED: ZEROES,
    ClusterKind.DATA: DATA,
    ClusterKind.COMPRESSED: STREAM,
}

ZLIB, ZSTD = 0, 1
CLUSTER = 4096


# ---- tables ----


@st.composite
def tables(draw: st.DrawFn) -> tuple[Geometry, list[L2Entry]]:
    geometry = draw(geometries())
    bitmaps = u64 if geometry.extended_l2 else st.just(0)
    entries = st.builds(L2Entry, l2_values(geometry), bitmaps)
    return geometry, draw(st.lists(entries, min_size=1, max_size=12))


def one_by_one(entries: list[L2Entry], geometry: Geometry, *, data_file: bool) -> list[tuple[int, int]]:
    """Kind and place of each unit, by the readable truth."""
    found = []
    for entry in entries:
        for index in range(SUBCLUSTERS if geometry.extended_l2 else 1):
            if geometry.extended_l2:
                kind = entry.subcluster_kind(index, data_file=data_file)
            else:
                kind = entry.kind(geometry, data_file=data_file)
            place = entry.value if kind is ClusterKind.COMPRESSED else 0
            if kind is ClusterKind.DATA:
                place = entry.host_offset + index * geometry.subcluster_size
            found.append((KINDS[kind], place))
    return found


@given(tables(), st.booleans())
def test_units_are_what_the_entries_say(case: tuple[Geometry, list[L2Entry]], data_file: bool) -> None:
    geometry, entries = case
    words = [
        word for entry in entries for word in ((entry.value, entry.bitmap) if geometry.extended_l2 else (entry.value,))
    ]
    found = units(np.array(words, np.uint64), geometry, data_file=data_file)
    pairs = list(zip(found.kinds.tolist(), found.places.tolist(), strict=True))
    assert pairs == one_by_one(entries, geometry, data_file=data_file)


# ---- marks ----


@given(
    st.integers(0, 3000),
    st.sampled_from([1, 3, 64]),
    st.lists(st.tuples(st.integers(0, 3200), st.integers(0, 3200)), max_size=12),
)
def test_marks_are_the_union_of_the_ranges(length: int, chunk_bytes: int, ranges: list[tuple[int, int]]) -> None:
    marks = Marks(length * 512, 512, chunk_bytes)
    expected = [False] * length
    for first, stop in ranges:
        marks.mark(first, stop)
        expected[first:stop] = [True] * len(expected[first:stop])
    vector = marks.vector()
    assert [bool(bit) for bit in vector.slice(0, length)] == expected
    assert vector.count() == sum(expected)


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
@example(1, 512, 513)
def test_a_range_of_bytes_marks_every_granule_that_it_touches(size: int, start: int, stop: int) -> None:
    marks = Marks(size, 4096, 512)
    marks.mark_bytes(start, stop)
    touched = range(start, min(stop, size))
    expected = set(range(touched[0] // 4096, touched[-1] // 4096 + 1)) if touched else set()
    found = {index for first, end in marks.vector().runs() for index in range(first, end)}
    assert found == expected


@given(
    st.integers(1, 1 << 19),
    st.tuples(st.sampled_from([512, 2048, 65536]), st.sampled_from([512, 4096, 65536])),
    st.integers(0, 9),
    st.lists(st.booleans(), max_size=60),
    st.booleans(),
)
def test_units_mark_what_they_touch(
    size: int, widths: tuple[int, int], first: int, chosen: list[bool], marked_before: bool
) -> None:
    granularity, unit = widths
    one, other = Marks(size, granularity, 4), Marks(size, granularity, 4)
    if marked_before:
        one.mark(2, 20)
        other.mark(2, 20)
    one.mark_units(first * unit, unit, np.array(chosen, np.bool_))
    for index, is_chosen in enumerate(chosen, first):
        if is_chosen:
            other.mark_bytes(index * unit, (index + 1) * unit)
    assert list(one.vector().runs()) == list(other.vector().runs())


def test_no_bitmap_larger_than_qemu_takes() -> None:
    Marks(1 << 41, 512, 1 << 16)
    with pytest.raises(BitmapLimitError):
        Marks((1 << 41) + 1, 512, 1 << 16)


# ---- streams ----


def packed(data: bytes, kind: int) -> bytes:
    if kind == ZSTD:
        return zstandard.ZstdCompressor().compress(data)
    deflate = zlib.compressobj(wbits=-12)
    return deflate.compress(data) + deflate.flush()


@given(st.binary(min_size=1, max_size=64), st.binary(max_size=600), st.sampled_from([ZLIB, ZSTD]))
def test_a_stream_may_be_followed_by_anything(part: bytes, rest: bytes, kind: int) -> None:
    data = (part * CLUSTER)[:CLUSTER]
    assert decompress(packed(data, kind) + rest, kind, CLUSTER) == data


def test_a_cluster_of_several_frames() -> None:
    data = random.Random(1).randbytes(CLUSTER)
    frames = packed(data[:1000], ZSTD) + packed(data[1000:], ZSTD)
    assert decompress(frames + b"\1" * 100, ZSTD, CLUSTER) == data


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_a_stream_that_is_no_cluster_is_damage(kind: int) -> None:
    whole = packed(random.Random(2).randbytes(CLUSTER), kind)
    for bad in (b"", bytes(512), b"\xff" * 512, whole[:-10], packed(b"x" * (CLUSTER - 1), kind)):
        with pytest.raises(CorruptImageError, match="compressed cluster"):
            decompress(bad, kind, CLUSTER)


def test_a_frame_that_goes_on_when_the_cluster_is_full_is_damage_as_in_qemu() -> None:
    with pytest.raises(CorruptImageError, match="more than"):
        decompress(packed(bytes(CLUSTER + 1), ZSTD), ZSTD, CLUSTER)
    assert decompress(packed(bytes(CLUSTER + 1), ZLIB), ZLIB, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
@given(noise=st.binary(max_size=300), at=st.integers(0, 200))
def test_noise_is_damage_or_a_cluster(kind: int, noise: bytes, at: int) -> None:
    stream = bytearray(packed(bytes(range(256)) * 16, kind))
    stream[at : at + len(noise)] = noise
    with contextlib.suppress(CorruptImageError):
        assert len(decompress(bytes(stream), kind, CLUSTER)) == CLUSTER


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_a_bomb_takes_no_memory(kind: int) -> None:
    bomb = packed(bytes(64 << 20), kind)
    tracemalloc.start()
    try:
        with contextlib.suppress(CorruptImageError):
            decompress(bomb, kind, CLUSTER)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
