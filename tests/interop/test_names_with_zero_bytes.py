"""Bitmaps with a zero byte in their name: QEMU ends it there, and cannot write the directory, or sees a name twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qcow2bm.__main__ import main
from tests.support.qemu import bitmap_info, check, qemu_img, qemu_io, read_bitmaps
from tests.support.raw import Raw


def named(folder: Path, *names: bytes) -> Path:
    """An image with a bitmap of 1 MiB dirty for each name."""
    image = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    plain = [f"{index}".rjust(len(name), "n") for index, name in enumerate(names)]
    for name in plain:
        qemu_img("bitmap", "--add", image, name)
    qemu_io(image, "write -P 1 1M 1M")
    raw = Raw.load(image)
    for old, new in zip(plain, names, strict=True):
        at = bytes(raw.data).index(old.encode(), raw.directory[0])
        raw.data[at : at + len(new)] = new
    raw.save(image)
    return image


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([b"daily", b"week\0ly-long"], ["daily", "week"]),
        ([b"ab\0d", b"ab"], ["ab-2", "ab"]),
        ([b"ab", b"ab\0d"], ["ab", "ab-2"]),
        ([b"\0bc", b"x"], ["unnamed-2", "x"]),
    ],
)
def test_what_follows_a_zero_byte_goes_and_the_bits_stay(
    tmp_path: Path, names: list[bytes], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    image = named(tmp_path, *names)
    used = Path(shutil.copy(image, tmp_path / "used"))
    assert qemu_io(used, "write 0 64k", check=False).returncode, "QEMU can write to it"
    assert main(["check", str(image)]) == 4
    assert "zero byte" in capsys.readouterr().out
    assert main(["add", str(image), "new", "--dry-run"]) == 0
    assert "is broken" in capsys.readouterr().err
    assert main(["repair", str(image), "--yes"]) == 0
    assert [bitmap["name"] for bitmap in bitmap_info(image)] == expected
    assert all(list(ranges) == [(1 << 20, 1 << 20)] for ranges in read_bitmaps(image).values())
    qemu_io(image, "write -P 2 8M 64k")
    assert check(image)["returncode"] == 0
    assert all((8 << 20, 65536) in list(ranges) for ranges in read_bitmaps(image).values())


def test_the_drop_in_does_with_them_what_qemu_does(tmp_path: Path) -> None:
    image = named(tmp_path, b"week\0ly-long")
    before = image.read_bytes()
    assert main(["qemu-img", "check", "-q", str(image)]) == check(image)["returncode"] == 0
    assert image.read_bytes() == before
