"""Reading an undo file: its header, its records, and what it keeps. Nothing is believed before its checksum is right.

Bytes are read from the file each time they are asked for: an undo file may be as large as what it undoes.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

from ..errors import UndoError
from .file import ImageFile, close_fd, read_fd
from .plan import SECTOR, Kept
from .undo_data_file import NotedDataFile
from .undo_layout import (
    CRC_SIZE,
    KEPT_SIZE,
    MAX_STAGES,
    PIECE,
    RECORD_SIZE,
    KeptHead,
    KeptPart,
    RecordHead,
    State,
    Summary,
    crc,
    seen,
    this_boot,
)

_MAX_LABEL = 1 << 16
"""Bytes of a label that are read."""
_SPARSE = 1 << 30
"""Bytes from which on a file must not be a hole."""

Head = TypeVar("Head", RecordHead, KeptHead)


@dataclass(frozen=True, slots=True)
class Record:
    """What one write of the change replaced. Offset and lengths are in bytes of the image.

    Attributes:
        stage: number of its stage.
        length: bytes that were replaced, as far as the file reached.
        old_at: where the old bytes are in the undo file; None if they were all zero.
        new_at: where the new ones are; None for a free cluster that was filled.
        filled: length of that cluster's new content, whose checksum is `filled_crc`.
    """

    stage: int
    offset: int
    length: int
    old_at: int | None
    new_at: int | None
    filled: int
    filled_crc: int

    @property
    def end(self) -> int:
        """Offset after the last byte that was replaced."""
        return self.offset + self.length


class UndoReader:
    """An open undo file. Use as a context manager."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Open and read the header.

        Raises:
            UndoError: it is no undo file, or a damaged one.
        """
        self.path = path
        mode = os.O_RDWR if writable else os.O_RDONLY
        try:
            self._fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise UndoError(f"cannot open the undo file {path}: {os.strerror(error.errno or 0)}") from error
        try:
            self._summary = self._read_summary()
        except BaseException:
            close_fd(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        close_fd(self._fd)

    @staticmethod
    def was_begun(path: Path) -> bool:
        """False if a crash came while the file was being written, so that nothing it belongs to was changed yet."""
        if path.is_symlink() or not path.is_file():  # opening a FIFO would wait for its other end
            raise UndoError(f"{path} is no regular file, and so no journal")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return any(read_fd(fd, SECTOR, 0))
        finally:
            close_fd(fd)

    def _read_summary(self) -> Summary:
        try:
            summary = Summary.parse(read_fd(self._fd, SECTOR, 0))
        except (OSError, ValueError):
            raise UndoError(f"{self.path} is not an undo file of qcow2bm") from None
        if summary is None:
            raise UndoError(f"{self.path} is damaged: its header's checksum is wrong")
        return summary

    # What it says

    @property
    def state(self) -> State:
        """How far the change has come."""
        return self._summary.state

    @property
    def made_ns(self) -> int | None:
        """When it was made, in nanoseconds since 1970; of an old file when its change was done, or None."""
        return self._summary.made_ns or self._summary.mtime_ns or None

    def is_of(self, image: ImageFile) -> bool:
        """True if it was made for this very file, not for another one of its name; of old undo files by time stamp."""
        status = os.fstat(image.fd)
        if self._summary.inode:
            return self._summary.inode == status.st_ino
        return self.mtime_before_ns == status.st_mtime_ns

    def is_of_another(self, image: ImageFile) -> bool:
        """True if it was certainly made for another file."""
        return self._summary.inode not in (0, os.fstat(image.fd).st_ino)

    @property
    def mtime_before_ns(self) -> int:
        """Time stamp of the image before the change."""
        return self._summary.mtime_before_ns

    @property
    def size_before(self) -> int:
        """Length of the image before the change, in bytes."""
        return self._summary.size_before

    @property
    def size_after(self) -> int:
        """Length of the image after the change, in bytes."""
        return self._summary.size_after

    @property
    def mtime_ns(self) -> int:
        """Time stamp of the image once the change was done; 0 as long as it was not."""
        return self._summary.mtime_ns

    def is_seen(self, image: ImageFile) -> bool:
        """True if the image has the length and the header that it had when the change was done."""
        then = {"head_crc": self._summary.head_crc, "size_after": self._summary.size_after}
        return then == seen(image, self._summary.version)

    @property
    def bytes_replaced(self) -> int:
        """Bytes that the change wrote, free clusters included."""
        return sum(max(record.length, record.filled) for record in self.records)

    # Records

    @property
    def is_of_this_boot(self) -> bool:
        """False if the machine was started again since the change was done, or the file is of another machine.

        A crash may have lost a time stamp that a guest's write had left, though what was written is there.
        """
        return self._summary.boot in (0, this_boot())

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """All records in the order of the plan, each read once to see that it is whole.

        Raises:
            UndoError: one is damaged, or together they are none that a change leaves.
        """
        records = tuple(self._read_records())
        if len({record.stage for record in records}) > MAX_STAGES:
            raise UndoError(f"{self.path} is damaged: it has more stages than any change")
        self._require_apart((record.offset, record.filled) for record in records if record.filled)
        return records

    def _require_apart(self, ranges: Iterable[tuple[int, int]]) -> None:
        """No byte is filled, or given up, twice: each is looked at, however often it is named."""
        reached = 0
        for offset, length in sorted(ranges):
            if offset < reached:
                raise UndoError(f"{self.path} is damaged: it names the bytes at {offset:#x} twice")
            reached = offset + length

    def _read_records(self) -> Iterator[Record]:
        reach = max(self.size_before, self.size_after)
        parts = self._parts(RecordHead.parse, RECORD_SIZE, SECTOR, self._summary.records)
        for number, (head, at) in enumerate(parts):
            if head is None or not _is_whole(head) or head.offset + max(head.length, head.filled) > reach:
                raise UndoError(f"{self.path} is damaged in record {number}")
            yield Record(
                head.stage,
                head.offset,
                head.length,
                at if head.old_stored else None,
                at + head.old_stored if head.new_stored else None,
                head.filled,
                head.filled_crc,
            )

    def old(self, record: Record, start: int, stop: int) -> bytes:
        """The old bytes of a record between two offsets of the image."""
        return self._stored(record.old_at, start - record.offset, stop - start)

    def new(self, record: Record, start: int, stop: int) -> bytes:
        """The new bytes of a rewrite between two offsets of the image."""
        return self._stored(record.new_at, start - record.offset, stop - start)

    def _stored(self, place: int | None, skip: int, length: int) -> bytes:
        if place is None:
            return bytes(length)
        data = read_fd(self._fd, length, place + skip)
        if len(data) != length:
            raise UndoError(f"{self.path} has become shorter while it was read")
        return data

    # What is kept

    def kept(self) -> KeptBytes:
        """The ranges that were kept, and their bytes; all read once to see that they are whole.

        Raises:
            UndoError: the file is damaged.
        """
        ranges: list[Kept] = []
        pieces: list[tuple[int, int, int | None]] = []
        parts = self._parts(KeptHead.parse, KEPT_SIZE, self._summary.kept_at, self._summary.kept)
        for number, (head, at) in enumerate(parts):
            kinds = {KeptPart.RANGE, KeptPart.PIECE}
            if head is not None and head.stored and (head.stored != head.length or head.length > PIECE):
                kinds = {KeptPart.RANGE}
            if head is None or head.kind not in kinds or head.offset + head.length > self.size_before:
                raise UndoError(f"{self.path} is damaged in kept part {number}")
            if head.kind == KeptPart.PIECE:
                pieces.append((head.offset, head.length, at if head.stored else None))
            else:
                label = self._label(head, at)
                ranges.append(Kept(label, head.offset, head.length))
        return KeptBytes(self, tuple(ranges), sorted(pieces))

    @cached_property
    def given_up(self) -> tuple[tuple[int, int, int | None], ...]:
        """Offset, length and CRC-32C of what the change gave up, which the image relies on again when it is undone.

        There is no checksum of what is all zeroes, which may be of any length.

        Raises:
            UndoError: the file is damaged.
        """
        pieces = tuple(self._read_given_up())
        self._require_apart((offset, length) for offset, length, _ in pieces)
        return pieces

    def _read_given_up(self) -> Iterator[tuple[int, int, int | None]]:
        parts = self._parts(KeptHead.parse, KEPT_SIZE, self._summary.given_up_at, self._summary.given_up)
        for number, (head, at) in enumerate(parts):
            sound = head is not None and head.kind == KeptPart.GIVEN_UP and head.stored in (0, CRC_SIZE)
            if head is None or not sound or (head.stored and head.length > PIECE):
                raise UndoError(f"{self.path} is damaged in piece {number} of what was given up")
            checksum = int.from_bytes(read_fd(self._fd, head.stored, at), "little") if head.stored else None
            yield head.offset, head.length, checksum

    @cached_property
    def data_file(self) -> NotedDataFile | None:
        """What it notes of the image's external data file, which it does not hold; None if the change left that alone.

        Raises:
            UndoError: the file is damaged where that would be.
        """
        parts = self._parts(KeptHead.parse, KEPT_SIZE, self._summary.kept_at, min(1, self._summary.kept))
        for head, at in parts:
            if head is None:
                raise UndoError(f"{self.path} is damaged in kept part 0")
            if head.kind == KeptPart.RANGE and not head.length:
                return NotedDataFile.parse(self._label(head, at))
        return None

    def _label(self, head: KeptHead, at: int) -> str:
        return read_fd(self._fd, min(head.stored, _MAX_LABEL), at).decode("utf-8", "surrogateescape")

    def kept_piece(self, place: int | None, length: int) -> bytes:
        """Bytes of a kept piece, for `KeptBytes`."""
        return self._stored(place, 0, length)

    # Parts

    def _parts(
        self, parse: Callable[[bytes], Head | None], size: int, at: int, count: int
    ) -> Iterator[tuple[Head | None, int]]:
        """The heads of `count` parts from `at` on, each with where its body is; None for one that is damaged."""
        end = self._length()
        for _ in range(count):
            head = parse(read_fd(self._fd, size, at) if at < end else b"")
            at += size
            if head is None or head.body > end - at or self._crc(at, head.body) != head.crc:
                yield None, at
                return
            yield head, at
            at += head.body

    def _length(self) -> int:
        """Bytes of the file, which was written in full: one that is next to nothing but a hole takes long to read."""
        status = os.fstat(self._fd)
        if status.st_size > _SPARSE and status.st_blocks * 512 < status.st_size >> 10:
            raise UndoError(f"{self.path} is damaged: next to nothing of its {status.st_size} bytes is there")
        return status.st_size

    def _crc(self, at: int, length: int) -> int:
        value = 0
        for start in range(at, at + length, PIECE):
            value = crc(read_fd(self._fd, min(PIECE, at + length - start), start), value)
        return value


def _is_whole(head: RecordHead) -> bool:
    """A rewrite has its new bytes, a free cluster that was filled none; both the old ones, but where all were zero."""
    lengths = (head.new_stored, head.filled)
    fits = lengths == (0, max(head.length, head.filled)) or lengths == (head.length, 0)
    return fits and head.old_stored in (0, head.length)


@dataclass(frozen=True, slots=True)
class KeptBytes:
    """What an undo file keeps besides, as a sparse copy of the image before the change. Read while that file is open.

    Attributes:
        ranges: as they were asked for, cut to the file, in that order.
    """

    undo: UndoReader
    ranges: tuple[Kept, ...]
    _pieces: list[tuple[int, int, int | None]]

    def holds(self, offset: int, length: int) -> bool:
        """True if these bytes of the image were kept, as far as it had them."""
        end = min(offset + length, self.undo.size_before)
        return max((stop for _, stop, _ in self._parts(offset, end)), default=offset) >= end

    def read(self, offset: int, length: int) -> bytes | None:
        """Bytes of the image before the change; zeroes past its end. None if they were not kept."""
        if not self.holds(offset, length):
            return None
        end = min(offset + length, self.undo.size_before)
        data = b"".join(self.undo.kept_piece(place, stop - start) for start, stop, place in self._parts(offset, end))
        return data + bytes(length - len(data))

    def _parts(self, at: int, end: int) -> Iterator[tuple[int, int, int | None]]:
        """The pieces between two offsets, up to the first gap: from, to, and where in the undo file, if not zeroes."""
        while at < end:
            index = bisect_right(self._pieces, at, key=lambda piece: piece[0]) - 1
            start, size, place = self._pieces[index] if index >= 0 else (0, 0, None)
            stop = min(end, start + size)
            if stop <= at:
                return
            yield at, stop, None if place is None else place + at - start
            at = stop
