"""Calls that a signal interrupts before they begin; `make crash` does it to every call of every command."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.crash.commands import COMMANDS
from tests.crash.interrupts import interrupt
from tests.crash.shapes import SHAPES
from tests.crash.trial import named

CHOSEN = ("merge, with undo", "repair refcounts", "undo", "import")


@pytest.fixture(scope="module")
def traced() -> None:
    """Some machines let no process be traced, whoever asks."""
    done = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], check=False, capture_output=True, text=True)
    if done.returncode and "Operation not permitted" in done.stderr:
        pytest.skip("this machine lets no process be traced")
    assert not done.returncode, done.stderr


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", CHOSEN)
def test_interrupted_calls_change_nothing(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    outcome = interrupt(folder, named(COMMANDS, name), SHAPES[0])
    assert outcome.states, "no call was interrupted"
    assert not outcome.bad, "\n".join(outcome.bad)
