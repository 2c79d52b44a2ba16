"""Calls that fail in the middle of every command: a clear error, and the old image or the new one.

An ordinary run tries some calls of each command with one of the faults; `make crash` nearly every call with every one.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from qcow2bm.errors import FlushError
from qcow2bm.image import commit, overlay
from qcow2bm.image.file import ImageFile
from qcow2bm.image.roll_back import Outcome
from tests.crash.commands import COMMANDS, Command
from tests.crash.faults import FAULTS, Fault, failing
from tests.crash.shapes import SHAPES
from tests.crash.trial import named
from tests.crash.trying import try_out

SAMPLE = [
    (command, FAULTS[(number + turn * 5) % len(FAULTS)]) for number, command in enumerate(COMMANDS) for turn in range(2)
]


@pytest.mark.parametrize(
    ("command", "fault"), SAMPLE, ids=[f"{command.name}-{fault}".replace(" ", "-") for command, fault in SAMPLE]
)
def test_a_failing_call_is_an_error_and_no_harm(command: Command, fault: Fault) -> None:
    shape = next(shape for shape in SHAPES if command.fits(shape))
    outcome = try_out(command, shape, fault, every=fault.few)
    assert not outcome.bad, "\n".join(outcome.bad)
    assert outcome.states, "nothing failed"


FOUND = (
    # What the undo file notes of a data file was read first, and an error there named nothing.
    ("undo", "internal snapshot", "other errors"),
    # The journal was gone already when its folder could not be flushed, and a rollback without it was cut short.
    ("remove the last", "extension outside the first sector", "flush errors"),
    # An export file that could be opened and not looked at: the message did not say which, and it stayed open.
    ("import", "64 KiB clusters", "other error"),
    # What was read a second time was taken for changed where a read had stopped half-way.
    ("import", "64 KiB clusters", "short reads"),
    # A write that a full disk cut short had made the file longer, and putting back filled holes there is no room for.
    ("resample", "no room in the refcount blocks", "disk fills up"),
    # What a plan is known by takes the image's bytes, and an error in reading them named nothing.
    ("repair by a plan", "1-bit refcounts", "read error"),
    # The drop-in did not say which image could not be read, where that failed as it looked for free clusters.
    ("drop-in bitmap --add", "no room in the refcount table", "read error"),
    # The journal that stays, or the undo file, stayed open as well.
    ("grow, tail dirty, with undo", "64 KiB clusters", "write errors"),
)
"""What went wrong once: command, shape of the image, fault."""


@pytest.mark.parametrize(("command", "shape", "fault"), FOUND)
def test_what_has_been_found_and_mended(command: str, shape: str, fault: str) -> None:
    outcome = try_out(named(COMMANDS, command), named(SHAPES, shape), named(FAULTS, fault))
    assert outcome.states
    assert not outcome.bad, "\n".join(outcome.bad)


@pytest.mark.parametrize("fault", ["short reads", "short writes", "no space", "read error"])
@pytest.mark.parametrize(("command", "every"), [("merge", 3), ("repair mappings", 150)])
def test_what_is_kept_in_temporary_files_may_fail_as_well(
    command: str, every: int, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a change is too large for memory, which no small image brings about."""
    monkeypatch.setattr(overlay, "_IN_MEMORY", 0)
    monkeypatch.setattr(commit, "_IN_MEMORY", 0)
    outcome = try_out(named(COMMANDS, command), SHAPES[0], named(FAULTS, fault), every=every)
    assert outcome.states
    assert not outcome.bad, "\n".join(outcome.bad)


def test_what_is_not_put_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that the proof can fail."""
    monkeypatch.setattr(commit, "roll_back", lambda *_: Outcome())
    assert try_out(named(COMMANDS, "merge"), SHAPES[0], named(FAULTS, "write error")).bad


def test_every_fault_is_in_the_sample() -> None:
    assert {fault.name for _, fault in SAMPLE} == {fault.name for fault in FAULTS}


def test_the_call_that_is_meant_fails(tmp_path: Path) -> None:
    """And none on a file elsewhere, nor before or after unless all shall fail."""
    inside, outside = tmp_path / "folder", tmp_path / "elsewhere"
    inside.mkdir()
    (inside / "f").write_bytes(b"abcd")
    outside.write_bytes(b"abcd")
    fds = [os.open(path, os.O_RDWR) for path in (inside / "f", outside)]
    once, always = Fault("one", ("pread",), errno.EIO), Fault("all", ("pread",), errno.EIO, sticky=True)
    for fault, expected in ((once, [True, False, True]), (always, [True, False, False])):
        with failing(inside, fault, 1) as stand_in:
            passed = []
            for _ in range(3):
                assert os.pread(fds[1], 4, 0) == b"abcd"
                try:
                    passed.append(os.pread(fds[0], 4, 0) == b"abcd")
                except OSError:
                    passed.append(False)
        assert passed == expected
        assert stand_in.happened
    with failing(inside, Fault("half", ("pread", "pwrite"), None), 0):
        assert os.pread(fds[0], 4, 0) == b"ab"
    for fd in fds:
        os.close(fd)


def test_a_flush_whose_error_is_swallowed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is the new one, and may not last."""
    real = ImageFile.barrier

    def barrier(file: ImageFile) -> None:
        with contextlib.suppress(FlushError):
            real(file)

    monkeypatch.setattr(ImageFile, "barrier", barrier)
    assert try_out(named(COMMANDS, "merge"), SHAPES[0], named(FAULTS, "flush error")).bad
