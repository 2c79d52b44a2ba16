"""Writing an undo file: on the disk in full before the first byte of the image is overwritten.

Of each write of a plan it takes down what is there now, then the ranges that the plan wants kept besides. Only when all
of that has reached the disk does the file get its header, and only when that has, and the folder knows the file, does
the plan begin.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UndoError
from .file import ImageFile, close_fd, flush_error, read_fd, write_fd
from .plan import SECTOR, Kept, Stage, Write
from .undo_layout import CRC_SIZE, PIECE, KeptHead, KeptPart, RecordHead, State, Summary, crc, seen, this_boot

_CLOSED = -1
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""To create a file: never over another one, nor through a link."""


class UndoWriter:
    """Writes the undo file of one plan. `create` leaves it flushed and "in progress"."""

    def __init__(self, fd: int, path: Path, summary: Summary) -> None:
        self._fd = fd
        self.path = path
        self._summary = summary
        self._at = SECTOR
        self._alias: Path | None = None

    @classmethod
    def create(
        cls,
        path: Path,
        image: ImageFile,
        stages: Sequence[Stage],
        size_after: int,
        *,
        kept: Sequence[Kept] = (),
        given_up: Iterable[tuple[int, int]] = (),
    ) -> UndoWriter:
        """Write down what `stages` replace in `image`, which will have `size_after` bytes, and the `kept` ranges.

        Args:
            given_up: ranges (start, end) that nothing will use any more, and that the image relies on again when the
                change is undone.

        Raises:
            UndoError: the file exists already or cannot be written.
        """
        status = os.fstat(image.fd)
        what = "journal" if path == image.journal else "undo file"
        try:
            fd = _create(path, status)
        except OSError as error:
            raise UndoError(f"cannot create the {what} {path}: {os.strerror(error.errno or 0)}") from error
        tearable = any(stage.journaled for stage in stages)
        summary = Summary(
            State.IN_PROGRESS, 0, image.size, size_after, status.st_mtime_ns, 0, 0, made_ns=time.time_ns(),
            journaled=int(tearable), inode=status.st_ino,
        )  # fmt: skip
        writer = cls(fd, path, summary)
        try:
            writer._fill(image, stages, kept, given_up)
        except OSError as error:
            writer.discard()
            raise UndoError(f"cannot write the {what} {path}: {os.strerror(error.errno or 0)}") from error
        except BaseException:
            writer.discard()
            raise
        return writer

    def _fill(
        self, image: ImageFile, stages: Sequence[Stage], kept: Sequence[Kept], given_up: Iterable[tuple[int, int]]
    ) -> None:
        writes = ((number, write) for number, stage in enumerate(stages) for write in stage.writes)
        _, records = self._append(_record(image, number, write) for number, write in writes)
        given_up_at, pieces = self._append(_given_up_parts(image, given_up))
        kept_at, parts = self._append(_kept_parts(image, kept))
        # A file whose header is there is whole: a crash before that leaves a sector of zeroes, and an untouched image.
        os.fsync(self._fd)
        self._summary = replace(
            self._summary, records=records, given_up=pieces, given_up_at=given_up_at, kept=parts, kept_at=kept_at
        )
        write_summary(self._fd, self._summary)
        sync_folder(self.path)

    def _append(self, parts: Iterable[tuple[bytes, ...]]) -> tuple[int, int]:
        """Write parts behind what is there; where that is, and how many."""
        start, number = self._at, 0
        for part in parts:
            number += 1
            for piece in part:
                write_fd(self._fd, piece, self._at)
                self._at += len(piece)
        return start, number

    def link(self, path: Path) -> bool:
        """Give the file a second name, durably, until it is complete or discarded.

        False where the file system cannot: it has no hard links, or the name would lie on another one.

        Raises:
            UndoError: there is a file of that name.
        """
        if not second_name(self.path, path):
            return False
        self._alias = path
        return True

    def complete(self, image: ImageFile) -> None:
        """Say that the plan is done and what the image looks like now. The caller holds its locks until it has ended.

        Raises:
            FlushError, OSError: the file says "in progress" for good, or until the next crash.
        """
        mtime = os.fstat(image.fd).st_mtime_ns
        _outlive(mtime)
        done = replace(self._summary, state=State.COMPLETE, mtime_ns=mtime, boot=this_boot(), **seen(image))
        write_summary(self._fd, done)
        self.close()
        self._unlink_alias()

    def discard(self) -> None:
        """Remove the file: the plan was rolled back, or its journal is not wanted.

        Raises:
            FlushError, OSError: it is there, or may be there again after a crash.
        """
        self.close()
        self._unlink_alias()
        drop(self.path)

    def close(self) -> None:
        """Close the file, which stays as it is, and so does its second name; for the second time nothing happens."""
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            close_fd(fd)

    def _unlink_alias(self) -> None:
        if self._alias is not None:
            drop(self._alias)


def _create(path: Path, image: os.stat_result) -> int:
    """Create a file; its descriptor.

    Who may write to the image can then use what belongs to it, also if it was root who changed the image.
    """
    fd = os.open(path, _NEW, stat.S_IMODE(image.st_mode) & 0o666)
    try:
        with contextlib.suppress(PermissionError):
            os.fchown(fd, image.st_uid, image.st_gid)
    except BaseException:
        close_fd(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def second_name(undo: Path, journal: Path) -> bool:
    """Make an undo file the journal as well, durably; False where the file system cannot.

    Raises:
        UndoError: there is a journal already.
    """
    try:
        os.link(undo, journal, follow_symlinks=False)
    except FileExistsError as error:
        raise UndoError(f"cannot create the journal {journal}: {os.strerror(error.errno or 0)}") from error
    except OSError:
        return False
    sync_folder(journal)
    return True


def second_copy(fd: int, journal: Path, image: os.stat_result) -> None:
    """The same where there are no second names: a copy of the undo file, whole before it counts.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    copy = _create(journal, image)
    try:
        end = os.fstat(fd).st_size
        for at in range(SECTOR, end, PIECE):
            write_fd(copy, read_fd(fd, min(PIECE, end - at), at), at)
        os.fsync(copy)
        write_fd(copy, read_fd(fd, SECTOR, 0), 0)
        os.fsync(copy)
        sync_folder(journal)
    except BaseException:
        journal.unlink(missing_ok=True)
        raise
    finally:
        close_fd(copy)


def _outlive(mtime_ns: int) -> None:
    """Wait until a write would leave another time stamp than this, by which the image is known not to be used since.

    File systems keep time in ticks of a few milliseconds, some in one or two seconds.
    """
    tick = 2 * 10**9 if mtime_ns % 10**9 == 0 else 10**7
    left = mtime_ns + tick - time.time_ns()
    if left > 0:  # more than a tick where a server has another idea of the time
        time.sleep(min(left, tick) / 10**9)


def write_summary(fd: int, summary: Summary) -> None:
    """Write the header of an undo file, durably."""
    write_fd(fd, summary.build(), 0)
    os.fsync(fd)


def sync_folder(path: Path) -> None:
    """Make it durable that a file is in its folder, or no more."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        close_fd(fd)


# ---- what is written ----


def _record(image: ImageFile, stage: int, write: Write) -> tuple[bytes, ...]:
    """Head, old bytes and new bytes of one write."""
    reached = max(0, min(write.end, image.size) - write.offset)
    old = image.read_at(write.offset, reached) if write.old is None else write.old
    stored = b"" if _is_zero(old) else old
    fresh = write.old is None
    content = write.read()
    new = b"" if fresh else bytes(content)
    head = RecordHead(
        stage,
        write.offset,
        len(old),
        old_stored=len(stored),
        new_stored=len(new),
        filled=write.length if fresh else 0,
        filled_crc=crc(content) if fresh else 0,
        crc=crc(new, crc(stored)),
    )
    return head.build(), stored, new


def _kept_parts(image: ImageFile, kept: Sequence[Kept]) -> Iterator[tuple[bytes, bytes]]:
    """Head and body of all ranges, then of all pieces that lie in any of them; what the file has not is left out."""
    ranges = []
    for wanted in kept:
        start = min(max(0, wanted.offset), image.size)
        length = max(0, min(wanted.offset + wanted.length, image.size) - start)
        ranges.append((start, start + length))
        yield _part(KeptPart.RANGE, start, length, wanted.label.encode("utf-8", "surrogateescape"))
    for start, end in _joined(ranges):
        yield from _pieces(image, start, end)


def _given_up_parts(image: ImageFile, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[bytes, bytes]]:
    """Head and checksum of each range as far as the file reaches, in pieces; of a hole there is no checksum."""
    for start, end in _joined((start, min(end, image.size)) for start, end in ranges):
        for at, length, data in image.stretches(start, end, PIECE):
            checksum = b"" if data is None else crc(data).to_bytes(CRC_SIZE, "little")
            yield _part(KeptPart.GIVEN_UP, at, length, checksum)


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges (start, end) in order, those that overlap or touch as one."""
    first = last = 0
    for start, end in sorted(ranges):
        if start > last:
            if last > first:
                yield first, last
            first, last = start, end
        last = max(last, end)
    if last > first:
        yield first, last


def _pieces(image: ImageFile, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """A range of the file in pieces; one without bytes is zeroes."""
    for at, length, data in image.stretches(start, end, PIECE):
        yield _part(KeptPart.PIECE, at, length, b"" if data is None or _is_zero(data) else data)


def _part(kind: KeptPart, offset: int, length: int, body: bytes) -> tuple[bytes, bytes]:
    return KeptHead(offset, length, len(body), kind, crc(body)).build(), body


def _is_zero(data: bytes) -> bool:
    return data.count(0) == len(data)


def drop(path: Path) -> None:
    """Remove a file durably.

    Raises:
        FlushError: it is gone, but may be there again after a power cut.
    """
    path.unlink(missing_ok=True)
    try:
        sync_folder(path)
    except OSError as error:
        raise flush_error(error) from error
