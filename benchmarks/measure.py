"""Two programs doing the same work, run in turn: what the machine does to one it does to the other."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SPAWN = Path(__file__).with_name("spawn.py")


class CommandFailedError(Exception):
    """A measured command did not end with status 0: its time means nothing."""


@dataclass(frozen=True)
class Sample:
    """What one run of one command took."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    peak_rss: int  # bytes


@dataclass(frozen=True)
class Side:
    """One of the two programs: its commands, taken in turn, and what has to be done, untimed, before each."""

    commands: Sequence[Sequence[str]]
    prepare: Callable[[], None] = lambda: None

    def run(self, number: int) -> Sample:
        """One run, counted from 0."""
        self.prepare()
        return sample(self.commands[number % len(self.commands)])


@dataclass(frozen=True)
class Comparison:
    """The runs of both sides, pairwise neighbours in time."""

    ours: Sequence[Sample]
    theirs: Sequence[Sample]

    @property
    def ratio(self) -> float:
        """Our median time in terms of theirs: below 1 we are faster."""
        return median(run.wall for run in self.ours) / median(run.wall for run in self.theirs)

    @property
    def pairwise_ratio(self) -> float:
        """The median of each pair's ratio: tells when the machine got slower half way through."""
        return median(ours.wall / theirs.wall for ours, theirs in zip(self.ours, self.theirs, strict=True))

    @property
    def cpu_ratio(self) -> float:
        """As `ratio`, of processor time: what is left when the disk is out of the picture."""
        return median(run.cpu for run in self.ours) / median(run.cpu for run in self.theirs)


def sample(command: Sequence[str]) -> Sample:
    """Run the command once."""
    runner = [sys.executable, "-I", "-S", str(SPAWN), *command]
    done = subprocess.run(runner, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandFailedError(f"{shlex.join(command)}: {done.stderr.strip()}")
    wall, user, system, peak_rss, status = done.stdout.split()
    if status != "0":
        raise CommandFailedError(f"{shlex.join(command)}: exit status {status}: {done.stderr.strip()}")
    return Sample(float(wall), float(user) + float(system), int(peak_rss))


def compare(ours: Side, theirs: Side, runs: int) -> Comparison:
    """Both once to warm up, then ours, theirs, ours, theirs ..."""
    ours.run(0)
    theirs.run(0)
    pairs = [(ours.run(number), theirs.run(number)) for number in range(1, runs + 1)]
    return Comparison([pair[0] for pair in pairs], [pair[1] for pair in pairs])
