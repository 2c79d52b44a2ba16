"""Edits of images whose refcounts lie: what looks free is in use, and QEMU may refuse to write to them at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2bm.__main__ import main
from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import OFFSET, Raw

IMAGE = "IMAGE"
EDITS = (
    "merge IMAGE idle all",
    "set IMAGE idle --range 0+4k",
    "set IMAGE idle --range 0+1M",
    "unset IMAGE all --range 0+4k",
    "clear IMAGE all",
    "invert IMAGE idle",
    "resample IMAGE all --granularity 8k",
    "copy IMAGE#all IMAGE#new",
    "add IMAGE new",
    "disable IMAGE all",
    "rename IMAGE all other",
    "remove IMAGE fine",
    "resize IMAGE +64k",
    "resize --shrink IMAGE 512k",
    "qemu-img bitmap --add IMAGE new",
    "qemu-img bitmap --clear IMAGE all",
    "qemu-img bitmap --merge all IMAGE idle",
    "qemu-img bitmap --disable IMAGE all",
    "qemu-img bitmap --remove IMAGE fine",
)
PLACES = ("header", "directory", "table", "data", "guest")


def damaged(folder: Path, place: str) -> Path:
    """An image with three bitmaps whose only refcount table entry names something else than a refcount block."""
    image = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,refcount_bits=2", image, "1M")
    for name in ("all", "fine"):
        qemu_img("bitmap", "--add", "-g", "4k", image, name)
    qemu_io(image, "write -P 1 0 100k")
    qemu_img("bitmap", "--add", "--disable", "-g", "4k", image, "idle")
    raw = Raw.load(image)
    places = {
        "header": 0,
        "directory": raw.directory[0],
        "table": raw.tables()["idle"][0],
        "data": raw.number(raw.bitmap_data("all")[0]) & OFFSET,
        "guest": raw.number(raw.l2_entry()) & OFFSET,
    }
    raw.put(raw.number(48), places[place])
    raw.save(image)
    return image


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_by_refcounts_that_lie_is_refused(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never is it done already, and nothing is written: a VM may not even open such an image."""
    image = damaged(tmp_path, place)
    before = image.read_bytes()
    for edit in EDITS:
        status = main([word.replace(IMAGE, str(image)) for word in edit.split()])
        said = capsys.readouterr()
        assert status in (1, 2), edit
        assert str(image) in said.err, edit
        assert "nothing to do" not in said.out, edit
        assert image.read_bytes() == before, edit


def test_qemu_does_not_write_to_an_image_whose_directory_counts_clusters(tmp_path: Path) -> None:
    """Why such an edit must not pass for done: the VM does not start."""
    image = damaged(tmp_path, "directory")
    assert "Can't update bitmap directory" in qemu_io(image, "length", check=False).stderr
