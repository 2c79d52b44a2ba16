"""Faults of extensions, encryption and data file, for which QEMU refuses to open an image.

Source: `qcow2_read_extensions`, `qcow2_do_open`; qcow2 specification, "Header extensions". Those of the header's own
fields are the header's, those of the bitmaps their directory's. Who reads bitmaps need not mind these; nobody should
write to an image that has one: QEMU would not open it afterwards either, and damage seldom comes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ..errors import CorruptImageError
from .extensions import BitmapsExtension, CryptoHeaderPointer, Extension, ExtensionArea, ExtensionType
from .faults import Fault
from .header import Autoclear, Header, field_offset
from .limits import MAX_ENCRYPTION_HEADER

if TYPE_CHECKING:
    from .luks import LuksFault

_MAX_FORMAT_NAME = 15
"""Bytes of a backing format's name that QEMU has room for."""
_LUKS_LENGTH = 592
"""Bytes of a LUKS header without its key material."""


class OpeningFault(NamedTuple):
    """A fault and what it is about.

    Attributes:
        at: offset in the file of the header field or the extension, in bytes.
        value: the number that is wrong, an offset or a length in bytes; 0 if there is none.
    """

    fault: Fault
    at: int
    value: int = 0


def opening_faults(header: Header, area: ExtensionArea, read: Callable[[int, int], bytes]) -> Iterator[OpeningFault]:
    """The faults of extensions, encryption and data file that keep QEMU from opening an image.

    Args:
        read: gives the bytes at an offset of the file, zeroes where it has none.
    """
    yield from _length_faults(area)
    yield from _encryption_faults(header, area.find(ExtensionType.CRYPTO_HEADER), read)
    if header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA and not header.has_data_file:
        fault = Fault("data-file-raw-without-file", "the raw data file bit is set without a data file")
        yield OpeningFault(fault, field_offset("autoclear_features"))


def _length_faults(area: ExtensionArea) -> Iterator[OpeningFault]:
    """Extensions of a wrong length; the first of a type that has a structure is for who reads that."""
    parsers: dict[int, Callable[[bytes], object]] = {
        ExtensionType.BITMAPS: BitmapsExtension.parse,
        ExtensionType.CRYPTO_HEADER: CryptoHeaderPointer.parse,
    }
    seen: set[int] = set()
    for extension in area.extensions:
        length = len(extension.data)
        if extension.type == ExtensionType.BACKING_FORMAT and length > _MAX_FORMAT_NAME:
            text = f"the backing format's name has {length} bytes, QEMU takes {_MAX_FORMAT_NAME}"
            yield OpeningFault(Fault("backing-format-length", text), extension.offset, length)
        if extension.type in seen and extension.type in parsers:  # QEMU looks at each
            try:
                parsers[extension.type](extension.data)
            except CorruptImageError as error:
                yield OpeningFault(Fault.of(error), extension.offset, length)
        seen.add(extension.type)


def _encryption_faults(
    header: Header, extension: Extension | None, read: Callable[[int, int], bytes]
) -> Iterator[OpeningFault]:
    """The pointer to the LUKS header, and what that says."""
    luks = header.encrypts_by_place
    if extension is None:
        if luks:
            fault = Fault("encryption-extension-missing", "LUKS, but no header extension tells where its header is")
            yield OpeningFault(fault, field_offset("crypt_method"))
        return
    at = extension.offset
    if not luks:
        text = f"an encryption header, but the method is {header.crypt_method}"
        yield OpeningFault(Fault("encryption-extension-unexpected", text), at)
        return
    try:
        pointer = CryptoHeaderPointer.parse(extension.data)
    except CorruptImageError as error:
        yield OpeningFault(Fault.of(error), at)
        return
    if not header.geometry.may_start(pointer.offset, 0):
        text = f"the encryption header's offset {pointer.offset:#x} is not a cluster's"
        yield OpeningFault(Fault("encryption-header-offset", text), at, pointer.offset)
    elif pointer.length < _LUKS_LENGTH:
        text = f"the encryption header has {pointer.length} bytes, a LUKS header {_LUKS_LENGTH} at least"
        yield OpeningFault(Fault("encryption-header-size", text), at, pointer.length)
    elif pointer.length > MAX_ENCRYPTION_HEADER:
        text = f"the encryption header has {pointer.length} bytes, which nobody would write"
        yield OpeningFault(Fault("encryption-header-size", text), at, pointer.length)
    else:
        for code, found in _luks_faults(pointer, read):
            yield OpeningFault(Fault(code, found.message), at, pointer.offset)


def luks_faults(area: ExtensionArea, read: Callable[[int, int], bytes]) -> Iterator[LuksFault]:
    """What is wrong with the LUKS header of an image whose pointer to it is sound."""
    extension = area.find(ExtensionType.CRYPTO_HEADER)
    if extension is not None:
        for _, found in _luks_faults(CryptoHeaderPointer.parse(extension.data), read):
            yield found


def _luks_faults(pointer: CryptoHeaderPointer, read: Callable[[int, int], bytes]) -> Iterator[tuple[str, LuksFault]]:
    """The same with the problems' codes."""
    from .luks import LUKS_LENGTH, MAGIC, LuksFault, LuksHeader  # few images are encrypted

    data = read(pointer.offset, LUKS_LENGTH)
    if not data.startswith(MAGIC):
        text = f"there is no LUKS header at {pointer.offset:#x}"
        yield "encryption-header-magic", LuksFault(text, "Volume is not in LUKS format")
        return
    for found in LuksHeader.parse(data).faults(pointer.length):
        yield "encryption-header-damaged", found
