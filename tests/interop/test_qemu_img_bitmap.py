"""The drop-in `qcow2bm qemu-img bitmap` beside the real `qemu-img bitmap`: same words, same status, same bitmaps.

Each command line runs twice, in two directories with equal images, once by each program. Where the two are meant to
differ (all or nothing; clusters of detached bitmaps given back) a test of its own says so.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import StorageDaemon
from tests.support.images import unpack
from tests.support.listing import read_bitmaps
from tests.support.tools import bitmap_info, check, qemu_img

OURS = [sys.executable, "-m", "qcow2bm", "qemu-img"]
REAL = ["qemu-img"]
LONG = "n" * 1024

# A row per command line; a.qcow2 holds bitmaps b (64 KiB) and fine (512 B, disabled), s.qcow2 one called s.
SAME = [
    [],
    ["--foo"],
    ["--foo=3", "x"],
    ["-f"],
    ["--merge"],
    ["-X", "a.qcow2", "b"],
    ["-gX", "--add"],
    ["--add", "-g", "9E", "a.qcow2", "new"],
    ["--add", "-g", "-1", "a.qcow2", "new"],
    ["--add", "-g", "1e3", "a.qcow2", "new"],
    ["--add", "-g", "3", "a.qcow2", "new"],
    ["--add", "-g", "256", "a.qcow2", "new"],
    ["--add", "-g", "4G", "a.qcow2", "new"],
    ["--add", "-g", "1.5k", "a.qcow2", "new"],
    ["--add", "-g", "2G", "a.qcow2", "new"],
    ["--add", "-g", "0x200", "a.qcow2", "new"],
    ["--add", "-g0", "a.qcow2", "new"],
    ["--add", "--granularity=128k", "a.qcow2", "new"],
    ["--add", "-g", "0.5M", "a.qcow2", "new"],
    ["-g", "512", "--remove", "a.qcow2", "b"],
    ["--add", "a.qcow2"],
    ["--add", "a.qcow2", "b", "c"],
    ["--add", "-b", "s.qcow2", "a.qcow2", "b"],
    ["--add", "-F", "qcow2", "a.qcow2", "b"],
    ["--add", "none.qcow2", "x"],
    ["--add", "."],
    ["--add", "-f", "qcow2", "text", "x"],
    ["--add", "v2.qcow2", "x"],
    ["--remove", "v2.qcow2", "x"],
    ["--add", "-g", "7", "v2.qcow2", "x"],
    ["--add", "corrupt.qcow2", "x"],
    ["--add", "a.qcow2", ""],
    ["--add", "a.qcow2", LONG],
    ["--add", "a.qcow2", LONG[:1023]],
    ["--add", "a.qcow2", "b"],
    ["--add", "huge.qcow2", "x"],
    ["--merge", "nope", "a.qcow2", "b"],
    ["--merge", "b", "a.qcow2", "nope"],
    ["--merge", "nope", "-b", "s.qcow2", "a.qcow2", "b"],
    ["--merge", "s", "-b", "none.qcow2", "a.qcow2", "b"],
    ["--merge", "s", "-b", "other-size.qcow2", "a.qcow2", "b"],
    ["--merge", "b", "-b", "a.qcow2", "a.qcow2", "b"],
    ["--merge", "s", "-b", "s.qcow2", "a.qcow2", "b"],
    ["--merge", "s", "-b", "s.qcow2", "-F", "qcow2", "-f", "qcow2", "a.qcow2", "fine"],
    ["--merge", "fine", "a.qcow2", "b"],
    ["--merge", "b", "a.qcow2", "fine"],
    ["--add", "--merge", "b", "--merge", "fine", "--disable", "a.qcow2", "new"],
    ["a.qcow2", "--add", "new", "--disable"],
    ["--ad", "a.qcow2", "new"],
    ["--re", "a.qcow2", "b"],
    ["--e", "a.qcow2", "fine"],
    ["--disable", "a.qcow2", "b"],
    ["--clear", "a.qcow2", "b"],
    ["--remove", "a.qcow2", "nope"],
    ["--enable", "a.qcow2", "nope"],
    ["--remove", "--add", "-g", "4k", "a.qcow2", "b"],
    ["--add", "--", "a.qcow2", "--odd"],
    ["--add", "first.qcow2", "new"],
    ["--clear", "in-use.qcow2", "fine"],
    ["--merge", "fine", "in-use.qcow2", "kept"],
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images the command lines name."""
    where = tmp_path_factory.mktemp("originals")

    def create(name: str, size: str, *options: str) -> None:
        qemu_img("create", "-q", "-f", "qcow2", *options, name, size, cwd=where)

    create("a.qcow2", "10M")
    qemu_img("bitmap", "--add", "a.qcow2", "b", cwd=where)
    qemu_img("bitmap", "--add", "-g", "512", "a.qcow2", "fine", cwd=where)
    with StorageDaemon(where / "a.qcow2") as daemon:
        daemon.write(1 << 20, 5000)
        daemon.write(7 << 20, 1 << 20)
    qemu_img("bitmap", "--disable", "a.qcow2", "fine", cwd=where)
    create("s.qcow2", "10M")
    qemu_img("bitmap", "--add", "-g", "1M", "s.qcow2", "s", cwd=where)
    with StorageDaemon(where / "s.qcow2") as daemon:
        daemon.write(4 << 20, 512)
    create("other-size.qcow2", "20M")
    qemu_img("bitmap", "--add", "other-size.qcow2", "s", cwd=where)
    create("v2.qcow2", "10M", "-o", "compat=0.10")
    create("huge.qcow2", "2P")
    create("first.qcow2", "10M")
    create("corrupt.qcow2", "10M")
    with (where / "corrupt.qcow2").open("r+b") as file:
        file.seek(79)
        file.write(b"\x02")
    shutil.copy(unpack("in-use", where), where / "in-use.qcow2")
    (where / "text").write_text("no image at all\n" * 100)
    return where


def _run(program: list[str], where: Path, argv: list[str]) -> tuple[int, str, str]:
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [*program, "bitmap", *argv], cwd=where, capture_output=True, text=True, env=environment, check=False
    )
    words = re.sub(r"^qemu-img: ", "qcow2bm: ", done.stderr, flags=re.MULTILINE)
    return done.returncode, done.stdout, re.sub(r"#block\d+", "#block", words)


def _bitmaps(image: Path) -> tuple[list[dict[str, object]], dict[str, list[tuple[int, int]]]]:
    return bitmap_info(image), read_bitmaps(image)


@pytest.mark.parametrize("argv", SAME, ids=lambda argv: " ".join(argv)[:60] or "nothing")
def test_says_and_does_what_qemu_img_does(originals: Path, tmp_path: Path, argv: list[str]) -> None:
    """Standard output, standard error, status, and the bitmaps as QEMU reads them afterwards."""
    ours, real = tmp_path / "ours", tmp_path / "real"
    for copy in (ours, real):
        shutil.copytree(originals, copy)
    assert _run(OURS, ours, argv) == _run(REAL, real, argv)
    for name in ("a.qcow2", "first.qcow2"):
        assert _bitmaps(ours / name) == _bitmaps(real / name)
        assert check(ours / name)["returncode"] == 0


def test_nothing_is_left_behind_when_a_later_action_fails(originals: Path, tmp_path: Path) -> None:
    """The one wanted difference: qemu-img leaves the new bitmap behind, we leave the image as it was."""
    image = tmp_path / "a.qcow2"
    shutil.copy(originals / "a.qcow2", image)
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    status, _, words = _run(OURS, tmp_path, ["--add", "--merge", "nope", "a.qcow2", "new"])
    assert (status, words) == (1, "qcow2bm: Operation merge on bitmap new failed: Dirty bitmap 'nope' not found\n")
    assert hashlib.sha256(image.read_bytes()).hexdigest() == before


def test_an_image_a_vm_writes_to_is_refused_as_by_qemu_img(originals: Path, tmp_path: Path) -> None:
    """Lock conflict: same words, same status."""
    shutil.copy(originals / "a.qcow2", tmp_path / "a.qcow2")
    argv = ["--clear", "a.qcow2", "b"]
    with StorageDaemon(tmp_path / "a.qcow2"):
        assert _run(OURS, tmp_path, argv) == _run(REAL, tmp_path, argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--version"],
        ["info", "--output=json", "a.qcow2"],
        ["bitmap", "--help"],
        ["bitmap", "--add", "-f", "raw", "text", "x"],
        ["bitmap", "--add", "--image-opts", "driver=qcow2,file.filename=a.qcow2", "x"],
        ["bitmap", "--add", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}', "x"],
        ["bitmap", "--add", "file:a.qcow2", "x"],
    ],
    ids=lambda argv: " ".join(argv)[:50],
)
def test_what_is_not_ours_is_handed_to_the_real_qemu_img(originals: Path, tmp_path: Path, argv: list[str]) -> None:
    """Other subcommands, formats and protocols: exec, so even the program name in messages is qemu-img's."""
    results = []
    for program in (OURS, REAL):
        where = tmp_path / program[-1].replace("-", "") / str(len(results))
        shutil.copytree(originals, where)
        done = subprocess.run(
            [*program, *argv],
            cwd=where,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
            check=False,
        )
        results.append((done.returncode, done.stdout, re.sub(r"#block\d+", "#block", done.stderr)))
    assert results[0] == results[1]


def test_a_dirty_image_is_repaired_first_by_the_real_qemu_img(originals: Path, tmp_path: Path) -> None:
    """A dirty bit means refcounts that a crash left behind; qemu-img repairs them when it opens the image."""
    image = tmp_path / "a.qcow2"
    shutil.copy(originals / "a.qcow2", image)
    with image.open("r+b") as file:
        file.seek(79)
        file.write(b"\x01")
    assert _run(OURS, tmp_path, ["--add", "a.qcow2", "new"])[0] == 0
    assert image.read_bytes()[79] == 0
    assert "new" in [row["name"] for row in bitmap_info(image)]


def test_detached_bitmaps_are_dropped_without_leaking(tmp_path: Path) -> None:
    """QEMU drops them too when it opens for writing, and leaks their clusters; we give them back."""
    image = unpack("detached", tmp_path)
    status, _, words = _run(OURS, tmp_path, ["--add", image.name, "fresh"])
    assert status == 0
    assert words.startswith("qcow2bm: warning: a program lacking bitmap support modified this file")
    assert [row["name"] for row in bitmap_info(image)] == ["fresh"]
    assert check(image)["returncode"] == 0


def test_without_a_real_qemu_img_the_message_says_so(tmp_path: Path) -> None:
    """On a machine without QEMU the drop-in still does what is ours, and says what is not."""
    done = subprocess.run(
        [*OURS, "info", "x"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(Path.cwd())},
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "qcow2bm: there is no qemu-img on PATH, and this needs the real one\n")
