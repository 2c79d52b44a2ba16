"""What is parsed and built again is the same, value for value and byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.errors import CorruptImageError, TruncatedImageError
from qcow2bm.format.bitmap_directory import BitmapEntry, parse_directory, parse_entry
from qcow2bm.format.entries import CompressedDescriptor, get_refcount, set_refcount, table_bytes, table_entries
from qcow2bm.format.entries import used_clusters as used
from qcow2bm.format.extensions import (
    BitmapsExtension,
    CryptoHeaderPointer,
    Extension,
    ExtensionArea,
    FeatureName,
    parse_feature_names,
)
from qcow2bm.format.geometry import Geometry
from qcow2bm.format.header import Header
from qcow2bm.format.snapshot_table import SnapshotEntry, parse_snapshot, parse_snapshots
from tests import strategies as own

# ---- header ----


@given(own.headers, st.binary(max_size=16))
def test_a_header_survives_with_unknown_features_and_fields_whatever_follows_it(header: Header, after: bytes) -> None:
    data = header.build()
    assert len(data) == header.header_length
    assert Header.parse(data + after) == header
    assert Header.parse(data + after).build() == data


@given(own.headers, st.data())
def test_a_header_cut_short_is_refused(header: Header, data: st.DataObject) -> None:
    built = header.build()
    with pytest.raises(TruncatedImageError):
        Header.parse(built[: data.draw(st.integers(4, len(built) - 1))])


@given(own.v3_headers(), st.integers(0, 1 << 32 - 1))
def test_a_header_length_that_is_none_is_refused(header: Header, length: int) -> None:
    data = bytearray(header.build())
    data[100:104] = length.to_bytes(4, "big")
    if length % 8 or not 104 <= length <= len(data):
        with pytest.raises(CorruptImageError):
            Header.parse(bytes(data)).validate()
    else:
        assert Header.parse(bytes(data)).header_length == length


# ---- extensions ----


@given(own.bitmaps_extensions)
def test_the_bitmaps_extension_survives(extension: BitmapsExtension) -> None:
    assert BitmapsExtension.parse(extension.build()) == extension
    assert len(extension.build()) == 24


@given(own.crypto_pointers)
def test_the_encryption_header_pointer_survives(pointer: CryptoHeaderPointer) -> None:
    assert CryptoHeaderPointer.parse(pointer.build()) == pointer


@given(st.binary(max_size=40).filter(lambda data: len(data) not in (16, 24)))
def test_fixed_extensions_of_another_length_are_refused(data: bytes) -> None:
    for kind in (BitmapsExtension, CryptoHeaderPointer):
        with pytest.raises(CorruptImageError):
            kind.parse(data)


@given(st.lists(own.feature_names, max_size=5).map(tuple), st.binary(max_size=47))
def test_the_feature_name_table_survives_and_a_short_last_row_is_ignored(
    rows: tuple[FeatureName, ...], short: bytes
) -> None:
    data = b"".join(bytes([row.type, row.bit]) + row.raw_name for row in rows)
    assert len(data) == 48 * len(rows)
    assert parse_feature_names(data + short) == rows


@given(st.lists(own.extensions(), max_size=6), st.sampled_from([72, 104, 112]), st.integers(0, 40))
def test_the_extension_area_survives_byte_for_byte(given_ones: list[Extension], start: int, room: int) -> None:
    """With its end marker, or filled to the brim without one: the end of the first cluster or a backing name."""
    body = b"".join(extension.build() for extension in given_ones)
    limit = start + len(body) + room
    data = bytes(start) + body + bytes(room)
    area = ExtensionArea.parse(data, start, limit)
    assert [(e.type, e.data, e.padding) for e in area.extensions] == [(e.type, e.data, e.padding) for e in given_ones]
    assert area.end == start + len(body)
    assert area.build() == body + (bytes(8) if room >= 8 else b"")
    for extension in area.extensions:
        assert data[extension.offset : extension.end] == extension.build()
        assert data[extension.data_offset :].startswith(extension.data)


@given(own.extensions(), st.integers(0, 7))
def test_an_extension_whose_padding_the_backing_name_cuts_survives(extension: Extension, keep: int) -> None:
    keep = min(keep, len(extension.padding))
    whole = extension.build()
    data = whole[: len(whole) - len(extension.padding) + keep]
    area = ExtensionArea.parse(data + b"name.qcow2", 0, len(data))
    assert area.end == len(data)
    assert area.build() == data


@given(own.extensions(), st.integers(1, 100))
def test_an_extension_longer_than_its_room_is_refused(extension: Extension, missing: int) -> None:
    whole = extension.build()
    limit = 8 + len(extension.data) - missing
    if limit < 8:
        assert ExtensionArea.parse(whole, 0, max(0, limit)).extensions == ()
    else:
        with pytest.raises(CorruptImageError):
            ExtensionArea.parse(whole, 0, limit).validate()


# ---- bitmap directory and snapshots ----


@given(own.bitmap_entries())
def test_a_directory_entry_survives_with_extra_data_flags_and_padding(entry: BitmapEntry) -> None:
    data = entry.build()
    assert len(data) == entry.size
    assert len(data) % 8 == 0
    assert parse_entry(data) == entry


@given(own.bitmap_entries(), st.data())
def test_a_directory_entry_cut_short_is_refused(entry: BitmapEntry, data: st.DataObject) -> None:
    built = entry.build()
    with pytest.raises(CorruptImageError):
        parse_entry(built[: data.draw(st.integers(0, len(built) - 1))])


@given(st.lists(own.bitmap_entries(), min_size=1, max_size=6))
def test_a_whole_directory_survives_with_the_offset_of_each_entry(entries: list[BitmapEntry]) -> None:
    data = b"".join(entry.build() for entry in entries)
    found = list(parse_directory(data, len(entries)))
    assert [entry for _, entry in found] == entries
    assert all(data[offset:].startswith(entry.build()) for offset, entry in found)


@given(st.lists(own.bitmap_entries(), min_size=1, max_size=4), st.sampled_from([-1, 1]))
def test_a_directory_that_its_count_does_not_fill_is_refused(entries: list[BitmapEntry], off: int) -> None:
    data = b"".join(entry.build() for entry in entries)
    with pytest.raises(CorruptImageError):
        list(parse_directory(data, len(entries) + off))


@given(st.lists(own.snapshot_entries(), min_size=1, max_size=4))
def test_a_snapshot_table_survives_with_extra_data_and_padding(entries: list[SnapshotEntry]) -> None:
    data = b"".join(entry.build() for entry in entries)
    found = list(parse_snapshots(lambda at, length: data[at:][:length], 0, len(entries)))
    assert [entry for _, entry in found] == entries
    assert all(data[at:].startswith(entry.build()) for at, entry in found)
    assert sum(entry.size for entry in entries) == len(data)


@given(own.snapshot_entries())
def test_the_last_snapshot_entry_may_lack_its_padding(entry: SnapshotEntry) -> None:
    data = entry.build()
    bare = data[: len(data) - len(entry.padding)]
    parsed = parse_snapshot(bare)
    assert (parsed.name, parsed.id, parsed.extra_data) == (entry.name, entry.id, entry.extra_data)
    assert parsed.build()[: len(bare)] == bare


# ---- entries ----


@given(own.geometries().flatmap(lambda g: st.tuples(st.just(g), own.compressed_descriptors(g))))
def test_a_compressed_descriptor_survives_at_every_cluster_size(case: tuple[Geometry, CompressedDescriptor]) -> None:
    geometry, descriptor = case
    assert CompressedDescriptor.parse(descriptor.build(geometry), geometry) == descriptor


@given(own.geometries(), st.integers(0, (1 << 62) - 1))
def test_any_compressed_entry_is_built_again_as_it_was(geometry: Geometry, low: int) -> None:
    entry = 1 << 62 | low
    assert CompressedDescriptor.parse(entry, geometry).build(geometry) == entry


@given(own.geometries(), st.integers(0, 1 << 63), st.integers(-1, 1 << 30))
def test_a_compressed_descriptor_that_does_not_fit_is_refused(geometry: Geometry, offset: int, length: int) -> None:
    shift = 70 - geometry.cluster_bits
    sectors = (offset + length - 1) // 512 - offset // 512
    fits = offset < 1 << shift and length > 0 and sectors < 1 << geometry.cluster_bits - 8
    descriptor = CompressedDescriptor(offset, length)
    if fits:
        assert descriptor.build(geometry) >> 62 == 1
    else:
        with pytest.raises(CorruptImageError):
            descriptor.build(geometry)


def naive_refcount(block: bytes, index: int, order: int) -> int:
    """The specification's words: big-endian from 8 bits on, below that the least significant bits first."""
    bits = 1 << order
    if bits >= 8:
        return int.from_bytes(block[index * bits // 8 : (index + 1) * bits // 8], "big")
    return sum((block[(index * bits + n) // 8] >> ((index * bits + n) % 8) & 1) << n for n in range(bits))


blocks = st.binary(min_size=1, max_size=8).map(lambda part: part * (64 // len(part)) + bytes(64 % len(part)))


@pytest.mark.parametrize("order", range(7))
@given(block=blocks)
def test_refcounts_are_read_as_the_specification_says(order: int, block: bytes) -> None:
    count = len(block) * 8 >> order
    expected = [naive_refcount(block, index, order) for index in range(count)]
    assert [get_refcount(block, index, order) for index in range(count)] == expected
    assert used(block, order).tolist() == [int(refcount != 0) for refcount in expected]


@pytest.mark.parametrize("order", range(7))
@given(block=blocks, place=st.floats(0, 1, exclude_max=True), number=own.u64)
def test_setting_a_refcount_changes_that_one_alone(order: int, block: bytes, place: float, number: int) -> None:
    count = len(block) * 8 >> order
    index, value = int(place * count), number & (1 << (1 << order)) - 1
    changed = bytearray(block)
    at = set_refcount(changed, index, order, value)
    expected = [naive_refcount(block, i, order) for i in range(count)]
    expected[index] = value
    assert [naive_refcount(changed, i, order) for i in range(count)] == expected
    width = max(1, (1 << order) // 8)
    assert block[:at] + block[at + width :] == changed[:at] + changed[at + width :]


@pytest.mark.parametrize("order", range(7))
def test_a_refcount_that_does_not_fit_is_refused_and_changes_nothing(order: int) -> None:
    block = bytearray(64)
    with pytest.raises(OverflowError):
        set_refcount(block, 1, order, 1 << (1 << order))
    assert block == bytes(64)


@given(st.lists(own.u64, max_size=40))
def test_tables_are_big_endian_and_survive(values: list[int]) -> None:
    data = b"".join(value.to_bytes(8, "big") for value in values)
    assert list(table_entries(data)) == values
    assert table_bytes(table_entries(data)) == data
