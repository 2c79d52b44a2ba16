"""Edits that outgrow the refcount table: new refcount blocks, then a new table, and an image that QEMU goes on with.

With 512-byte clusters a refcount table of one cluster counts few enough clusters to fill them all.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qcow2bm
from tests.support.qemu import Ranges, StorageDaemon, check, guest_digest, qemu_img, qemu_io, read_bitmaps

KIB, MIB = 1 << 10, 1 << 20

CLUSTER = 512
TABLE_ENTRIES = CLUSTER // 8


def counted(refcount_bits: int) -> int:
    """Bytes of the file that a refcount table of one cluster can count."""
    return TABLE_ENTRIES * (CLUSTER * 8 // refcount_bits) * CLUSTER


def table_clusters(image: Path) -> int:
    """The size of the refcount table, from the header."""
    with image.open("rb") as file:
        return int.from_bytes(file.read(60)[56:60], "big")


def almost_full(image: Path, refcount_bits: int) -> None:
    """Guest data up to some KiB below the last cluster that the first refcount table counts."""
    limit = counted(refcount_bits)
    options = f"cluster_size={CLUSTER},refcount_bits={refcount_bits}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(limit))
    qemu_img("bitmap", "--add", "-g", "512", image, "daily")
    written = 0
    while (room := limit - image.stat().st_size - 24 * KIB) > 8 * KIB:
        # Every 32 KiB of the guest cost an L2 table too, so half of the room is always safe.
        piece = room // 2 & -4 * KIB
        qemu_io(image, f"write -P 9 {written} {piece}")
        written += piece
    assert table_clusters(image) == 1


@pytest.mark.parametrize("refcount_bits", [8, 16, 32, 64])
def test_edits_outgrow_the_refcount_table(refcount_bits: int, tmp_path: Path) -> None:
    image, chance = tmp_path / "image.qcow2", random.Random(refcount_bits)
    almost_full(image, refcount_bits)
    disk, dirty, size = guest_digest(image), read_bitmaps(image), counted(refcount_bits)
    added = 0
    while table_clusters(image) == 1:
        ranges: Ranges = [(offset, 512) for offset in range(chance.randrange(0, 64 * KIB, 1024), size, 64 * KIB)]
        with qcow2bm.open(image, writable=True) as ours, ours.edit() as edit:
            edit.add(f"b{added}", granularity=512, recording=False)
            for offset, length in ranges:
                edit.set_range(f"b{added}", offset, length)
        dirty[f"b{added}"] = ranges
        added += 1
        assert check(image)["returncode"] == 0
        assert added < 200, "the table never grew"
    assert read_bitmaps(image) == dirty
    assert guest_digest(image) == disk

    with StorageDaemon(image) as vm:
        vm.write(size - 512, 512)
        vm.write(0, 64 * KIB)
    dirty["daily"] = [*dirty["daily"], (size - 512, 512)]
    assert read_bitmaps(image) == dirty

    with qcow2bm.open(image, writable=True) as ours, ours.edit() as edit:
        edit.remove(*edit.names("*"))
    assert check(image)["returncode"] == 0
    assert read_bitmaps(image) == {}


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_one_edit_adds_many_refcount_blocks(refcount_bits: int, tmp_path: Path) -> None:
    """More new clusters in one commit than a refcount block counts; at 64 bits also more than the table does."""
    image = tmp_path / "image.qcow2"
    options = f"cluster_size={CLUSTER},refcount_bits={refcount_bits}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "256M")
    with qcow2bm.open(image, writable=True) as ours, ours.edit() as edit:
        for number in range(40):
            edit.add(f"b{number}", granularity=512, recording=False)
            for offset in range(number * 512, 256 * MIB, 2 * MIB):
                edit.set_range(f"b{number}", offset, 512)
    assert check(image)["returncode"] == 0
    assert read_bitmaps(image) == {
        f"b{number}": [(offset, 512) for offset in range(number * 512, 256 * MIB, 2 * MIB)] for number in range(40)
    }
    assert (table_clusters(image) > 1) == (refcount_bits == 64)
