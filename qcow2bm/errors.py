"""Every exception qcow2bm raises on purpose, and the exit status each one means.

The tree (exit status in brackets)::

    Qcow2bmError                      [1]  the command failed
    ├── UsageError                   [64]  no image could satisfy what was asked for
    ├── NotQcow2Error                [63]  a format this command does not handle
    ├── CorruptImageError             [2]  the image breaks the qcow2 format
    │   ├── TruncatedImageError       [2]  a structure lies outside the file
    │   └── ProofError                [2]  clusters are not owned as the image says
    ├── UnsupportedImageError         [1]  sound, but not for this operation
    │   └── UnsupportedVersionError   [1]  neither version 2 nor 3 of the format
    ├── OutdatedPlanError             [1]  the image has changed since the change was planned
    ├── InterruptedChangeError        [1]  a crash cut a change short
    ├── InUseError                   [75]  another process has the image open
    ├── LockingUnavailableError       [1]  the file system cannot lock
    ├── NoSpaceError                  [1]  the change does not fit
    ├── ImageIOError                  [1]  the operating system refused a read or a write
    │   ├── FlushError                [1]  what reached the disk is unknown
    │   └── ChangeDoneError           [1]  the change is done, what failed came after it
    ├── UndoError                     [1]  an undo file cannot be used on this image
    ├── ExportFileError               [1]  an export file cannot be read or written
    ├── UnprovedError                 [1]  a bitmap cannot be put to the test
    ├── LineageError                  [1]  exported bitmaps are not of the disk as it is
    └── BitmapError                   [1]  a bitmap refuses the operation
        ├── BitmapNotFoundError       [1]
        ├── BitmapExistsError         [1]
        ├── BitmapSizeMismatchError   [1]  the disks have different sizes
        ├── BitmapLimitError          [1]  QEMU's limits on number, size or space
        ├── BitmapInconsistentError   [4]  in use by a writer that died, or by a running VM
        └── BitmapBrokenError         [4]  its directory entry, table or data breaks the format

An error knows what is wrong (`message`), where (`image`) and what to do about it (`hint`); `str()` puts them
together as the command line prints them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

RUN_CHECK = "run `qcow2bm check` on it, and change nothing before its findings are understood"


class Qcow2bmError(Exception):
    """Base of all errors of this package.

    Args:
        message: what is wrong, one line, no final full stop.
        hint: what the user can do about it.
        image: the image it is about; filled in by `naming` where the code that raises does not know it.
        code: the problem's permanent code, where `check` has one for it.
    """

    exit_status: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        image: str | Path | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.image = image
        self.code = code

    def __str__(self) -> str:
        place = f"{self.image}: " if self.image is not None else ""
        advice = f"; {self.hint}" if self.hint else ""
        return f"{place}{self.message}{advice}"


class UsageError(Qcow2bmError):
    """No image could satisfy what was asked for: a malformed size, name, granularity or range."""

    exit_status = 64


class NotQcow2Error(Qcow2bmError):
    """The file is not a qcow2 image, or not one that this command handles."""

    exit_status = 63


class CorruptImageError(Qcow2bmError):
    """The image breaks the qcow2 format."""

    exit_status = 2


class TruncatedImageError(CorruptImageError):
    """A structure that the image names lies wholly or partly outside the file."""


class ProofError(CorruptImageError):
    """A cluster that would be written, freed or reused has other owners than the refcounts say."""


class UnsupportedImageError(Qcow2bmError):
    """The image is sound but does not allow the operation.

    Version 2, an unknown feature, the dirty or the corrupt bit.
    """


class UnsupportedVersionError(UnsupportedImageError):
    """The image has a version of the format that is not known."""

    def __init__(self, version: int) -> None:
        super().__init__(f"qcow2 version {version} is not known, only 2 and 3 are")
        self.version = version


class OutdatedPlanError(Qcow2bmError):
    """The image has changed since the change was planned; nothing was written, or everything was put back."""


class InterruptedChangeError(Qcow2bmError):
    """A crash cut a change short. A command that opens the image for writing settles it, if its journal is there."""


class InUseError(Qcow2bmError):
    """Another process has the image open in a way that conflicts; try again later."""

    exit_status = 75


class LockingUnavailableError(Qcow2bmError):
    """The file system has no open-file-description locks, so nothing can keep QEMU out."""


class NoSpaceError(Qcow2bmError):
    """The change needs more room than the disk, the device, the header cluster or the refcount table can give."""


class ImageIOError(Qcow2bmError):
    """The operating system refused to open, read, write or flush."""


class FlushError(ImageIOError):
    """A flush failed. What reached the disk is unknown, so nothing more may be written."""


class ChangeDoneError(ImageIOError):
    """The change is done, and the message says so. What failed came after it: giving clusters back, for example."""


class UndoError(Qcow2bmError):
    """An undo file is damaged, belongs to another image, or the image has changed since it was written."""


class ExportFileError(Qcow2bmError):
    """An export file is damaged, cut short, of a version that is not known, or in the way."""


class UnprovedError(Qcow2bmError):
    """A bitmap cannot be put to the test, as one of the disks or the bitmap cannot be read: it may be good or not."""


class LineageError(Qcow2bmError):
    """Exported bitmaps are those of another image, or of this one before it was written to."""


class BitmapError(Qcow2bmError):
    """A bitmap refuses the operation."""


class BitmapNotFoundError(BitmapError):
    """The image has no bitmap of that name."""


class BitmapExistsError(BitmapError):
    """The image has a bitmap of that name already."""


class BitmapSizeMismatchError(BitmapError):
    """Two bitmaps describe disks of different sizes."""


class BitmapLimitError(BitmapError):
    """QEMU would not accept the result: too many bitmaps, or one that is too large for its granularity."""


class BitmapInconsistentError(BitmapError):
    """The bitmap is marked in use: its bits on disk may be stale, so only removing it is safe."""

    exit_status = 4


class BitmapBrokenError(BitmapError):
    """The bitmap's directory entry, table or data breaks the format."""

    exit_status = 4


@contextlib.contextmanager
def naming(image: str | Path) -> Iterator[None]:
    """Say which image an error is about, and turn an `OSError` met on the way into `ImageIOError`."""
    try:
        yield
    except Qcow2bmError as error:
        if error.image is None:
            error.image = image
        raise
    except OSError as error:
        raise from_os_error(error, image) from error


def from_os_error(error: OSError, image: str | Path | None = None) -> Qcow2bmError:
    """The error of this package that says the same as `error`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ImageIOError(reason, image=image)
