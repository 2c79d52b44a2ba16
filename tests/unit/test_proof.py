"""A refcount may lie: the proof looks at what really refers to a cluster before a byte is written."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import Edit
from qcow2bm.bitmap.store import BitmapDirectory
from qcow2bm.errors import ProofError, Qcow2bmError
from qcow2bm.image import proof
from qcow2bm.image.image import Qcow2Image
from tests.support.images import unpack
from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import BITMAPS, OFFSET, Raw
from tests.support.recording import Tape
from tests.support.scenes import add_data, fixture, one, remove_all, small, three

COPIED = 1 << 63


@pytest.fixture(params=["plain", "numpy"], autouse=True)
def path_taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of looking through L2 tables."""
    if request.param == "numpy":
        monkeypatch.setattr(proof, "_SMALL", 0)
    return request.param


def refused(image: Path, edit: Callable[[Edit], object], kind: type[Qcow2bmError] = ProofError) -> str:
    """Edit an image, which must refuse, untouched; what it says."""
    before, tape = image.read_bytes(), Tape()
    opening = qcow2bm.open(image, writable=True, open_file=tape.open)
    with opening as opened, pytest.raises(kind) as caught, opened.edit() as draft:
        edit(draft)
    assert not tape.events
    assert image.read_bytes() == before
    assert str(image) in str(caught.value)
    return str(caught.value)


def host(raw: Raw, guest_cluster: int = 0) -> int:
    """Offset of the host cluster of a guest cluster."""
    return raw.number(raw.l2_entry(guest_cluster)) & OFFSET


# ---- lies ----


def a_table_entry_names_guest_data(raw: Raw) -> None:
    """QEMU overwrites the guest's data here."""
    raw.put(raw.bitmap_data("a")[0], host(raw, FIRST))


def two_bitmaps_share_a_cluster(raw: Raw) -> None:
    raw.put(raw.bitmap_data("a")[0], raw.number(raw.bitmap_data("b")[0]))


def a_bitmap_names_its_cluster_twice(raw: Raw) -> None:
    table, _ = raw.tables()["b"]
    raw.put(table, raw.number(raw.bitmap_data("b")[0]))


def a_bitmap_table_is_guest_data(raw: Raw) -> None:
    at, _, _ = raw.directory
    cluster = host(raw, FIRST)
    raw.data[cluster : cluster + raw.cluster_size] = bytes(raw.cluster_size)
    raw.put(at, cluster)


def the_directory_is_guest_data(raw: Raw) -> None:
    cluster, (at, size, _) = host(raw, FIRST), raw.directory
    raw.data[cluster : cluster + size] = raw.data[at : at + size]
    raw.put(raw.extensions()[BITMAPS][0] + 16, cluster)


def a_data_cluster_is_an_l2_table(raw: Raw) -> None:
    raw.put(raw.bitmap_data("a")[0], raw.number(raw.number(40)) & OFFSET)


def a_data_cluster_is_a_refcount_block(raw: Raw) -> None:
    raw.put(raw.bitmap_data("a")[0], raw.blocks[0])


def a_data_cluster_is_the_header(raw: Raw) -> None:
    """Offset 0 cannot be named, but the header's cluster is the only one: take the L1 table instead."""
    raw.put(raw.bitmap_data("a")[0], raw.number(40))


FIRST = 16  # the first guest cluster that the scenes have written: 1 MiB


@pytest.mark.parametrize(
    "lie",
    [
        a_table_entry_names_guest_data,
        two_bitmaps_share_a_cluster,
        a_bitmap_table_is_guest_data,
        the_directory_is_guest_data,
        a_data_cluster_is_an_l2_table,
        a_data_cluster_is_a_refcount_block,
        a_data_cluster_is_the_header,
    ],
    ids=lambda lie: lie.__name__,
)
def test_clusters_with_another_owner_are_not_given_back(tmp_path: Path, lie: Callable[[Raw], None]) -> None:
    image = three(tmp_path)
    raw = Raw.load(image)
    lie(raw)
    raw.save(image)
    said = refused(image, remove_all)
    assert "check" in said
    assert "used" in said


def test_an_entry_in_a_directory_that_is_guest_data_is_not_switched_in_place(tmp_path: Path) -> None:
    image = three(tmp_path)
    raw = Raw.load(image)
    the_directory_is_guest_data(raw)
    raw.save(image)
    assert "guest data at 0x100000" in refused(image, lambda edit: edit.disable("a"))


def test_a_cluster_that_one_bitmap_names_twice_is_not_given_back(tmp_path: Path) -> None:
    image = small(tmp_path)
    raw = Raw.load(image)
    places = raw.bitmap_data("sectors")
    table, entries = raw.tables()["sectors"]
    other = next(at for at in range(table, table + 8 * entries, 8) if at not in places)
    raw.put(other, raw.number(places[0]))
    raw.save(image)
    assert "used twice" in refused(image, lambda edit: edit.remove("sectors"))


@dataclass(frozen=True)
class Lie:
    """A refcount of 0 on a cluster in use, which first fit therefore finds first."""

    name: str
    make: Callable[[Path], Path]
    where: Callable[[Raw], int]
    owner: str


def l2_table(raw: Raw) -> int:
    return raw.number(raw.number(40)) & OFFSET


def snapshots_l1(raw: Raw) -> int:
    return raw.number(raw.number(64))


def snapshot_image(folder: Path) -> Path:
    """A snapshot whose L1 table, L2 table and data are its own."""
    image = three(folder)
    qemu_img("snapshot", "-c", "s", image)
    qemu_io(image, "write -P 9 1M 128k")
    return image


def only_the_snapshots_data(raw: Raw) -> int:
    table = raw.number(snapshots_l1(raw)) & OFFSET
    return raw.number(table + 8 * FIRST) & OFFSET


def compressed_image(folder: Path) -> Path:
    """Compressed clusters, several in one host cluster; and bitmaps."""
    source = folder / "source.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", source, "4M")
    qemu_io(source, "write -P 1 1M 1M")
    image = folder / "image.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", source, image)
    for name in "ab":
        qemu_img("bitmap", "--add", image, name)
    return image


def compressed_data(raw: Raw) -> int:
    entry = raw.number(raw.l2_entry(FIRST))
    assert entry >> 62 == 1
    bits = 62 - (raw.number(20, 4) - 8)
    return (entry & (1 << bits) - 1) // raw.cluster_size * raw.cluster_size


def compressed_tail(raw: Raw) -> int:
    """A host cluster that only the end of a compressed cluster lies in."""
    entries = [raw.number(raw.l2_entry(n)) for n in range(64)]
    bits, size = 62 - (raw.number(20, 4) - 8), raw.cluster_size
    for entry in (entry for entry in entries if entry >> 62 == 1):
        start, sectors = entry & (1 << bits) - 1, (entry & (1 << 62) - 1) >> bits
        end = (start & ~511) + 512 * (sectors + 1) - 1
        if start // size != end // size:
            return end // size * size
    raise AssertionError("no compressed cluster crosses a border")


def noisy_compressed_image(folder: Path) -> Path:
    """Data that hardly shrinks, so that compressed clusters cross host clusters."""
    source = folder / "source.raw"
    noise = b"".join(struct.pack("<I", n * 2654435761 & 0xFFFFFFFF)[:3] + b"\0" for n in range(1 << 18))
    source.write_bytes(noise)
    image = folder / "image.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", source, image)
    for name in "ab":
        qemu_img("bitmap", "--add", image, name)
    return image


def extended_data(raw: Raw) -> int:
    return next(at for n in range(4096) if (at := host(raw, n)))


LIES = (
    Lie("guest data", three, lambda raw: host(raw, FIRST), "guest data at 0x100000"),
    Lie("L2 table", three, l2_table, "an L2 table"),
    Lie("L1 table", three, lambda raw: raw.number(40), "the active L1 table"),
    Lie("refcount table", three, lambda raw: raw.number(48), "the refcount table"),
    Lie("refcount block", three, lambda raw: raw.blocks[0], "refcount block 0"),
    Lie("header", three, lambda _raw: 0, "the header"),
    Lie("bitmap table", three, lambda raw: raw.tables()["a"][0], "the table of bitmap 'a'"),
    Lie("bitmap data", three, lambda raw: raw.number(raw.bitmap_data("a")[0]), "the data of bitmap 'a'"),
    Lie("snapshot table", snapshot_image, lambda raw: raw.number(64), "the snapshot table"),
    Lie("a snapshot's L1 table", snapshot_image, snapshots_l1, "the L1 table of snapshot 1"),
    Lie("a snapshot's data", snapshot_image, only_the_snapshots_data, "guest data at 0x100000"),
    Lie("compressed", compressed_image, compressed_data, "guest data at 0x100000"),
    Lie("compressed, second cluster", noisy_compressed_image, compressed_tail, "guest data at"),
    Lie("extended L2", fixture("extended-l2"), extended_data, "guest data at"),
    Lie("encryption header", fixture("luks"), lambda raw: raw.number(120), "the encryption header"),
)


def add_many(edit: Edit) -> None:
    """Takes every hole there is."""
    for number in range(40):
        edit.add(f"new {number}", recording=False)


@pytest.mark.parametrize("lie", LIES, ids=[lie.name for lie in LIES])
def test_a_cluster_in_use_with_refcount_0_is_not_overwritten(tmp_path: Path, lie: Lie) -> None:
    image = lie.make(tmp_path)
    raw = Raw.load(image)
    place = lie.where(raw)
    raw.set_refcount(place, 0)
    raw.save(image)
    said = refused(image, add_many)
    assert f"the cluster at {place:#x} has refcount 0 but is used by" in said
    assert lie.owner in said
    assert "check" in said


@pytest.mark.parametrize("count", [0, 2])
def test_a_directory_with_a_refcount_that_lies_is_not_replaced(tmp_path: Path, count: int) -> None:
    image = three(tmp_path)
    raw = Raw.load(image)
    raw.set_refcount(raw.directory[0], count)
    raw.save(image)
    said = refused(image, add_many)
    assert f"the cluster at {raw.directory[0]:#x} has refcount {count} instead of 1" in said
    assert "check" in said


def test_two_refcount_table_entries_with_one_block_are_refused(tmp_path: Path) -> None:
    image = three(tmp_path)
    raw = Raw.load(image)
    raw.put(raw.number(48) + 8, raw.blocks[0])
    raw.save(image)
    assert "refcount block 0" in refused(image, add_data)


def test_a_sound_image_is_not_refused(tmp_path: Path) -> None:
    for name in ("extended-l2", "zlib-compressed", "zstd", "internal-snapshots", "luks", "data-file", "large-clusters"):
        image = unpack(name, tmp_path / name)
        with qcow2bm.open(image, writable=True) as opened:
            with opened.edit() as edit:
                add_many(edit)
            with opened.edit() as edit:
                remove_all(edit)
            assert len(opened.bitmaps) == 0


def test_guest_clusters_in_a_data_file_are_not_taken_for_ours(tmp_path: Path) -> None:
    """The data file's offsets are those of our header, tables and bitmaps, and mean nothing here."""
    image = unpack("data-file", tmp_path)
    raw = Raw.load(image)
    raw.put(raw.l2_entry(FIRST), raw.tables()["daily"][0] | COPIED)
    raw.save(image)
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.remove("daily")
    assert "daily" not in Raw.load(image).tables()


def test_a_bitmap_without_data_names_no_empty_range(tmp_path: Path) -> None:
    with Qcow2Image.open(one(tmp_path)) as image:
        references = list(BitmapDirectory(image).references())
        assert references
        assert all(reference.offset and reference.length for reference in references)
