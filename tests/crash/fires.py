"""The kinds of fire: what each tries of a command on a shape of image, and what it says of itself."""

from __future__ import annotations

import argparse
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcow2bm.errors import Qcow2bmError
from tests.crash.choosing import thorough
from tests.crash.commands import COMMANDS, Command
from tests.crash.faults import FAULTS
from tests.crash.interrupts import interrupt
from tests.crash.kills import SIGNALS, kill
from tests.crash.replay import replay
from tests.crash.shapes import SHAPES, Shape
from tests.crash.trial import Outcome
from tests.crash.trying import try_out
from tests.support.tools import QemuError


@dataclass(frozen=True)
class Task(ABC):
    """One command on one image under one kind of fire: what can be sent to another process, so both are numbers."""

    command: int
    shape: int

    def run(self) -> Outcome:
        """Try it; what cannot be tried, or tries nothing, is bad."""
        try:
            outcome = self.burn(COMMANDS[self.command], SHAPES[self.shape])
        except (AssertionError, QemuError, Qcow2bmError) as error:
            return Outcome(bad=[f"could not be tried: {error}"])
        if not outcome.states and not self.may_be_none:
            outcome.bad.append("nothing was tried")
        return outcome

    @abstractmethod
    def burn(self, command: Command, shape: Shape) -> Outcome:
        """Let it happen, and judge what it leaves."""

    @property
    def may_be_none(self) -> bool:
        """True if there may be nothing to try."""
        return False

    @property
    def detail(self) -> str:
        """What tells it from others of its kind on the same command and shape."""
        return ""


@dataclass(frozen=True)
class PowerCut(Task):
    """The states that a power cut may leave: `limit` of them, of `rounds` random sets of very many sectors."""

    limit: int
    rounds: int

    def burn(self, command: Command, shape: Shape) -> Outcome:
        return replay(command, shape, lambda seed: thorough(seed, self.rounds), limit=self.limit)


@dataclass(frozen=True)
class FailingCall(Task):
    """A call fails; of all that may, every so many-th one."""

    fault: int
    every: int

    def burn(self, command: Command, shape: Shape) -> Outcome:
        return try_out(command, shape, FAULTS[self.fault], every=self.every)

    @property
    def may_be_none(self) -> bool:
        return FAULTS[self.fault].full  # not every command needs room on the disk

    @property
    def detail(self) -> str:
        return str(FAULTS[self.fault])


class Interruption(Task):
    """Every call is interrupted."""

    def burn(self, command: Command, shape: Shape) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="interrupts-") as folder:
            return interrupt(Path(folder), command, shape)


@dataclass(frozen=True)
class Kill(Task):
    """The process is killed, or asked to end, so often at random moments."""

    signal: int
    times: int

    def burn(self, command: Command, shape: Shape) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            return kill(Path(folder), command, shape, SIGNALS[self.signal], self.times)

    @property
    def may_be_none(self) -> bool:
        return True  # all of a few signals may come too late

    @property
    def detail(self) -> str:
        return SIGNALS[self.signal].name


Pairs = Sequence[tuple[int, int]]
"""Commands and shapes that fit each other, by number."""


def _power(pairs: Pairs, options: argparse.Namespace) -> Iterator[Task]:
    return (PowerCut(*pair, options.limit, options.rounds) for pair in pairs)


def _faults(pairs: Pairs, options: argparse.Namespace) -> Iterator[Task]:
    return (FailingCall(*pair, fault, options.every) for *pair, fault in _turning(pairs, len(FAULTS)))


def _interrupts(pairs: Pairs, _: argparse.Namespace) -> Iterator[Task]:
    return (Interruption(*pair) for pair in pairs)


def _kills(pairs: Pairs, options: argparse.Namespace) -> Iterator[Task]:
    times = -(-options.kills // (len(COMMANDS) * len(SIGNALS)))
    return (Kill(*pair, signal, times) for *pair, signal in _turning(pairs, len(SIGNALS)))


def _turning(pairs: Pairs, kinds: int) -> Iterator[tuple[int, int, int]]:
    """Each command with each of so many kinds of a thing, on a shape that turns."""
    for command in dict.fromkeys(command for command, _ in pairs):
        fitting = [shape for other, shape in pairs if other == command]
        for kind in range(kinds):
            yield command, fitting[(command + kind) % len(fitting)], kind


@dataclass(frozen=True)
class Fire:
    """A kind of fire. Its figures stand in docs/reliability.md between `<!-- name -->` and `<!-- end -->`."""

    name: str
    caption: str
    tasks: Callable[[Pairs, argparse.Namespace], Iterator[Task]]


FIRES = (
    Fire("power", "states that a power cut may leave", _power),
    Fire("faults", "failing calls", _faults),
    Fire("interrupts", "calls interrupted by a signal", _interrupts),
    Fire("kills", "processes killed or ended while they wrote", _kills),
)
