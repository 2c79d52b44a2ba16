"""Headers, directories and snapshot tables that real QEMU wrote: parsed to exactly these values, built to these bytes.

make.py made the files and read them by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcow2bm.format.bitmap_directory import parse_directory
from qcow2bm.format.extensions import (
    BitmapsExtension,
    CryptoHeaderPointer,
    ExtensionArea,
    ExtensionType,
    parse_feature_names,
)
from qcow2bm.format.header import Header
from qcow2bm.format.snapshot_table import parse_snapshots

HERE = Path(__file__).parent
IMAGES: dict[str, Any] = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))["images"]
FEATURES = ("incompatible_features", "compatible_features", "autoclear_features")

every_image = pytest.mark.parametrize("name", IMAGES)


def head(name: str) -> bytes:
    return (HERE / f"{name}.head").read_bytes()


def parse_area(name: str) -> ExtensionArea:
    data, header = head(name), Header.parse(head(name))
    return ExtensionArea.parse(data, header.header_length, header.backing_file_offset or len(data))


@every_image
def test_the_header_says_what_qemu_put_there_and_is_built_again(name: str) -> None:
    header, expected = Header.parse(head(name)), dict(IMAGES[name]["header"])
    header.validate()
    if header.version == 3:
        assert header.additional.hex() == expected.pop("additional")
    assert {field: int(getattr(header, field)) for field in expected} == expected
    assert head(name).startswith(header.build())
    assert len(header.build()) == header.header_length == expected.get("header_length", 72)


@every_image
def test_the_extensions_say_what_qemu_put_there_and_are_built_again(name: str) -> None:
    area = parse_area(name)
    found = [{"type": e.type, "offset": e.offset, "data": e.data.hex()} for e in area.extensions]
    assert found == IMAGES[name]["extensions"]
    assert head(name)[area.start :].startswith(area.build())
    assert area.build()[-8:] == bytes(8)


@every_image
def test_the_backing_file_name_lies_where_the_header_says(name: str) -> None:
    header = Header.parse(head(name))
    start = header.backing_file_offset
    text = head(name)[start:][: header.backing_file_size].decode() if start else None
    assert text == IMAGES[name]["backing_file"]


# QEMU leaves the table out of version 2 and where clusters are too small for it.
@pytest.mark.parametrize("name", [name for name in IMAGES if name not in ("v2", "small-clusters")])
def test_the_feature_name_table_is_built_again(name: str) -> None:
    extension = parse_area(name).find(ExtensionType.FEATURE_NAMES)
    assert extension is not None
    rows = parse_feature_names(extension.data)
    assert b"".join(bytes([row.type, row.bit]) + row.raw_name for row in rows) == extension.data
    names = {(row.type, row.bit): row.name for row in rows}
    assert names[0, 0] == "dirty bit"
    assert names[2, 0] == "bitmaps"


def test_the_encryption_header_lies_behind_the_header() -> None:
    extension = parse_area("luks").find(ExtensionType.CRYPTO_HEADER)
    assert extension is not None
    pointer = CryptoHeaderPointer.parse(extension.data)
    assert pointer.build() == extension.data
    assert pointer.offset >= 1 << Header.parse(head("luks")).cluster_bits
    assert pointer.length > 0


@pytest.mark.parametrize("name", [name for name, image in IMAGES.items() if "bitmaps" in image])
def test_the_bitmap_directory_says_what_qemu_put_there_and_is_built_again(name: str) -> None:
    extension = parse_area(name).find(ExtensionType.BITMAPS)
    assert extension is not None
    pointer = BitmapsExtension.parse(extension.data)
    assert pointer.build() == extension.data
    data = (HERE / f"{name}.directory").read_bytes()
    assert len(data) == pointer.bitmap_directory_size
    found = list(parse_directory(data, pointer.nb_bitmaps))
    expected = IMAGES[name]["bitmaps"]
    assert [
        {
            "place": place,
            **{field: int(getattr(entry, field)) for field in entry.__slots__ if field in NUMBERS},
            "name": entry.name.decode(),
            "extra_data": entry.extra_data.hex(),
        }
        for place, entry in found
    ] == expected
    assert b"".join(entry.build() for _, entry in found) == data


NUMBERS = ("bitmap_table_offset", "bitmap_table_size", "flags", "type", "granularity_bits")


def test_the_snapshot_table_says_what_qemu_put_there_and_is_built_again() -> None:
    data, expected = (HERE / "snapshots.snapshots").read_bytes(), IMAGES["snapshots"]["snapshots"]
    found = [entry for _, entry in parse_snapshots(lambda at, length: data[at:][:length], 0, len(expected))]
    assert [
        {
            "l1_table_offset": entry.l1_table_offset,
            "l1_size": entry.l1_size,
            "extra_data": entry.extra_data.hex(),
            "id": entry.id.decode(),
            "name": entry.name.decode(),
        }
        for entry in found
    ] == expected
    assert [entry.virtual_size for entry in found] == [64 << 20] * 2
    built = b"".join(entry.build() for entry in found)
    assert data[: len(built)] == built
    assert not any(data[len(built) :])
