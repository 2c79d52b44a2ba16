"""One command on one image: recorded, then cut short in every way that was chosen, and each remainder judged."""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.choosing import Choose
from tests.crash.commands import Command
from tests.crash.disk import Folder, State, states
from tests.crash.judge import Judge, Truth
from tests.crash.recorder import recorded
from tests.crash.shapes import Shape

_BY_QEMU = 25
"""Of so many states one is read by QEMU bit by bit as well."""


@dataclass
class Outcome:
    """How many different states there were, and what was wrong with some."""

    states: int = 0
    bad: list[str] = field(default_factory=list)


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
        image = shape.make(folder)
        command.prepare(image, shape)
        before, old = Folder.read(folder), Truth.of(image, shape.secret, by_qemu=True)
        with recorded(folder) as ops, quiet() as said:
            status = command.run(image, shape)
        if status not in command.status:
            return Outcome(bad=[f"the command itself ended with {status}: {said.getvalue().strip()}"])
        judge = Judge(image, shape.secret, old, Truth.of(image, shape.secret, by_qemu=True))
        chooser = choose(seed)
        found = [state for size in sectors for state in states(before, ops, size, chooser)]
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


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What a command prints meanwhile, kept."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield out
