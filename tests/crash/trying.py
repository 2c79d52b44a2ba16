"""One command on one image with a fault at every call, until it gets through: it fails cleanly, or it succeeds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from tests.crash.commands import Command, quiet
from tests.crash.faults import Fault, failing
from tests.crash.shapes import Shape
from tests.crash.trial import Outcome, Trial

EACH_OF = 200
"""The first calls, of which each fails once."""


_PUT_BACK = "everything was put back"


def try_out(command: Command, shape: Shape, fault: Fault, *, every: int = 1) -> Outcome:
    """Let the first call fail, then the second, and so on; `every` third one, say, to save time.

    After the first few hundred ever fewer: some commands make thousands of calls that are much alike.
    """
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="fault-") as path:
        folder = Path(path)
        trial = Trial(folder, command, shape)
        trial.run()
        judge = trial.judge()
        for number in _numbers(every):
            trial.before.write(folder)
            with (
                failing(folder, fault, number) as stand_in,
                patch.object(tempfile, "tempdir", path),  # what is spilled into temporary files may fail as well
                quiet() as said,
            ):
                status = command.run(trial.image, shape)
            if not stand_in.happened:
                return outcome
            outcome.states += 1
            wrong = _wrong(command, fault, status, said.getvalue(), trial) or judge.verdict()
            if wrong is not None:
                outcome.bad.append(f"{fault} at call {number}: {wrong}")
    return outcome


def _numbers(every: int) -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += every * (1 + number // (every * EACH_OF))


def _wrong(command: Command, fault: Fault, status: int, said: str, trial: Trial) -> str | None:
    """What is wrong with how a command ended."""
    if "internal error" in said or "Traceback" in said:
        return f"it says {said!r}"
    if left := _open_in(trial.image.parent):
        return f"it leaves open {left}"
    if status in command.status:
        return "it says that all is well" if fault.must_be_told else None
    if fault.code is None:
        return f"half a call is no error, but it ended with {status}: {said!r}"
    if status not in command.failed:
        return f"it ended with {status}: {said!r}"
    return _told_wrongly(said, trial)


def _open_in(folder: Path) -> list[str]:
    """The files of a folder that this process has open, deleted ones too."""
    places = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return [str(place) for place in places if folder.resolve() in place.parents]


def _told_wrongly(said: str, trial: Trial) -> str | None:
    """What is wrong with what a command says of its failure."""
    folder = trial.image.parent
    if not any(str(file) in said for file in (folder, *folder.iterdir())):
        return f"it does not name the image, nor a file of it: {said!r}"
    if _PUT_BACK in said and trial.image.read_bytes() != trial.settled:
        return f"not every byte was put back, nor the length: {said!r}"
    return None
