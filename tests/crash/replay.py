"""One command on one image: recorded, then cut short in every way that was chosen, and each remainder judged."""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tests.crash.choosing import Choose
from tests.crash.commands import Command
from tests.crash.disk import State, states
from tests.crash.judge import Judge
from tests.crash.recorder import recorded
from tests.crash.shapes import Shape
from tests.crash.trial import Outcome, Trial

_BY_QEMU = 25
"""Of so many states one is read by QEMU bit by bit as well."""


def replay(
    command: Command,
    shape: Shape,
    choose: Callable[[int], Choose],
    *,
    sectors: tuple[int, ...] = (512, 4096),
    limit: int | None = None,
) -> Outcome:
    """Cut a command short.

    Args:
        choose: makes a chooser of sectors from a seed.
        limit: judge so many states at most, a random choice of all.
    """
    seed = zlib.crc32(f"{command.name} {shape.name}".encode())
    with tempfile.TemporaryDirectory(prefix="crash-") as path:
        folder = Path(path)
        trial = Trial(folder, command, shape, by_qemu=True)
        with recorded(folder) as ops:
            trial.run()
        judge = trial.judge()
        chooser = choose(seed)
        found = [state for size in sectors for state in states(trial.before, ops, size, chooser)]
        return _judged(judge, folder, _part(found, limit, seed))


def _judged(judge: Judge, folder: Path, found: list[State]) -> Outcome:
    """Judge those that look different."""
    outcome, seen = Outcome(), set[int]()
    for state in found:
        remains = state.folder
        key = hash(remains.key)
        if key in seen:
            continue
        seen.add(key)
        remains.write(folder)
        verdict = judge.verdict()
        if verdict is None and len(seen) % _BY_QEMU == 1:
            verdict = judge.verdict_of_qemu()
        if verdict is not None:
            outcome.bad.append(f"{state.name}: {verdict}")
    outcome.states = len(seen)
    return outcome


def _part(found: list[State], limit: int | None, seed: int) -> list[State]:
    """All of them; if there are too many, a part that is always the same."""
    return found if limit is None or len(found) <= limit else random.Random(seed).sample(found, limit)
