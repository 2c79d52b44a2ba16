"""Where each field of an on-disk structure lies and what its bytes say, without judging them: for looking at damage.

The structures themselves stay where they are defined; this module only walks them, so a dump and the parser can never
disagree about an offset. Whatever the data ends before is left out instead of refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from construct import Struct

from .bitmap_directory import ENTRY_STRUCT as BITMAP_STRUCT
from .bitmap_directory import BitmapEntry
from .extensions import BITMAPS_STRUCT, CRYPTO_STRUCT, HEAD_LENGTH, Extension, ExtensionType
from .header import HEADER_LENGTH_FIELD, V2_LENGTH, V2_STRUCT, V3_LENGTH, V3_STRUCT
from .snapshot_table import ENTRY_STRUCT as SNAPSHOT_STRUCT
from .snapshot_table import SnapshotEntry


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its name in the specification, its place in the file, its value."""

    name: str
    offset: int
    length: int
    value: int | bytes


def _walk(struct: Struct, data: bytes, base: int) -> Iterator[Field]:
    """The fixed-size fields of `struct`, which starts at `base`, as far as `data` holds them."""
    at = 0
    for part in struct.subcons:
        length = part.sizeof()
        raw = data[at : at + length]
        if len(raw) < length:
            return
        yield Field(part.name or "", base + at, length, part.parse(raw))
        at += length


def _raw(name: str, offset: int, data: bytes) -> Iterator[Field]:
    if data:
        yield Field(name, offset, len(data), data)


def header_fields(data: bytes) -> Iterator[Field]:
    """The header's fields: those of version 2, then those of later versions up to what `header_length` says."""
    yield from _walk(V2_STRUCT, data, 0)
    if int.from_bytes(data[4:8], "big") < 3:
        return
    yield from _walk(V3_STRUCT, data[V2_LENGTH:], V2_LENGTH)
    end = int.from_bytes(data[HEADER_LENGTH_FIELD:][:4], "big")
    additional = data[V3_LENGTH:end] if V3_LENGTH < end <= len(data) else b""
    if additional:
        yield Field("compression_type", V3_LENGTH, 1, additional[0])
        yield from _raw("additional", V3_LENGTH + 1, additional[1:])


def extension_fields(extension: Extension) -> Iterator[Field]:
    """An extension's head and its data, field by field where the specification gives it fields."""
    yield Field("type", extension.offset, 4, extension.type)
    yield Field("length", extension.offset + 4, 4, len(extension.data))
    known = {ExtensionType.BITMAPS: BITMAPS_STRUCT, ExtensionType.CRYPTO_HEADER: CRYPTO_STRUCT}
    struct = next((found for kind, found in known.items() if kind == extension.type), None)
    if struct is None:
        yield from _raw("data", extension.data_offset, extension.data)
    else:
        yield from _walk(struct, extension.data, extension.data_offset)
        known_length = struct.sizeof()
        yield from _raw("excess", extension.data_offset + known_length, extension.data[known_length:])
    yield from _raw("padding", extension.offset + HEAD_LENGTH + len(extension.data), extension.padding)


def bitmap_entry_fields(entry: BitmapEntry, offset: int) -> Iterator[Field]:
    """The fields of a bitmap directory entry that lies at `offset`."""
    data = entry.build()
    yield from _walk(BITMAP_STRUCT, data, offset)
    at = offset + BITMAP_STRUCT.sizeof()
    for name, raw in (("extra_data", entry.extra_data), ("name", entry.name), ("padding", entry.padding)):
        yield from _raw(name, at, raw)
        at += len(raw)


def snapshot_fields(entry: SnapshotEntry, offset: int) -> Iterator[Field]:
    """The fields of a snapshot table entry that lies at `offset`."""
    data = entry.build()
    yield from _walk(SNAPSHOT_STRUCT, data, offset)
    at = offset + SNAPSHOT_STRUCT.sizeof()
    parts = (("extra_data", entry.extra_data), ("id", entry.id), ("name", entry.name), ("padding", entry.padding))
    for name, raw in parts:
        yield from _raw(name, at, raw)
        at += len(raw)
