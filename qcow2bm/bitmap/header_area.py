"""The header's part in a change of bitmaps: point the bitmaps extension at a new directory, add it, or drop it.

Why each layout keeps the image whole: the 24 bytes of the extension's data are overwritten in place, in one disk
sector, so a crash leaves the old directory or the new one. A first extension is written behind the end marker,
where nobody looks, before the end marker turns into its head, and only then the autoclear bit says that it counts.
Dropping the last goes the other way. Where a header is laid out so that this is not possible, all of it is rewritten
at once, under a journal.
"""

from __future__ import annotations

from ..errors import NoSpaceError
from ..format.extensions import BITMAPS_LENGTH, END_MARKER, HEAD_LENGTH, BitmapsExtension, Extension, ExtensionType
from ..format.header import AUTOCLEAR_FIELD, BACKING_FILE_FIELDS, KNOWN_AUTOCLEAR, Autoclear
from ..image.header_draft import HeaderDraft
from ..image.image import Qcow2Image
from ..image.plan import Switch


def switch(head: HeaderDraft, extension: Extension, pointer: BitmapsExtension, *, attach: bool) -> Switch:
    """Point the extension at another directory.

    Args:
        attach: set the autoclear bit too, afterwards: the bitmaps there were detached and are gone, the new ones count.
    """
    head.put(extension.data_offset, pointer.build(), "the bitmaps extension")
    if attach:
        head.put(AUTOCLEAR_FIELD, _autoclear(head.image, bitmaps=True), "the autoclear bit: the bitmaps count")
    return head.in_steps("switch to the new bitmap directory", commit=-1)


def attach(head: HeaderDraft, pointer: BitmapsExtension) -> Switch:
    """Add the extension to an image that has none.

    Raises:
        NoSpaceError: the first cluster has no room for it.
    """
    image = head.image
    header, area = image.header, image.extensions
    end = area.end + HEAD_LENGTH + BITMAPS_LENGTH + HEAD_LENGTH
    name = image.head[header.backing_file_offset :][: header.backing_file_size] if header.backing_file_offset else b""
    apart = True
    if header.backing_file_offset and end > header.backing_file_offset:
        # Without an end marker the old name would be taken for an extension once the header says it lies elsewhere.
        apart = area.end + HEAD_LENGTH <= area.limit
        # Behind the old name if there is room, so that one of the two is whole at any moment.
        place = max(end, header.backing_file_offset + len(name))
        if place + len(name) > image.geometry.cluster_size:
            place, apart = end, False
        _require_room(image, place + len(name))
        head.put(place, name, "copy of the backing file name", unseen=True)
        head.put(BACKING_FILE_FIELDS, place.to_bytes(8, "big"), "place of the backing file name")
    _require_room(image, end)
    body = pointer.build() + END_MARKER
    head.put(area.end + HEAD_LENGTH, body, "the bitmaps extension, not yet reachable", unseen=True)
    head.put(area.end, _extension_head(), "the end marker becomes the bitmaps extension")
    head.put(AUTOCLEAR_FIELD, _autoclear(image, bitmaps=True), "the autoclear bit: the bitmaps count")
    return head.in_steps("add the bitmaps extension", commit=-1) if apart else head.at_once("add the bitmaps extension")


def detach(head: HeaderDraft, extension: Extension) -> Switch:
    """Drop the extension: the image has no bitmaps any more."""
    drop(head, extension)
    if _is_last(head.image, extension):
        return head.in_steps("drop the bitmaps extension", commit=0)
    return head.at_once("drop the bitmaps extension")


def drop(head: HeaderDraft, extension: Extension) -> None:
    """The steps of dropping it, in order. One that a damaged image of version 2 has is dropped as well."""
    image = head.image
    area = image.extensions
    if image.header.version >= 3:  # where a header of version 2 has its extensions already
        head.put(AUTOCLEAR_FIELD, _autoclear(image, bitmaps=False), "the autoclear bit: no bitmaps count")
    if _is_last(image, extension):
        # Only its head is overwritten; what follows an end marker means nothing.
        head.put(extension.offset, END_MARKER, "the bitmaps extension becomes the end marker")
        return
    rest = image.head[extension.end : min(area.end + HEAD_LENGTH, area.limit)]
    moved = rest + bytes(extension.end - extension.offset)
    head.put(extension.offset, moved, "the extensions behind the bitmaps extension move up")


def _is_last(image: Qcow2Image, extension: Extension) -> bool:
    return extension.end == image.extensions.end


def _autoclear(image: Qcow2Image, *, bitmaps: bool) -> bytes:
    features = image.header.autoclear_features & KNOWN_AUTOCLEAR & ~Autoclear.BITMAPS
    return int(features | (Autoclear.BITMAPS if bitmaps else 0)).to_bytes(8, "big")


def _extension_head() -> bytes:
    return Extension(ExtensionType.BITMAPS, bytes(BITMAPS_LENGTH)).build()[:HEAD_LENGTH]


def _require_room(image: Qcow2Image, end: int) -> None:
    if end > image.geometry.cluster_size:
        raise NoSpaceError(
            "the first cluster has no room for the bitmaps extension",
            hint="a shorter backing file name would make some",
        )
