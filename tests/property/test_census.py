"""Both ways of taking the census say the same: of every damaged fixture, and of many damaged images more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qcow2bm.checks import walk
from qcow2bm.checks.runner import check

if TYPE_CHECKING:
    from pathlib import Path

    from qcow2bm.checks.model import Report

EVERYTHING = 1 << 60


def taken(monkeypatch: pytest.MonkeyPatch, path: Path, *, plainly: bool) -> Report:
    limit = EVERYTHING if plainly else -1
    with monkeypatch.context() as patched:
        patched.setattr(walk, "_PLAIN_ENTRIES", limit)
        patched.setattr(walk, "_PLAIN_BLOCKS", limit)
        return check(path, owners=True, limit=None)


def same(one: Report, other: Report) -> None:
    assert one.counts == other.counts
    assert one.allocation == other.allocation
    assert one.findings == other.findings
    assert one == other
