"""Every command under fire, on the shapes of image in turn or on all: `python -m tests.crash`.

Prints what it finds as it goes, writes the figures of each kind of fire into docs/reliability.md when it was tried with
all commands and shapes, and ends with 1 if any image is bad afterwards.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product

from tests.crash.commands import COMMANDS
from tests.crash.fires import FIRES, Task
from tests.crash.shapes import SHAPES
from tests.support.figures import measured_with, write_figures


def _options() -> argparse.Namespace:
    names = [fire.name for fire in FIRES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=names, action="append", help="this kind of fire; may be given again")
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
        for fire in FIRES:
            if options.only and fire.name not in options.only:
                continue
            tasks = list(fire.tasks(pairs, options))
            tried, bad = _burn(pool, fire.name, tasks)
            said = f"{tried:,} {fire.caption}, {bad} bad"
            print(said, flush=True)
            if not (options.command or options.shape):
                part = f", every {options.every}th call" if fire.name == "faults" and options.every > 1 else ""
                write_figures(fire.name, f"Measured: {said}; {_extent(tasks)}{part}. {measured_with()}")
            all_bad += bad
    return 1 if all_bad else 0


def _burn(pool: ProcessPoolExecutor, name: str, tasks: list[Task]) -> tuple[int, int]:
    """How many states were tried, and how many of them are bad."""
    tried = bad = 0
    for task, outcome in zip(tasks, pool.map(Task.run, tasks), strict=True):
        tried, bad = tried + outcome.states, bad + len(outcome.bad)
        words = (name, COMMANDS[task.command].name, SHAPES[task.shape].name, task.detail)
        print(f"{outcome.states:6} tried, {len(outcome.bad):3} bad: {' / '.join(filter(None, words))}", flush=True)
        for line in outcome.bad[:5]:
            print(f"        {line}", flush=True)
    return tried, bad


def _extent(tasks: list[Task]) -> str:
    commands, shapes = {task.command for task in tasks}, {task.shape for task in tasks}
    return f"{len(tasks)} combinations of {len(commands)} commands and {len(shapes)} shapes of image"


if __name__ == "__main__":
    sys.exit(main())
