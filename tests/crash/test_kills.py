"""Processes killed, or asked to end, in the middle of their writing; `make crash` does it two thousand times."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.crash.commands import COMMANDS
from tests.crash.kills import SIGNALS, kill
from tests.crash.shapes import SHAPES
from tests.crash.trial import named

CHOSEN = ("merge, with undo", "repair refcounts", "undo")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", CHOSEN)
def test_a_process_that_is_ended_leaves_the_old_state_or_the_new_one(
    name: str, number: signal.Signals, tmp_path: Path
) -> None:
    outcome = kill(tmp_path, named(COMMANDS, name), SHAPES[0], number, rounds=3)
    assert outcome.states, "every signal came too late"
    assert not outcome.bad, "\n".join(outcome.bad)
