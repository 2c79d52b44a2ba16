"""Positional reads, writes and barriers on one regular file or block device.

The only place that opens images. A name is opened once and kept open: locks belong to this open file description,
and a name that is opened twice may be two different files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Self

from ..errors import FlushError, ImageIOError, NotQcow2Error, TruncatedImageError, naming
from ..format.geometry import begins_outside
from ..format.limits import MAX_CLUSTER_BITS

JOURNAL_SUFFIX = ".qcow2bm-journal"
"""Of the journal beside an image."""
UNDO_SUFFIX = ".qcow2bm-undo"
"""Of the undo file beside an image where the user names no other."""

_A_DIRECTORY = "is a directory, not a qcow2 image"

_BLKROGET = 0x125E


class ImageFile:
    """An open image file. Use `ImageFile.open`; offsets and lengths are in bytes.

    Attributes:
        fd: the file descriptor, which also carries the locks.
        size: length of the file or device; follows writes and truncation.
        is_device: True for a block device, whose size is fixed.
        slack: bytes past the end of the file that may read as zeroes, because a structure may end in a cluster that
            the file holds only in part: one cluster of this image, the largest there is until the header is read.
    """

    def __init__(self, fd: int, path: Path, *, writable: bool, size: int, is_device: bool) -> None:
        self.fd = fd
        self.path = path
        self.writable = writable
        self.size = size
        self.is_device = is_device
        self.slack = 1 << MAX_CLUSTER_BITS

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = False) -> Self:
        """Open a regular file or a block device.

        Raises:
            ImageIOError: it cannot be opened.
            NotQcow2Error: it is a directory, a FIFO, a socket or a character device.
        """
        name = Path(path)
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        with naming(name):
            try:
                fd = os.open(name, flags)
            except IsADirectoryError:
                raise NotQcow2Error(_A_DIRECTORY) from None
            try:
                mode = os.fstat(fd).st_mode
                if stat.S_ISDIR(mode):
                    raise NotQcow2Error(_A_DIRECTORY)
                if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                    raise NotQcow2Error("is neither a regular file nor a block device")
                if writable and stat.S_ISBLK(mode) and _is_read_only(fd):
                    raise ImageIOError("the device is read-only")
                size = os.lseek(fd, 0, os.SEEK_END)
            except BaseException:
                close_fd(fd)
                raise
            return cls(fd, name, writable=writable, size=size, is_device=stat.S_ISBLK(mode))

    @cached_property
    def real(self) -> Path:
        """The name of the file itself, by whatever link it was opened; asked for once, as links may change."""
        return self.path.resolve()

    @property
    def journal(self) -> Path:
        """Where a change that needs a journal keeps it: beside the file itself."""
        return self.real.with_name(self.real.name + JOURNAL_SUFFIX)

    def require_its_name(self) -> None:
        """Refuse to go by the name for what lies beside the file, when that has become another file's.

        Raises:
            ImageIOError: the file was renamed, removed or replaced since it was opened.
        """
        try:
            named = self.real.stat()
        except FileNotFoundError:
            named = None
        if named is None or not os.path.samestat(named, os.fstat(self.fd)):
            raise ImageIOError(f"it was renamed or replaced while it was open: {self.real} is not it any more")

    @property
    def has_journal(self) -> bool:
        """True if there is one. There is none where its name would be too long."""
        try:
            self.journal.lstat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return False
            raise
        return True

    @property
    def present(self) -> int:
        """Bytes that the file takes on the disk, of a device all: what it can hold, whatever its size claims."""
        return self.size if self.is_device else os.fstat(self.fd).st_blocks * 512

    def measure(self) -> None:
        """Look how long the file is now."""
        self.size = os.lseek(self.fd, 0, os.SEEK_END)

    def close(self) -> None:
        """Close the file, which also drops its locks."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            close_fd(fd)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; of the cluster in which the file ends the rest is zeroes.

        Raises:
            TruncatedImageError: one of the range's clusters begins outside the file. Nothing is allocated on the word
                of such a range.
        """
        if not length:
            return b""
        self._require_inside(offset, length)
        data = read_fd(self.fd, length, offset)
        return data if len(data) == length else data + bytes(length - len(data))

    def _require_inside(self, offset: int, length: int) -> None:
        if begins_outside(offset, length, self.slack, self.size):
            raise TruncatedImageError(f"{length} bytes at {offset:#x} lie outside the file of {self.size} bytes")

    def read_padded(self, offset: int, length: int) -> bytes:
        """`length` bytes, which the caller has bounded, with zeroes wherever the file has none: as QEMU reads."""
        present = min(length, self.size - offset)
        data = self.read_at(offset, present) if present > 0 else b""
        return data if len(data) == length else data + bytes(length - len(data))

    def read_pieces(self, pieces: Iterable[tuple[int, int]], buffer: memoryview) -> None:
        """Fill `buffer` with pieces (offset, length) one after the other, padded as `read_padded` does."""
        at = 0
        for offset, length in pieces:
            part = buffer[at : at + length]
            at += length
            if offset >= self.size or os.preadv(self.fd, [part], offset) != length:
                part[:] = self.read_padded(offset, length)

    def is_hole(self, offset: int, length: int) -> bool:
        """True if the file certainly holds nothing but zeroes there: a sparse file may claim any number of tables."""
        return offset < self.size and self.next_data(offset) >= min(offset + length, self.size)

    def next_data(self, offset: int) -> int:
        """The first offset from `offset` on that may hold something else than a hole; the file's size if none does."""
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            return self.size if error.errno == errno.ENXIO else offset

    def stretches(self, start: int, end: int, most: int) -> Iterator[tuple[int, int, bytes | None]]:
        """Offset, length and bytes of the pieces of a range, of `most` bytes or fewer.

        A hole is one piece without bytes, however large, and so is what lies behind the end of the file.
        """
        while start < end:
            data = self.next_data(start) if start < self.size else end
            hole_end = end if data >= self.size else min(data, end)
            length = hole_end - start or min(most, end - start, self.size - start)
            yield start, length, None if hole_end > start else self.read_at(start, length)
            start += length

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset`; durable only after the next `barrier`."""
        for end in _written(self.fd, data, offset):
            # After every part: one that a full disk cut short has made the file longer all the same.
            if not self.is_device:
                self.size = max(self.size, end)

    def barrier(self) -> None:
        """Everything written so far reaches the disk before anything written later.

        By fdatasync, which covers the file size.

        Raises:
            FlushError: what is on the disk is then unknown: nothing more may be written.
        """
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise flush_error(error) from error

    def truncate(self, size: int) -> None:
        """Cut a regular file back to `size`, or extend it with a hole."""
        os.ftruncate(self.fd, size)
        self.size = size

    def free_space(self) -> int | None:
        """Bytes the file can still grow by, or None when that cannot be told."""
        if self.is_device:
            return 0
        status = os.fstatvfs(self.fd)
        return status.f_bavail * status.f_frsize


def close_fd(fd: int) -> None:
    """Close a file of which all is flushed that counts. It is closed whatever happens.

    An error of that is for what was written and not flushed, as on NFS: of a change that succeeded nothing is, and one
    that failed has said so.
    """
    with contextlib.suppress(OSError):
        os.close(fd)


def flush_error(error: OSError) -> FlushError:
    """The error of a flush that failed."""
    return FlushError(
        f"flushing failed ({os.strerror(error.errno or errno.EIO)}): what reached the disk is unknown",
        hint="check the disk, then run `qcow2bm check` on the image",
    )


def read_fd(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes of an open file from `offset` on, fewer only at its end: a read may stop before that."""
    data = os.pread(fd, length, offset)
    if len(data) == length or not data:
        return data
    parts, got = [data], len(data)
    while got < length and (data := os.pread(fd, length - got, offset + got)):
        parts.append(data)
        got += len(data)
    return b"".join(parts)


def write_fd(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file: a write may stop before that."""
    for _ in _written(fd, data, offset):
        pass


def _written(fd: int, data: bytes | bytearray | memoryview, offset: int) -> Iterator[int]:
    """Write it, and yield the end of each part."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[written:], offset + written
        yield offset


def _is_read_only(fd: int) -> bool:
    """True for a device that takes no writes: the kernel lets root open one for writing all the same."""
    flag: int = struct.unpack("@i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0]
    return flag != 0
