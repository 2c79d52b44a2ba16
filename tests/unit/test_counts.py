"""What an edit costs: bytes read and written, counted at the file, on a 1 TiB disk with 100 bitmaps.

The fixture `many-bitmaps` has clusters of 64 KiB, a file of 40 MiB, and 8 MiB of bits that are not all zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import Edit
from qcow2bm.format.header import Header
from tests.support.images import unpack
from tests.support.raw import OFFSET, Raw
from tests.support.recording import Tape

CLUSTER = 64 << 10
BITMAPS = 100
TABLE = 32 * 8  # 1 TiB at 64 KiB is 2 MiB of bits: 32 chunks


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("many-bitmaps", tmp_path_factory.mktemp("many"))


@pytest.fixture
def image(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "image.qcow2"
    copy.write_bytes(original.read_bytes())
    return copy


@pytest.fixture(scope="module")
def metadata(original: Path) -> int:
    """Bytes that every edit may read once: header cluster, refcounts, L1 and L2 tables, directory, bitmap tables.

    The proof looks at all mapping tables; the other bitmaps' tables are among what could refer to a cluster.
    """
    raw = Raw.load(original)
    header = Header.parse(bytes(raw.data[:CLUSTER]))
    l1 = range(header.l1_table_offset, header.l1_table_offset + 8 * header.l1_size, 8)
    l2_tables = {raw.number(at) & OFFSET for at in l1} - {0}
    refcounts = CLUSTER * (header.refcount_table_clusters + len(raw.blocks))
    return CLUSTER + refcounts + 8 * header.l1_size + CLUSTER * len(l2_tables) + raw.directory[1] + BITMAPS * TABLE


def edit(image: Path, change: Callable[[Edit], object]) -> Tape:
    tape = Tape()
    with qcow2bm.open(image, writable=True, open_file=tape.open) as opened, opened.edit() as draft:
        change(draft)
    return tape


def reread(image: Path) -> int:
    """What a plan and a commit read again.

    Planning: refcount blocks for free clusters, for what is given back, for the writes before and after. The commit:
    the bytes it replaces, which are less than a cluster, and the header cluster afterwards.
    """
    return (4 * len(Raw.load(image).blocks) + 2) * CLUSTER


def test_the_fixture_is_what_the_bounds_are_for(original: Path) -> None:
    raw = Raw.load(original)
    assert raw.cluster_size == CLUSTER
    assert len(raw.tables()) == BITMAPS
    assert {entries for _, entries in raw.tables().values()} == {TABLE // 8}
    data = sum(len(raw.bitmap_data(name)) for name in raw.tables())
    assert data * CLUSTER > 8 << 20, "reading all the bits would not go unnoticed"


def test_removing_one_bitmap_reads_metadata_and_writes_a_directory(image: Path, metadata: int) -> None:
    """Written: the new directory, filled up to a cluster, 24 bytes of header, 2 bytes of refcount for each cluster."""
    clusters = len(Raw.load(image).bitmap_data("backup-050")) + 3
    tape = edit(image, lambda draft: draft.remove("backup-050"))
    assert tape.bytes_read <= metadata + reread(image)
    # Refcounts close to each other become one write, so up to a sector between two of them.
    assert tape.bytes_written <= CLUSTER + 24 + clusters * (512 + 2)


def test_disabling_one_bitmap_writes_its_flags(image: Path, metadata: int) -> None:
    tape = edit(image, lambda draft: draft.disable("backup-050"))
    assert tape.bytes_written <= 4
    assert tape.bytes_read <= metadata + reread(image)


def test_adding_an_empty_bitmap_writes_a_table_and_a_directory(image: Path, metadata: int) -> None:
    tape = edit(image, lambda draft: draft.add("new"))
    assert tape.bytes_written <= 2 * CLUSTER + 24 + 4 * 514
    assert tape.bytes_read <= metadata + reread(image)


def test_setting_one_range_reads_and_writes_one_chunk(image: Path, metadata: int) -> None:
    """Written: chunk, table, directory. The chunk is read to be compared with what is stored, and to be written."""
    tape = edit(image, lambda draft: draft.set_range("backup-050", 0, CLUSTER))
    assert tape.bytes_written <= 3 * CLUSTER + 24 + 8 * 514
    assert tape.bytes_read <= metadata + reread(image) + 3 * CLUSTER


def test_clearing_a_bitmap_reads_none_of_its_bits(image: Path, metadata: int) -> None:
    tape = edit(image, lambda draft: draft.clear("backup-050"))
    assert tape.bytes_read <= metadata + reread(image)


def test_removing_a_hundred_bitmaps_writes_refcounts_and_no_directory(image: Path, metadata: int) -> None:
    """QEMU writes all that are left, each time. Here: 2 bytes of refcount for each cluster, and gaps below a sector."""
    clusters = len(Raw.load(image).data) // CLUSTER
    tape = edit(image, lambda draft: draft.remove(*draft.names("*")))
    assert tape.bytes_written <= 2 * clusters + 512 + 16
    assert tape.bytes_read <= metadata + reread(image)


def test_merging_reads_each_source_a_few_times_and_no_other_bitmap(image: Path, metadata: int) -> None:
    """Once or twice to settle what a chunk comes to, once to write it; the target's own chunks as well."""
    raw = Raw.load(image)
    sources = [f"backup-0{number}" for number in range(10, 20)]
    involved = sum(len(raw.bitmap_data(name)) for name in [*sources, "backup-050"])
    tape = edit(image, lambda draft: draft.merge("backup-050", sources))
    assert tape.bytes_read <= metadata + reread(image) + 3 * involved * CLUSTER
    assert tape.bytes_written <= (TABLE // 8 + 2) * CLUSTER + 2 * (TABLE // 8 + 3) * 514


# ---- reading ----


def test_listing_reads_the_header_the_directory_and_the_tables(image: Path) -> None:
    """A table tells whether its bitmap is broken. No bit is read."""
    tape, raw = Tape(), Raw.load(image)
    with qcow2bm.open(image, open_file=tape.open) as opened:
        assert len([(b.name, b.state, b.granularity, b.recording) for b in opened.bitmaps]) == BITMAPS
    # The first 104 bytes say how large the first cluster is.
    assert tape.bytes_read <= 104 + CLUSTER + raw.directory[1] + BITMAPS * TABLE


def test_counting_one_bitmap_reads_its_data_alone(image: Path) -> None:
    tape, raw = Tape(), Raw.load(image)
    with qcow2bm.open(image, open_file=tape.open) as opened:
        bitmap = opened.bitmaps["backup-050"]
        assert bitmap.dirty_bytes > 0
    data = {raw.number(place) & OFFSET for place in raw.bitmap_data("backup-050")}
    at, size, _ = raw.directory
    table = raw.tables()["backup-050"][0]
    allowed = [range(CLUSTER), range(at, at + size), range(table, table + TABLE)]
    allowed += [range(offset, offset + CLUSTER) for offset in data]
    for offset, length in tape.reads:
        assert any(offset in part and offset + length <= part.stop for part in allowed), hex(offset)
    # Each data cluster once for the count; the last once more for the end of the disk.
    assert (
        sum(length for offset, length in tape.reads if any(offset in p for p in allowed[3:]))
        <= (len(data) + 1) * CLUSTER
    )


def test_extents_are_read_as_they_are_asked_for(image: Path) -> None:
    tape = Tape()
    with qcow2bm.open(image, open_file=tape.open) as opened:
        extents = opened.bitmaps["backup-050"].extents()
        before = tape.bytes_read
        next(extents)
        assert tape.bytes_read - before <= 2 * CLUSTER
