"""The on-disk structures of an image as they are, field by field: also of an image too damaged to be opened.

Nothing has to be right for this. Each structure is read as far as its bytes go and its place can be told, what was
read before a fault is kept, and the fault is told. What is not there is not made up, and no size in the file is
believed before its bytes are there.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..errors import (
    CorruptImageError,
    NotQcow2Error,
    Qcow2bmError,
    TruncatedImageError,
    naming,
)
from ..format.bitmap_directory import BitmapEntry, parse_directory
from ..format.entries import table_entries
from ..format.extensions import BitmapsExtension, ExtensionArea, ExtensionType
from ..format.geometry import Geometry
from ..format.header import MAGIC, Header
from ..format.layout import Field, bitmap_entry_fields, extension_fields, header_fields, snapshot_fields
from ..format.limits import (
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_CLUSTER_BITS,
    MAX_L1_ENTRIES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
)
from ..format.snapshot_table import SnapshotEntry, parse_snapshots
from ..format.text import decode_name
from ..image.file import ImageFile
from ..image.image import take_locks

_PIECE = 1 << 16
"""Bytes of a table that are read at once."""
_AGAIN = 1 << 20
"""Bytes of tables that are shown although others lie there too: a sound image has none, a hostile one any number."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries of a table as fields, those that are not zero. They stay numbers until asked for: there may be millions.

    Attributes:
        offset: of the table.
        pieces: index of the first one and entries of each piece that is not all zeroes.
    """

    offset: int
    pieces: tuple[tuple[int, array[int]], ...]

    def __iter__(self) -> Iterator[Field]:
        for first, values in self.pieces:
            for index, value in enumerate(values, first):
                if value:
                    yield Field(f"[{index}]", self.offset + 8 * index, 8, value)

    def __len__(self) -> int:
        return sum(len(values) - values.count(0) for _, values in self.pieces)

    @property
    def largest(self) -> int:
        """The largest entry, as a number."""
        return max((max(values) for _, values in self.pieces), default=0)

    @property
    def last(self) -> int:
        """The highest index."""
        if not self.pieces:
            return 0
        first, values = self.pieces[-1]
        return next(first + index for index in reversed(range(len(values))) if values[index])


@dataclass(frozen=True, slots=True)
class Part:
    """Fields that belong together: a header, an extension, an entry, a table."""

    title: str
    fields: tuple[Field, ...] | Entries


@dataclass(frozen=True, slots=True)
class Structure:
    """One kind of structure.

    Attributes:
        parts: what could be read.
        error: why there is no more, or what is wrong with it; None if all is well.
    """

    name: str
    parts: tuple[Part, ...]
    error: Qcow2bmError | None


@contextlib.contextmanager
def raw_image(path: str | os.PathLike[str], *, force_share: bool = False) -> Iterator[RawImage]:
    """An image's bytes, locked as a reader's where the file system can.

    Raises:
        InUseError: another process writes to it, and `force_share` is off.
        NotQcow2Error, ImageIOError: it is no file, or cannot be read.
    """
    file = ImageFile.open(path)
    try:
        with naming(file.path):
            raw = RawImage(file, locked=take_locks(file, writable=False, force_share=force_share))
            raw.require_qcow2()
        yield raw
    finally:
        file.close()


class RawImage:
    """The bytes of an image, and where in them the structures are said to be.

    Attributes:
        locked: False if the file system has no locks: what is read may be stale.
    """

    def __init__(self, file: ImageFile, *, locked: bool) -> None:
        self.locked = locked
        self._file = file
        self._head = file.read_at(0, min(file.size, 1 << MAX_CLUSTER_BITS))
        self._shown = _Shown()

    def require_qcow2(self) -> None:
        """Raise NotQcow2Error unless the file begins as a qcow2 image: fields of anything else would mislead."""
        if not self._head.startswith(MAGIC):
            raise NotQcow2Error("not a qcow2 image", hint="qcow2bm reads qcow2 and nothing else")

    def read(self, name: str) -> Structure:
        """One of STRUCTURES, as far as it can be read."""
        parts: list[Part] = []
        error: Qcow2bmError | None = None
        self._shown = _Shown()
        try:
            with naming(self._file.path):
                for part in STRUCTURES[name](self):
                    parts.append(part)  # noqa: PERF402 - what came before the fault is kept
        except Qcow2bmError as fault:
            error = fault
        return Structure(name, tuple(parts), error)

    # One generator for each structure: parts, then a fault if there is one

    def header(self) -> Iterator[Part]:
        """The header; the fault is the first reason not to open the image."""
        fields = tuple(header_fields(self._head))
        if fields:
            yield Part("header", fields)
        Header.parse(self._head).validate()

    def extensions(self) -> Iterator[Part]:
        """The header extensions."""
        for extension in self._extensions.extensions:
            yield Part(f"extension {extension.type_name}", tuple(extension_fields(extension)))
        self._extensions.validate()

    def bitmap_directory(self) -> Iterator[Part]:
        """The entries of the bitmap directory."""
        for index, (entry, offset) in enumerate(self._bitmaps()):
            yield Part(f"bitmap {index} '{decode_name(entry.name)}'", tuple(bitmap_entry_fields(entry, offset)))

    def bitmap_tables(self) -> Iterator[Part]:
        """The bitmap tables."""
        for entry, _ in self._bitmaps():
            title = f"table of bitmap '{decode_name(entry.name)}'"
            limit = self._geometry.max_bitmap_table_entries
            yield from self._table(title, entry.bitmap_table_offset, entry.bitmap_table_size, limit)

    def snapshots(self) -> Iterator[Part]:
        """The entries of the snapshot table."""
        for index, (offset, entry) in enumerate(self._snapshots()):
            yield Part(f"snapshot {index} '{decode_name(entry.name)}'", tuple(snapshot_fields(entry, offset)))

    def l1(self) -> Iterator[Part]:
        """The active L1 table and those of the snapshots."""
        header = self._header
        yield from self._table("active L1 table", header.l1_table_offset, header.l1_size, MAX_L1_ENTRIES)
        for _, entry in self._snapshots():
            title = f"L1 table of snapshot {decode_name(entry.id)}"
            yield from self._table(title, entry.l1_table_offset, entry.l1_size, MAX_L1_ENTRIES)

    def refcount_table(self) -> Iterator[Part]:
        """The refcount table."""
        header = self._header
        entries = header.refcount_table_clusters * self._geometry.cluster_size // 8
        limit = MAX_REFCOUNT_TABLE_BYTES // 8
        yield from self._table("refcount table", header.refcount_table_offset, entries, limit)

    # Where they are

    @cached_property
    def _header(self) -> Header:
        return Header.parse(self._head)

    @property
    def _geometry(self) -> Geometry:
        bits = self._header.cluster_bits
        if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
            raise CorruptImageError(f"nothing more can be found: the cluster size is 2^{bits}")
        return self._header.geometry

    @cached_property
    def _extensions(self) -> ExtensionArea:
        header, end = self._header, self._geometry.cluster_size
        area = self._head[:end].ljust(end, b"\0")
        limit = header.backing_file_offset if 0 < header.backing_file_offset < end else end
        return ExtensionArea.parse(area, len(header.build()), limit)

    def _bitmaps(self) -> Iterator[tuple[BitmapEntry, int]]:
        """Bitmap directory entries with their offsets in the file."""
        extension = self._extensions.find(ExtensionType.BITMAPS)
        if extension is None:
            return
        pointer = BitmapsExtension.parse(extension.data)
        start = pointer.bitmap_directory_offset
        data = self._present("the bitmap directory", start, pointer.bitmap_directory_size, MAX_BITMAP_DIRECTORY_BYTES)
        for place, entry in parse_directory(data, pointer.nb_bitmaps):
            yield entry, start + place

    def _snapshots(self) -> Iterator[tuple[int, SnapshotEntry]]:
        """Offsets in the file and snapshot table entries."""

        def read(offset: int, length: int) -> bytes:
            return self._present("the snapshot table", offset, length, length)

        return parse_snapshots(read, self._header.snapshots_offset, self._header.nb_snapshots)

    def _table(self, title: str, offset: int, entries: int, limit: int) -> Iterator[Part]:
        """A table of 64-bit entries, at most `limit`: those that are not zero, by their index."""
        size = self._within(title, offset, 8 * entries, 8 * limit) // 8 * 8
        fields = Entries(offset, tuple(self._pieces(title, offset, size)))
        yield Part(f"{title} at {offset:#x}: {len(fields)} of {entries} entries used", fields)
        if size < 8 * entries:
            raise TruncatedImageError(f"the file ends within {title}")

    def _pieces(self, title: str, start: int, size: int) -> Iterator[tuple[int, array[int]]]:
        """Indices and entries of a table where it is not zero. Holes are not read: a file may be exabytes of them."""
        at = start
        while at < start + size and (at := self._file.next_data(at)) < start + size:
            at -= (at - start) % 8
            data = self._file.read_at(at, min(_PIECE, start + size - at))
            if data.count(0) < len(data):
                self._shown.add(at, at + len(data))
                if self._shown.again > _AGAIN:
                    raise CorruptImageError(f"{title} at {start:#x} and others before it lie in the same place")
                yield (at - start) // 8, table_entries(data)
            at += len(data)

    def _present(self, what: str, offset: int, length: int, limit: int) -> bytes:
        """What the file has of a range."""
        present = self._within(what, offset, length, limit)
        return self._file.read_at(offset, present) if present else b""

    def _within(self, what: str, offset: int, length: int, limit: int) -> int:
        """How many bytes of a range the file has."""
        if length > limit:
            raise CorruptImageError(f"{what} would have {length} bytes, above {limit}")
        if offset >= self._file.size and length:
            raise TruncatedImageError(f"{what} at {offset:#x} lies outside the file of {self._file.size} bytes")
        return max(0, min(length, self._file.size - offset))


class _Shown:
    """Ranges of the file that have been shown, and how many bytes more than once (`again`)."""

    def __init__(self) -> None:
        self.again = 0
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Take one more; those that touch become one, so that the lists stay short."""
        touched = slice(bisect_left(self._ends, start), bisect_right(self._starts, end))
        others = list(zip(self._starts[touched], self._ends[touched], strict=True))
        self.again += sum(min(end, stop) - max(start, begin) for begin, stop in others)
        self._starts[touched] = [min(start, *(begin for begin, _ in others))] if others else [start]
        self._ends[touched] = [max(end, *(stop for _, stop in others))] if others else [end]


STRUCTURES: dict[str, Callable[[RawImage], Iterator[Part]]] = {
    "header": RawImage.header,
    "extensions": RawImage.extensions,
    "bitmap-directory": RawImage.bitmap_directory,
    "bitmap-tables": RawImage.bitmap_tables,
    "snapshots": RawImage.snapshots,
    "l1": RawImage.l1,
    "refcount-table": RawImage.refcount_table,
}
"""The structures by name, in the order in which one leads to the next."""
