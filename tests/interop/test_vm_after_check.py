"""What `check` does not call corrupt a VM may write to: nothing is lost then, and QEMU's check says nothing worse."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.__main__ import main
from qcow2bm.checks.problems import PROBLEMS
from tests.support.images import Fixture, corrupt_fixtures
from tests.support.qemu import check, open_arguments, qemu_img, qemu_io
from tests.support.raw import BITMAPS, Raw

CLUSTER = 64 << 10
HARMLESS = (0, 3, 4)
"""What `check` ends with where data and refcounts are fine."""
FIXTURES = [fix for fix in corrupt_fixtures() if PROBLEMS[fix.path.name].severity.exit_status in HARMLESS]
_DETACHED = "a program lacking bitmap support"
"""A warning of QEMU's about bitmaps that it drops."""
_WORSE = (0, 3, 2, 1)
"""What `qemu-img check` ends with, the best first."""


class Guest:
    """A guest's disk, as it must be, beside the image that holds it."""

    def __init__(self, image: Path, secret: str | None) -> None:
        self.image = image
        self.secret = secret
        self.opens = self._io("length") == ""
        self.disk = bytearray(self._read() if self.opens else b"")

    def run(self, *writes: tuple[int, int, int]) -> str:
        """One run of a VM: it writes ranges (offset, length, byte) and ends. What QEMU complained of."""
        for offset, length, byte in writes:
            self.disk[offset : offset + length] = bytes([byte]) * length
        return self._io(*(f"write -P {byte} {offset} {length}" for offset, length, byte in writes))

    @property
    def is_whole(self) -> bool:
        """True if QEMU reads all that was there, and all that was written since."""
        return self._read() == self.disk

    def _io(self, *commands: str) -> str:
        done = qemu_io(self.image, *commands, secret=self.secret, check=False)
        said = done.stderr.strip() or ("" if done.returncode == 0 else done.stdout)
        return "" if _DETACHED in said and done.returncode == 0 else said

    def _read(self) -> bytes:
        raw = self.image.with_suffix(".raw")
        opening, name = open_arguments(self.image, self.secret)
        done = qemu_img("convert", *opening, "-O", "raw", name, raw, check=False, cwd=self.image.parent)
        return raw.read_bytes() if done.returncode == 0 else b""


def free_places(guest: Guest) -> list[int]:
    """Guest offsets of clusters of 64 KiB that read as zeroes: most of them have no cluster yet."""
    places = range(0, len(guest.disk) - CLUSTER + 1, CLUSTER)
    return [place for place in places if not any(guest.disk[place : place + CLUSTER])]


@pytest.mark.parametrize("each", [1, 3], ids=["cluster by cluster", "several at once"])
@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.path.name)
def test_a_vm_loses_nothing_on_what_is_not_called_corrupt(fixture: Fixture, each: int, tmp_path: Path) -> None:
    image = fixture.unpack(tmp_path)
    status = qcow2bm.check(image).exit_status
    before = check(image, fixture.secret)["returncode"]
    guest = Guest(image, fixture.secret)
    if status not in HARMLESS or not guest.opens:
        return
    places = free_places(guest)
    for run in range(4):
        chosen = places[run * each : (run + 1) * each]
        writes = [(place, CLUSTER, 0 if number % 3 == 2 else 0x40 + run) for number, place in enumerate(chosen)]
        assert guest.run(*writes) == "", f"run {run}"
        assert guest.is_whole, f"run {run}"
    assert _WORSE.index(check(image, fixture.secret)["returncode"]) <= _WORSE.index(before)


def outside(folder: Path, what: str, clusters: int) -> Path:
    """An image with two bitmaps of which one says that its table, or its data, lies just behind the file's end."""
    image = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    for name in ("b", "c"):
        qemu_img("bitmap", "--add", "-g", "64k", image, name)
    qemu_io(image, "write -P 1 0 1M")
    raw = Raw.load(image)
    end = -(-len(raw.data) // CLUSTER) * CLUSTER + clusters * CLUSTER
    raw.put(raw.directory[0] if what == "table" else raw.tables()["b"][0], end)
    raw.save(image)
    return image


@pytest.mark.parametrize("clusters", [1, 2])
@pytest.mark.parametrize("what", ["table", "data"])
def test_what_a_bitmap_names_behind_the_end_of_the_file_is_a_corruption(
    what: str, clusters: int, tmp_path: Path
) -> None:
    report = qcow2bm.check(outside(tmp_path, what, clusters))
    assert report.exit_status == 2
    assert f"bitmap-{what}-outside" in report.counts


def test_a_vm_frees_guest_data_that_has_come_to_lie_where_a_bitmap_is_said_to(tmp_path: Path) -> None:
    """Why that is a corruption: QEMU frees what the bitmap had when it closes the image."""
    guest = Guest(outside(tmp_path, "data", 1), None)
    for run in range(2):
        guest.run(((10 + 2 * run) << 20, 6 * CLUSTER, 2 + run))
    assert not guest.is_whole


def test_a_vm_cannot_write_where_bitmaps_are_announced_and_there_are_none(tmp_path: Path) -> None:
    """So it is a corruption. Edits and a resize refuse, and the repair mends it."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_io(image, "write -P 1 0 1M")
    raw = Raw.load(image)
    assert BITMAPS not in raw.extensions()
    raw.put(88, 1)
    raw.save(image)
    assert qcow2bm.check(image).exit_status == 2

    for words in (["add", str(image), "b"], ["resize", str(image), "+1M"]):
        assert main(words) == 4
        assert image.read_bytes() == bytes(raw.data)

    assert "overlaps with bitmap directory" in Guest(image, None).run((8 << 20, CLUSTER, 2))
    raw.save(image)
    assert main(["repair", "--yes", str(image)]) == 0
    guest = Guest(image, None)
    assert guest.run((8 << 20, CLUSTER, 2)) == ""
    assert guest.is_whole
