"""Fields of the header and its extensions whose right value is known: padding, unknown marks, the compression bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ..checks.model import RepairClass
from ..format.header import (
    AUTOCLEAR_FIELD,
    CHANGE_CUT_SHORT,
    CUT_SHORT,
    INCOMPATIBLE_FIELD,
    KNOWN_AUTOCLEAR,
    V3_LENGTH,
    Incompatible,
)
from .model import Proposal, Scope, Step
from .workshop import Workshop


def fields(shop: Workshop) -> Iterator[Proposal]:
    """A step for each of them."""
    mends: dict[str, tuple[RepairClass, str, Callable[[Workshop], None]]] = {
        CHANGE_CUT_SHORT: (RepairClass.GUESS, "take the image for what a crash has left of it", _our_mark),
        "header-padding": (RepairClass.LOSSLESS, "clear the header's padding", _header_padding),
        "extension-padding": (RepairClass.LOSSLESS, "clear the padding of header extensions", _extension_padding),
        "unknown-autoclear": (RepairClass.LOSSY, "clear unknown autoclear bits", unknown_autoclear),
        "compression-type-bit": (
            RepairClass.GUESS, "make the feature bit say what the compression type says", _compression_bit,
        ),
    }  # fmt: skip
    for code, (kind, title, mend) in mends.items():
        if found := shop.found(code):
            yield Step(title, kind, Scope.HEADER, {code: len(found)}), partial(mend, shop)


def _our_mark(shop: Workshop) -> None:
    features = int(shop.image.header.incompatible_features) & ~CUT_SHORT
    shop.write(INCOMPATIBLE_FIELD, features.to_bytes(8, "big"), "header: the mark of a change that was cut short")


def _header_padding(shop: Workshop) -> None:
    padding = shop.image.header.additional[1:8]  # the first byte is the compression type
    shop.write(V3_LENGTH + 1, bytes(len(padding)), "header: padding")


def _extension_padding(shop: Workshop) -> None:
    for extension in shop.image.extensions.extensions:
        if any(extension.padding):
            place = extension.data_offset + len(extension.data)
            shop.write(place, bytes(len(extension.padding)), f"padding of extension {extension.type_name}")


def unknown_autoclear(shop: Workshop) -> None:
    """What the specification asks of every writer: clear the autoclear bits that it does not know."""
    # As plain numbers: the inverse of an IntFlag knows no bits above the highest one defined.
    known = int(shop.image.header.autoclear_features) & int(KNOWN_AUTOCLEAR)
    shop.write(AUTOCLEAR_FIELD, known.to_bytes(8, "big"), "header: unknown autoclear bits")


def _compression_bit(shop: Workshop) -> None:
    header, bit = shop.image.header, int(Incompatible.COMPRESSION_TYPE)
    features = int(header.incompatible_features) & ~bit | (bit if header.compression_type else 0)
    shop.write(INCOMPATIBLE_FIELD, features.to_bytes(8, "big"), "header: incompatible features")
