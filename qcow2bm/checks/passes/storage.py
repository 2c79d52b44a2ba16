"""Where guest data lies and how: the encryption header, and the rules of an external data file."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import CorruptImageError
from ...format.extensions import CryptoHeaderPointer, ExtensionType
from ...format.header import Autoclear, field_offset
from ...format.limits import MAX_ENCRYPTION_HEADER
from ..model import Finding, InQemu, Location
from ..problems import found, from_fault
from ..view import View, unreadable

_LUKS = 2
_LUKS_LENGTH = 592
"""Bytes of a LUKS header without its key material."""
_LUKS_MAGIC = b"LUKS\xba\xbe"


def encryption(view: View) -> Iterator[Finding]:
    """The encryption method and its header; the clusters of that header are the mapping's business."""
    extension = view.image.extensions.find(ExtensionType.CRYPTO_HEADER)
    luks = view.header.crypt_method == _LUKS
    if extension is None:
        if luks:
            where = Location("header", field_offset("crypt_method"))
            yield found(
                "encryption-extension-missing", "LUKS, but no header extension tells where its header is", where
            )
        return
    where = Location("extensions", extension.offset)
    if not luks:
        method = view.header.crypt_method
        yield found("encryption-extension-unexpected", f"an encryption header, but the method is {method}", where)
        return
    try:
        pointer = CryptoHeaderPointer.parse(extension.data)
    except CorruptImageError as error:
        yield from_fault(unreadable(error), where)
        return
    if not view.geometry.may_start(pointer.offset, 0):
        text = f"the encryption header's offset {pointer.offset:#x} is not a cluster's"
        yield found("encryption-header-offset", text, where, offset=pointer.offset)
    elif pointer.length < _LUKS_LENGTH:
        text = f"the encryption header has {pointer.length} bytes, a LUKS header {_LUKS_LENGTH} at least"
        yield found("encryption-header-size", text, where)
    elif pointer.length > MAX_ENCRYPTION_HEADER:
        text = f"the encryption header has {pointer.length} bytes, which nobody would write"
        yield found("encryption-header-size", text, where, qemu=InQemu.SILENT)
    elif view.file.read_padded(pointer.offset, len(_LUKS_MAGIC)) != _LUKS_MAGIC:
        text = f"there is no LUKS header at {pointer.offset:#x}"
        yield found("encryption-header-magic", text, where, offset=pointer.offset)


def data_file(view: View) -> Iterator[Finding]:
    """The name of the data file and the flags that go with one."""
    name = view.image.extensions.find(ExtensionType.DATA_FILE)
    raw = bool(view.header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA)
    if view.header.has_data_file:
        if name is None or not name.data:
            text = "guest data lies in a data file, but the image does not name it"
            yield found("data-file-name-missing", text, Location("extensions"))
        return
    if name is not None:
        text = "a data file is named, but the image keeps its data itself"
        yield found("data-file-name-unused", text, Location("extensions", name.offset))
    if raw:
        where = Location("header", field_offset("autoclear_features"))
        yield found("data-file-raw-without-file", "the raw data file bit is set without a data file", where)
