"""One command on one image: recorded, then cut short in every way that was chosen, and each remainder judged."""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

from tests.crash.choosing import Choose
from tests.crash.commands import Command
from tests.crash.disk import Folder, State, states
from tests.crash.judge import Judge
from tests.crash.recorder import recorded
from tests.crash.shapes import Shape
from tests.crash.trial import Outcome, Trial

_BY_QEMU = 25
"""Of so many states one is read by QEMU bit by bit as well, and another one used by a VM."""
_WITH_A_JOURNAL = 4
"""Of so many states with a journal one is used by a VM."""


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
        limit: judge so many different states at most, a random choice of all.
    """
    seed = zlib.crc32(f"{command.name} {shape.name}".encode())
    with tempfile.TemporaryDirectory(prefix="crash-") as path:
        folder = Path(path)
        trial = Trial(folder, command, shape, by_qemu=True)
        with recorded(folder) as ops:
            trial.run()
        assert trial.before.after(ops).key == Folder.read(folder).key, "the states would be those of something else"
        judge = trial.judge()
        chooser = choose(seed)
        found = [state for size in sectors for state in states(trial.before, ops, size, chooser)]
        return _judged(judge, folder, found if limit is None else _in_turn(found, seed), limit)


def _judged(judge: Judge, folder: Path, found: Iterable[State], limit: int | None) -> Outcome:
    """Judge those that look different, up to a limit."""
    outcome, seen, journals = Outcome(), set[int](), 0
    for state in found:
        remains = state.folder
        key = hash(remains.key)
        if key in seen:
            continue
        if len(seen) == limit:
            break
        seen.add(key)
        remains.write(folder)
        verdict = judge.verdict()
        if verdict is None and len(seen) % _BY_QEMU == 1:
            verdict = judge.verdict_of_qemu()
        has_journal = any(name.endswith("-journal") for name in remains.names)
        journals += has_journal
        used = has_journal and journals % _WITH_A_JOURNAL == 1
        if verdict is None and (used or len(seen) % _BY_QEMU == 2):
            remains.write(folder)
            verdict = judge.verdict_with_a_vm()
        if verdict is not None:
            outcome.bad.append(f"{state.name}: {verdict}")
    outcome.states = len(seen)
    return outcome


def _in_turn(found: list[State], seed: int) -> Iterator[State]:
    """All of them, one from before each flush after the other, in an order that is always the same."""
    chance = random.Random(seed)
    moments: dict[str, list[State]] = {}
    for state in found:
        moments.setdefault(state.name.partition(":")[0], []).append(state)
    for states_then in moments.values():
        chance.shuffle(states_then)
    return (state for state in chain.from_iterable(zip_longest(*moments.values())) if state is not None)
