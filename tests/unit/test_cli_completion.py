"""Shell completion, asked for as the shells ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcow2bm.cli.app import COMMANDS
from tests.support.images import FIXTURES, unpack


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack("office-week", tmp_path)


def complete(*words: str | Path, shell: str = "bash") -> list[str]:
    """What the shell is offered for the last word."""
    line = [str(word) for word in ("qcow2bm", *words)]
    asked = {"COMP_WORDS": "\n".join(line), "COMP_CWORD": str(len(line) - 1), "_TYPER_COMPLETE_ARGS": " ".join(line)}
    environment = {**os.environ, **asked, "_QCOW2BM_COMPLETE": f"complete_{shell}"}
    argv = [sys.executable, "-m", "qcow2bm"]
    done = subprocess.run(argv, cwd=FIXTURES.parent, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_commands() -> None:
    assert complete("re") == [name for name in COMMANDS if name.startswith("re")]
    assert complete("rem") == ["remove"]


def test_names_from_the_image(image: Path) -> None:
    assert complete("show", image, "") == ["mon", "tue", "wed", "thu", "fri", "sat"]
    assert complete("rename", image, "t") == ["tue", "thu"]


def test_names_that_are_on_the_line_are_not_offered_again(image: Path) -> None:
    assert complete("remove", image, "mon", "sat", "") == ["tue", "wed", "thu", "fri"]
    assert complete("merge", image, "mon", "") == ["tue", "wed", "thu", "fri", "sat"]


def test_names_of_another_image_after_its_hash(image: Path) -> None:
    assert complete("merge", image, "mon", f"{image}#t") == [f"{image}#tue", f"{image}#thu"]
    assert complete("copy", f"{image}#s") == [f"{image}#sat"]


def test_bash_gets_names_it_can_put_on_the_line(tmp_path: Path) -> None:
    offered = complete("show", unpack("unusual-names", tmp_path), "w")
    assert " ".join(offered) == "with\\ space"


def test_zsh(image: Path) -> None:
    assert complete("show", image, "m", shell="zsh") == ["_arguments", "'*:", ':(("mon"))\'']


def test_whatever_is_wrong_with_the_image_is_silent(tmp_path: Path) -> None:
    assert complete("show", tmp_path / "missing", "") == []
    assert complete("show", tmp_path, "") == []
    (tmp_path / "raw").write_bytes(b"raw")
    assert complete("show", tmp_path / "raw", "") == []


def test_an_image_in_use_is_completed_all_the_same(image: Path) -> None:
    from qcow2bm import api

    with api.open(image, writable=True):
        assert "mon" in complete("show", image, "")
