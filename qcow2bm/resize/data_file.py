"""The external data file of an image that is resized: which it is, and how long it is to be.

No name in an image is believed: the user says where the file is. A raw one is as long as the disk, since whoever reads
it alone takes its length for the disk's size. One that is not raw is cut only where no cluster is in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import NoSpaceError, NotQcow2Error, UnsupportedImageError, UsageError, naming
from ..format.extensions import ExtensionType
from ..format.header import MAGIC, Autoclear
from ..image.file import ImageFile
from ..image.image import Qcow2Image, take_locks
from ..image.plan import DataFile
from .mapping import end_in_data_file

_PIECE = 64 << 10
"""Bytes of a data file that are looked at together."""
_MANY = 1 << 10
"""Ranges that are told apart; more of them are one."""


@contextlib.contextmanager
def opened(image: Qcow2Image, path: Path | None) -> Iterator[ImageFile | None]:
    """The data file of an image, open to be read; None if it has none.

    Raises:
        UnsupportedImageError: there is one, and nobody says where.
        UsageError: there is none, or this is the image itself, or no file that can be one.
        InUseError: another process writes to it.
        ImageIOError: it cannot be opened.
    """
    if path is None:
        if image.header.has_data_file:
            name = image.extensions.text(ExtensionType.DATA_FILE) or ""
            raise UnsupportedImageError(
                f"its guest data lies in an external data file, which it calls '{name}'",
                hint="say with --data-file where that is: no name in an image is believed for it",
            )
        yield None
        return
    if not image.header.has_data_file:
        raise UsageError("it has no external data file", hint="leave --data-file out")
    try:
        file = ImageFile.open(path)
    except NotQcow2Error as error:
        reason = error.message.partition(",")[0]  # nobody wants it to be a qcow2 image
        raise UsageError(f"the data file '{path}' {reason}", hint="name a file or a block device") from None
    try:
        with naming(path):
            from ..chain.layers import file_identity  # with numpy

            if file_identity(file) == file_identity(image.file):
                raise UsageError("this is the image, not its data file")
            if image.locked:
                take_locks(file, writable=False, force_share=False)
            _require_no_image(file, image.extensions.text(ExtensionType.DATA_FILE))
        yield file
    finally:
        file.close()


def _require_no_image(file: ImageFile, name: str | None) -> None:
    """Refuse a qcow2 image, whose length is not to be touched, if the image does not call its data file so.

    A data file may begin like one: the guest may keep an image on its disk.

    Raises:
        UsageError: it is one.
    """
    if file.read_padded(0, len(MAGIC)) == MAGIC and (not name or Path(name).name != file.path.name):
        called = f"the image calls its data file '{name}'" if name else "the image does not name its data file"
        raise UsageError(
            "this is a qcow2 image and not the image's data file",
            hint=f"{called}; if the disk itself begins like an image, name it by a link of that name",
        )


def is_raw(image: Qcow2Image) -> bool:
    """True if the data file alone is the guest's disk."""
    return bool(image.header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA)


def lengths(image: Qcow2Image, file: ImageFile, old: int, new: int) -> DataFile:
    """How long the data file is to be, meanwhile and in the end.

    Raises:
        NoSpaceError: it is a block device, and too small.
    """
    extended = max(file.size, new)
    if file.is_device:
        if extended > file.size:
            raise NoSpaceError(f"the data file is a device of {file.size} bytes", hint="extend the device")
        return DataFile(file.path, file.size, file.size, file.size, image.locked)
    cut = extended
    if new < old:
        cut = new if is_raw(image) else max(new, end_in_data_file(image, image.geometry.clusters(new)))
    return DataFile(file.path, file.size, extended, min(cut, extended), image.locked)


def doubts(image: Qcow2Image, file: ImageFile, disk: int) -> Iterator[str]:
    """What speaks against this being the data file of an image, for people to judge."""
    name = image.extensions.text(ExtensionType.DATA_FILE)
    if name and Path(name).name != file.path.name:
        yield f"note: the image calls its data file '{name}', not '{file.path.name}'"
    if is_raw(image) and not file.is_device and file.size != disk:
        yield f"note: the data file has {file.size} bytes, the disk {disk}"


def exposed_bytes(file: ImageFile, old: int, new: int) -> tuple[tuple[int, int], ...]:
    """What a raw data file that is longer than the disk holds there already, as ranges (offset, length) with data."""
    stop = min(new, file.size)
    found: list[tuple[int, int]] = []
    at = old
    while at < stop:
        at = max(at, file.next_data(at))
        end = min((at // _PIECE + 1) * _PIECE, stop)
        if at < end and any(file.read_at(at, end - at)):
            if found and sum(found[-1]) == at:
                at = found.pop()[0]
            found.append((at, end - at))
        at = max(at, end)
    if len(found) > _MANY:
        return ((found[0][0], sum(found[-1]) - found[0][0]),)
    return tuple(found)
