"""A file system without the locks that QEMU respects: nothing is changed there unasked, and who reads is warned.

The kernel's answers are put in place of the lock calls of a real process, before it loads anything of ours.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from qcow2bm.errors import LockingUnavailableError
from qcow2bm.image.lock import LockMode, acquire
from tests.support.holders import locked_bytes
from tests.support.qemu import bitmap_info, qemu_img, qemu_io, read_bitmaps

ANSWERS = ("ENOLCK", "EINVAL", "EOPNOTSUPP", "ENOSYS")
WITHOUT = "this file system has no locks that QEMU respects"
STALE = "this file system has no locks: what is shown is stale if a VM runs"

PROGRAM = """
import contextlib, errno, fcntl, io, json, os, sys

code, real = getattr(errno, sys.argv[1]), fcntl.fcntl

def answer(fd, command, *words):
    if command in (36, 37, 38):  # F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW
        raise OSError(code, os.strerror(code))
    return real(fd, command, *words)

fcntl.fcntl = answer

from qcow2bm import __main__

said = []
for line in sys.argv[2:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        said.append((__main__.main(line.split()), out.getvalue(), err.getvalue()))
print(json.dumps(said))
"""


class Said(NamedTuple):
    """What came of a command."""

    status: int
    out: str
    err: str


def typed(folder: Path, *lines: str, code: str = "ENOLCK") -> list[Said]:
    """Command lines of a process that gets no locks, one after the other."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, code, *lines],
        cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return [Said(*said) for said in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pattern")
    for name in ("a", "b"):
        image = path / f"{name}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", image, "64M")
        qemu_img("bitmap", "--add", image, "x")
        qemu_io(image, "write 1M 64k")
        qemu_img("bitmap", "--add", image, "y")
    with (path / "older.raw").open("wb") as older:
        older.truncate(64 << 20)
    made = typed(path, "export b.qcow2 exported", "merge a.qcow2 y x --undo undo --no-lock")
    assert [said.status for said in made] == [0, 0]
    return path


@pytest.fixture
def folder(pattern: Path, tmp_path: Path) -> Path:
    """Two images with a bitmap `x` of one write and a bitmap `y`, and what some commands want beside them."""
    shutil.copytree(pattern, tmp_path, dirs_exist_ok=True)
    return tmp_path


CHANGES = (
    "undo a.qcow2 undo",
    "add a.qcow2 new",
    "merge a.qcow2 y x",
    "remove a.qcow2 new",
    "import b.qcow2 exported --merge",
    "copy a.qcow2#x b.qcow2#twin",
    "copy b.qcow2#twin b.qcow2#second",
    "rebuild b.qcow2 y --against older.raw",
    "diff older.raw b.qcow2 --into b.qcow2#differs",
    "resize b.qcow2 +1M",
    "repair a.qcow2 --yes",
)
READS = (
    *("info a.qcow2", "list a.qcow2", "show a.qcow2 x", "dump a.qcow2", "estimate a.qcow2", "export a.qcow2 again"),
    *("diff older.raw a.qcow2", "prove a.qcow2 x --against older.raw"),
    *("add a.qcow2 new --dry-run", "repair a.qcow2 --dry-run", "copy a.qcow2#x b.qcow2#twin --dry-run"),
)


@pytest.mark.parametrize("code", ANSWERS)
def test_a_change_is_refused_until_the_user_answers_for_it(code: str, folder: Path) -> None:
    """Status 1, the image named, the way out told; with --no-lock the result is what it should be."""
    image = folder / "a.qcow2"
    before = image.read_bytes()
    (refused,) = typed(folder, "clear a.qcow2 x", code=code)
    assert refused == Said(1, "", f"qcow2bm: a.qcow2: {WITHOUT}; make sure that no VM runs and use --no-lock\n")
    assert image.read_bytes() == before
    read, cleared = typed(folder, "list a.qcow2", "clear a.qcow2 x --no-lock", code=code)
    assert (read.status, read.err) == (0, f"qcow2bm: a.qcow2: warning: {STALE}\n")
    assert (cleared.status, cleared.err) == (0, "")
    assert read_bitmaps(image) == {"x": [], "y": [(1 << 20, 64 << 10)]}


def test_every_command_that_changes_refuses_and_can_be_told_to_go_on(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for line, refused in zip(CHANGES, typed(folder, *CHANGES), strict=True):
        assert (refused.status, refused.out) == (1, ""), line
        assert refused.err.startswith("qcow2bm: "), line
        assert f".qcow2: {WITHOUT}; make sure that no VM runs and use --no-lock\n" in refused.err, line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for line, done in zip(CHANGES, typed(folder, *(f"{line} --no-lock" for line in CHANGES)), strict=True):
        assert done.status == 0, (line, done)
        assert "no locks" not in done.err, line
    written = [(1 << 20, 64 << 10)]
    assert read_bitmaps(folder / "a.qcow2") == {"x": written, "y": written}
    assert read_bitmaps(folder / "b.qcow2") == {
        "x": written, "y": written, "twin": written, "second": written, "differs": written,
    }  # fmt: skip
    for name in ("a.qcow2", "b.qcow2"):
        qemu_img("check", folder / name)


def test_every_command_that_reads_says_that_nothing_protects_it(folder: Path) -> None:
    """Of each file that it reads so; --no-lock, where there is one, is the user's own word and needs no warning."""
    for line, said in zip(READS, typed(folder, *READS), strict=True):
        assert said.status == 0, (line, said)
        files = {
            word.partition("#")[0] for word in line.split() if word.startswith(("a.qcow2", "b.qcow2", "older.raw"))
        }
        assert set(said.err.splitlines()) == {f"qcow2bm: {name}: warning: {STALE}" for name in files}, line
    check, why, quiet = typed(folder, "check a.qcow2", "why a.qcow2 x", "prove a.qcow2 x --against older.raw --no-lock")
    assert (check.status, why.status, quiet.status, quiet.err) == (0, 0, 0, "")
    assert check.err == "qcow2bm: a.qcow2: warning: read without keeping writers out: what is found may be stale\n"
    assert "cannot be told: this file system has no locks" in " ".join(why.out.split())


def test_the_drop_in_refuses_as_qemu_does(folder: Path) -> None:
    """QEMU fails to lock a byte and opens nothing; the drop-in says where to turn to, for it has no --no-lock."""
    lines = (
        "qemu-img check -f qcow2 a.qcow2",
        "qemu-img check -r all -f qcow2 a.qcow2",
        "qemu-img bitmap --add -f qcow2 a.qcow2 new",
    )
    for said in typed(folder, *lines):
        assert (said.status, said.out) == (1, "")
        first, second = said.err.splitlines()
        assert first == f"qcow2bm: Could not open 'a.qcow2': {WITHOUT}"
        assert "--no-lock" in second
    assert {entry["name"] for entry in bitmap_info(folder / "a.qcow2")} == {"x", "y"}


@pytest.mark.parametrize("mode", LockMode)
def test_locks_that_end_half_way_leave_nothing(mode: LockMode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock table that is full gives the first locks and not the next ones: those must not keep QEMU out."""
    image = folder / "a.qcow2"
    real = fcntl.fcntl
    calls = 0

    def answer(fd: int, command: int, words: bytes) -> object:
        nonlocal calls
        calls += command == fcntl.F_OFD_SETLK
        if calls == len(mode.value.announced):
            calls = -100
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return real(fd, command, words)

    monkeypatch.setattr(fcntl, "fcntl", answer)
    fd = os.open(image, os.O_RDWR)
    try:
        with pytest.raises(LockingUnavailableError):
            acquire(fd, mode)
        assert locked_bytes(os.getpid(), image) == frozenset()
    finally:
        os.close(fd)
