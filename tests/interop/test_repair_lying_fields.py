"""One field of the bitmaps' structures that lies: a repair must not write over, move or lose what belongs to others."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.__main__ import main
from tests.support.qemu import StorageDaemon, check, create_luks, guest_digest, qemu_img, qemu_io, read_bitmaps
from tests.support.raw import BITMAPS, Raw

MIB = 1 << 20
SECRET = "lying"


def mend(image: Path) -> str:
    """Repair as `qcow2bm repair --yes` does; the plan in words."""
    with qcow2bm.repairing(image, qcow2bm.RepairPolicy(keeps_undo=True)) as repair:
        repair.commit(undo=image.with_name("undo"))
        return str(repair.plan)


@pytest.fixture
def trimmed(tmp_path: Path) -> Path:
    """The bitmap directory lies in a hole that the guest has trimmed, in front of guest data."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    for name in ("a", "b"):
        qemu_img("bitmap", "--add", image, name)
    qemu_io(image, "write -P 1 0 512k", "write -P 2 16M 512k", "discard 0 512k", options=("-d", "unmap"))
    qemu_io(image, "write -P 3 32M 64k")
    raw = Raw.load(image)
    assert len(raw.data) - raw.directory[0] > 4 * raw.cluster_size
    return image


@pytest.mark.parametrize("size", [1 << 63 | 32, 0x8020, 1 << 28 | 32])
def test_a_directory_that_claims_more_than_it_has_is_not_written_over_what_lies_behind(
    trimmed: Path, size: int
) -> None:
    disk, bitmaps = guest_digest(trimmed), read_bitmaps(trimmed)
    raw = Raw.load(trimmed)
    raw.put(raw.extensions()[BITMAPS][0] + 8, size)
    raw.save(trimmed)
    mend(trimmed)
    assert guest_digest(trimmed) == disk
    assert read_bitmaps(trimmed) == bitmaps
    assert check(trimmed)["returncode"] == 0


@pytest.mark.parametrize("target", ["refcount table", "l1 table", "table of a"])
def test_a_directory_pointer_that_names_another_structure_is_put_right(trimmed: Path, target: str) -> None:
    disk, bitmaps = guest_digest(trimmed), read_bitmaps(trimmed)
    raw = Raw.load(trimmed)
    wrong = {"refcount table": raw.number(48), "l1 table": raw.number(40), "table of a": raw.tables()["a"][0]}[target]
    raw.put(raw.extensions()[BITMAPS][0] + 16, wrong)
    raw.save(trimmed)
    mend(trimmed)
    assert guest_digest(trimmed) == disk
    assert read_bitmaps(trimmed) == bitmaps


def test_a_table_offset_of_zero_is_one_bitmaps_loss(trimmed: Path) -> None:
    disk, bitmaps = guest_digest(trimmed), read_bitmaps(trimmed)
    raw = Raw.load(trimmed)
    raw.put(raw.directory[0], 0)
    raw.save(trimmed)
    assert check(trimmed)["returncode"] == 1, "QEMU refuses the image"
    mend(trimmed)
    assert guest_digest(trimmed) == disk
    assert read_bitmaps(trimmed) == {"b": bitmaps["b"]}


def test_encrypted_clusters_that_are_shared_stay_where_they_can_be_decrypted(tmp_path: Path) -> None:
    """LUKS encrypts by the place in the file: a copy elsewhere would be noise."""
    image = tmp_path / "image.qcow2"
    create_luks(image, "4M", SECRET, "cluster_size=64k")
    qemu_io(image, "write -P 1 0 64k", "write -P 2 64k 64k", secret=SECRET)
    raw = Raw.load(image)
    raw.put(raw.l2_entry(1), raw.number(raw.l2_entry(0)))
    raw.save(image)
    disk = guest_digest(image, SECRET)
    assert "LUKS" in mend(image)
    assert guest_digest(image, SECRET) == disk


def test_an_l1_entry_with_nothing_but_flags_does_not_end_qemu(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "1M")
    raw = Raw.load(image)
    raw.put(raw.number(40), 1 << 63)
    raw.save(image)
    assert check(image)["returncode"] == 2
    mend(image)
    assert check(image)["returncode"] == 0
    with StorageDaemon(image) as vm:
        vm.write(0, 512)
    assert check(image)["returncode"] == 0


@pytest.mark.parametrize("size", [2 << 30, 40 << 30], ids=["smaller", "larger"])
def test_bitmaps_that_agree_on_another_size_of_the_disk_are_taken_out_as_a_guess_only(
    tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of the size is wrong: they are sound, and all that keeps a VM from a disk that was cut off."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "10G")
    for name in "ab":
        qemu_img("bitmap", "--add", "-g", "4096", image, name)
    qemu_io(image, "write -P 1 9G 1M")
    sound, raw = image.read_bytes(), Raw.load(image)
    raw.put(24, size)
    raw.save(image)
    for allowed in ("lossless", "lossy"):
        assert main(["repair", str(image), "--yes", "--allow", allowed]) in (2, 4)
        assert "the size in the header may be wrong" in capsys.readouterr().out
        assert image.read_bytes() == raw.data
    raw.put(24, 10 << 30)
    assert raw.data == sound
