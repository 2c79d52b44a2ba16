"""Opening export files: a new one that is there whole or not at all, and one to read, which may come through a pipe.

What is read is needed twice: once from its start to its end, to see that it is whole, and then in parts. What comes
through a pipe is therefore kept in a nameless temporary file as it is read: of an export file no more than was already
found to be in order, of any other form no more than the largest that there may be.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from ..errors import ExportFileError, ImageIOError, from_os_error, naming
from ..format.header import MAGIC as QCOW2_MAGIC
from .file import close_fd, read_fd
from .undo_writer import sync_folder

_PIECE = 1 << 20
_HEAD = 64 << 10
"""Bytes that are looked at to know a file."""
_ANY = re.compile(b"")


class NewFile:
    """A file in the making. A context manager that gives a stream to write to.

    It is written under another name in the same folder, flushed, and gets its own name at the end; whatever is raised
    on the way, nothing of it is left.
    """

    def __init__(self, path: Path, *, force: bool = False, like: re.Pattern[bytes] | None = _ANY) -> None:
        """Nothing is opened yet.

        Args:
            force: take the place of a file of that name.
            like: how such a file begins, if it is not empty: anything else was named by a slip of the finger. None
                if it cannot be known, and so no file is replaced.

        Raises:
            ExportFileError: there is one and `force` is off, or it is nothing that may be replaced.
        """
        if path.is_dir():
            raise ExportFileError(f"{path} is a directory")
        if os.path.lexists(path):
            if not force:
                raise ExportFileError(f"{path} is there already", hint="--force replaces it")
            _require_replaceable(path, like)
        self._path = path.resolve()
        self._force = force
        self._temporary = self._path.with_name(f".{self._path.name[:200]}.{secrets.token_hex(4)}")
        self._stream: BinaryIO | None = None
        self._is_whole = False

    def __enter__(self) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._stream = os.fdopen(os.open(self._temporary, flags, 0o666), "wb", _PIECE)
        except OSError as error:
            raise from_os_error(error, self._path) from error
        except BaseException:  # a signal just after the file was made
            self._temporary.unlink(missing_ok=True)
            raise
        return self._stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._stream is not None
        try:
            if isinstance(error, OSError):  # whoever reads an image on the way says so: this is about the file
                raise error
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._give_name()
        except OSError as failure:
            raise from_os_error(failure, self._path) from failure
        finally:
            with contextlib.suppress(OSError):  # what is left in its buffer after an error
                self._stream.close()
            self._discard()

    def _discard(self) -> None:
        try:
            self._temporary.unlink(missing_ok=True)
        except OSError as error:
            text = f"a temporary file stays, {self._temporary} ({from_os_error(error).message})"
            hint = "what was written is whole" if self._is_whole else None
            raise ImageIOError(text, image=self._path, hint=hint) from error

    def _give_name(self) -> None:
        if self._force:
            self._temporary.replace(self._path)
        else:
            try:
                self._link()  # unlike a rename, never over a file that has come meanwhile
            except FileExistsError:
                raise ExportFileError(f"{self._path} is there already", hint="--force replaces it") from None
        self._is_whole = True
        try:
            sync_folder(self._path)
        except OSError as error:
            text = f"it is whole, but a power cut may take its name away ({from_os_error(error).message})"
            raise ImageIOError(text, image=self._path) from error

    def _link(self) -> None:
        try:
            os.link(self._temporary, self._path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: take the name first, for which there is no other way
            close_fd(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
            try:
                self._temporary.replace(self._path)
            except BaseException:
                self._path.unlink(missing_ok=True)
                raise


def _require_replaceable(path: Path, like: re.Pattern[bytes] | None) -> None:
    """Refuse to replace a device, a disk image, or any other file that is no export."""
    if path.exists() and not path.is_file():
        raise ExportFileError(f"{path} is no regular file", hint="write to - and let the shell do the rest")
    try:
        with path.open("rb") as old:
            start = old.read(_HEAD)
    except FileNotFoundError:  # a link that leads nowhere
        return
    except OSError as error:
        raise from_os_error(error, path) from error
    if start and like is None and not start.startswith(QCOW2_MAGIC):
        raise ExportFileError(
            f"{path} is there already, and nothing tells whether it is bare bits",
            hint="remove it first, or choose another name",
        )
    if start.startswith(QCOW2_MAGIC) or (start and like is not None and not like.match(start)):
        what = "a qcow2 image" if start.startswith(QCOW2_MAGIC) else "something else than an export"
        raise ExportFileError(f"{path} is {what} and is not replaced", hint="choose another name")


class Input:
    """Bytes to read one after the other, and to read again. A context manager.

    Attributes:
        name: for messages.
        at: how many bytes were read.
    """

    def __init__(self, stream: BinaryIO, name: str, *, spool: BinaryIO | None) -> None:
        """Use `open` or `of`."""
        self._stream = stream
        self._spool = spool
        self._own = False
        self._taken = False
        self.name = name
        self.at = 0

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file; a pipe or a device is read as a stream.

        Raises:
            ImageIOError: it cannot be opened.
        """
        with naming(path):
            # This waits for a FIFO's other end: without it, a FIFO whose writer comes later would read as empty.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
            try:
                regular = stat.S_ISREG(os.fstat(fd).st_mode)
                stream = os.fdopen(fd, "rb", _PIECE)
            except BaseException:
                close_fd(fd)
                raise
        found = cls(stream, str(path), spool=None if regular else _spool())
        found._own = True
        return found

    @classmethod
    def of(cls, stream: BinaryIO, name: str = "the export") -> Self:
        """Read from a stream, which stays open. What is read is kept in a temporary file."""
        return cls(stream, name, spool=_spool())

    def close(self) -> None:
        """Close what was opened here."""
        if self._spool is not None:
            self._spool.close()
        if self._own:
            with contextlib.suppress(OSError):  # it was only read
                self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, length: int) -> bytes:
        """The next `length` bytes, which the caller has bounded; fewer at the end.

        Raises:
            ImageIOError: the operating system refused.
        """
        parts = []
        stream = self._spool if self._taken and self._spool is not None else self._stream
        try:
            while length and (part := stream.read(length)):
                parts.append(part)
                length -= len(part)
        except OSError as error:
            raise from_os_error(error, self.name) from error
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if self._spool is not None and not self._taken:
            try:
                self._spool.write(data)
            except OSError as error:
                raise from_os_error(error, tempfile.gettempdir()) from error
        self.at += len(data)
        return data

    def take_in(self, limit: int) -> None:
        """Read what comes through a pipe to its end, before anything else is done; a regular file is left where it is.

        Args:
            limit: no more than this and a byte, which then tells that there is more.

        Raises:
            ImageIOError: the operating system refused.
        """
        if self._spool is None or self._taken:
            return
        while self.at <= limit and self.read(min(limit + 1 - self.at, _PIECE)):
            pass
        self._spool.seek(0)
        self._taken, self.at = True, 0

    def read_rest(self, limit: int) -> bytes:
        """All that is left, but not more than `limit` bytes and one."""
        parts: list[bytes] = []
        while limit >= 0 and (part := self.read(min(limit + 1, _PIECE))):
            parts.append(part)
            limit -= len(part)
        return b"".join(parts)

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes that were read before; fewer if the file has become shorter since."""
        if self._spool is not None:
            self._spool.flush()
        source = self._stream if self._spool is None else self._spool
        try:
            return read_fd(source.fileno(), length, offset)
        except OSError as error:
            raise from_os_error(error, self.name) from error


def _spool() -> BinaryIO:
    try:
        return tempfile.TemporaryFile(buffering=_PIECE)  # type: ignore[return-value]
    except OSError as error:
        raise from_os_error(error, tempfile.gettempdir()) from error
