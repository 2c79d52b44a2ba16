"""A pointer that names another cluster than it should, each cluster in turn: what it meant is never given up unasked.

Such an entry is sound by itself. That it is wrong shows only where the cluster has another owner, or is counted by
nobody while another one is counted and referred to by nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.__main__ import main
from qcow2bm.checks.problems import HELD_BACK
from tests.support.qemu import Ranges, check, guest_digest, qemu_img, qemu_io, read_bitmaps
from tests.support.raw import BITMAPS, Raw

BEHIND = 3
"""Clusters after the end of the file that are tried as well."""


@dataclass(frozen=True)
class Scene:
    """A real image with bitmaps, a snapshot, and free clusters among those in use."""

    image: Path
    raw: Raw
    bitmaps: dict[str, Ranges]

    def pointed(self, place: int, flags: int = 0) -> Iterator[int]:
        """The image with a pointer to each of its clusters, and to some behind its end; which one it is."""
        size, meant = self.raw.cluster_size, self.raw.number(place) & ~(self.raw.cluster_size - 1) & ~(3 << 62)
        for cluster in range(1, -(-len(self.raw.data) // size) + BEHIND):
            if cluster * size != meant:
                changed = Raw(bytes(self.raw.data))
                changed.put(place, cluster * size | flags)
                changed.save(self.image)
                yield cluster


@pytest.fixture(params=["4k", "64k"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    image = tmp_path / "image.qcow2"
    unmap = ("-d", "unmap")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={request.param}", image, "8M")
    for name in "bc":
        qemu_img("bitmap", "--add", "-g", "4k", image, name)
    qemu_io(image, "write -P 1 0 100k", "write -P 2 4M 192k", options=unmap)
    qemu_img("snapshot", "-c", "s", image)
    qemu_io(image, "write -P 3 1M 70k", "discard 4M 192k", options=unmap)
    return Scene(image, Raw.load(image), read_bitmaps(image))


def repaired(image: Path) -> int:
    """Repair without any risk; the exit status."""
    undo = image.with_name("undo")
    undo.unlink(missing_ok=True)
    with qcow2bm.repairing(image, qcow2bm.RepairPolicy()) as repair:
        return repair.commit(undo=undo).exit_status


def missing(have: Ranges, wanted: Ranges) -> list[tuple[int, int]]:
    return [
        (start, length)
        for start, length in wanted
        if not any(first <= start and start + length <= first + reach for first, reach in have)
    ]


@pytest.mark.parametrize("pointer", ["table", "entry", "directory"])
def test_no_bitmap_misses_a_dirty_byte_wherever_its_pointer_leads(scene: Scene, pointer: str) -> None:
    raw = scene.raw
    places = {"table": raw.directory[0], "entry": raw.tables()["b"][0], "directory": raw.extensions()[BITMAPS][0] + 16}
    tried = 0
    for cluster in scene.pointed(places[pointer]):
        status = repaired(scene.image)
        tried += 1
        if status in (0, 3):
            left = read_bitmaps(scene.image)
            wrong = {name: lacks for name in left if (lacks := missing(left[name], scene.bitmaps[name]))}
            assert not wrong, f"cluster {cluster}, repaired with {status}"
    assert tried > 20


def test_what_an_l2_entry_meant_is_there_when_it_is_put_right_after_a_repair(scene: Scene) -> None:
    """Also after a second repair, and a guest that writes elsewhere: its cluster is not given away."""
    raw = scene.raw
    place = raw.l2_entry(0)
    before, digest, tried = raw.number(place), guest_digest(scene.image), 0
    for _ in scene.pointed(place, flags=1 << 63):
        repaired(scene.image)
        main(["repair", str(scene.image), "--yes", "--no-undo"])
        mended = Raw.load(scene.image)
        if mended.number(40) != raw.number(40) or mended.number(raw.number(40)) != raw.number(raw.number(40)):
            continue  # the table itself was copied
        mended.put(place, before)
        mended.save(scene.image)
        assert guest_digest(scene.image) == digest
        tried += 1
    assert tried > 20


@pytest.mark.parametrize("table", ["the disk's", "a snapshot's"])
def test_no_l1_table_is_made_one_without_a_word(scene: Scene, table: str) -> None:
    """What is called free of harm afterwards reads as it did, or what was cut off is held back."""
    raw = scene.raw
    place, words = (40, ()) if table == "the disk's" else (raw.number(64), ("-l", "snapshot.name=s"))
    wanted, tried = read(scene.image, *words), 0
    for cluster in scene.pointed(place):
        status = repaired(scene.image)
        tried += 1
        if status in (0, 3) and read(scene.image, *words) != wanted:
            held_back = not qcow2bm.check(scene.image).counts.keys().isdisjoint(HELD_BACK)
            assert held_back, f"cluster {cluster}, repaired with {status}"
    assert tried > 20


def read(image: Path, *words: str) -> bytes | None:
    raw = image.with_name("raw")
    done = qemu_img("convert", *words, "-f", "qcow2", "-O", "raw", image, raw, check=False)
    return raw.read_bytes() if done.returncode == 0 else None


def test_a_directory_that_an_l1_pointer_leads_to_stays(scene: Scene) -> None:
    """It parses as one, so it is the pointer that is wrong; and nobody may call what the guest then reads sound."""
    raw = scene.raw
    directory = raw.number(raw.extensions()[BITMAPS][0] + 16)
    raw.put(40, directory)
    raw.save(scene.image)
    assert repaired(scene.image) == 2
    raw.put(40, Raw.load(scene.image).number(40))
    assert {bitmap.name for bitmap in qcow2bm.open(scene.image).bitmaps} == {"b", "c"}


def test_bitmaps_stay_while_nothing_of_the_disk_can_be_read(tmp_path: Path) -> None:
    """For them alone QEMU does not open the image, and a backup of it would be one of zeroes."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "64M")
    qemu_img("bitmap", "--add", image, "b")
    qemu_io(image, "write -P 1 0 1M")
    raw = Raw.load(image)
    raw.put(40, len(raw.data) + (1 << 40))
    raw.put(raw.directory[0] + 8, 77, 4)
    raw.save(image)
    assert "error" in check(image)
    before = image.read_bytes()
    assert main(["repair", str(image), "--yes"]) == 2
    assert "error" in check(image)
    assert image.read_bytes() == before
