"""The bitmaps an image holds: directory, tables and data clusters, read when they are asked for.

Nothing is believed before it is checked, and a fault in one bitmap is that bitmap's alone: QEMU refuses the whole
image when one entry is bad; here the others stay readable.
"""

from __future__ import annotations

import contextlib
import functools
from array import array
from collections.abc import Iterable, Iterator
from enum import Enum

from bitarray import bitarray

from ..errors import (
    BitmapBrokenError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    CorruptImageError,
    TruncatedImageError,
    naming,
)
from ..format.bitmap_directory import FIXED_LENGTH, BitmapEntry, parse_directory
from ..format.entries import OFFSET_MASK, BitmapTableEntry, all_sound, table_entries
from ..format.extensions import BitmapsExtension, Extension, ExtensionType
from ..format.faults import Fault, Weight
from ..format.header import Autoclear
from ..format.limits import MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS
from ..format.text import decode_name, encode_name
from ..image import lock
from ..image.file import ImageFile
from ..image.image import Qcow2Image
from ..image.references import Kind, Reference
from .bits import BitVector
from .chunks import ONES, ZEROES, Chunk

_SHARED_TABLE = "its table is another bitmap's"


class State(Enum):
    """What may be done with a bitmap."""

    READY = "ready"
    """Stored cleanly: everything."""
    ACTIVE = "active"
    """In use by a process that has the image open for writing: nothing."""
    INCONSISTENT = "inconsistent"
    """In use, and nobody has the image open: its last writer died. Remove."""
    BROKEN = "broken"
    """Its entry or table breaks the format. Remove, if its clusters can be told."""
    DETACHED = "detached"
    """The autoclear bit is off: something that knows no bitmaps wrote to the image. Remove."""


class StoredChunk:
    """A data cluster of a bitmap. Bits are read from the file each time they are asked for."""

    __slots__ = ("_file", "_offset")

    def __init__(self, file: ImageFile, offset: int) -> None:
        self._file = file
        self._offset = offset

    def read(self, start: int, length: int) -> bitarray:
        """A read-only view of the bytes just read.

        Raises:
            ImageIOError, TruncatedImageError: of this file: it may be read while another one is written to.
        """
        with naming(self._file.path):
            return bitarray(buffer=self._file.read_at(self._offset + start, length), endian="little")


class StoredBitmap:
    """One bitmap of an image as it is on disk.

    Attributes:
        entry: its bitmap directory entry.
        place: where that is in the file, in bytes.
    """

    def __init__(
        self, image: Qcow2Image, entry: BitmapEntry, place: int, *, attached: bool, conflict: str | None
    ) -> None:
        self._image = image
        self.entry = entry
        self.place = place
        self._attached = attached
        self._conflict = conflict

    @property
    def name(self) -> str:
        """The name as text."""
        return decode_name(self.entry.name)

    @property
    def granularity(self) -> int:
        """Guest bytes one bit stands for."""
        return self.entry.granularity

    @property
    def recording(self) -> bool:
        """True if QEMU tracks writes in it (the auto flag)."""
        return self.entry.recording

    @functools.cached_property
    def state(self) -> State:
        """What may be done with it."""
        if self.fault is not None:
            return State.BROKEN
        if not self._attached:
            return State.DETACHED
        if not self.entry.in_use:
            return State.READY
        # Our own write lock is not another's: with it held nobody else can be writing.
        return State.ACTIVE if lock.has_writer(self._image.file.fd) else State.INCONSISTENT

    @functools.cached_property
    def fault(self) -> str | None:
        """Why the bitmap is broken, or None."""
        if self._conflict is not None:
            return self._conflict
        fault = next((fault for fault in self.entry_faults if fault.weight is not Weight.MINOR), None)
        if fault is not None:
            return fault.message
        return self.table_fault

    @functools.cached_property
    def entry_faults(self) -> tuple[Fault, ...]:
        """What is wrong with its directory entry as such."""
        return tuple(self.entry.faults(self._image.geometry))

    @property
    def table_fault(self) -> str | None:
        """What is wrong with its table, or None; the directory entry is not judged."""
        try:
            return self._table_fault()
        except CorruptImageError as error:
            return f"its table cannot be read: {error.message}"

    def _table_fault(self) -> str | None:
        size = self._image.file.size
        if all_sound(self.table, self._image.geometry, size):
            return None
        for index, value in enumerate(self.table):
            if not value:
                continue
            entry = BitmapTableEntry(value)
            fault = entry.fault(self._image.geometry)
            if fault is not None:
                return f"its table's {fault.message} (index {index})"
            if entry.offset >= size:
                return f"its data at {entry.offset:#x} lies outside the file"
        return None

    @functools.cached_property
    def table(self) -> array[int]:
        """The bitmap table as it is stored.

        Raises:
            CorruptImageError: it lies outside the file or is larger than any bitmap's.
        """
        size = self.entry.bitmap_table_size
        if size > self._image.geometry.max_bitmap_table_entries:
            raise CorruptImageError(f"a bitmap table of {size} entries is larger than any bitmap needs")
        return table_entries(self._image.file.read_at(self.entry.bitmap_table_offset, 8 * size))

    @functools.cached_property
    def bits(self) -> BitVector:
        """The bits, read chunk by chunk when they are looked at. Those of an inconsistent bitmap may be stale.

        Raises:
            BitmapBrokenError: the bitmap is broken.
        """
        if self.fault is not None:
            raise BitmapBrokenError(f"bitmap '{self.name}' is broken: {self.fault}")
        geometry, chunks = self._image.geometry, self._chunks()
        needed = geometry.bitmap_table_entries(self.granularity)
        chunks += [ZEROES] * (needed - len(chunks))  # an inconsistent bitmap's table may be of another size
        return BitVector(geometry.bitmap_bits(self.granularity), geometry.cluster_size, chunks[:needed])

    @property
    def is_misfit(self) -> bool:
        """True if nothing is wrong with it but that its table was made for a disk of another size."""
        if self._conflict is not None or self.table_fault is not None:
            return False
        if len(self.table) == self._image.geometry.bitmap_table_entries(self.granularity):
            return False
        faults = (fault for fault in self.entry_faults if fault.weight is not Weight.MINOR)
        return all(fault.code == "bitmap-table-size" for fault in faults)

    @property
    def table_bits(self) -> BitVector:
        """The bits of all the clusters that its table has, whatever size of disk that was made for.

        Raises:
            CorruptImageError: the table lies outside the file or is larger than any bitmap's.
        """
        chunks = self._chunks()
        cluster_size = self._image.geometry.cluster_size
        return BitVector(8 * cluster_size * len(chunks), cluster_size, chunks)

    def _chunks(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for value in self.table:
            entry = BitmapTableEntry(value)
            constant = ONES if entry.all_ones else ZEROES
            chunks.append(StoredChunk(self._image.file, entry.offset) if entry.offset else constant)
        return chunks

    def readable_bits(self) -> BitVector:
        """The bits, if they are to be relied on.

        Raises:
            BitmapInconsistentError: it is in use, or detached.
            BitmapBrokenError: it is broken.
        """
        require_ready(self)
        return self.bits

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the clusters its table and data take; 0 for what cannot be read."""
        geometry = self._image.geometry
        if self._conflict == _SHARED_TABLE:
            return 0
        try:
            data = sum(1 for value in self.table if BitmapTableEntry(value).offset)
        except CorruptImageError:
            return 0
        return (data + geometry.clusters(8 * self.entry.bitmap_table_size)) * geometry.cluster_size

    def references(self) -> Iterator[Reference]:
        """The host ranges that the table and its entries name; adjacent data clusters as one.

        A table at offset 0 is nowhere: the header is no table.
        """
        cluster_size = self._image.geometry.cluster_size
        if not self.entry.bitmap_table_offset:
            return
        owner = f"the table of bitmap '{self.name}'"
        if self.entry.bitmap_table_size:
            yield Reference(self.entry.bitmap_table_offset, 8 * self.entry.bitmap_table_size, Kind.BITMAPS, owner)
        if self._conflict == _SHARED_TABLE:
            return  # its data are the other's, and walked once
        owner = f"the data of bitmap '{self.name}'"
        try:
            offsets = [offset for value in self.table if (offset := value & OFFSET_MASK)]
        except CorruptImageError:
            return
        start = length = 0
        for offset in offsets:
            if offset != start + length:
                if length:
                    yield Reference(start, length, Kind.BITMAPS, owner)
                start, length = offset, 0
            length += cluster_size
        if length:
            yield Reference(start, length, Kind.BITMAPS, owner)


def not_found(name: str) -> BitmapNotFoundError:
    """The error for a name that no bitmap has."""
    return BitmapNotFoundError(f"no bitmap is called '{name}'", hint="`qcow2bm list` shows those there are")


def require_ready(bitmap: StoredBitmap) -> None:
    """Raise unless the bitmap is ready, saying what is in the way.

    Raises:
        BitmapInconsistentError: it is in use, or detached.
        BitmapBrokenError: it is broken.
    """
    state, name = bitmap.state, bitmap.name
    if state is State.BROKEN:
        raise BitmapBrokenError(f"bitmap '{name}' is broken: {bitmap.fault}", hint="`qcow2bm why` names the ways out")
    if state is State.ACTIVE:
        raise BitmapInconsistentError(f"bitmap '{name}' is in use by a running VM", hint="shut the VM down first")
    if state is State.INCONSISTENT:
        raise BitmapInconsistentError(
            f"bitmap '{name}' is inconsistent: its last writer did not close the image, so its bits are stale",
            hint="`qcow2bm why` names the ways out: a salvage by `qcow2bm repair`, or a new bitmap with a full backup",
        )
    if state is State.DETACHED:
        raise BitmapInconsistentError(
            f"bitmap '{name}' is detached: a program that knows no bitmaps wrote to the image, so its bits are stale",
            hint="`qcow2bm why` names the ways out: a salvage by `qcow2bm repair`, or a new bitmap with a full backup",
        )


class BitmapDirectory:
    """All bitmaps of an image, in directory order.

    Attributes:
        extension: the bitmaps header extension, or None.
        pointer: its parsed data, or None.
        attached: the autoclear bit is on, so the bitmaps count.
        bitmaps: what could be parsed.
        damage: why the directory as a whole breaks the format; `bitmaps` then holds what came before the damage.
        damage_code: the damage's permanent code.
    """

    def __init__(self, image: Qcow2Image) -> None:
        """Read the directory; tables are read when they are asked for."""
        self.extension: Extension | None = image.extensions.find(ExtensionType.BITMAPS)
        self.pointer: BitmapsExtension | None = None
        self.attached = bool(image.header.autoclear_features & Autoclear.BITMAPS)
        self.damage: str | None = None
        self.damage_code: str | None = None
        found: list[StoredBitmap] = []
        try:
            for bitmap in self._read(image):
                found.append(bitmap)  # noqa: PERF402 - what came before the damage is kept
        except CorruptImageError as error:
            self.damage, self.damage_code = error.message, error.code
        self.bitmaps = tuple(found)

    @property
    def is_ignored(self) -> bool:
        """QEMU does not look at it: it is detached. Its extension's length QEMU looks at all the same."""
        return not self.attached and self.damage_code != "bitmaps-extension-length"

    def _read(self, image: Qcow2Image) -> Iterator[StoredBitmap]:
        if self.extension is None:
            if self.attached:
                text = "the autoclear bit for bitmaps is set, but there is no bitmaps extension"
                raise CorruptImageError(text, code="bitmaps-extension-missing")
            return
        pointer = BitmapsExtension.parse(self.extension.data)
        if not pointer.reserved:
            yield from self._entries(image, pointer)
            return
        with contextlib.suppress(CorruptImageError):  # QEMU looks at that field first; what the rest says is clear
            yield from self._entries(image, pointer)
        raise CorruptImageError("the bitmaps extension has a reserved field set", code="bitmaps-extension-reserved")

    def _entries(self, image: Qcow2Image, pointer: BitmapsExtension) -> Iterator[StoredBitmap]:
        _require_sane(image, pointer)
        self.pointer = pointer
        data = image.file.read_at(pointer.bitmap_directory_offset, pointer.bitmap_directory_size)
        names: set[bytes] = set()
        tables: set[int] = set()
        for at, entry in parse_directory(data, pointer.nb_bitmaps):
            conflict = "another bitmap has the same name" if entry.qemu_name in names else None
            if entry.bitmap_table_offset in tables:
                conflict = _SHARED_TABLE
            place = pointer.bitmap_directory_offset + at
            yield StoredBitmap(image, entry, place, attached=self.attached, conflict=conflict)
            names.add(entry.qemu_name)
            tables.add(entry.bitmap_table_offset)

    def find(self, name: str) -> StoredBitmap:
        """The bitmap of a name.

        Raises:
            BitmapNotFoundError: there is none.
            BitmapBrokenError: the directory is damaged, so nobody knows.
        """
        wanted = encode_name(name)
        for bitmap in self.bitmaps:
            if bitmap.entry.name == wanted:
                return bitmap
        self.require_undamaged()
        raise not_found(name)

    def require_undamaged(self) -> None:
        """Raise BitmapBrokenError if the directory as a whole breaks the format."""
        if self.damage is not None:
            raise BitmapBrokenError(
                f"the bitmap directory is damaged: {self.damage}", hint="`qcow2bm repair` says what can be done"
            )

    def references(self, bitmaps: Iterable[StoredBitmap] | None = None) -> Iterator[Reference]:
        """The host ranges that the directory, the tables and their entries take: of all bitmaps, or of some."""
        if self.pointer is not None:
            pointer = self.pointer
            offset, size = pointer.bitmap_directory_offset, pointer.bitmap_directory_size
            yield Reference(offset, size, Kind.BITMAPS, "the bitmap directory")
        for bitmap in self.bitmaps if bitmaps is None else bitmaps:
            yield from bitmap.references()


def _require_sane(image: Qcow2Image, pointer: BitmapsExtension) -> None:
    """Raise for the first reason not to read the directory, in QEMU's order (`qcow2_read_extensions`)."""
    size, offset = pointer.bitmap_directory_size, pointer.bitmap_directory_offset
    if not 0 < pointer.nb_bitmaps <= MAX_BITMAPS:
        text = f"the bitmaps extension says there are {pointer.nb_bitmaps} bitmaps"
        raise CorruptImageError(text, code="bitmaps-count")
    if not offset or not image.geometry.is_aligned(offset):
        text = f"the bitmap directory's offset {offset:#x} is not a cluster's"
        raise CorruptImageError(text, code="bitmap-directory-offset")
    if not FIXED_LENGTH <= size <= MAX_BITMAP_DIRECTORY_BYTES:
        raise CorruptImageError(f"the bitmap directory's size is {size}", code="bitmap-directory-size")
    if image.geometry.is_outside(offset, size, image.file.size):
        text = f"the bitmap directory at {offset:#x} lies outside the file of {image.file.size} bytes"
        raise TruncatedImageError(text, code="bitmap-directory-outside")
