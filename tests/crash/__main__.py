"""Every command under fire, on every shape of image: `python -m tests.crash`.

Prints what it finds as it goes, writes the figures into docs/reliability.md when all of it was run, and ends with 1 if
any image is bad afterwards.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tests.crash.choosing import thorough
from tests.crash.commands import COMMANDS
from tests.crash.faults import FAULTS
from tests.crash.kills import SIGNALS, kill
from tests.crash.replay import Outcome, replay
from tests.crash.shapes import SHAPES
from tests.crash.trying import try_out
from tests.support.figures import measured_with, write_figures


@dataclass(frozen=True)
class _Task:
    """One command on one image under one kind of fire: what can be sent to another process."""

    kind: str
    command: int
    shape: int
    detail: int = 0
    rounds: int = 0

    def run(self) -> Outcome:
        command, shape = COMMANDS[self.command], SHAPES[self.shape]
        if self.kind == "power":
            return replay(command, shape, lambda seed: thorough(seed, self.rounds), limit=self.detail)
        if self.kind == "faults":
            return try_out(command, shape, FAULTS[self.detail])
        with tempfile.TemporaryDirectory(prefix="kill-") as folder:
            return kill(Path(folder), command, shape, SIGNALS[self.detail], self.rounds)

    def __str__(self) -> str:
        detail = {"faults": FAULTS, "kills": [number.name for number in SIGNALS]}.get(self.kind)
        words = [self.kind, COMMANDS[self.command].name, SHAPES[self.shape].name]
        return " / ".join([*words, str(detail[self.detail])] if detail else words)


def _tasks(kind: str, pairs: list[tuple[int, int]], options: argparse.Namespace) -> Iterator[_Task]:
    """Power cuts on every shape; faults and kills, which do not depend on it as much, on a turning one."""
    if kind == "power":
        yield from (_Task(kind, *pair, options.limit, options.rounds) for pair in pairs)
        return
    details = range(len(FAULTS)) if kind == "faults" else range(len(SIGNALS))
    rounds = -(-options.kills // (len(COMMANDS) * len(SIGNALS)))
    shapes = {command: [shape for other, shape in pairs if other == command] for command, _ in pairs}
    for command, fitting in shapes.items():
        for turn, detail in enumerate(details):
            yield _Task(kind, command, fitting[(command + turn) % len(fitting)], detail, rounds)


FIRES = {
    "power": "states that a power cut may leave",
    "faults": "calls that failed",
    "kills": "processes killed or ended while they wrote",
}


def main() -> int:
    """Run them all."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", choices=list(FIRES), action="append", help="power cuts, failing calls, or kills")
    options.add_argument("--command", default="", help="only commands with this in their name")
    options.add_argument("--shape", default="", help="only shapes with this in their name")
    options.add_argument("--rounds", type=int, default=500, help="random sets of many sectors")
    options.add_argument("--limit", type=int, default=200, help="states of one command on one shape at most")
    options.add_argument("--kills", type=int, default=2000)
    options.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = options.parse_args()
    fires = chosen.only or list(FIRES)
    pairs = [
        (place, other)
        for (place, command), (other, shape) in product(enumerate(COMMANDS), enumerate(SHAPES))
        if chosen.command in command.name and chosen.shape in shape.name and command.fits(shape)
    ]
    tried: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    with ProcessPoolExecutor(chosen.workers) as pool:
        tasks = [task for kind in fires for task in _tasks(kind, pairs, chosen)]
        for task, outcome in zip(tasks, pool.map(_Task.run, tasks), strict=True):
            tried[task.kind] += outcome.states
            bad[task.kind] += len(outcome.bad)
            print(f"{outcome.states:6} tried, {len(outcome.bad):3} bad: {task}", flush=True)
            for line in outcome.bad[:5]:
                print(f"        {line}", flush=True)
    print({kind: (tried[kind], bad[kind]) for kind in fires})
    if fires == list(FIRES) and not (chosen.command or chosen.shape):
        write_figures("fire", _table(tried, bad, Counter(task.kind for task in tasks)))
    return 1 if bad.total() else 0


def _table(tried: Counter[str], bad: Counter[str], combinations: Counter[str]) -> str:
    rows = [f"| {text} | {combinations[kind]} | {tried[kind]} | {bad[kind]} |" for kind, text in FIRES.items()]
    head = f"{len(COMMANDS)} commands on {len(SHAPES)} shapes of image. {measured_with()}"
    return "\n".join([head, "", "| | combinations | tried | bad |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main())
