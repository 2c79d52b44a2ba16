"""Every command under fire, on every shape of image: `python -m tests.crash`.

Prints what it finds as it goes, writes the figures of each kind of fire into docs/reliability.md when it was tried with
all commands and shapes, and ends with 1 if any image is bad afterwards.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from qcow2bm.errors import Qcow2bmError
from tests.crash.choosing import thorough
from tests.crash.commands import COMMANDS
from tests.crash.faults import FAULTS
from tests.crash.interrupts import interrupt
from tests.crash.kills import SIGNALS, kill
from tests.crash.replay import replay
from tests.crash.shapes import SHAPES
from tests.crash.trial import Outcome
from tests.crash.trying import try_out
from tests.support.figures import measured_with, write_figures
from tests.support.tools import QemuError


@dataclass(frozen=True)
class _Task:
    """One command on one image under one kind of fire: what can be sent to another process."""

    kind: str
    command: int
    shape: int
    detail: int = 0
    rounds: int = 0

    def run(self) -> Outcome:
        try:
            outcome = self._run()
        except (AssertionError, QemuError, Qcow2bmError) as error:
            return Outcome(bad=[f"could not be tried: {error}"])
        if not outcome.states and not self._may_be_none:
            outcome.bad.append("nothing was tried")
        return outcome

    @property
    def _may_be_none(self) -> bool:
        """All of a few signals may come too late, and not every command needs room on the disk."""
        return self.kind == "kills" or (self.kind == "faults" and FAULTS[self.detail].full)

    def _run(self) -> Outcome:
        command, shape = COMMANDS[self.command], SHAPES[self.shape]
        if self.kind == "power":
            return replay(command, shape, lambda seed: thorough(seed, self.rounds), limit=self.detail)
        if self.kind == "faults":
            return try_out(command, shape, FAULTS[self.detail], every=self.rounds)
        with tempfile.TemporaryDirectory(prefix=f"{self.kind}-") as folder:
            if self.kind == "interrupts":
                return interrupt(Path(folder), command, shape)
            return kill(Path(folder), command, shape, SIGNALS[self.detail], self.rounds)

    def __str__(self) -> str:
        detail = {"faults": FAULTS, "kills": [number.name for number in SIGNALS]}.get(self.kind)
        words = [self.kind, COMMANDS[self.command].name, SHAPES[self.shape].name]
        return " / ".join([*words, str(detail[self.detail])] if detail else words)


def _tasks(kind: str, pairs: list[tuple[int, int]], options: argparse.Namespace) -> Iterator[_Task]:
    """Power cuts and interrupts on every shape; the others, of which there are many kinds, on a turning one."""
    if kind in ("power", "interrupts"):
        yield from (_Task(kind, *pair, options.limit, options.rounds) for pair in pairs)
        return
    details = {"faults": len(FAULTS), "kills": len(SIGNALS)}[kind]
    rounds = -(-options.kills // (len(COMMANDS) * len(SIGNALS))) if kind == "kills" else options.every
    shapes = {command: [shape for other, shape in pairs if other == command] for command, _ in pairs}
    for command, fitting in shapes.items():
        for detail in range(details):
            yield _Task(kind, command, fitting[(command + detail) % len(fitting)], detail, rounds)


FIRES = {
    "power": "states that a power cut may leave",
    "faults": "failing calls",
    "interrupts": "calls interrupted by a signal",
    "kills": "processes killed or ended while they wrote",
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(FIRES), action="append", help="this kind of fire; may be given again")
    parser.add_argument("--command", default="", help="only commands with this in their name")
    parser.add_argument("--shape", default="", help="only shapes with this in their name")
    parser.add_argument("--rounds", type=int, default=500, help="random sets of many sectors")
    parser.add_argument("--limit", type=int, default=24, help="states of one command on one shape at most")
    parser.add_argument("--every", type=int, default=1, help="let only every n-th call fail")
    parser.add_argument("--kills", type=int, default=2100, help="signals that come in time")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> int:
    """Run them all; 1 if anything is bad."""
    options = _options()
    pairs = [
        (place, other)
        for (place, command), (other, shape) in product(enumerate(COMMANDS), enumerate(SHAPES))
        if options.command in command.name and options.shape in shape.name and command.fits(shape)
    ]
    all_bad = 0
    with ProcessPoolExecutor(options.workers) as pool:
        for kind in options.only or FIRES:
            tasks = list(_tasks(kind, pairs, options))
            tried = bad = 0
            for task, outcome in zip(tasks, pool.map(_Task.run, tasks), strict=True):
                tried, bad = tried + outcome.states, bad + len(outcome.bad)
                print(f"{outcome.states:6} tried, {len(outcome.bad):3} bad: {task}", flush=True)
                for line in outcome.bad[:5]:
                    print(f"        {line}", flush=True)
            said = f"{tried:,} {FIRES[kind]}, {bad} bad"
            print(said, flush=True)
            if not (options.command or options.shape):
                part = f", every {options.every}th call" if kind == "faults" and options.every > 1 else ""
                write_figures(kind, f"Measured: {said}; {_extent(tasks)}{part}. {measured_with()}")
            all_bad += bad
    return 1 if all_bad else 0


def _extent(tasks: list[_Task]) -> str:
    commands, shapes = {task.command for task in tasks}, {task.shape for task in tasks}
    return f"{len(tasks)} combinations of {len(commands)} commands and {len(shapes)} shapes of image"


if __name__ == "__main__":
    sys.exit(main())
