"""Power cuts in the middle of every command: a sample that is always the same; `make crash` tries many more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcow2bm import __main__
from qcow2bm.cli import app
from qcow2bm.image import overlay
from qcow2bm.image.file import ImageFile
from tests.crash.choosing import sampled, thorough
from tests.crash.commands import COMMANDS, Command, quiet
from tests.crash.disk import Folder, Op, by_number, states
from tests.crash.recorder import recorded
from tests.crash.replay import replay
from tests.crash.shapes import SHAPES, Shape
from tests.crash.trial import named

LIMIT = 8
"""States of one command on one shape in an ordinary run."""

# Each command on one shape and each shape with some command; over the list every kind of command meets most shapes.
SAMPLE = [
    (
        command,
        next(shape for turn in range(len(SHAPES)) if command.fits(shape := SHAPES[(7 * number + turn) % len(SHAPES)])),
    )
    for number, command in enumerate(COMMANDS)
]


@pytest.mark.parametrize(("command", "shape"), SAMPLE, ids=lambda value: value.name.replace(" ", "-"))
def test_a_power_cut_leaves_the_old_state_or_the_new_one(command: Command, shape: Shape) -> None:
    outcome = replay(command, shape, sampled, limit=LIMIT)
    assert not outcome.bad, "\n".join(outcome.bad)
    assert outcome.states > 1, "nothing was cut short"


# ---- the model itself ----


def all_states(before: dict[str, bytes], ops: list[Op], sector: int = 512) -> set[frozenset[tuple[str, bytes]]]:
    return {state.folder.key for state in states(by_number(before), ops, sector, thorough(0))}


def one(data: bytes) -> frozenset[tuple[str, bytes]]:
    return frozenset({("f", data)})


A, B, OLD = b"a" * 512, b"b" * 512, b"o" * 512


def test_sectors_between_two_flushes_reach_the_disk_in_any_order() -> None:
    ops = [Op("write", 1, data=A + B), Op("flush", 1)]
    assert all_states({"f": OLD + OLD}, ops) == {one(x + y) for x in (OLD, A) for y in (OLD, B)}


def test_larger_sectors_are_written_whole() -> None:
    ops = [Op("write", 1, data=A + B), Op("flush", 1)]
    assert all_states({"f": OLD * 8}, ops, 4096) == {one(OLD * 8), one(A + B + OLD * 6)}


def test_what_was_flushed_is_there_before_what_follows() -> None:
    ops = [Op("write", 1, data=A), Op("flush", 1), Op("write", 1, offset=512, data=B)]
    assert all_states({"f": OLD + OLD}, ops) == {one(OLD + OLD), one(A + OLD), one(A + B)}


def test_a_file_without_its_name_is_not_there() -> None:
    ops = [Op("link", 2, "g"), Op("write", 2, data=A), Op("flush", 2), Op("flush folder")]
    found = all_states({"f": OLD}, ops)
    assert frozenset({("f", OLD)}) in found
    assert frozenset({("f", OLD), ("g", b"")}) in found
    assert frozenset({("f", OLD), ("g", A)}) in found


def test_a_new_file_is_another_one_although_it_may_have_the_inode_of_one_that_is_gone(tmp_path: Path) -> None:
    with recorded(tmp_path) as ops:
        for name in "fg":
            os.close(os.open(tmp_path / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            (tmp_path / name).unlink()
    first, second = (op.file for op in ops if op.kind == "link")
    assert first != second


def test_names_come_and_go_in_their_order() -> None:
    ops = [Op("link", 1, "second"), Op("unlink", name="f"), Op("flush folder")]
    names = {frozenset(name for name, _ in state) for state in all_states({"f": OLD}, ops)}
    assert names == {frozenset({"f"}), frozenset({"f", "second"}), frozenset({"second"})}


def test_more_than_ten_sectors_are_tried_alone_left_out_and_at_random() -> None:
    chosen = set(thorough(1, rounds=50)(40))
    assert {(place,) for place in range(40)} < chosen
    assert {tuple(other for other in range(40) if other != place) for place in range(40)} < chosen
    assert len(chosen) > 100


def test_the_recorder_sees_everything_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(OLD)
    before = Folder.read(tmp_path)
    with recorded(tmp_path) as ops:
        fd = os.open(tmp_path / "g", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.pwrite(fd, A, 512)
        os.fsync(fd)
        os.ftruncate(fd, 700)
        os.close(fd)
        os.link(tmp_path / "g", tmp_path / "h")
        (tmp_path / "g").unlink()
        Path(tmp_path / "h").replace(tmp_path / "i")
    assert before.after(ops).key == frozenset({("f", OLD), ("i", bytes(512) + A[:188])})
    assert [op.kind for op in ops] == ["link", "write", "flush", "truncate", "link", "unlink", "link", "unlink"]


def test_a_way_of_writing_that_it_does_not_see_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(OLD)
    with pytest.raises(AssertionError, match="does not see"), recorded(tmp_path), (tmp_path / "f").open("r+b") as file:
        file.write(A)


@pytest.mark.parametrize("name", ["merge", "copy", "remove"])
def test_a_missing_barrier_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that the proof can fail: the same commands on a file whose barriers do nothing."""
    monkeypatch.setattr(ImageFile, "barrier", lambda _: None)
    assert replay(named(COMMANDS, name), SHAPES[0], lambda seed: thorough(seed, 20), limit=200).bad


def test_a_missing_mark_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same without the mark: a VM gets at what is torn, or nobody can tell whether it has."""
    monkeypatch.setattr(overlay, "_marked", lambda _, stages: stages)
    command = named(COMMANDS, "repair refcounts")
    assert replay(command, SHAPES[0], lambda seed: thorough(seed, 20), limit=200).bad


FOUND = (
    # Half of a repair put back, and nothing that told the next command.
    ("undo of a repair", "unknown autoclear bits"),
    # Lost without its barrier on the data file, which few states show.
    ("grow with a data file", "raw data file"),
)
"""Commands and shapes of which every state is tried: what went wrong once, and what the sample would miss."""


@pytest.mark.parametrize(("command", "shape"), FOUND)
def test_what_has_been_found_stays_mended(command: str, shape: str) -> None:
    outcome = replay(named(COMMANDS, command), named(SHAPES, shape), lambda seed: thorough(seed, 20), limit=60)
    assert not outcome.bad, "\n".join(outcome.bad)
    assert outcome.states > 3


def test_an_export_is_whole_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    """It changes no image, so it is not among the commands; what it leaves is a backup's only copy of a bitmap."""
    image, flushed = SHAPES[0].make(tmp_path), []
    real_fsync, real_link = os.fsync, os.link

    def fsync(fd: int) -> None:
        flushed.append(os.fstat(fd).st_ino)
        real_fsync(fd)

    def link(source: Path, target: Path) -> None:
        assert Path(source).stat().st_ino in flushed, "it has a name, and may not be on the disk"
        real_link(source, target)

    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "link", link)
        assert __main__.main(["export", str(image), str(tmp_path / "exported")]) == 0
    assert tmp_path.stat().st_ino == flushed[-1], "and then its name is"


READING = {"info", "list", "show", "dump", "explain", "why", "export", "prove", "estimate"}
"""Commands that change no image."""


def test_every_shape_and_every_command_is_in_the_sample() -> None:
    changing = {command.line.split()[0] for command in COMMANDS} - {"qemu-img"}
    assert not changing & READING
    assert set(app.COMMANDS) == changing | READING, "a new command is in neither list"
    assert {shape.name for _, shape in SAMPLE} == {shape.name for shape in SHAPES}
