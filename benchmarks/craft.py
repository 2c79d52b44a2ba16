"""Big sparse qcow2 images for benchmarks: only metadata is written, guest data is holes.

Every image lies in the file in this order, and passes `qemu-img check`:

    cluster 0            header, then the bitmaps extension
    L2 tables            among the (unwritten) data clusters that they name
    L1 table             then one for each snapshot, and the snapshot table
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
    Refcounts: TypeAlias = NDArray[np.uint16]

Layout: TypeAlias = Literal["sequential", "shuffled", "compressed"]

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

COPIED = np.uint64(1 << 63)
COMPRESSED = np.uint64(1 << 62)
SECTOR_BITS = 9
ALL_SUBCLUSTERS = 0xFFFFFFFF  # the second half of an extended L2 entry: allocated, none reads as zeroes
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
BITMAPS_EXTENSION = 0x23852875
AUTOCLEAR_BITMAPS = 1
TRACKING_BITMAP = 1  # the only type of a directory entry
REFCOUNT_ORDER = 4
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
EXTENSION = struct.Struct(">IIIIQQ")
DIRECTORY_ENTRY = struct.Struct(">QIIBBHI")
SNAPSHOT = struct.Struct(">QIHHIIQIIQQQ")  # with the 24 bytes of extra data that QEMU writes
SNAPSHOT_EXTRA = 24
NO_INSTRUCTION_COUNT = (1 << 64) - 1


@dataclass(frozen=True)
class BitmapSpec:
    """A bitmap to put into an image; granularity in bytes."""

    name: str
    granularity: int
    pattern: Pattern


class ImageWriter:
    """A new image file whose clusters are handed out one after the other."""

    def __init__(self, path: str | os.PathLike[str], cluster_size: int, *, extended_l2: bool = False) -> None:
        self.extended_l2 = extended_l2
        self.l2_entries = cluster_size // (16 if extended_l2 else 8)  # of one table
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

    def write_l1_table(self, size: int, l2_tables: Entries | None) -> tuple[int, int]:
        """(offset, entries) of a new L1 table for this virtual size, with these entries or none."""
        entries = -(-size // (self.cluster_size * self.l2_entries))
        offset = self.allocate(self.clusters_for(entries * 8))
        if l2_tables is not None:
            self.write(offset, l2_tables.astype(">u8"))
        return offset, entries

    def write_l2_tables(self, offsets: Entries, entries: Entries) -> None:
        """The entries of all guest clusters, into tables that lie anywhere; the last one may be filled in part."""
        tables = np.zeros((len(offsets) * self.l2_entries, 2 if self.extended_l2 else 1), ">u8")
        tables[: len(entries), 0] = entries
        if self.extended_l2:  # a compressed cluster has no subclusters
            tables[: len(entries), 1] = np.where(entries & COMPRESSED, 0, ALL_SUBCLUSTERS)
        for offset, table in zip(offsets.tolist(), tables.reshape(len(offsets), -1), strict=True):
            self.write(offset, table)

    def finish(
        self,
        size: int,
        l1_table: tuple[int, int],
        *,
        snapshots: tuple[int, int] = (0, 0),
        extension: bytes = b"",
        refcounts: Refcounts | None = None,
    ) -> None:
        """Refcounts, then the header. Each cluster counts 1, or what `refcounts` says of the first ones."""
        table_offset, table_clusters = self._write_refcounts(refcounts)
        l1_offset, l1_size = l1_table
        header = HEADER.pack(
            *(b"QFI\xfb", 3),
            *(0, 0),  # backing file
            *(self.cluster_bits, size, 0),
            *(l1_size, l1_offset, table_offset, table_clusters),
            *snapshots,
            *(INCOMPATIBLE_EXTENDED_L2 if self.extended_l2 else 0, 0, AUTOCLEAR_BITMAPS if extension else 0),
            *(REFCOUNT_ORDER, HEADER.size),
        )
        self.write(0, header + extension + bytes(8))  # eight zero bytes: the end of the header extensions
        os.ftruncate(self._fd, self.clusters * self.cluster_size)

    def _write_refcounts(self, refcounts: Refcounts | None) -> tuple[int, int]:
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
    extended_l2: bool = False,
    snapshots: int = 0,
    seed: int = 1,
) -> None:
    """An image whose every guest cluster is allocated: in order, anywhere, or as compressed streams.

    Nothing was written since the snapshots were taken: they and the disk share all L2 tables and data.
    """
    rng = np.random.default_rng(seed)
    copied = np.uint64(0) if snapshots else COPIED  # of L1 and L2 entries alike: that nobody else refers to it
    with ImageWriter(path, cluster_size, extended_l2=extended_l2) as writer:
        guest_clusters = writer.clusters_for(size)
        if layout == "compressed":
            l2_tables, entries, refcounts = _compressed_clusters(writer, guest_clusters, rng)
        else:
            l2_tables, entries = _normal_clusters(writer, guest_clusters, rng if layout == "shuffled" else None)
            entries |= copied
            refcounts = np.ones(writer.clusters, np.uint16)
        writer.write_l2_tables(l2_tables, entries)
        refcounts[1:] *= np.uint16(1 + snapshots)  # so far there is the header, and what is shared
        l1_table = writer.write_l1_table(size, l2_tables | copied)
        saved = _write_snapshots(writer, size, l2_tables, snapshots) if snapshots else (0, 0)
        writer.finish(size, l1_table, snapshots=saved, refcounts=refcounts)


def _normal_clusters(writer: ImageWriter, count: int, rng: np.random.Generator | None) -> tuple[Entries, Entries]:
    """Host offsets of the L2 tables, and of the data: shuffled, or each table before what it maps.

    The latter is how `qemu-img create -o preallocation=metadata` lays out an image, and a guest that writes in order.
    """
    tables = -(-count // writer.l2_entries)
    first = writer.allocate(tables + count)
    offsets = (np.arange(tables + count, dtype=np.uint64) << np.uint64(writer.cluster_bits)) + np.uint64(first)
    if rng:
        rng.shuffle(offsets)
        return offsets[:tables], offsets[tables:]
    is_data = np.ones(len(offsets), bool)
    is_data[:: writer.l2_entries + 1] = False
    return offsets[~is_data], offsets[is_data]


def _compressed_clusters(
    writer: ImageWriter, count: int, rng: np.random.Generator
) -> tuple[Entries, Entries, Refcounts]:
    """Host offsets of the L2 tables, their entries, and the refcounts of it all.

    Behind the tables lie streams of random length, byte after byte as `qemu-img convert -c` packs them.
    """
    tables = -(-count // writer.l2_entries)
    l2_tables = np.arange(tables, dtype=np.uint64) * np.uint64(writer.cluster_size)
    l2_tables += np.uint64(writer.allocate(tables))
    lengths = rng.integers(writer.cluster_size // 8, writer.cluster_size // 2, count, dtype=np.uint64)
    ends = np.cumsum(lengths)
    # One spare cluster: the last stream claims whole sectors, which may reach past its last byte's cluster.
    base = writer.allocate(writer.clusters_for(int(ends[-1])) + 1)
    starts = ends - lengths + np.uint64(base)
    sector = np.uint64(SECTOR_BITS)
    more_sectors = ((starts + lengths - np.uint64(1)) >> sector) - (starts >> sector)
    entries = COMPRESSED | (more_sectors << np.uint64(62 - (writer.cluster_bits - 8))) | starts
    lasts = (((starts >> sector) + more_sectors + np.uint64(1)) << sector) - np.uint64(1)
    return l2_tables, entries, _stream_refcounts(writer, base, starts, lasts)


def _stream_refcounts(writer: ImageWriter, base: int, starts: Entries, lasts: Entries) -> Refcounts:
    """Of all clusters so far. A stream refers to each cluster from its first byte's to its last one's."""
    bits = np.uint64(writer.cluster_bits)
    # Count +1 where a stream begins and -1 behind where it ends: the sum so far is how many touch a cluster.
    steps = np.bincount((starts >> bits).astype(np.int64), minlength=writer.clusters + 1)
    steps -= np.bincount((lasts >> bits).astype(np.int64) + 1, minlength=writer.clusters + 1)
    refcounts = np.cumsum(steps)[: writer.clusters].astype(np.uint16)
    refcounts[: base >> writer.cluster_bits] = 1
    return refcounts


def _write_snapshots(writer: ImageWriter, size: int, l2_tables: Entries, count: int) -> tuple[int, int]:
    """(number, offset) of a snapshot table; each snapshot has an L1 table of its own, over the same L2 tables."""
    table = b"".join([_write_snapshot(writer, size, l2_tables, number) for number in range(1, count + 1)])
    return count, writer.append(table)


def _write_snapshot(writer: ImageWriter, size: int, l2_tables: Entries, number: int) -> bytes:
    """The L1 table of one snapshot without VM state; its entry of the snapshot table."""
    l1_offset, l1_size = writer.write_l1_table(size, l2_tables)
    ident, name = str(number).encode(), f"daily-{number}".encode()
    entry = SNAPSHOT.pack(
        *(l1_offset, l1_size, len(ident), len(name)),
        *(1_700_000_000 + number * 86_400, 0, 0),  # date in seconds and nanoseconds, the guest's clock
        *(0, SNAPSHOT_EXTRA),  # VM state: none
        *(0, size, NO_INSTRUCTION_COUNT),  # VM state again
    )
    entry += ident + name
    return entry + bytes(-len(entry) % 8)


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
