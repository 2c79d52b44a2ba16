"""`estimate` beside a count of every sector, by what `qemu-img map` says of it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qcow2bm
from qcow2bm import __main__
from qcow2bm.chain.estimate import GRANULARITIES, AtGranularity
from qcow2bm.errors import BitmapInconsistentError, BitmapNotFoundError, CorruptImageError
from tests.support.daemon import StorageDaemon
from tests.support.disks import KIB, MIB, STEP, Made, random_layer
from tests.support.images import unpack
from tests.support.qemu import qemu_img, qemu_img_json, qemu_io

ROUNDS = int(os.environ.get("QCOW2BM_ROUNDS", "1"))
DATA, ZERO, NOTHING = range(3)

Sectors = npt.NDArray[np.uint8]
Dirty = npt.NDArray[np.bool_]


def kinds(image: Path, size: int) -> Sectors:
    """What the image itself holds of each sector, as QEMU sees it."""
    found = np.full(size // STEP, NOTHING, np.uint8)
    for row in qemu_img_json("map", "-f", "qcow2", image.name, cwd=image.parent):
        if row["depth"] == 0 and row["present"]:
            kind = DATA if row["data"] or row.get("compressed") else ZERO
            found[row["start"] // STEP : (row["start"] + row["length"]) // STEP] = kind
    return found


def at(dirty: Dirty, granularity: int) -> Dirty:
    """The sectors that are dirty at a granularity."""
    each = granularity // STEP
    padded = np.append(dirty, np.zeros(-len(dirty) % each, np.bool_)).reshape(-1, each).any(axis=1)
    return np.repeat(padded, each)[: len(dirty)]


def counted(dirty: Dirty, held: Sectors) -> tuple[int, ...]:
    return tuple(int((dirty & (held == kind)).sum()) * STEP for kind in (DATA, ZERO, NOTHING))


def exact(row: AtGranularity) -> tuple[int, ...]:
    assert row.is_exact
    assert row.dirty == row.data + row.zero + row.unallocated
    return row.data, row.zero, row.unallocated


@pytest.mark.parametrize("seed", range(8 * ROUNDS))
def test_an_estimate_is_a_count_of_sectors(seed: int, tmp_path: Path) -> None:
    """Coarser granularities exactly; finer ones between bounds, for any bits that round out to the bitmap's."""
    chance = random.Random(seed)
    size = chance.randrange(MIB, 9 * MIB, STEP)
    below: Made | None = None
    if chance.random() < 0.5:
        (tmp_path / "base").write_bytes(chance.randbytes(MIB))
        below = Made(tmp_path / "base", "raw")
    made = random_layer(chance, tmp_path / "image", size, below, last=True)
    version = qemu_img_json("info", "-f", "qcow2", made.path.name, cwd=tmp_path)["format-specific"]["data"]["compat"]
    if version == "0.10":
        qemu_img("amend", "-f", "qcow2", "-o", "compat=1.1", made.path.name, cwd=tmp_path)
    dirty = np.zeros(size // STEP, np.bool_)
    granularity = chance.choice((512, 4 * KIB, 64 * KIB, MIB, 4 * MIB, 1 << 31))
    with qcow2bm.open(made.path, writable=True) as image, image.edit() as edit:
        edit.add("fine", granularity=512)
        for _ in range(chance.randrange(6)):
            start = chance.randrange(len(dirty))
            stop = min(start + chance.choice((1, 8, 100, 3000)), len(dirty))
            dirty[start:stop] = True
            edit.set_range("fine", start * STEP, (stop - start) * STEP)
        edit.copy("fine", "own", granularity=granularity)
    held = kinds(made.path, size)

    (found,) = qcow2bm.estimate(made.path, "own")
    assert [row.granularity for row in found.rows] == sorted({granularity, *GRANULARITIES})
    assert found.has_backing == (below is not None)
    for row in found.rows:
        truth = counted(at(dirty, row.granularity), held)
        if row.granularity >= granularity:
            assert exact(row) == truth
        else:
            assert row.least_data <= truth[0] <= row.data
            assert row.least_dirty <= sum(truth) <= row.dirty
            assert row.dirty == found.current.dirty
    coarse = np.flatnonzero(np.diff(np.concatenate([[False], at(dirty, granularity), [False]])))
    assert found.runs == len(coarse) // 2


def test_the_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1G")
    qemu_io(image, "write -P 1 0 256M")
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        for name in ("long", "short", "none", "middle"):
            edit.add(name, granularity=64 * KIB)
        edit.set_range("long", 0, 128 * MIB)
        edit.set_range("middle", 0, 10 * 64 * KIB)
        for number in range(100):
            edit.set_range("short", number * 2 * MIB, 1)
    found = {one.bitmap: one for one in qcow2bm.estimate(image)}
    assert (found["long"].coarser, found["long"].finer) == (2 * MIB, None)
    assert (found["short"].coarser, found["short"].finer) == (None, 8 * KIB)
    assert (found["none"].coarser, found["none"].finer) == (None, None)
    assert (found["middle"].coarser, found["middle"].finer) == (128 * KIB, None)
    assert found["short"].current.data == 100 * 64 * KIB
    assert found["short"].at(8 * KIB).least_data == 100 * 8 * KIB
    assert __main__.main(["estimate", str(image)]) == 0
    said = capsys.readouterr().out
    for words in ("Coarser pays: 2 MiB", "Finer may pay", "cannot be told", "as it is", "800 KiB to 6.2 MiB"):
        assert words in said


def advice(capsys: pytest.CaptureFixture[str], image: Path, name: str) -> str:
    assert __main__.main(["estimate", str(image), name]) == 0
    return capsys.readouterr().out.partition("\n\n")[2].partition("\n\n")[2]


def test_no_advice_says_what_is_not_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1G")
    qemu_io(image, "write -P 1 0 256M")
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        for name, granularity in (("sector", 512), ("empty", 64 * KIB), ("four", 4 * KIB), ("huge", 1 << 31)):
            edit.add(name, granularity=granularity)
        edit.set_range("sector", 0, 512)
        edit.set_range("four", MIB, 4 * KIB)
        edit.set_range("huge", 0, 1)
        for number in range(10):
            edit.set_range("empty", 512 * MIB + number * 2 * MIB, 1)
    capsys.readouterr()
    said = advice(capsys, image, "sector")
    assert "long" not in said
    assert "as fine as is worth thinking about" in said
    assert "by this bitmap it would copy 64 KiB" in said
    said = advice(capsys, image, "empty")
    assert "Nothing that is dirty is data" in said
    assert "long" not in said
    said = advice(capsys, image, "four")
    assert "long" not in said
    assert "by this bitmap it would copy 64 KiB" in said
    said = advice(capsys, image, "huge")
    assert "coarser one would copy more" not in said

    tiny = tmp_path / "tiny.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", tiny, "256k")
    qemu_io(tiny, "write -P 1 0 256k")
    with qcow2bm.open(tiny, writable=True) as opened, opened.edit() as edit:
        edit.add("daily", granularity=64 * KIB, all_dirty=True)
    capsys.readouterr()
    (found,) = qcow2bm.estimate(tiny)
    assert found.coarser is None  # a byte is as small as a bitmap gets
    said = advice(capsys, tiny, "daily")
    assert "instead of" not in said
    assert "no smaller" in said
    assert "QEMU" not in said


def test_bitmaps_that_are_left_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "8M")
    qemu_img("bitmap", "--add", image, "one")
    qemu_img("bitmap", "--add", image, "two")
    with StorageDaemon(image) as vm:
        vm.io("write -P 1 0 64k", "flush")
        assert __main__.main(["estimate", "-U", "--output", "json", str(image)]) == 0
        told = capsys.readouterr()
        found = json.loads(told.out)
        assert found["estimates"] == []
        assert found["left-out"] == [{"bitmap": name, "state": "active"} for name in ("one", "two")]
        assert "2 left out: 'one' is in use by a running VM" in told.err
        assert __main__.main(["estimate", "-U", str(image), "one"]) == 75
        assert "running VM" in capsys.readouterr().err
    assert __main__.main(["estimate", "--output", "json", str(image)]) == 0
    assert [one["bitmap"] for one in json.loads(capsys.readouterr().out)["estimates"]] == ["one", "two"]
    stale = unpack("in-use", tmp_path / "in-use")
    assert __main__.main(["estimate", str(stale)]) == __main__.main(["list", str(stale)])
    assert "is inconsistent" in capsys.readouterr().err


def test_neither_a_key_nor_another_file_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encrypted, overlay = unpack("luks", tmp_path / "luks"), tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "missing", overlay, "1G")
    assert __main__.main(["add", str(overlay), "daily", "--all-dirty"]) == 0
    capsys.readouterr()
    for path in (encrypted, overlay):
        before = path.read_bytes()
        assert __main__.main(["estimate", "--output", "json", str(path)]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert found["estimates"]
        assert path.read_bytes() == before
    assert found["estimates"][0]["copied-bytes"] == 1 << 30  # the backing file may hold that much


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    in_use = unpack("in-use", tmp_path / "in-use")
    with qcow2bm.open(in_use) as image:
        name = next(bitmap.name for bitmap in image.bitmaps if bitmap.state is qcow2bm.State.INCONSISTENT)
    with pytest.raises(BitmapInconsistentError):
        qcow2bm.estimate(in_use, name)
    with pytest.raises(BitmapNotFoundError):
        qcow2bm.estimate(in_use, "nosuch")
    assert qcow2bm.estimate(unpack("no-bitmaps", tmp_path / "none")) == ()


def test_a_mapping_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_io(image, "write -P 1 0 64k")
    qemu_img("bitmap", "--add", image, "daily")
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[int.from_bytes(data[40:48], "big") :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
    data[table : table + 8] = ((1 << 63) | (1 << 50)).to_bytes(8, "big")
    image.write_bytes(data)
    with pytest.raises(CorruptImageError, match="image"):
        qcow2bm.estimate(image)


def test_a_large_sparse_image_takes_no_time(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64T")
    qemu_io(image, *(f"write -P 1 {number}T 64k" for number in range(0, 64, 4)))
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("daily", all_dirty=True)
    (found,) = qcow2bm.estimate(image)
    assert found.current.data == 16 * 64 * KIB
    assert found.current.unallocated == (64 << 40) - 16 * 64 * KIB
