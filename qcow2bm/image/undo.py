"""Undo files: what stages of a plan replace, written down and flushed before the first byte is overwritten.

While a plan runs its undo file says "in progress"; once the plan is done it says "complete", and the user may put the
old bytes back as long as nobody has touched the image since. They are put back stage by stage, last stage first, so
that a crash on the way leaves no more than leaked clusters, and the same command finishes what it began.

A journal is the same file for the few stages that a crash could tear. Whoever opens the image for writing next settles
it: what was torn is rolled back, what was finished is kept.

Layout (little-endian, each part with its own CRC-32C): one 512-byte header, which a disk writes whole, so that the
state changes at one moment; then the records, each a fixed head, the old bytes (none if they were all zero) and,
where a structure in use is rewritten, the new ones: by them the file recognises its image, also one that a crash
left half-way. Of a free cluster that is filled it keeps a checksum of the new content, to see whether it has changed
since.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Self

from construct import Bytes, Const, ConstructError, Int32ul, Int64sl, Int64ul, Padded, Struct

from ..errors import UndoError, from_os_error
from .file import ImageFile
from .plan import SECTOR, Stage, Write


class State(IntEnum):
    """How far the change an undo file belongs to has come."""

    IN_PROGRESS = 1
    COMPLETE = 2
    UNDONE = 3


_MAGIC = b"QCOW2BM undo 1\n\0"
_FIELDS = Struct(
    "state" / Int32ul,
    "head_crc" / Int32ul,
    "size_before" / Int64ul,
    "size_after" / Int64ul,
    "mtime_before_ns" / Int64sl,
    "mtime_ns" / Int64sl,
    "records" / Int64ul,
)
_HEADER = Padded(SECTOR, Struct("magic" / Const(_MAGIC), "fields" / Bytes(_FIELDS.sizeof()), "crc" / Int32ul))
_RECORD = Struct(
    "stage" / Int64ul,
    "offset" / Int64ul,
    "length" / Int64ul,
    "old_stored" / Int64ul,
    "new_stored" / Int64ul,
    "filled" / Int64ul,
    "filled_crc" / Int32ul,
    "crc" / Int32ul,
)
_CRC = Int32ul


@dataclass(frozen=True, slots=True)
class _Summary:
    """The header of an undo file. `head_crc` is over the image's first sector after the change."""

    state: State
    head_crc: int
    size_before: int
    size_after: int
    mtime_before_ns: int
    mtime_ns: int
    records: int

    def build(self) -> bytes:
        fields: bytes = _FIELDS.build({name: int(getattr(self, name)) for name in self.__slots__})
        built: bytes = _HEADER.build({"fields": fields, "crc": _crc(fields)})
        return built


@dataclass(frozen=True, slots=True)
class _Record:
    """What one write replaces: `old` as far as the file reached.

    `new` is empty where free clusters were filled; `filled` is then their length, `filled_crc` is over their content.
    """

    stage: int
    offset: int
    old: bytes
    new: bytes
    filled: int
    filled_crc: int


def _crc(data: bytes | memoryview, value: int = 0) -> int:
    from crc32c import crc32c

    return crc32c(data, value)


class UndoWriter:
    """Writes the undo file of one plan. `create` leaves it flushed and "in progress"."""

    def __init__(self, fd: int, path: Path, summary: _Summary) -> None:
        self._fd = fd
        self.path = path
        self._summary = summary

    @classmethod
    def create(cls, path: Path, image: ImageFile, stages: Sequence[Stage], size_after: int) -> UndoWriter:
        """Write down what `stages` replace in `image`, which will have `size_after` bytes.

        Raises:
            UndoError: the file exists already or cannot be written.
        """
        status = os.fstat(image.fd)
        mode = stat.S_IMODE(status.st_mode) & 0o666
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, mode)
        except OSError as error:
            raise UndoError(f"cannot create the undo file {path}: {os.strerror(error.errno or 0)}") from error
        writer = cls(fd, path, _Summary(State.IN_PROGRESS, 0, image.size, size_after, status.st_mtime_ns, 0, 0))
        try:
            writer._fill(image, stages)
        except OSError as error:
            writer.discard()
            raise UndoError(f"cannot write the undo file {path}: {os.strerror(error.errno or 0)}") from error
        except BaseException:
            writer.discard()
            raise
        return writer

    def _fill(self, image: ImageFile, stages: Sequence[Stage]) -> None:
        at = SECTOR
        count = 0
        for number, stage in enumerate(stages):
            for write in stage.writes:
                record = _encode(image, number, write)
                _write_all(self._fd, record, at)
                at += len(record)
                count += 1
        # A file whose header is there is whole: a crash before that leaves a sector of zeroes, and an untouched image.
        os.fsync(self._fd)
        self._summary = replace(self._summary, records=count)
        _write_state(self._fd, self._summary)
        _sync_directory(self.path)

    def complete(self, image: ImageFile) -> None:
        """Say that the plan is done and what the image looks like now."""
        mtime = os.fstat(image.fd).st_mtime_ns
        _write_state(self._fd, replace(self._summary, state=State.COMPLETE, mtime_ns=mtime, **_now(image)))
        os.close(self._fd)

    def discard(self) -> None:
        """Remove the file: the plan was rolled back, or its journal is not wanted."""
        os.close(self._fd)
        self.path.unlink(missing_ok=True)
        _sync_directory(self.path)


def _now(image: ImageFile) -> dict[str, int]:
    return {"head_crc": _crc(image.read_at(0, SECTOR)), "size_after": image.size}


def _encode(image: ImageFile, stage: int, write: Write) -> bytes:
    reached = max(0, min(write.end, image.size) - write.offset)
    old = image.read_at(write.offset, reached) if write.old is None else write.old
    stored = old if old.count(0) != len(old) else b""
    fresh = write.old is None
    new = b"" if fresh else bytes(write.read())
    head: bytes = _RECORD.build(
        {
            "stage": stage,
            "offset": write.offset,
            "length": len(old),
            "old_stored": len(stored),
            "new_stored": len(new),
            "filled": write.length if fresh else 0,
            "filled_crc": _crc(write.read()) if fresh else 0,
            "crc": _crc(new, _crc(stored)),
        }
    )
    return head + _CRC.build(_crc(head)) + stored + new


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _write_state(fd: int, summary: _Summary) -> None:
    _write_all(fd, summary.build(), 0)
    os.fsync(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class UndoFile:
    """An undo file opened to put the old bytes back. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open and read the summary.

        Raises:
            UndoError: it is no undo file, or a damaged one.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise UndoError(f"cannot open the undo file {path}: {os.strerror(error.errno or 0)}") from error
        try:
            self._summary = self._read_summary()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @staticmethod
    def was_begun(path: Path) -> bool:
        """False if a crash came while the file was being written, so that nothing it belongs to was changed yet."""
        with path.open("rb") as file:
            return any(file.read(SECTOR))

    @property
    def state(self) -> State:
        """How far the change has come."""
        return self._summary.state

    def _read_summary(self) -> _Summary:
        try:
            header = _HEADER.parse(os.pread(self._fd, SECTOR, 0))
            fields = dict(_FIELDS.parse(header.fields))
            del fields["_io"]
            if _crc(header.fields) != header.crc:
                raise UndoError(f"{self.path} is damaged: its header's checksum is wrong")
            return _Summary(**fields | {"state": State(fields["state"])})
        except (ConstructError, OSError, ValueError):
            raise UndoError(f"{self.path} is not an undo file of qcow2bm") from None

    def _records(self) -> Iterator[_Record]:
        at = SECTOR
        end = os.lseek(self._fd, 0, os.SEEK_END)
        head_length = _RECORD.sizeof()
        for number in range(self._summary.records):
            raw = os.pread(self._fd, head_length + 4, at)
            if len(raw) < head_length + 4 or _crc(raw[:head_length]) != _CRC.parse(raw[head_length:]):
                raise UndoError(f"{self.path} is damaged in record {number}")
            head = _RECORD.parse(raw)
            at += head_length + 4
            length = head.old_stored + head.new_stored
            reach = max(self._summary.size_before, self._summary.size_after)
            fits = head.offset + max(head.length, head.filled) <= reach and length <= end - at
            stored = os.pread(self._fd, length, at) if fits else b""
            whole = {head.old_stored, head.new_stored} <= {0, head.length}
            if len(stored) != length or _crc(stored) != head.crc or not fits or not whole:
                raise UndoError(f"{self.path} is damaged in record {number}")
            at += length
            old, new = stored[: head.old_stored] or bytes(head.length), stored[head.old_stored :]
            yield _Record(head.stage, head.offset, old, new, head.filled, head.filled_crc)

    def restore(self, image: ImageFile, *, force: bool = False) -> None:
        """Put the old bytes and the old length back; what was interrupted half-way is rolled back the same way.

        Args:
            force: do it although the image's time stamp says that it was touched. Changed content is refused all the
                same.

        Raises:
            UndoError: the file is damaged, has been used already, or the image has changed since.
        """
        if self.state is State.UNDONE:
            raise UndoError(f"{self.path} has been used already")
        # Reading every record here also means that a damaged file is refused before the first byte is written.
        self._require_recognised(image)
        if self.state is State.COMPLETE:
            self._require_unchanged(image, force=force)
        _write_state(self._fd, replace(self._summary, state=State.IN_PROGRESS))
        self._put_back(image)
        # With the bytes of then goes the time stamp of then, by which an older undo file knows the image.
        os.utime(image.fd, ns=(os.fstat(image.fd).st_atime_ns, self._summary.mtime_before_ns))
        _write_state(self._fd, replace(self._summary, state=State.UNDONE))

    def settle(self, image: ImageFile) -> bool:
        """Finish with a journal that a crash left: True if what it journals was torn and is rolled back.

        Raises:
            UndoError: the journal is damaged, or the image is not as the crash left it.
        """
        if self.is_untouched(image) or self._is_final(image):
            return False
        self._require_recognised(image)
        self._put_back(image)
        return True

    def _put_back(self, image: ImageFile) -> None:
        stages = sorted({record.stage for record in self._records()}, reverse=True)
        for stage in stages:
            for record in self._records():
                if record.stage == stage:
                    image.write_at(record.offset, record.old)
            image.barrier()
        if image.size > self._summary.size_before and not image.is_device:
            image.truncate(self._summary.size_before)
            image.barrier()

    def _require_recognised(self, image: ImageFile) -> None:
        """Every byte that was rewritten must be an old or a new one.

        Anything else is another image, or a later state.
        """
        sizes = sorted((self._summary.size_before, self._summary.size_after))
        strange: set[int] = set()
        known = sizes[0] <= image.size <= sizes[1]
        rewrites = [record for record in self._records() if record.new and known]
        for record in rewrites:
            strange.update(_places(image, record, matching=False))
        for record in rewrites if strange else ():
            strange.difference_update(_places(image, record, matching=True))
        if strange or not known:
            raise UndoError(
                "the image has changed since the undo file was written",
                hint=f"nothing was put back; if you know better, move {self.path} away",
            )

    def _require_unchanged(self, image: ImageFile, *, force: bool) -> None:
        summary = self._summary
        now = _now(image)
        if now != {"head_crc": summary.head_crc, "size_after": summary.size_after} or not self._is_final(image):
            raise UndoError("the image has changed since the undo file was written", hint="nothing was put back")
        if not image.is_device and os.fstat(image.fd).st_mtime_ns != summary.mtime_ns and not force:
            raise UndoError(
                "the image was written to since the undo file was made, though the places it knows are unchanged",
                hint="guest data may be newer; use --force if you know that only the time stamp changed",
            )

    def is_untouched(self, image: ImageFile) -> bool:
        """True if everything that was to be rewritten is as it was."""
        rewrites = [(record.offset, record.old) for record in self._records() if record.new]
        return _would_change_nothing(image, reversed(rewrites))

    def _is_final(self, image: ImageFile) -> bool:
        """True if everything the change wrote is as it left it."""
        rewrites = []
        for record in self._records():
            if record.filled and _crc(image.read_at(record.offset, record.filled)) != record.filled_crc:
                return False
            rewrites.append((record.offset, record.new))
        return _would_change_nothing(image, rewrites)


def _places(image: ImageFile, record: _Record, *, matching: bool) -> set[int]:
    """Offsets of the bytes of a rewrite that are, or are not, an old or a new one."""
    now = image.read_at(record.offset, len(record.old))
    if now in (record.old, record.new) and not matching:
        return set()
    bytes_there = enumerate(zip(now, record.old, record.new, strict=True), record.offset)
    return {place for place, (byte, old, new) in bytes_there if (byte in (old, new)) is matching}


def _would_change_nothing(image: ImageFile, writes: Iterable[tuple[int, bytes]]) -> bool:
    """True if the image is as it would be after these writes, one after the other."""
    there: dict[int, bytes] = {}
    wanted: dict[int, bytearray] = {}
    for offset, data in writes:
        for sector in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
            if sector not in there:
                there[sector] = image.read_at(sector * SECTOR, SECTOR)
                wanted[sector] = bytearray(there[sector])
            start, end = max(offset, sector * SECTOR), min(offset + len(data), (sector + 1) * SECTOR)
            wanted[sector][start % SECTOR : (end - 1) % SECTOR + 1] = data[start - offset : end - offset]
    return wanted == there


def settle_journal(image: ImageFile) -> bool:
    """Finish with the journal that a crash left beside an image; True if a torn header was rolled back.

    The caller holds the write lock.

    Raises:
        UndoError: the journal is damaged, or the image is not as the crash left it.
    """
    path = image.journal
    rolled_back = False
    try:
        if UndoFile.was_begun(path):
            with UndoFile(path) as journal:
                rolled_back = journal.settle(image)
        path.unlink()
        _sync_directory(path)
    except OSError as error:
        raise from_os_error(error, path) from error
    return rolled_back
