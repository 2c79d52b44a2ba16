"""Real processes that are killed, or asked to end, at any moment of their writing.

A commit takes milliseconds, so a signal at random would nearly always come while Python is still loading. The process
therefore waits a moment before each call that writes, and says when the first one comes.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.crash.calls import CHANGING
from tests.crash.commands import Command
from tests.crash.disk import Folder
from tests.crash.shapes import Shape
from tests.crash.trial import Outcome, Trial

PAUSE = 0.004
"""Seconds before each call that writes."""

_TRIES = 4
"""For each signal that is to come in time."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

_CHILD = """
import os, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # which what runs in the background ignores
begun = False

def slow(real):
    def call(*words, **options):
        global begun
        if not begun:
            begun = True
            os.write(int(sys.argv[2]), b"!")
        time.sleep(float(sys.argv[1]))
        return real(*words, **options)
    return call

for name in sys.argv[3].split(","):
    setattr(os, name, slow(getattr(os, name)))

from qcow2bm.__main__ import main
sys.exit(main(sys.argv[4:]))
"""


@dataclass(frozen=True)
class _Ended:
    """How a process ended.

    Attributes:
        status: its exit status, or the signal that killed it, negative.
        in_time: it was still there when the signal was sent.
        seconds: from its first write to its end.
    """

    status: int
    said: str
    in_time: bool
    seconds: float


def kill(folder: Path, command: Command, shape: Shape, number: signal.Signals, rounds: int) -> Outcome:
    """Run a command and end it at a random moment of its writing, until `rounds` signals have come in time."""
    trial = Trial(folder, command, shape)
    length = _length_of_writing(command, trial.image, shape)
    expected = set(trial.before.names) | set(Folder.read(folder).names)
    outcome, chance = Outcome(), random.Random(f"{command.name} {number}")
    judge = trial.judge()
    for _ in range(_TRIES * rounds):
        if outcome.states == rounds:
            break
        trial.before.write(folder)
        ended = _run(command.words(trial.image, shape), number, chance.random() * length)
        outcome.states += ended.in_time
        if not ended.in_time:
            length = min(length, ended.seconds)  # the machine was busier when it was measured
        left = set(Folder.read(folder).names) - expected
        wrong = _wrong(ended, command, number)
        if wrong is None and number is not signal.SIGKILL and left:
            wrong = f"it left {left}"
        wrong = wrong or judge.verdict()
        if wrong is not None:
            outcome.bad.append(f"{number.name}: {wrong}")
    return outcome


def _length_of_writing(command: Command, image: Path, shape: Shape) -> float:
    """Seconds that the slowed process takes from its first write to its end, and a little more."""
    ended = _run(command.words(image, shape), None, 0.0)
    assert ended.status in command.status, ended
    return 1.1 * ended.seconds


def _run(words: list[str], number: signal.Signals | None, delay: float) -> _Ended:
    """Start the command, and send the signal so many seconds after its first write."""
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(PAUSE), str(writing), ",".join(CHANGING), *words],
        cwd=Path.cwd(), pass_fds=(writing,), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    ) as child:  # fmt: skip
        os.close(writing)
        os.read(reading, 1)  # the first write, or the end of a process that writes nothing
        begun = time.monotonic()
        in_time = False
        if number is not None:
            time.sleep(delay)
            in_time = child.poll() is None
            child.send_signal(number)
        said = child.communicate()[0].decode()
    os.close(reading)
    return _Ended(child.returncode, said, in_time, time.monotonic() - begun)


def _wrong(ended: _Ended, command: Command, number: signal.Signals) -> str | None:
    if "Traceback" in ended.said or "internal error" in ended.said:
        return ended.said
    if ended.status in (*command.status, -number, 128 + number):
        return None
    return f"it ended with {ended.status}: {ended.said}"
