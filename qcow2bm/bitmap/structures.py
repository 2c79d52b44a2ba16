"""The on-disk structures of an image as they are, field by field: also of an image too damaged to be opened.

Nothing has to be right for this. Each structure is read as far as its bytes go and its place can be told, what was
read before a fault is kept, and the fault is told. What is not there is not made up, and no size in the file is
believed before its bytes are there.
"""

from __future__ import annotations

import contextlib
import os
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


@dataclass(frozen=True, slots=True)
class Part:
    """Fields that belong together: a header, an extension, an entry, a table."""

    title: str
    fields: tuple[Field, ...]


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

    def require_qcow2(self) -> None:
        """Raise NotQcow2Error unless the file begins as a qcow2 image: fields of anything else would mislead."""
        if not self._head.startswith(MAGIC):
            raise NotQcow2Error("not a qcow2 image", hint="qcow2bm reads qcow2 and nothing else")

    def read(self, name: str) -> Structure:
        """One of STRUCTURES, as far as it can be read."""
        parts: list[Part] = []
        error: Qcow2bmError | None = None
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
        data = self._present(title, offset, 8 * entries, 8 * limit)
        present = data[: len(data) // 8 * 8]
        used = [(index, value) for index, value in enumerate(table_entries(present)) if value]
        fields = tuple(Field(f"[{index}]", offset + 8 * index, 8, value) for index, value in used)
        yield Part(f"{title} at {offset:#x}: {len(used)} of {entries} entries used", fields)
        if len(present) < 8 * entries:
            raise TruncatedImageError(f"the file ends within {title}")

    def _present(self, what: str, offset: int, length: int, limit: int) -> bytes:
        """What the file has of a range."""
        if length > limit:
            raise CorruptImageError(f"{what} would have {length} bytes, above {limit}")
        if offset >= self._file.size and length:
            raise TruncatedImageError(f"{what} at {offset:#x} lies outside the file of {self._file.size} bytes")
        return self._file.read_at(offset, min(length, self._file.size - offset)) if length else b""


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
