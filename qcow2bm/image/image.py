"""An open qcow2 image: its file, its locks, its header and extensions.

Opening reads the first cluster and nothing else; nothing the image names (backing file, data file) is ever opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..errors import (
    CorruptImageError,
    InterruptedChangeError,
    LockingUnavailableError,
    TruncatedImageError,
    UnsupportedImageError,
    UsageError,
    naming,
)
from ..format.extensions import CryptoHeaderPointer, ExtensionArea, ExtensionType
from ..format.geometry import Geometry
from ..format.header import CLUSTER_BITS_FIELD, MAGIC, V3_LENGTH, Header, Incompatible
from ..format.limits import MAX_CLUSTER_BITS, MIN_CLUSTER_BITS
from ..format.opening import opening_faults
from ..format.snapshot_table import SnapshotEntry, parse_snapshots
from ..format.text import decode_name
from . import lock
from .file import ImageFile

if TYPE_CHECKING:
    from .undo import Settled

OpenFile = Callable[..., ImageFile]


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """The internal snapshots and where their table lies, in bytes."""

    offset: int
    length: int
    entries: tuple[SnapshotEntry, ...]


class Qcow2Image:
    """A qcow2 image. Open it with `Qcow2Image.open`; use it as a context manager.

    Attributes:
        file: the open file.
        header: the parsed header.
        extensions: the header extensions with their offsets.
        geometry: index arithmetic.
        head: the bytes of the first cluster as far as the file has them.
        locked: False if no lock protects what is read: it may be stale.
        settled: what opening did with the journal that a crash had left; None if there was none.
    """

    def __init__(
        self, file: ImageFile, head: bytes, header: Header, extensions: ExtensionArea, *, locked: bool
    ) -> None:
        self.file = file
        self.head = head
        self.header = header
        self.extensions = extensions
        self.geometry: Geometry = header.geometry
        self.locked = locked
        self.settled: Settled | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writable: bool = False,
        force_share: bool = False,
        use_locks: bool = True,
        open_file: OpenFile = ImageFile.open,
    ) -> Self:
        """Open an image and take QEMU's locks on it: as a reader, or as the only writer.

        Args:
            writable: refuses an image that another process reads or writes, or that must not be written.
            force_share: read an image although a VM writes to it; what is seen may be stale. Not with `writable`.
            use_locks: False takes no locks at all: the caller knows that no VM runs.
            open_file: opens the file; tests put a recording one here.

        Raises:
            UsageError: `writable` and `force_share` together.
            NotQcow2Error, CorruptImageError, UnsupportedImageError: what is wrong with the header.
            InterruptedChangeError: a crash has cut a change short that has not been settled.
            InUseError: a conflicting lock is held.
            LockingUnavailableError: `writable` on a file system without locks.
            ImageIOError: the operating system refused.
        """
        if writable and force_share:
            raise UsageError("an image that others write to can be opened read-only, not for writing", image=Path(path))
        file = open_file(path, writable=writable)
        try:
            with naming(file.path):
                locked = use_locks and take_locks(file, writable=writable, force_share=force_share)
                settled = settle_interrupted(file, writable=writable)
                image = cls(file, *read_head(file), locked=locked and not force_share)
                image.settled = settled
                if writable:
                    image.require_writable()
                return image
        except BaseException:
            file.close()
            raise

    @property
    def rolled_back(self) -> bool:
        """True if opening found a change that a crash had cut short, and undid it."""
        return self.settled is not None and self.settled.rolled_back

    def reload(self) -> None:
        """Read header and extensions again, after a commit has changed them."""
        with naming(self.file.path):
            self.head, self.header, self.extensions = read_head(self.file)
            self.geometry = self.header.geometry

    def close(self) -> None:
        """Close the file and drop the locks."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def require_writable(self) -> None:
        """Refuse what the specification forbids to write to, and what QEMU would not open afterwards.

        Raises:
            UnsupportedImageError: the corrupt bit is set, or the dirty bit, which means that the refcounts are not to
                be trusted.
            CorruptImageError: QEMU would not open the image for what its extensions say.
        """
        if self.header.incompatible_features & Incompatible.CORRUPT:
            raise UnsupportedImageError(
                "it is marked corrupt and must not be written to",
                hint="`qcow2bm repair --dry-run` says what can be done",
            )
        if self.header.incompatible_features & Incompatible.DIRTY:
            raise UnsupportedImageError(
                "it is marked dirty: its refcounts were left behind by a crash",
                hint="`qcow2bm repair` brings them up to date",
            )
        for fault, _, _ in opening_faults(self.header, self.extensions, self.file.read_padded):
            hint = "QEMU refuses such an image; `qcow2bm check` says what can be done"
            raise CorruptImageError(fault.message, hint=hint, code=fault.code)

    @property
    def crypto_header(self) -> CryptoHeaderPointer | None:
        """Where the LUKS header lies, if there is one."""
        extension = self.extensions.find(ExtensionType.CRYPTO_HEADER)
        return None if extension is None else CryptoHeaderPointer.parse(extension.data)

    @property
    def backing_file(self) -> str | None:
        """The backing file's name as the image has it. It is data: nothing opens it."""
        if not self.header.backing_file_offset:
            return None
        start = self.header.backing_file_offset
        return decode_name(self.head[start : start + self.header.backing_file_size]) or None

    def snapshots(self) -> SnapshotTable:
        """The internal snapshots, read entry by entry: no size in the file is believed before its bytes are there.

        Raises:
            CorruptImageError: the table breaks the format or QEMU's limits.
        """
        offset = self.header.snapshots_offset
        entries = tuple(entry for _, entry in parse_snapshots(self._read_present, offset, self.header.nb_snapshots))
        return SnapshotTable(offset, sum(entry.size for entry in entries), entries)

    def _read_present(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`: what the file has of them."""
        present = min(length, self.file.size - offset)
        if present <= 0:
            raise TruncatedImageError(f"the snapshot table at {offset:#x} lies outside the file")
        return self.file.read_at(offset, present)


def take_locks(file: ImageFile, *, writable: bool, force_share: bool) -> bool:
    """Lock an open file as the only writer or as a reader; False if the file system has no locks for a reader.

    Raises:
        InUseError: a conflicting lock is held.
        LockingUnavailableError: `writable` on a file system without locks.
    """
    mode = lock.LockMode.WRITER if writable else lock.LockMode.READER
    if force_share:
        mode = lock.LockMode.FORCED_READER
    try:
        lock.acquire(file.fd, mode)
    except LockingUnavailableError:
        if writable:
            raise
        return False
    file.measure()  # somebody may have made it longer since it was opened
    return True


def settle_interrupted(file: ImageFile, *, writable: bool) -> Settled | None:
    """Settle what a crash cut short, or refuse to read an image in that state; None if there was no journal.

    The caller holds the lock that goes with it.

    Raises:
        InterruptedChangeError: there is a journal, and the image is open read-only.
        UndoError: the journal is damaged, or the image is not as the crash left it.
    """
    if not file.has_journal:
        return None
    from .undo import has_torn, settle_journal  # rarely needed, and its structures take time to declare

    if not writable:
        if not has_torn(file):
            return None
        raise InterruptedChangeError(
            f"a change was cut short by a crash: there is a journal {file.journal}",
            hint="the next command that opens the image for writing settles it",
        )
    return settle_journal(file)


def read_head(file: ImageFile) -> tuple[bytes, Header, ExtensionArea]:
    """The first cluster, and the header and extensions in it; raises as `Qcow2Image.open` does."""
    start = file.read_at(0, min(V3_LENGTH, file.size))
    cluster_bits = int.from_bytes(start[CLUSTER_BITS_FIELD:][:4], "big")
    if start[:4] == MAGIC and MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        start = file.read_at(0, min(1 << cluster_bits, file.size))
    header = Header.parse(start)
    header.validate()
    file.slack = header.geometry.cluster_size
    limit = header.backing_file_offset or header.geometry.cluster_size
    head = start + bytes(header.geometry.cluster_size - len(start))
    extensions = ExtensionArea.parse(head, len(header.build()), limit)
    extensions.validate()
    return head, header, extensions
