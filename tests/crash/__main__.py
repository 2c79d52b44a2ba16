"""Cut every command short on every shape of image, at every moment that the model knows: `python -m tests.crash`.

Prints what it finds as it goes, writes the figures into docs/reliability.md, and ends with 1 if any state is bad.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product

from tests.crash.choosing import thorough
from tests.crash.commands import COMMANDS
from tests.crash.replay import Outcome, replay
from tests.crash.shapes import SHAPES


def main() -> int:
    """Run them all."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--command", default="", help="only commands with this in their name")
    options.add_argument("--shape", default="", help="only shapes with this in their name")
    options.add_argument("--rounds", type=int, default=500, help="random sets of many sectors")
    options.add_argument("--limit", type=int, default=400, help="different states of one command on one shape at most")
    options.add_argument("--workers", type=int, default=2)
    chosen = options.parse_args()
    cases = [
        (command, shape)
        for command, shape in product(COMMANDS, SHAPES)
        if chosen.command in command.name and chosen.shape in shape.name and command.fits(shape)
    ]
    counts: Counter[str] = Counter()
    bad = 0
    with ProcessPoolExecutor(chosen.workers) as pool:
        running = [pool.submit(_one, command.name, shape.name, chosen.rounds, chosen.limit) for command, shape in cases]
        for (command, shape), task in zip(cases, running, strict=True):
            outcome = task.result()
            counts[command.name] += outcome.states
            bad += len(outcome.bad)
            print(f"{command.name:28} {shape.name:34} {outcome.states:6} states, {len(outcome.bad)} bad", flush=True)
            for line in outcome.bad[:5]:
                print(f"    {line}", flush=True)
    print(f"{len(cases)} commands on images, {sum(counts.values())} states, {bad} bad")
    return 1 if bad else 0


def _one(command: str, shape: str, rounds: int, limit: int) -> Outcome:
    (chosen,) = (one for one in COMMANDS if one.name == command)
    (made,) = (one for one in SHAPES if one.name == shape)
    return replay(chosen, made, lambda seed: thorough(seed, rounds), limit=limit)


if __name__ == "__main__":
    sys.exit(main())
