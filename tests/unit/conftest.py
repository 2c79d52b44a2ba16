"""What the tests of the command line share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from qcow2bm import __main__

if TYPE_CHECKING:
    from pathlib import Path


class Result(NamedTuple):
    """What a command line came to."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Run one command line in this process: its exit status, what it printed, and what it printed on stderr."""

    def runner(*words: str | Path) -> Result:
        status = __main__.main([str(word) for word in words])
        return Result(status, *capsys.readouterr())

    return runner
