"""An image as a check sees it: read-only, however damaged, and what one pass leaves for the next.

A pass takes what it needs from here and leaves what it found out in the attributes that say so; passes never import
each other.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..bitmap.store import BitmapDirectory, StoredBitmap
from ..errors import CorruptImageError, naming
from ..format.bitmap_directory import BitmapEntry
from ..format.entries import table_entries
from ..format.extensions import CryptoHeaderPointer, ExtensionArea
from ..format.faults import Fault
from ..format.geometry import div_up, round_up
from ..format.header import MAGIC, Header
from ..format.limits import MAX_CLUSTER_BITS, MAX_ENCRYPTION_HEADER, MAX_L1_ENTRIES
from ..format.snapshot_table import SnapshotEntry
from ..format.text import decode_name
from ..image.file import ImageFile
from ..image.image import Qcow2Image, settle_interrupted, take_locks
from ..image.plan import SECTOR
from ..image.references import Kind, Reference, l1_owner, structures
from .census import Census, Mismatch
from .model import Allocation, InQemu
from .plain import PLAIN_ENTRIES, PlainCensus
from .stored import StoredRefcounts
from .telling import Telling

if TYPE_CHECKING:
    from .bulk import BulkCensus

Progress = Callable[[int, int], None]

_NONSENSE = 8
"""Entries of the mapping that may be nonsense, in a small image, before the header is doubted."""
_REPEATED = 1 << 19
"""L2 entries that are looked at more than once, at the most, so that a finding is repeated for each visit."""


@dataclass(frozen=True, slots=True)
class Root:
    """An L1 table: of the active disk, or of a snapshot. `entries` counts; `fault` says why it is not walked."""

    offset: int
    entries: int
    snapshot: SnapshotEntry | None = None
    fault: Fault | None = None

    @property
    def name(self) -> str | None:
        """The snapshot, as `snapshot_name` has it."""
        entry = self.snapshot
        return None if entry is None else snapshot_name(entry)


class View:
    """What passes read, and what they leave for each other.

    Attributes:
        file_size: length of the file in bytes, in whole sectors as QEMU has it.
        image: file, header, extensions and geometry; nothing of it has been judged.
        faults: what is wrong with the header and the extensions' area as such.
        as_qemu: count what qemu-img counts, where it counts what is not there.
        telling: how many findings are told one by one.
        progress: called with bytes of L2 tables read, and to read.
        snapshots: left by the snapshot table's pass: offset in the file and entry.
        snapshots_length: bytes of the snapshot table, as far as it could be read.
        roots: left by the mapping's pass: all L1 tables.
        l2_tables: left by the mapping: how many there are.
        visits: left by the mapping: how often L1 entries name those that want a closer look.
        miscopied: left by the mapping: L2 tables of the active disk with a copied flag that contradicts the refcount,
            each with how many L1 entries name it.
        directory: the bitmaps, as far as they can be read.
        bitmaps: left by the directory's pass: those whose tables are looked at.
        allocation: statistics, left by several passes.
        leaks: runs of clusters without any reference, left for the pass that names them.
        overcounted: the same of clusters with a reference, and a refcount above the number of them.
        undercounted: how many clusters have a refcount below the number of their references.
        uncounted: runs of those that have none, as many as are kept for a closer look.
        unseen: True if nobody has looked at all of the leaked clusters.
        nonsense: entries of the mapping that cannot be what they should be; counted by whoever takes the findings.
        leak_doubt: left by the leaks' pass: why they may be no leaks although all could be read.
        header_doubt: left by the leaks' pass: what in the header contradicts the tables.
        complete: False once a pass had to leave something out.
        hidden: True once a problem was found that cuts clusters off; set by whoever takes the findings.
        held_before: says whether the image as it was before a repair of ours had leaks that were held back, and that
            still are among those given; set by whoever knows how to look at it.
    """

    def __init__(
        self, image: Qcow2Image, faults: tuple[Fault, ...], *, as_qemu: bool, telling: Telling, progress: Progress
    ) -> None:
        self.image = image
        self.file = image.file
        self.header = image.header
        self.geometry = image.geometry
        self.faults = faults
        self.as_qemu = as_qemu
        self.telling = telling
        self.progress = progress
        self.snapshots: list[tuple[int, SnapshotEntry]] = []
        self.snapshots_length = 0
        self.roots: list[Root] = []
        self.stored = StoredRefcounts.read(image)
        self.file_size = round_up(self.file.size, SECTOR)
        self._census: Census | None = None
        self.directory = BitmapDirectory(image)
        self.l2_tables = 0
        self.visits = 0
        self.miscopied: dict[int, int] = {}
        self.bitmaps: list[StoredBitmap] = []
        self.allocation = Allocation()
        self.leaks: list[Mismatch] = []
        self.overcounted: list[Mismatch] = []
        self.undercounted = 0
        self.uncounted: list[Mismatch] = []
        self.unseen = False
        self.nonsense = 0
        self.leak_doubt: str | None = None
        self.header_doubt: str | None = None
        self.complete = True
        self.hidden = False
        self.held_before: Callable[[Container[int]], bool] = lambda _: False

    @property
    def blind(self) -> bool:
        """True if clusters that nothing refers to may not be leaks: what refers to them may be damaged or unread.

        qemu-img makes no such difference.
        """
        return not self.as_qemu and (self.hidden or not self.complete)

    @property
    def tables_in_bulk(self) -> bool:
        """True if there are so many entries that tables which want a closer look are judged as a whole."""
        return self.telling.folds and not isinstance(self.census, PlainCensus)

    @property
    def bulk(self) -> BulkCensus:
        """The census, where tables are so large that they are counted as a whole."""
        from .bulk import BulkCensus

        assert isinstance(self.census, BulkCensus), "what is judged as a whole is counted so"
        return self.census

    @cached_property
    def bitmaps_in_bulk(self) -> bool:
        """True if the bitmap tables together are so large that each is judged as a whole."""
        entries = sum(bitmap.entry.bitmap_table_size for bitmap in self.directory.bitmaps)
        return self.telling.folds and entries > PLAIN_ENTRIES

    @property
    def doubt(self) -> str | None:
        """Why a field of the header may be wrong although it could be right, or None; known once all passes are done.

        Whatever is then built upon the mapping may be written over what is sound.
        """
        if self.nonsense > max(_NONSENSE, self.allocation.allocated // 8):
            return f"{self.nonsense} entries of the mapping are nonsense: a field of the header may be wrong"
        return self.header_doubt

    @property
    def says_at_every_visit(self) -> bool:
        """True if what is wrong with an L2 table is a finding for each entry that names it, as qemu-img prints it.

        Otherwise it is one finding that counts them all, and so it is where there would be too many.
        """
        return self.as_qemu and self.visits * self.geometry.l2_entries <= _REPEATED

    @property
    def census(self) -> Census:
        """The references; the mapping's pass begins it, and it is complete when the refcounts are compared."""
        assert self._census is not None, "only the mapping's pass knows which kind of census an image needs"
        return self._census

    @census.setter
    def census(self, census: Census) -> None:
        self._census = census

    def in_qemu(self, end: int) -> InQemu | None:
        """What QEMU's check makes of what lies outside the file and ends there: None for what it makes of that else."""
        return None if end >= self.geometry.outside_for_qemu(self.file_size) else InQemu.SILENT

    def structures(self) -> Iterator[Reference]:
        """Everything but L2 tables, guest data and bitmaps, as ranges with an owner."""
        end = self.file_size  # of what begins behind it nothing is counted, and there may be very much
        blocks = array("Q", (entry if entry < end else 0 for entry in self.stored.table))
        yield from structures(self.image, blocks, self.crypto_header)
        yield from self.root_tables()

    def root_tables(self) -> Iterator[Reference]:
        """The snapshot table and all L1 tables."""
        offset, length = self.header.snapshots_offset, self.snapshots_length
        yield Reference(offset, length, Kind.SNAPSHOT_TABLE, "the snapshot table")
        for root in self.roots:
            if root.fault is None:
                yield Reference(root.offset, 8 * root.entries, Kind.L1_TABLES, l1_owner(root.snapshot))

    def read_l1(self, root: Root) -> array[int]:
        """An L1 table as native integers, without the zeroes past the end of the file; nothing if it cannot be one."""
        if root.fault is not None or root.entries > MAX_L1_ENTRIES:
            return array("Q")
        length = 8 * min(root.entries, div_up(self.file.size - root.offset, 8))
        if length <= 0 or self.file.is_hole(root.offset, length):
            return array("Q")
        return table_entries(self.file.read_padded(root.offset, length))

    @property
    def crypto_header(self) -> CryptoHeaderPointer | None:
        """Where the LUKS header lies, if that can be told."""
        try:
            pointer = self.image.crypto_header
        except CorruptImageError:
            return None
        return pointer if pointer is not None and pointer.length <= MAX_ENCRYPTION_HEADER else None

    def read_table(self, entry: BitmapEntry) -> array[int]:
        """A bitmap table as native integers; zeroes past the end of the file, nothing if its size is impossible."""
        size = entry.bitmap_table_size
        if size > self.geometry.max_bitmap_table_entries:
            return array("Q")
        return table_entries(self.file.read_padded(entry.bitmap_table_offset, 8 * size))


@contextlib.contextmanager
def opened(
    path: str | os.PathLike[str], *, writable: bool = False, force_share: bool = False, use_locks: bool = True
) -> Iterator[tuple[ImageFile, bool]]:
    """An image file open as a reader's, or as the only writer's, and whether a lock protects it.

    A change of ours that a crash cut short is rolled back first for a writer.

    Raises:
        NotQcow2Error: it does not begin as a qcow2 image.
        InUseError: another process writes to it, and `force_share` is off.
        LockingUnavailableError: `writable` on a file system without locks.
        InterruptedChangeError: a change of ours was cut short and must be settled first.
        ImageIOError: the operating system refused.
    """
    file = ImageFile.open(path, writable=writable)
    try:
        with naming(Path(path)):
            locked = use_locks and take_locks(file, writable=writable, force_share=force_share)
            settle_interrupted(file, writable=writable)
            yield file, locked and not force_share
    finally:
        file.close()


def read_header(file: ImageFile) -> tuple[Header, bytes]:
    """The header, not judged, and the bytes it stands in; as QEMU reads, with zeroes where the file ends too early.

    Raises:
        NotQcow2Error, UnsupportedImageError: as `Header.parse`.
    """
    data = file.read_at(0, min(1 << MAX_CLUSTER_BITS, file.size))
    return Header.parse(data.ljust(1 << MAX_CLUSTER_BITS, b"\0") if data[: len(MAGIC)] == MAGIC else data), data


def damaged_image(file: ImageFile, header: Header, data: bytes, *, locked: bool) -> Qcow2Image:
    """An image whose header has no fatal fault, open although it may have others."""
    size = header.geometry.cluster_size
    file.slack = size
    head = data[:size].ljust(size, b"\0")
    limit = header.backing_file_offset if 0 < header.backing_file_offset <= size else size
    extensions = ExtensionArea.parse(head, header.header_length, limit)
    return Qcow2Image(file, head, header, extensions, locked=locked)


def snapshot_name(entry: SnapshotEntry) -> str:
    """A snapshot's id and name as QEMU's messages have them."""
    return f"{_as_c_string(entry.id)} ({_as_c_string(entry.name)})"


def _as_c_string(name: bytes) -> str:
    return decode_name(name.partition(b"\0")[0])
