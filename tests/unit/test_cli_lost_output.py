"""Output that nobody can take: a full disk behind stdout, a reader who has left, streams that the caller has closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import FIXTURES
from tests.support.raw import Raw
from tests.support.scenes import three

ROOT = FIXTURES.parent
DONE = "the change is done, but it could not be reported: No space left on device"


def spawn(*words: str | Path, buffered: bool = True, **options) -> subprocess.CompletedProcess[str]:
    """The program as a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    if not buffered:
        environment["PYTHONUNBUFFERED"] = "1"
    argv = [sys.executable, "-m", "qcow2bm", *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(argv, cwd=ROOT, env=environment, check=False, text=True, timeout=60, **streams)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """The L1 table's refcount is too low."""
    image = three(tmp_path)
    raw = Raw.load(image)
    raw.set_refcount(raw.number(40), 0)
    raw.save(image)
    return image


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "line",
    [
        "check -r all --output json IMAGE",
        "qemu-img check -r all -f qcow2 IMAGE",
        "qemu-img check -r all --output=json -f qcow2 IMAGE",
        "repair IMAGE --yes --output json",
        "undo IMAGE UNDO",
        "clear IMAGE a",
    ],
)
def test_a_change_that_is_done_and_cannot_be_reported_is_told_with_the_images_name(
    damaged: Path, line: str, buffered: bool
) -> None:
    undo = damaged.with_name("undo")
    if not line.startswith(("check", "qemu-img", "repair")):
        assert spawn("repair", damaged, "--yes", "--undo", undo).returncode == 0
    before = damaged.read_bytes()
    names = {"IMAGE": str(damaged), "UNDO": str(undo)}
    with Path("/dev/full").open("w") as full:
        ended = spawn(*(names.get(word, word) for word in line.split()), buffered=buffered, stdout=full)
    assert ended.returncode == 1
    assert f"qcow2bm: {damaged}: {DONE}" in ended.stderr
    assert damaged.read_bytes() != before


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", [("repair", "--yes"), ("check", "-r", "all")])
def test_a_plan_that_cannot_be_shown_is_not_carried_out_and_not_the_images_fault(
    damaged: Path, words: tuple[str, ...], buffered: bool
) -> None:
    before = damaged.read_bytes()
    with Path("/dev/full").open("w") as full:
        ended = spawn(*words, damaged, buffered=buffered, stdout=full)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[0] == ("qcow2bm: standard output: No space left on device; nothing was written")
    assert damaged.read_bytes() == before


def test_a_check_with_nothing_to_repair_does_not_say_that_a_change_is_done(tmp_path: Path) -> None:
    image = three(tmp_path)
    for words in (("check", "-r", "all", "--output", "json"), ("qemu-img", "check", "-r", "all", "-f", "qcow2")):
        with Path("/dev/full").open("w") as full:
            ended = spawn(*words, image, stdout=full)
        assert ended.returncode == 1
        assert "standard output: No space left on device" in ended.stderr
        assert "the change is done" not in ended.stderr


def test_a_reader_who_has_left_is_not_the_images_fault(damaged: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = spawn("repair", damaged, "--dry-run", stdout=writing, buffered=False)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_who_has_closed_stdin_cannot_be_asked(damaged: Path) -> None:
    line = f"exec {sys.executable} -m qcow2bm repair {damaged} <&-"
    ended = subprocess.run(["sh", "-c", line], cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 64
    assert "nobody can be asked here" in ended.stderr


@pytest.mark.parametrize("width", ["20000000", "9" * 5000, "0", "-5", "wide", "²"])
def test_the_help_is_drawn_for_terminals_that_there_are(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, width)
    ended = spawn("--help")
    assert ended.returncode == 0, ended.stderr
    assert max(map(len, ended.stdout.splitlines())) <= 500
