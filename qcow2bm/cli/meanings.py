"""What a field of an on-disk structure says, in words beside its number."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import IntFlag

from ..format.bitmap_directory import BitmapFlag
from ..format.entries import ALL_ONES, COPIED, OFFSET_MASK, REFCOUNT_BLOCK_MASK
from ..format.extensions import Extension
from ..format.header import COMPRESSION, ENCRYPTION, Autoclear, Compatible, Incompatible
from ..format.layout import Field
from ..format.text import decode_name
from .sizes import human_size

_FLAGS: dict[str, type[IntFlag]] = {
    "incompatible_features": Incompatible,
    "compatible_features": Compatible,
    "autoclear_features": Autoclear,
    "flags": BitmapFlag,
}
_SHOWN_BYTES = 16


def shown(field: Field) -> str:
    """The value as it is looked for: offsets and flags in hexadecimal, counts and sizes in decimal."""
    if isinstance(field.value, bytes):
        cut = field.value[:_SHOWN_BYTES].hex(" ")
        return cut + (" ..." if len(field.value) > _SHOWN_BYTES else "")
    if field.name.endswith("offset") or field.name in _FLAGS or field.name.startswith("["):
        return f"{field.value:#x}"
    return f"{field.value:#010x}" if field.name == "type" and field.length == 4 else str(field.value)


def meaning(structure: str, field: Field) -> str:
    """What the value says; an empty text where the number says it all."""
    value = field.value
    if isinstance(value, bytes):
        return _text(value) if field.name in {"magic", "name", "id", "data"} else ""
    if field.name.startswith("["):
        return _entry(structure, value)
    if field.name in _FLAGS:
        return _flags(_FLAGS[field.name], value)
    if structure == "extensions" and field.name == "type":
        return Extension(value, b"").type_name
    return _number(field.name, value)


def _number(name: str, value: int) -> str:
    """Numbers that stand for something else."""
    match name:
        case "cluster_bits" | "granularity_bits":
            return human_size(1 << value) if value < 64 else "out of bounds"
        case "size" | "vm_state_size" | "bitmap_directory_size" if value >= 1024:
            return human_size(value)
        case "date_sec":
            return datetime.fromtimestamp(value, UTC).isoformat()
        case "refcount_order":
            return f"{1 << value} bits" if value < 7 else "out of bounds"
        case "crypt_method" | "compression_type":
            return (ENCRYPTION if name == "crypt_method" else COMPRESSION).get(value, "unknown")
        case _:
            return ""


def _flags(kind: type[IntFlag], value: int) -> str:
    names = [flag.name.lower().replace("_", "-") for flag in kind if value & flag and flag.name]
    unknown = value & ~sum(kind)
    return ", ".join([*names, *([f"unknown {unknown:#x}"] if unknown else [])])


def _entry(structure: str, value: int) -> str:
    """What an entry of a table says."""
    if structure == "bitmap-tables":
        return "all ones" if value == ALL_ONES else f"data at {value & OFFSET_MASK:#x}"
    if structure == "refcount-table":
        return f"refcount block at {value & REFCOUNT_BLOCK_MASK:#x}"
    copied = ", copied" if value & COPIED else ""
    return f"L2 table at {value & OFFSET_MASK:#x}{copied}"


def _text(value: bytes) -> str:
    """The value as text where that is what it is."""
    text = decode_name(value.rstrip(b"\0"))
    return f"'{text}'" if len(value) <= 1024 and text[:64].isprintable() else ""
