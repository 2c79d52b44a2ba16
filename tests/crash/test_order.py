"""The order in which a change, its journal and its undo file reach the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qcow2bm.image.file import JOURNAL_SUFFIX
from qcow2bm.image.undo_reader import UndoReader
from tests.crash.commands import COMMANDS
from tests.crash.order import (
    History,
    a_journal_outlives_what_it_journals,
    it_is_noted_first,
    names_are_made_certain,
    stages_are_put_back_one_by_one,
)
from tests.crash.recorder import recorded
from tests.crash.shapes import SHAPES
from tests.crash.trial import Trial, named

SHAPE = named(SHAPES, "64 KiB clusters")
JOURNALED = ("repair refcounts", "undo of a repair", "after a crash", "check -r all")
UNDONE = {"undo": "undo", "undo of a repair": "undo", "after a crash": f"image.qcow2{JOURNAL_SUFFIX}"}
"""Commands that put something back, and the file that it comes from."""

Stages = list[tuple[range, int]]


def history(folder: Path, command: str, undo: str | None = None) -> tuple[History, Stages]:
    """What a command does, and what an undo file says of the image beforehand."""
    trial = Trial(folder, named(COMMANDS, command), SHAPE)
    stages: Stages = []
    if undo is not None:
        with UndoReader(folder / undo) as reader:
            stages = [(range(record.offset, record.end), record.stage) for record in reader.records]
    with recorded(folder) as ops:
        trial.run()
    return History(trial.before, ops, trial.before.names[trial.image.name]), stages


def without(seen: History, *kinds: str) -> History:
    """The same, with no flushes of a kind."""
    return replace(seen, ops=[op for op in seen.ops if op.kind not in kinds])


@pytest.mark.parametrize("command", [*JOURNALED, "merge, with undo", "undo"])
def test_no_name_comes_or_goes_without_a_flush_of_the_folder(command: str, tmp_path: Path) -> None:
    seen, _ = history(tmp_path, command)
    assert not list(names_are_made_certain(seen))
    if any(op.kind in ("link", "unlink") for op in seen.ops):
        assert list(names_are_made_certain(without(seen, "flush folder")))


@pytest.mark.parametrize("command", JOURNALED)
def test_a_journal_goes_when_the_image_is_on_the_disk_and_its_other_name_says_so(command: str, tmp_path: Path) -> None:
    seen, _ = history(tmp_path, command)
    assert not list(a_journal_outlives_what_it_journals(seen))
    assert list(a_journal_outlives_what_it_journals(without(seen, "flush")))


@pytest.mark.parametrize("command", ["merge, with undo", "make refcounts anew", "undo", "undo of a repair"])
def test_an_undo_file_says_first_that_something_is_in_progress(command: str, tmp_path: Path) -> None:
    seen, _ = history(tmp_path, command)
    undo = next(
        number for name, number in seen.before.after(seen.ops).names.items() if name.endswith(("undo", "qcow2bm-undo"))
    )
    assert not list(it_is_noted_first(seen, undo))
    assert list(it_is_noted_first(without(seen, "flush"), undo))


@pytest.mark.parametrize("command", UNDONE)
def test_what_is_put_back_reaches_the_disk_stage_by_stage(command: str, tmp_path: Path) -> None:
    seen, stages = history(tmp_path, command, UNDONE[command])
    removed = [at for at, op in enumerate(seen.ops) if op.kind == "unlink"]
    seen = replace(seen, ops=seen.ops[: removed[0] if removed else None])  # a repair that comes next goes forward
    assert len({stage for _, stage in stages}) > 1
    assert not list(stages_are_put_back_one_by_one(seen, stages))
    assert list(stages_are_put_back_one_by_one(without(seen, "flush"), stages))
