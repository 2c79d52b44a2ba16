"""Header fields, feature bits and the header extensions as such."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...format.faults import Fault
from ...format.header import KNOWN_AUTOCLEAR, Incompatible, field_offset
from ..model import Finding, Location
from ..problems import found, from_fault
from ..view import View


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
        seen.add(extension.type)
        if any(extension.padding):
            yield found("extension-padding", f"padding of extension {extension.type_name} is not zero", where)
