"""`prove` finds every bit that is missing, and nothing where none is; a sample is worth what it says."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

import qcow2bm
from qcow2bm import __main__
from qcow2bm.chain.compare import _Comparison as Comparison
from qcow2bm.errors import BitmapInconsistentError, CorruptImageError, UsageError
from tests.support.daemon import StorageDaemon
from tests.support.disks import KIB, MIB, STEP
from tests.support.qemu import Ranges, qemu_img, qemu_io, read_bitmaps

ROUNDS = int(os.environ.get("QCOW2BM_ROUNDS", "1"))


def document(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> dict[str, Any]:
    """Run `prove --output json`."""
    assert __main__.main(["prove", "--output", "json", *(str(word) for word in words)]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def started(folder: Path, size: int, granularity: int, *options: str) -> tuple[Path, Path]:
    """An image with data and a bitmap that has just begun, and a raw copy of its disk."""
    image, older = folder / "image.qcow2", folder / "older.raw"
    qemu_img("create", "-q", "-f", "qcow2", *options, image, str(size))
    qemu_io(image, f"write -P 1 0 {size // 2 // STEP * STEP}")
    qemu_img("bitmap", "--add", "-g", str(granularity), image, "daily")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, older)
    return image, older


@pytest.mark.parametrize("seed", range(6 * ROUNDS))
def test_every_miss_is_found_and_nothing_else(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writes are recorded by QEMU; then one bit after the other is taken away, and put back."""
    chance = random.Random(seed)
    size = chance.randrange(MIB, 6 * MIB, STEP)
    granularity = chance.choice((512, 4 * KIB, 64 * KIB))
    image, older = started(tmp_path, size, granularity, "-o", f"cluster_size={chance.choice(('4k', '64k', '1M'))}")
    written: Ranges = []
    for _ in range(6):
        length = chance.choice((STEP, 3 * KIB, 70 * KIB))
        offset = chance.randrange(0, size - length, STEP)
        qemu_io(image, f"write -P {chance.randrange(2, 256)} {offset} {length}")
        written.append((offset, length))
    assert document(capsys, image, "daily", "--against", older)["missed-bytes"] == 0
    for offset, length in written:
        granule = chance.randrange(offset, offset + length, STEP) // granularity
        start, end = granule * granularity, min((granule + 1) * granularity, size)
        with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
            edit.unset_range("daily", start, end - start)
        found = document(capsys, image, "daily", "--against", older, status=2)
        assert [row for row in found["extents"] if row["kind"] == "missed"] == [
            {"offset": start, "length": end - start, "kind": "missed"}
        ]
        assert (found["missed-bytes"], found["covered"]) == (end - start, False)
        everything = document(capsys, image, "daily", "--against", older, "--sample", size + granularity, status=2)
        assert everything["sample"]["complete"]
        assert everything["missed-bytes"] == end - start
        with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
            edit.set_range("daily", start, end - start)
    assert document(capsys, image, "daily", "--against", older)["covered"]


def test_it_writes_nothing_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, older = started(tmp_path, 8 * MIB, 64 * KIB)
    qemu_io(image, "write -P 2 1M 128k", "write -P 1 3M 64k", "write -P 5 5M 512")
    before = image.read_bytes()
    assert __main__.main(["prove", str(image), "daily", "--against", str(older)]) == 0
    said = capsys.readouterr().out
    assert "every change is marked" in said
    assert "64 KiB (65536 bytes) in 1 range" in said
    assert image.read_bytes() == before
    assert __main__.main(["unset", str(image), "daily", "--range", "0+8M"]) == 0
    assert __main__.main(["prove", str(image), "daily", "--against", str(older)]) == 2
    said = capsys.readouterr().out
    assert "192 KiB (196608 bytes) in 2 ranges" in said
    assert "0x000000100000" in said
    assert "rebuild" in said


def test_a_disk_that_grew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU leaves the new tail clean: nothing is missed as long as it is zero."""
    image, older = started(tmp_path, 2 * MIB + 512, 64 * KIB)
    qemu_img("resize", "-q", image, "4M")
    assert document(capsys, image, "daily", "--against", older)["changed-bytes"] == 0
    qemu_io(image, "write -P 7 2097664 512", "write -P 7 3M 64k")
    assert read_bitmaps(image) == {"daily": [(2 * MIB, 64 * KIB), (3 * MIB, 64 * KIB)]}
    found = document(capsys, image, "daily", "--against", older)
    assert (found["missed-bytes"], found["changed-bytes"], found["excess-bytes"]) == (0, 128 * KIB, 0)
    assert __main__.main(["clear", str(image), "daily"]) == 0
    capsys.readouterr()
    found = document(capsys, image, "daily", "--against", older, status=2)
    assert [(row["offset"], row["length"]) for row in found["extents"]] == [(2 * MIB, 64 * KIB), (3 * MIB, 64 * KIB)]


def test_a_disk_that_shrank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, older = started(tmp_path, 2 * MIB, 64 * KIB)
    qemu_img("resize", "-q", "-f", "raw", older, "3M")
    assert __main__.main(["prove", str(image), "daily", "--against", str(older)]) == 0
    assert "larger by 1 MiB" in capsys.readouterr().err


def test_what_proves_nothing_is_refused(tmp_path: Path) -> None:
    image, older = started(tmp_path, MIB, 64 * KIB)
    with pytest.raises(UsageError, match="itself"):
        qcow2bm.prove(image, "daily", image, against_format="qcow2")
    with pytest.raises(UsageError, match="no granule"):
        qcow2bm.prove(image, "daily", older, sample=64 * KIB - 1)
    vm = StorageDaemon(image)
    vm.start()
    vm.io("write -P 1 0 64k", "flush")
    vm.kill()
    with pytest.raises(BitmapInconsistentError):
        qcow2bm.prove(image, "daily", older)
    assert __main__.main(["prove", str(image), "daily", "--against", str(older)]) == 4
    assert __main__.main(["prove", str(image), "nosuch", "--against", str(older)]) == 1
    assert __main__.main(["prove", str(image), "daily", "--against", str(older), "--seed", "1"]) == 64


def test_an_overlay_against_its_base_reads_the_overlay_alone(tmp_path: Path) -> None:
    base, image = tmp_path / "base.qcow2", tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1T")
    qemu_io(base, "write -P 1 0 1M", "write -P 1 900G 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, image)
    qemu_img("bitmap", "--add", image, "daily")
    qemu_io(image, "write -P 2 900G 64k")
    found = qcow2bm.prove(image, "daily", base, against_format="qcow2")
    assert (found.is_covered, found.changed_bytes, found.excess_bytes) == (True, 64 * KIB, 0)
    sampled = qcow2bm.prove(image, "daily", base, against_format="qcow2", sample=MIB)
    assert sampled.sample is not None
    assert (sampled.sample.suspects, sampled.sample.is_complete) == (0, True)


# ---- what it cannot tell ----


def test_a_bitmap_that_does_not_record_is_not_blamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it misses was changed after its time, or in it: nobody can tell, and a rebuild would not mend it."""
    image, older = started(tmp_path, 2 * MIB, 64 * KIB)
    qemu_io(image, "write -P 2 0 64k")
    qemu_img("bitmap", "--disable", image, "daily")
    assert document(capsys, image, "daily", "--against", older)["verdict"] == "covered"
    qemu_io(image, "write -P 3 1M 64k")
    found = document(capsys, image, "daily", "--against", older, status=2)
    assert (found["recording"], found["verdict"], found["missed-bytes"]) == (False, "undecided", 64 * KIB)
    assert __main__.main(["prove", str(image), "daily", "--against", str(older)]) == 2
    said = capsys.readouterr().out
    assert "a time that is over" in said
    assert "rebuild" not in said
    qemu_img("bitmap", "--enable", image, "daily")
    assert document(capsys, image, "daily", "--against", older, status=2)["verdict"] == "missed"


def test_a_disk_that_cannot_be_read_is_told_apart_from_a_miss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, older = started(tmp_path, 2 * MIB, 64 * KIB)
    damaged = tmp_path / "damaged.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", older, damaged)
    data = bytearray(damaged.read_bytes())
    table = int.from_bytes(data[int.from_bytes(data[40:48], "big") :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
    data[table : table + 8] = ((1 << 63) | (1 << 50) | 512).to_bytes(8, "big")
    damaged.write_bytes(data)
    capsys.readouterr()
    assert __main__.main(["prove", str(image), "daily", "--against", str(damaged)]) == 1
    assert "nothing is proved" in capsys.readouterr().err
    assert __main__.main(["diff", str(damaged), str(image)]) == 2
    with pytest.raises(CorruptImageError):
        qcow2bm.prove(image, "daily", damaged, against_format="qcow2")


def test_a_bitmap_that_a_vm_has_in_memory_is_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, older = started(tmp_path, MIB, 64 * KIB)
    with StorageDaemon(image) as vm:
        vm.io("write -P 1 0 64k", "flush")
        assert __main__.main(["prove", str(image), "daily", "--against", str(older), "--no-lock"]) == 75
        assert "running VM" in capsys.readouterr().err
        assert __main__.main(["prove", str(image), "daily", "--against", str(older)]) == 75
        said = capsys.readouterr().err
        assert "shut the VM down" in said
        assert "-U" not in said  # which this command does not have
        assert __main__.main(["diff", str(older), str(image)]) == 75
        assert "-U" not in capsys.readouterr().err


# ---- samples ----


@pytest.fixture(scope="module")
def half_missed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bitmap of 512 granules of 4 KiB that has forgotten the last third of what was changed: 64 of 192."""
    folder = tmp_path_factory.mktemp("sample")
    image, older = started(folder, 2 * MIB, 4 * KIB)
    qemu_io(image, "write -P 2 0 768k")
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.unset_range("daily", 512 * KIB, 256 * KIB)
    return image, older


def test_a_seed_draws_the_same_granules(half_missed: tuple[Path, Path]) -> None:
    image, older = half_missed
    one, two, other = (qcow2bm.prove(image, "daily", older, sample=32 * KIB, seed=seed) for seed in (11, 11, None))
    assert list(one.missed_ranges()) == list(two.missed_ranges())
    assert one.sample == two.sample
    assert one.sample is not None
    assert other.sample is not None
    # 512 KiB are marked, and of 1 MiB both disks hold nothing.
    assert (one.sample.suspects, one.sample.compared, other.sample.compared) == (128, 8, 8)
    assert one.excess is None
    assert one.changed_bytes is None


def test_a_sample_finds_as_often_as_it_says(half_missed: tuple[Path, Path]) -> None:
    """The suspects are 64 missed granules and 64 that are as they were, so of two drawn ones the first is a miss."""
    image, older = half_missed
    for seed in range(10):
        found = qcow2bm.prove(image, "daily", older, sample=8 * KIB, seed=seed)
        assert found.missed_bytes == 4 * KIB
        start, _ = next(found.missed_ranges())
        assert 512 * KIB <= start < 768 * KIB
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.set_range("daily", 516 * KIB, 252 * KIB)
    # Now one of 65 is missed: a sample of 13 finds it in one case of five, or it is not a fair one.
    found_in = sum(
        not qcow2bm.prove(image, "daily", older, sample=52 * KIB, seed=seed).is_covered for seed in range(200)
    )
    assert 25 <= found_in <= 55


def test_a_sample_that_takes_longer_than_all_is_not_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Thousands of single sectors: reading the disk from end to end is faster, and tells more."""
    image, older = started(tmp_path, 8 * MIB, 512)
    qemu_io(image, "write -P 2 0 64k")
    found = document(capsys, image, "daily", "--against", older, "--sample", "2M")
    assert found["sample"] is None
    assert (found["verdict"], found["changed-bytes"]) == ("covered", 64 * KIB)
    capsys.readouterr()
    assert __main__.main(["prove", str(image), "daily", "--against", str(older), "--sample", "2M"]) == 0
    assert "all of it was compared" in capsys.readouterr().err
    assert document(capsys, image, "daily", "--against", older, "--sample", "64k")["sample"]["compared-granules"] == 128


def test_a_sample_is_read_by_one_set_of_threads_and_tells_how_far_it_is(
    half_missed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, older = half_missed
    made: list[int] = []
    inner = Comparison.__init__

    def making(self: Comparison, granularity: int, length: int, *, parallel: bool) -> None:
        made.append(length)
        inner(self, granularity, length, parallel=parallel)

    monkeypatch.setattr(Comparison, "__init__", making)
    told: list[tuple[int, int]] = []
    qcow2bm.prove(image, "daily", older, sample=64 * KIB, seed=1, progress=lambda *pair: told.append(pair))
    assert made == [64 * KIB]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[0][0] < 2 * MIB  # the suspects are being counted
    assert told[-1] == (2 * MIB + 64 * KIB, 2 * MIB + 64 * KIB)
