"""`resize` and `undo` of an image whose guest data lies in an external file: what they say of that file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from qcow2bm.image import undo_writer
from qcow2bm.image.file import ImageFile
from tests.support.qemu import qemu_img, qemu_io

MIB = 1 << 20


def create(folder: Path, *options: str) -> Path:
    """An image of a MiB with a data file beside it."""
    image = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(options), image.name, "1M", cwd=folder)
    return image


@pytest.mark.parametrize("raw", ["on", "off"])
@pytest.mark.parametrize(("size", "options"), [("2M", []), ("512k", ["--shrink"])])
def test_undo_sees_that_the_data_file_was_written_to(
    size: str, options: list[str], raw: str, tmp_path: Path, run
) -> None:
    """The image shows nothing of it: its entries are the same before and after."""
    image = create(tmp_path, "data_file=external", f"data_file_raw={raw}")
    qemu_io(image, "write -P 1 0 1M")
    before, external, undo = image.read_bytes(), image.with_name("external"), tmp_path / "undo"
    words = ("resize", image, size, *options, "--data-file", external, "--undo", undo)
    status, out, _ = run(*words)
    assert status == 0
    assert "the data file is not part of the undo file" in out
    length = external.stat().st_size
    assert length == (2 * MIB if size == "2M" else MIB)
    stamp = external.stat().st_mtime_ns
    with external.open("r+b") as file:
        file.write(b"newer")
    os.utime(external, ns=(stamp + 1, stamp + 1))
    assert json.loads(run("undo", image, undo, "--list", "--output", "json").out)["data-file"]["changed"] is True
    status, _, err = run("undo", image, undo)
    assert status != 0
    assert "external was written to since" in err
    status, out, err = run("undo", image, undo, "--force")
    assert status == 0, err
    assert image.read_bytes() == before
    assert f"its data file {external} is not part of that" in err
    assert external.stat().st_size == length


def test_a_data_file_has_its_length_again_although_the_undo_file_cannot_be_removed(
    tmp_path: Path, run, monkeypatch
) -> None:
    """What fails while all is put back neither stops that nor hides what failed first."""
    image = create(tmp_path, "data_file=external")
    before, length = image.read_bytes(), image.with_name("external").stat().st_size

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "no such luck")

    monkeypatch.setattr(ImageFile, "write_at", fails)
    monkeypatch.setattr(undo_writer, "drop", fails)
    words = ("resize", image, "2M", "--data-file", image.with_name("external"), "--undo", tmp_path / "undo")
    status, _, err = run(*words)
    assert status == 1
    assert "writing failed (Input/output error); everything was put back" in err
    assert image.read_bytes() == before
    assert image.with_name("external").stat().st_size == length


def test_undo_says_what_becomes_of_a_data_file_that_was_not_written_to(tmp_path: Path, run) -> None:
    image = create(tmp_path, "data_file=external", "data_file_raw=on")
    before, external, undo = image.read_bytes(), image.with_name("external"), tmp_path / "undo"
    assert run("resize", image, "2M", "--data-file", external, "--undo", undo)[0] == 0
    document = json.loads(run("undo", image, undo, "--output", "json").out)
    assert document["data-file"] == {
        "path": str(external), "size-before": MIB, "size-after": 2 * MIB, "changed": False
    }  # fmt: skip
    assert image.read_bytes() == before


def test_doubts_about_a_data_file_are_told(tmp_path: Path, run) -> None:
    image = create(tmp_path, "data_file=external", "data_file_raw=on")
    other = tmp_path / "other"
    other.write_bytes(bytes(3 * MIB))
    status, out, _ = run("resize", image, "2M", "--data-file", other, "--dry-run")
    assert status == 0
    assert "note: the image calls its data file 'external', not 'other'" in out
    assert f"note: the data file has {3 * MIB} bytes, the disk {MIB}" in out
    assert run("resize", image, "2M", "--data-file", image.with_name("external"), "-n").out.count("note:") == 0
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for wrong in (tmp_path, fifo, ""):
        assert run("resize", image, "2M", "--data-file", wrong)[0] == 64


def test_the_document_of_a_resize(tmp_path: Path, run) -> None:
    image = create(tmp_path, "data_file=external", "data_file_raw=on")
    qemu_img("bitmap", "--add", "-g", "64k", image.name, "a", cwd=tmp_path)
    external = image.with_name("external")
    with external.open("ab") as file:
        file.write(b"\1" * 512)
    words = ("resize", image, "2M", "--data-file", external, "--clean-tail")
    expected = {
        "virtual-size-before": MIB,
        "virtual-size-after": 2 * MIB,
        "new-bytes-not-zero": 512,
        "data-file": {
            "path": str(external), "size-before": MIB + 512, "size-after": 2 * MIB, "action": "extended"
        },
    }  # fmt: skip
    assert json.loads(run(*words, "-n", "--output", "json").out)["resize"] == expected
    document = json.loads(run(*words, "--output", "json").out)
    assert document["resize"] == expected
    summary = "\n".join(document["summary"])
    assert "whatever --clean-tail says" in summary
    assert "clean but for those that may not be zeroes" in summary


def test_another_image_is_not_taken_for_the_data_file(tmp_path: Path, run) -> None:
    """Its length would follow the disk's, and a VM may need it."""
    image = create(tmp_path, "data_file=external")
    other = tmp_path / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", other, "1M")
    before = other.read_bytes()
    status, _, err = run("resize", image, "+1M", "--data-file", other)
    assert status == 64
    assert f"{other}: this is a qcow2 image and not the image's data file" in err
    assert "the image calls its data file 'external'" in err
    assert other.read_bytes() == before


def test_a_disk_that_begins_like_an_image_may_be_in_a_data_file_of_the_right_name(tmp_path: Path, run) -> None:
    image = create(tmp_path, "data_file=external", "data_file_raw=on")
    with image.with_name("external").open("r+b") as file:
        file.write(b"QFI\xfb")
    status, _, err = run("resize", image, "+1M", "--data-file", image.with_name("external"))
    assert (status, err) == (0, "")
