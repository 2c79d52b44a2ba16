"""Files that `repair --plan` writes and `--apply` reads: there whole or not at all, and named where they fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qcow2bm.image import export_file
from tests.crash.faults import Fault, failing
from tests.support.images import fixture


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return fixture("corrupt/leak").unpack(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder apart from the image."""
    (tmp_path / "plans").mkdir()
    return tmp_path / "plans"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["open", "fsync", "link"])
def test_nothing_is_left_of_a_plan_that_cannot_be_written(image: Path, folder: Path, run, call: str, code: int) -> None:
    plan = folder / "plan"
    with failing(folder, Fault(call, (call,), code, sticky=True), 0) as stand_in:
        result = run("repair", image, "--plan", plan)
    assert stand_in.happened
    if call == "link":  # a file system without second names
        assert run("repair", image, "--apply", plan, "--yes").status == 0
        return
    assert result.status == 1
    assert f"qcow2bm: {plan}: {os.strerror(code)}" in result.err
    assert list(folder.iterdir()) == []


def test_a_plan_that_does_not_fit_leaves_nothing(image: Path, folder: Path, run, monkeypatch) -> None:
    class Full:
        def __init__(self, stream) -> None:
            self._stream = stream

        def write(self, _data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str):
            return getattr(self._stream, name)

    real = os.fdopen
    monkeypatch.setattr(export_file.os, "fdopen", lambda *words: Full(real(*words)))
    result = run("repair", image, "--plan", folder / "plan")
    assert result.status == 1
    assert f"qcow2bm: {folder / 'plan'}: No space left on device" in result.err
    assert list(folder.iterdir()) == []


def test_the_folder_is_flushed_once_it_knows_a_plan(image: Path, folder: Path, run, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(export_file, "sync_folder", lambda path: seen.append((path, path.exists())))
    assert run("repair", image, "--plan", folder / "plan").status == 0
    assert seen == [(folder / "plan", True)]


def test_a_plan_in_the_way_is_refused_in_words_that_help(image: Path, folder: Path, run) -> None:
    (folder / "plan").write_text("something else")
    for taken in (folder / "plan", folder):
        result = run("repair", image, "--plan", taken)
        assert result.status == 64
        assert "name a new file for the plan" in result.err
    assert (folder / "plan").read_text() == "something else"


def test_what_cannot_be_read_of_a_plan_is_told_with_its_name(image: Path, folder: Path, run) -> None:
    for name, reason in ((folder / "none", "No such file or directory"), (folder / ("n" * 300), "File name too long")):
        result = run("repair", image, "--apply", name, "--yes")
        assert result.status == 1
        assert result.err == f"qcow2bm: {name}: {reason}\n"


def test_a_plan_that_is_no_regular_file_is_refused_and_not_waited_for(image: Path, folder: Path, run) -> None:
    os.mkfifo(folder / "fifo")
    for name in (folder / "fifo", folder):
        result = run("repair", image, "--apply", name, "--yes")
        assert result.status == 64
        assert f"{name} is no plan" in result.err
