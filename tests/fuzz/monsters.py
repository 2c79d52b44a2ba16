"""Images made to do harm, each by name: tables that name themselves, claims of exabytes, names that are commands.

Each is a sound image of a few clusters with a few numbers changed, as somebody would do it who has read the
specification and wants a backup server to hang, to run out of memory, or to do to a terminal what he likes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.monster_parts import (
    ALL,
    BITMAPS_MOST,
    CLUSTER,
    COPIED,
    FAR,
    L1_MOST,
    L1_NOISE,
    L2_NOISE,
    REFTABLE_MOST,
    REFTABLE_NOISE,
    SNAPSHOTS_MOST,
    appended,
    bitmap_entry,
    bitmaps_of,
    directory_at,
    directory_of,
    disk_of,
    fill,
    l1_at,
    l1_table,
    l2_table,
    l2_tables_of,
    noise,
    numbered,
    refcount_block,
    refcounts_at,
    snapshot_entry,
    snapshots_at,
    stretch,
)  # fmt: skip
from tests.support.raw import BITMAPS, OFFSET, Raw


@dataclass(frozen=True)
class Monster:
    """What is done to a sound image; `holes`: its file is then made as long as the file system allows."""

    make: Callable[[Raw], object]
    holes: bool = False

    @property
    def name(self) -> str:
        return self.make.__name__

    def lay_out(self, sound: bytes, image: Path) -> None:
        """Write it."""
        raw = Raw(sound)
        self.make(raw)
        raw.save(image)
        if self.holes:
            stretch(image)


# ---- one table for all ----


def billion_laughs(raw: Raw) -> None:
    """As many entries as there may be, all naming one L2 table."""
    l1_at(raw, appended(raw, struct.pack(">Q", l2_table(raw) | COPIED) * (L1_MOST // 8)), L1_MOST // 8)


def laughing_snapshots(raw: Raw) -> None:
    """Of very many snapshots each has the L1 table whose entries all name one L2 table."""
    billion_laughs(raw)
    entries = (snapshot_entry(l1_table(raw), L1_MOST // 8, number=number) for number in range(SNAPSHOTS_MOST))
    snapshots_at(raw, appended(raw, b"".join(entries)), SNAPSHOTS_MOST)


def snapshots_a_cluster_apart(raw: Raw) -> None:
    """Very many snapshots whose L1 tables of 32 MiB begin at every cluster of one another."""
    table = appended(raw, bytes(L1_MOST))
    entries = (
        snapshot_entry(
            table + number % (L1_MOST // CLUSTER) * CLUSTER,
            (L1_MOST - number % (L1_MOST // CLUSTER) * CLUSTER) // 8,
            number=number,
        )
        for number in range(SNAPSHOTS_MOST)
    )
    snapshots_at(raw, appended(raw, b"".join(entries)), SNAPSHOTS_MOST)


def one_block_for_all(raw: Raw) -> None:
    """All entries of the largest refcount table name one block."""
    block = refcount_block(raw)
    raw.put(48, appended(raw, struct.pack(">Q", block) * (REFTABLE_MOST // 8)))
    raw.put(56, REFTABLE_MOST // CLUSTER, 4)


def one_cluster_for_all(raw: Raw) -> None:
    """Every entry of every L2 table names one data cluster."""
    fill(raw, l2_table(raw), raw.number(l2_table(raw)))


def compressed_into_each_other(raw: Raw) -> None:
    """Every entry is a compressed cluster of the same bytes, each as long as can be said."""
    fill(raw, l2_table(raw), 1 << 62 | 0xFF << 54 | raw.number(l2_table(raw)) & OFFSET)


# ---- tables of nothing but nonsense, of which no two entries are alike ----


def l1_of_noise(raw: Raw) -> None:
    l1_at(raw, appended(raw, noise(L1_NOISE)), L1_NOISE // 8)


def l1_of_all_there_is(raw: Raw) -> None:
    """Every cluster of the file is an L2 table, again and again, and so are as many behind its end."""
    clusters = 2 * (len(raw.data) + L1_NOISE) // CLUSTER
    l1_at(raw, appended(raw, numbered(L1_NOISE, lambda n: COPIED | n % clusters * CLUSTER)), L1_NOISE // 8)


def l2_of_noise(raw: Raw) -> None:
    l2_tables_of(raw, noise(L2_NOISE))


def l2_behind_the_end(raw: Raw) -> None:
    """What is left of a disk whose file was cut off."""
    l2_tables_of(raw, numbered(L2_NOISE, lambda n: COPIED | FAR + n * CLUSTER))


def refcount_table_of_noise(raw: Raw) -> None:
    refcounts_at(raw, noise(REFTABLE_NOISE))


def refcount_table_far_away(raw: Raw) -> None:
    refcounts_at(raw, numbered(REFTABLE_NOISE, lambda n: (1 << 50) + n * CLUSTER))


def refcount_table_that_is_not_aligned(raw: Raw) -> None:
    refcounts_at(raw, numbered(REFTABLE_NOISE, lambda n: (n + 1) * 512))


def bitmap_tables_of_noise(raw: Raw) -> None:
    """One table, and as many bitmaps as may name it."""
    bitmaps_of(raw, noise(CLUSTER))


def bitmap_data_behind_the_end(raw: Raw) -> None:
    """A table that is sound but for the end of the file, and as many bitmaps as may name it."""
    bitmaps_of(raw, numbered(CLUSTER, lambda n: FAR + n * CLUSTER))


def bitmap_of_dense_bits(raw: Raw) -> None:
    """One cluster of bits, a quarter of them set, one by one; named so often that there are four thousand million."""
    entries, data = 8192, appended(raw, b"\x55\x00" * (CLUSTER // 2))
    disk_of(raw, entries * CLUSTER * 8 * 512)
    l1_at(raw, appended(raw, bytes(CLUSTER)), entries * 512 // (CLUSTER // 64))
    table = appended(raw, numbered(8 * entries, lambda _: data))
    directory_of(raw, [bitmap_entry(table, entries, b"a", 9)])


def raw_data_file_in_disorder(raw: Raw) -> None:
    """A data file that should be the disk as it is, and of which no cluster lies where the guest has it."""
    l2_tables_of(raw, numbered(L2_NOISE, lambda n: COPIED | (n ^ 1) * CLUSTER))
    raw.put(72, raw.number(72) | 4)
    raw.put(88, raw.number(88) | 2)
    raw.insert_extension(b"zeroes", kind=0x44415441)


# ---- tables that name tables ----


def l2_that_names_itself(raw: Raw) -> None:
    fill(raw, l2_table(raw), l2_table(raw) | COPIED)


def l2_that_names_the_l1(raw: Raw) -> None:
    fill(raw, l2_table(raw), l1_table(raw) | COPIED)


def l2_that_names_the_header(raw: Raw) -> None:
    fill(raw, l2_table(raw), 1 << 62)
    raw.put(l2_table(raw), COPIED | 1)


def l2_that_names_refcount_blocks(raw: Raw) -> None:
    fill(raw, l2_table(raw), refcount_block(raw) | COPIED)
    raw.put(l2_table(raw) + 8, raw.number(48) | COPIED)


def l1_that_names_everything(raw: Raw) -> None:
    """Itself, the refcount table, its block, the directory, the snapshot table: each is an L2 table as well."""
    directory, _, _ = raw.directory
    for index, offset in enumerate((l1_table(raw), raw.number(48), refcount_block(raw), directory, raw.number(64))):
        raw.put(l1_table(raw) + 8 * index, offset | COPIED)


def refcount_table_that_names_itself(raw: Raw) -> None:
    fill(raw, raw.number(48), raw.number(48))


def refcount_block_that_names_itself(raw: Raw) -> None:
    """It is the refcount table at the same time."""
    block = refcount_block(raw)
    raw.put(48, block)
    fill(raw, block, block, 64)


def refcount_block_in_the_l1(raw: Raw) -> None:
    raw.put(raw.number(48), l1_table(raw))
    raw.put(raw.number(48) + 8, l2_table(raw))


def refcount_table_in_the_l1(raw: Raw) -> None:
    raw.put(48, l1_table(raw))


def refcount_table_in_the_header(raw: Raw) -> None:
    raw.put(48, 0)


def bitmap_table_that_names_itself(raw: Raw) -> None:
    table, entries = raw.tables()["b"]
    fill(raw, table, table, entries)


def bitmap_tables_that_name_each_other(raw: Raw) -> None:
    a, b = raw.tables()["a"], raw.tables()["b"]
    fill(raw, a[0], b[0], a[1])
    fill(raw, b[0], a[0], b[1])


def bitmap_tables_that_name_the_directory(raw: Raw) -> None:
    directory, _, _ = raw.directory
    for table, entries in raw.tables().values():
        fill(raw, table, directory, entries)


def bitmap_tables_in_the_mapping(raw: Raw) -> None:
    directory, _, _ = raw.directory
    raw.put(directory, l1_table(raw))
    raw.put(directory + 32, l2_table(raw))


def bitmap_directory_in_the_header(raw: Raw) -> None:
    raw.put(raw.extensions()[BITMAPS][0] + 16, 0)


def bitmap_directory_in_the_l1(raw: Raw) -> None:
    raw.put(raw.extensions()[BITMAPS][0] + 16, l1_table(raw))


def bitmap_directory_of_nothing_but_beginnings(raw: Raw) -> None:
    """64 MiB of which every eight bytes might be an entry's, and none is one."""
    directory_at(raw, appended(raw, struct.pack(">BB6x", 1, 9) * (65535 * 128)), 65535, 65535 * 1024)


def snapshot_table_in_the_header(raw: Raw) -> None:
    snapshots_at(raw, 0, SNAPSHOTS_MOST)


def snapshots_of_the_refcounts(raw: Raw) -> None:
    """Snapshots whose L1 tables are the refcount table, its block, the header, the directory."""
    directory, _, _ = raw.directory
    places = (raw.number(48), refcount_block(raw), 0, directory, l2_table(raw))
    entries = [snapshot_entry(place, 128, number=number) for number, place in enumerate(places, 1)]
    snapshots_at(raw, appended(raw, b"".join(entries)), len(entries))


# ---- claims that lie within the file, as it is exabytes long ----


def exabytes(_raw: Raw) -> None:
    """Nothing else is wrong."""


def l1_of_holes(raw: Raw) -> None:
    l1_at(raw, FAR, L1_MOST // 8)


def l2_tables_in_holes(raw: Raw) -> None:
    """Of the largest L1 table all L2 tables are holes: 256 GiB of tables."""
    tables = range(L1_MOST // 8)
    offset = appended(raw, struct.pack(f">{len(tables)}Q", *(COPIED | FAR + number * CLUSTER for number in tables)))
    l1_at(raw, offset, len(tables))


def largest_disk(raw: Raw) -> None:
    """A disk of as many bytes as the largest L1 table maps, most of which is a hole."""
    l1_of_holes(raw)
    disk_of(raw, L1_MOST // 8 * CLUSTER // 8 * CLUSTER)


def data_in_holes(raw: Raw) -> None:
    for number in range(CLUSTER // 8):
        raw.put(l2_table(raw) + 8 * number, COPIED | FAR + number * (1 << 29))


def refcount_table_of_holes(raw: Raw) -> None:
    raw.put(48, FAR)
    raw.put(56, REFTABLE_MOST // CLUSTER, 4)


def refcount_blocks_in_holes(raw: Raw) -> None:
    """As many blocks as there may be, of which all but the first are holes: refcounts for 2 PiB."""
    blocks = (refcount_block(raw), *(FAR + number * CLUSTER for number in range(1, REFTABLE_MOST // 8)))
    raw.put(48, appended(raw, struct.pack(f">{len(blocks)}Q", *blocks)))
    raw.put(56, REFTABLE_MOST // CLUSTER, 4)


def snapshot_table_of_holes(raw: Raw) -> None:
    snapshots_at(raw, FAR, SNAPSHOTS_MOST)


def snapshot_table_of_64_mib(raw: Raw) -> None:
    """65,536 snapshots with as much extra data as is allowed, of which all is a hole but the first entry."""
    entry = bytearray(snapshot_entry(l1_table(raw), 1))
    entry[36:40] = struct.pack(">I", 1024)
    snapshots_at(raw, appended(raw, bytes(entry) + bytes(2048)), SNAPSHOTS_MOST)


def snapshots_of_holes(raw: Raw) -> None:
    """Very many snapshots, each with an L1 table of 32 MiB in a hole of its own."""
    entries = (snapshot_entry(FAR + number * L1_MOST, L1_MOST // 8, number=number) for number in range(SNAPSHOTS_MOST))
    snapshots_at(raw, appended(raw, b"".join(entries)), SNAPSHOTS_MOST)


def most_bitmaps(raw: Raw) -> None:
    """Very many bitmaps, each with a table in a hole of its own."""
    directory_of(raw, [bitmap_entry(FAR + n * CLUSTER, 1, b"%05d" % n) for n in range(BITMAPS_MOST)])


def most_bitmaps_with_long_names(raw: Raw) -> None:
    """Each name as long as may be, so that whoever says something of each of them says a lot."""
    count = 20_000 if ALL else 2000
    directory_of(raw, [bitmap_entry(FAR + n * CLUSTER, 1, b"%01023d" % n) for n in range(count)])


def most_bitmaps_in_one_table(raw: Raw) -> None:
    table, entries = raw.tables()["a"]
    directory_of(raw, [bitmap_entry(table, entries, b"%05d" % n) for n in range(BITMAPS_MOST)])


def bitmap_tables_of_holes(raw: Raw) -> None:
    """Tables of 134,217,728 entries: 1 GiB each, in a hole, of a disk that is as large as that asks for."""
    disk_of(raw, (1 << 27) * CLUSTER * 8 * 512)
    directory_of(raw, [bitmap_entry(FAR + n * (1 << 30), 1 << 27, b"%05d" % n, 9) for n in range(100)])


def bitmap_tables_of_legal_length(raw: Raw) -> None:
    """512 MiB of bits each, as much as QEMU takes, many times: a petabyte's, of which nothing is there."""
    disk_of(raw, (512 << 20) * 8 << 16)
    l1_at(raw, FAR, (512 << 20) * 8 // (CLUSTER // 8))
    tables = [bitmap_entry(FAR + (n + 1) * (1 << 26), 8192, b"%05d" % n) for n in range(1000 if ALL else 250)]
    directory_of(raw, tables)


def bitmap_data_in_holes(raw: Raw) -> None:
    """Bitmaps of legal length whose data are holes: as many as name one table, and some with one of their own."""
    count, entries = 64 if ALL else 16, CLUSTER // 8
    start = appended(raw, numbered(count * CLUSTER, lambda n: FAR + n * CLUSTER))
    tables = range(start, start + count * CLUSTER, CLUSTER)
    disk_of(raw, entries * CLUSTER * 8 * 512)
    l1_at(raw, FAR // 2, entries * 512 // (CLUSTER // 64))
    directory_of(raw, [bitmap_entry(table, entries, b"%05d" % n, 9) for n, table in enumerate([*tables, *tables])])


def bitmap_directory_of_holes(raw: Raw) -> None:
    directory_at(raw, FAR, BITMAPS_MOST, BITMAPS_MOST * 24)


def bitmap_directory_of_64_mib(raw: Raw) -> None:
    """Or of eight: every entry of nothing but zeroes is wrong in five ways, and each of them is told."""
    count = 65535 if ALL else 8192
    directory_at(raw, FAR, count, 1024 * count)


def encryption_header_in_a_hole(raw: Raw) -> None:
    raw.put(32, 2, 4)
    raw.insert_extension(struct.pack(">QQ", FAR, 1 << 30), before=BITMAPS, kind=0x0537BE77)


def clusters_of_2_mib(raw: Raw) -> None:
    """The same tables read with the largest clusters, refcounts of 64 bits: every number means 32 times as much."""
    raw.put(20, 21, 4)
    raw.put(96, 6, 4)


def clusters_of_512_bytes(raw: Raw) -> None:
    """The same tables read with the smallest clusters, refcounts of one bit."""
    raw.put(20, 9, 4)
    raw.put(96, 0, 4)


NOISE = tuple(
    map(
        Monster,
        (
            l1_of_noise, l1_of_all_there_is, l2_of_noise, l2_behind_the_end, refcount_table_of_noise,
            refcount_table_far_away, refcount_table_that_is_not_aligned, bitmap_tables_of_noise,
            bitmap_data_behind_the_end, raw_data_file_in_disorder,
        ),
    )
)  # fmt: skip

MONSTERS = (
    *map(
        Monster,
        (
            billion_laughs, laughing_snapshots, snapshots_a_cluster_apart, one_block_for_all, one_cluster_for_all,
            compressed_into_each_other, l2_that_names_itself, l2_that_names_the_l1, l2_that_names_the_header,
            l2_that_names_refcount_blocks, l1_that_names_everything, refcount_table_that_names_itself,
            refcount_block_that_names_itself, refcount_block_in_the_l1, refcount_table_in_the_l1,
            refcount_table_in_the_header, bitmap_table_that_names_itself, bitmap_tables_that_name_each_other,
            bitmap_tables_that_name_the_directory, bitmap_tables_in_the_mapping, bitmap_directory_in_the_header,
            bitmap_directory_in_the_l1, snapshot_table_in_the_header, snapshots_of_the_refcounts,
            most_bitmaps_in_one_table, bitmap_directory_of_nothing_but_beginnings, bitmap_of_dense_bits,
        ),
    ),
    *(
        Monster(make, holes=True)
        for make in (
            exabytes, l1_of_holes, l2_tables_in_holes, largest_disk, data_in_holes, refcount_table_of_holes,
            refcount_blocks_in_holes, one_block_for_all, snapshot_table_of_holes, snapshot_table_of_64_mib,
            snapshots_of_holes, most_bitmaps, most_bitmaps_with_long_names, bitmap_tables_of_holes,
            bitmap_data_in_holes, bitmap_tables_of_legal_length, bitmap_directory_of_holes, bitmap_directory_of_64_mib,
            encryption_header_in_a_hole, clusters_of_2_mib,
            clusters_of_512_bytes,
        )
    ),
    *NOISE,
)  # fmt: skip
