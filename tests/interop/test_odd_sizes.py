"""Disks that do not end with a sector, as other programs make them: QEMU counts whole sectors, and drops the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2bm.__main__ import main
from tests.support.qemu import check, qemu_img, qemu_img_json, qemu_io, read_bitmaps
from tests.support.raw import Raw

SIZES = {"512": ("cluster_size=512", 2 << 20, "512"), "64k": ("cluster_size=64k", 32 << 30, "64k")}
"""Size of clusters, and of a disk that ends just where an entry of a bitmap table does, and the granularity."""


@pytest.fixture(params=SIZES)
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A sound image whose disk is a hundred bytes longer than whole sectors, and a granularity."""
    options, size, granularity = SIZES[request.param]
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(size + 512))
    raw = Raw.load(image)
    raw.put(24, size + 100)
    raw.save(image)
    assert check(image)["returncode"] == 0
    assert qemu_img_json("info", image)["virtual-size"] == size
    return image, granularity


@pytest.mark.parametrize("words", [("add", "IMAGE", "x", "-g"), ("qemu-img", "bitmap", "--add", "IMAGE", "x", "-g")])
def test_qemu_reads_a_bitmap_that_is_added(odd: tuple[Path, str], words: tuple[str, ...]) -> None:
    image, granularity = odd
    assert main([str(image) if word == "IMAGE" else word for word in words] + [granularity]) == 0
    qemu_io(image, "write -P 1 64k 64k")
    assert check(image)["returncode"] == 0
    assert list(read_bitmaps(image)["x"]) == [(65536, 65536)]


def test_a_bitmap_of_qemu_is_sound_and_can_be_edited(odd: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    image, granularity = odd
    qemu_img("bitmap", "--add", "-g", granularity, image, "x")
    assert main(["check", str(image)]) == 0
    assert main(["set", str(image), "x", "--range", "0+128k"]) == 0
    assert main(["repair", str(image), "--yes"]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert list(read_bitmaps(image)["x"]) == [(0, 131072)]


def test_a_resize_begins_at_the_last_whole_sector(odd: tuple[Path, str]) -> None:
    image, granularity = odd
    qemu_img("bitmap", "--add", "-g", granularity, image, "x")
    size = qemu_img_json("info", image)["virtual-size"]
    assert main(["resize", str(image), "+1M"]) == 0
    assert qemu_img_json("info", image)["virtual-size"] == size + (1 << 20)
    assert check(image)["returncode"] == 0
