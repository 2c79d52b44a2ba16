"""Header fields, feature bits and the header extensions as such."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ...errors import CorruptImageError
from ...format.extensions import BitmapsExtension, CryptoHeaderPointer, Extension, ExtensionType
from ...format.faults import Fault
from ...format.header import KNOWN_AUTOCLEAR, Incompatible, field_offset
from ..model import Finding, Location
from ..problems import found, from_fault
from ..view import View, unreadable

_MAX_FORMAT_NAME = 15
"""Bytes of a backing format's name that QEMU has room for."""


def header(view: View) -> Iterator[Finding]:
    """What `Header.faults` says, and feature bits that tell of the image's state."""
    yield from header_faults(view.faults)
    features, place = view.header.incompatible_features, field_offset("incompatible_features")
    if features & Incompatible.DIRTY:
        yield found("marked-dirty", "the dirty bit is set", Location("header", place))
    if features & Incompatible.CORRUPT:
        yield found("marked-corrupt", "the corrupt bit is set", Location("header", place))
    # As plain numbers: the inverse of an IntFlag knows no bits above the highest one defined.
    unknown = int(view.header.autoclear_features) & ~int(KNOWN_AUTOCLEAR)
    if unknown:
        where = Location("header", field_offset("autoclear_features"))
        yield found("unknown-autoclear", f"unknown autoclear features {unknown:#x}", where)


def header_faults(faults: Iterable[Fault]) -> Iterator[Finding]:
    """Faults of the header, which may be all there is to say."""
    return (from_fault(fault, Location("header", 0)) for fault in faults)


def extensions(view: View) -> Iterator[Finding]:
    """The area of the header extensions; what one of them says is for the passes that it concerns."""
    area = view.image.extensions
    if area.fault is not None:
        yield from_fault(area.fault, Location("extensions", area.end))
    seen: set[int] = set()
    for index, extension in enumerate(area.extensions):
        where = Location("extensions", extension.offset, index)
        if extension.type in seen:
            yield found("extension-duplicate", f"a second extension {extension.type_name}", where)
            yield from _second(extension, where)
        seen.add(extension.type)
        if any(extension.padding):
            yield found("extension-padding", f"padding of extension {extension.type_name} is not zero", where)
        if extension.type == ExtensionType.BACKING_FORMAT and len(extension.data) > _MAX_FORMAT_NAME:
            text = f"the backing format's name has {len(extension.data)} bytes, QEMU takes {_MAX_FORMAT_NAME}"
            yield found("backing-format-length", text, where, length=len(extension.data))


def _second(extension: Extension, where: Location) -> Iterator[Finding]:
    """The length of an extension that is there again: QEMU looks at each."""
    parse: dict[int, Callable[[bytes], object]] = {
        ExtensionType.BITMAPS: BitmapsExtension.parse,
        ExtensionType.CRYPTO_HEADER: CryptoHeaderPointer.parse,
    }
    try:
        parse.get(extension.type, bytes)(extension.data)
    except CorruptImageError as error:
        yield from_fault(unreadable(error), where)
