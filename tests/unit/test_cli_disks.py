"""How the command line names disks that are only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2bm.cli.disks import DataFile, DiskFormat, data_files, format_of, parse_data_file
from qcow2bm.cli.extent_list import rows
from qcow2bm.errors import UsageError

IMAGE = Path("vm.qcow2")


def test_a_data_file_is_an_images_or_the_images() -> None:
    assert parse_data_file("vm.qcow2=/data/disk=1") == DataFile(IMAGE, Path("/data/disk=1"))
    assert parse_data_file("disk") == DataFile(None, Path("disk"))
    named = [parse_data_file("disk"), parse_data_file("base.qcow2=other")]
    assert data_files(named, IMAGE) == {IMAGE: Path("disk"), Path("base.qcow2"): Path("other")}
    assert data_files(None, IMAGE) == {}


def test_a_name_with_an_equals_sign_is_what_is_there(tmp_path: Path) -> None:
    for name in ("d=1.raw", "e=1.qcow2", "plain"):
        (tmp_path / name).touch()
    image, disk, plain = tmp_path / "e=1.qcow2", tmp_path / "d=1.raw", tmp_path / "plain"
    assert parse_data_file(str(disk)) == DataFile(None, disk)
    assert parse_data_file(f"{image}={disk}") == DataFile(image, disk)
    assert parse_data_file(f"{plain}={disk}") == DataFile(plain, disk)
    assert parse_data_file(f"{image}={tmp_path / 'missing=2'}") == DataFile(image, tmp_path / "missing=2")
    assert parse_data_file("a=b=c") == DataFile(Path("a"), Path("b=c"))


def test_an_image_has_one_data_file(tmp_path: Path) -> None:
    image, link = tmp_path / "vm.qcow2", tmp_path / "link"
    image.touch()
    link.symlink_to(image)
    for named in (["a", f"{image}=b"], [f"{link}=a", "b"], [f"{image}=a", f"{image}=b"]):
        with pytest.raises(UsageError, match="two data files"):
            data_files([parse_data_file(text) for text in named], image)


def test_only_the_users_words_tell_a_format() -> None:
    assert format_of(Path("a.qcow2"), None) == "qcow2"
    assert format_of(Path("a.qcow2"), DiskFormat.RAW) == "raw"
    assert format_of(Path("a.raw"), None) is None
    assert format_of(Path("/dev/vg/disk"), DiskFormat.QCOW2) == "qcow2"


def test_rows_cover_the_disk() -> None:
    dirty = [(0, 10), (30, 20)]
    assert list(rows(dirty, 60, dirty_only=True)) == [(0, 10, True), (30, 20, True)]
    assert list(rows(dirty, 60, dirty_only=False)) == [(0, 10, True), (10, 20, False), (30, 20, True), (50, 10, False)]
    assert list(rows([], 0, dirty_only=False)) == []
