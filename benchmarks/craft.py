"""Big sparse qcow2 images for benchmarks: only metadata is written, guest data is holes.

Every image lies in the file in this order, and passes `qemu-img check`:

    cluster 0            header, then the bitmaps extension
    L1 table             then L2 tables and the (unwritten) data clusters they name
    bitmap data, table   for each bitmap; then the bitmap directory
    refcount table       then the refcount blocks, which count themselves too

Refcounts have 16 bits, as in every image that qemu-img makes by default.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from benchmarks.patterns import chunks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType
    from typing import Any, Self

    from numpy.typing import NDArray

    from benchmarks.patterns import Pattern

    Entries: TypeAlias = NDArray[np.uint64]

Layout: TypeAlias = Literal["sequential", "shuffled", "compressed"]

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

COPIED = np.uint64(1 << 63)
COMPRESSED = np.uint64(1 << 62)
SECTOR_BITS = 9
BITMAPS_EXTENSION = 0x23852875
AUTOCLEAR_BITMAPS = 1
TRACKING_BITMAP = 1  # the only type of a directory entry
REFCOUNT_ORDER = 4
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
EXTENSION = struct.Struct(">IIIIQQ")
DIRECTORY_ENTRY = struct.Struct(">QIIBBHI")


@dataclass(frozen=True)
class BitmapSpec:
    """A bitmap to put into an image; granularity in bytes."""

    name: str
    granularity: int
    pattern: Pattern


class ImageWriter:
    """A new image file whose clusters are handed out one after the other."""

    def __init__(self, path: str | os.PathLike[str], cluster_size: int) -> None:
        self.cluster_size = cluster_size
        self.cluster_bits = cluster_size.bit_length() - 1
        self.clusters = 1  # the header's
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._fd)

    def allocate(self, clusters: int) -> int:
        """The host offset of so many new clusters."""
        first = self.clusters
        self.clusters += clusters
        return first << self.cluster_bits

    def clusters_for(self, size: int) -> int:
        """How many clusters so many bytes take."""
        return -(-size // self.cluster_size)

    def write(self, offset: int, data: bytes | NDArray[Any]) -> None:
        """All of the data, at this place."""
        view = as_bytes(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def append(self, data: bytes | NDArray[Any]) -> int:
        """The data in new clusters of its own; where they are."""
        offset = self.allocate(self.clusters_for(as_bytes(data).nbytes))
        self.write(offset, data)
        return offset

    def write_l1_table(self, size: int, l2_offset: int | None) -> tuple[int, int]:
        """(offset, entries) of an L1 table for this virtual size, over L2 tables that lie one after the other."""
        entries = -(-size // (self.cluster_size * self.cluster_size // 8))
        offset = self.allocate(self.clusters_for(entries * 8))
        if l2_offset is not None:
            tables = np.arange(entries, dtype=np.uint64) * np.uint64(self.cluster_size) + np.uint64(l2_offset)
            self.write(offset, (tables | COPIED).astype(">u8"))
        return offset, entries

    def finish(
        self, size: int, l1_table: tuple[int, int], *, extension: bytes = b"", refcounts: Entries | None = None
    ) -> None:
        """Refcounts, then the header. Each cluster counts 1, or what `refcounts` says of those handed out so far."""
        table_offset, table_clusters = self._write_refcounts(refcounts)
        l1_offset, l1_size = l1_table
        header = HEADER.pack(
            *(b"QFI\xfb", 3),
            *(0, 0),  # backing file
            *(self.cluster_bits, size, 0),
            *(l1_size, l1_offset, table_offset, table_clusters),
            *(0, 0),  # snapshots
            *(0, 0, AUTOCLEAR_BITMAPS if extension else 0),
            *(REFCOUNT_ORDER, HEADER.size),
        )
        self.write(0, header + extension + bytes(8))  # eight zero bytes: the end of the header extensions
        os.ftruncate(self._fd, self.clusters * self.cluster_size)

    def _write_refcounts(self, refcounts: Entries | None) -> tuple[int, int]:
        per_block = self.cluster_size // 2
        blocks, table = 0, 1
        while blocks * per_block < self.clusters + blocks + table:  # the blocks count themselves and the table
            blocks = -(-(self.clusters + blocks + table) // per_block)
            table = self.clusters_for(blocks * 8)
        table_offset = self.allocate(table)
        first_block = self.allocate(blocks)
        counts = np.zeros(blocks * per_block, ">u2")
        counts[: self.clusters] = 1
        if refcounts is not None:
            counts[: len(refcounts)] = refcounts
        offsets = np.arange(blocks, dtype=np.uint64) * np.uint64(self.cluster_size) + np.uint64(first_block)
        self.write(table_offset, offsets.astype(">u8"))
        self.write(first_block, counts)
        return table_offset, table


def as_bytes(data: bytes | NDArray[Any]) -> memoryview:
    """The bytes of a table as they go to the file."""
    return memoryview(data if isinstance(data, bytes) else data.data).cast("B")


# ---- images full of data ----


def full_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int = 64 * KIB,
    layout: Layout = "sequential",
    seed: int = 1,
) -> None:
    """An image whose every guest cluster is allocated: in order, anywhere, or as compressed streams."""
    rng = np.random.default_rng(seed)
    with ImageWriter(path, cluster_size) as writer:
        guest_clusters = writer.clusters_for(size)
        tables = -(-guest_clusters * 8 // cluster_size)
        l2_offset = writer.allocate(tables)
        l1_table = writer.write_l1_table(size, l2_offset)
        refcounts = None
        if layout == "compressed":
            entries, refcounts = _compressed_clusters(writer, guest_clusters, rng)
        else:
            entries = _normal_clusters(writer, guest_clusters)
            if layout == "shuffled":
                rng.shuffle(entries)
        writer.write(l2_offset, entries.astype(">u8"))
        writer.finish(size, l1_table, refcounts=refcounts)


def _normal_clusters(writer: ImageWriter, count: int) -> Entries:
    first = writer.allocate(count) >> writer.cluster_bits
    hosts = np.arange(first, first + count, dtype=np.uint64)
    return (hosts << np.uint64(writer.cluster_bits)) | COPIED


def _compressed_clusters(writer: ImageWriter, count: int, rng: np.random.Generator) -> tuple[Entries, Entries]:
    """L2 entries of streams of random length, byte after byte as `qemu-img convert -c` lays them; and all refcounts."""
    lengths = rng.integers(writer.cluster_size // 8, writer.cluster_size // 2, count, dtype=np.uint64)
    ends = np.cumsum(lengths)
    # One spare cluster: the last stream claims whole sectors, which may reach past its last byte's cluster.
    base = writer.allocate(writer.clusters_for(int(ends[-1])) + 1)
    starts = ends - lengths + np.uint64(base)
    sector = np.uint64(SECTOR_BITS)
    more_sectors = ((starts + lengths - np.uint64(1)) >> sector) - (starts >> sector)
    entries = COMPRESSED | (more_sectors << np.uint64(62 - (writer.cluster_bits - 8))) | starts
    lasts = (((starts >> sector) + more_sectors + np.uint64(1)) << sector) - np.uint64(1)

    # A stream refers to each cluster that its sectors touch: count +1 where it begins and -1 behind where it ends.
    bits = np.uint64(writer.cluster_bits)
    steps = np.bincount((starts >> bits).astype(np.int64), minlength=writer.clusters + 1)
    steps -= np.bincount((lasts >> bits).astype(np.int64) + 1, minlength=writer.clusters + 1)
    refcounts = np.cumsum(steps)[: writer.clusters].astype(np.uint64)
    refcounts[: base >> writer.cluster_bits] = 1
    return entries, refcounts


# ---- images with bitmaps ----


def bitmap_image(
    path: str | os.PathLike[str],
    size: int,
    bitmaps: Sequence[BitmapSpec],
    *,
    cluster_size: int = 64 * KIB,
    seed: int = 1,
) -> None:
    """An image without guest data, with these persistent bitmaps, none of them recording."""
    rng = np.random.default_rng(seed)
    with ImageWriter(path, cluster_size) as writer:
        l1_table = writer.write_l1_table(size, None)
        directory = b"".join([_write_bitmap(writer, size, bitmap, rng) for bitmap in bitmaps])
        offset = writer.append(directory)
        extension = EXTENSION.pack(BITMAPS_EXTENSION, 24, len(bitmaps), 0, len(directory), offset)
        writer.finish(size, l1_table, extension=extension)


def _write_bitmap(writer: ImageWriter, size: int, bitmap: BitmapSpec, rng: np.random.Generator) -> bytes:
    """Data and table of one bitmap; its directory entry."""
    bits = -(-size // bitmap.granularity)
    table = np.array(list(_table_entries(writer, chunks(bitmap.pattern, bits, writer.cluster_size, rng))), ">u8")
    name = bitmap.name.encode()
    granularity_bits = bitmap.granularity.bit_length() - 1
    offset = writer.append(table)
    entry = DIRECTORY_ENTRY.pack(offset, len(table), 0, TRACKING_BITMAP, granularity_bits, len(name), 0) + name
    return entry + bytes(-len(entry) % 8)


def _table_entries(writer: ImageWriter, data: Iterable[NDArray[np.uint8]]) -> Iterable[int]:
    """As QEMU stores it: a cluster of zeroes or ones takes no space."""
    for chunk in data:
        if not chunk.any():
            yield 0
        elif (chunk == 0xFF).all():
            yield 1
        else:
            yield writer.append(chunk)
