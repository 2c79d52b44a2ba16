"""Which of the sectors that a power cut may have stopped are tried: all sets of few, a fair choice of many."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations

ALL_OF = 10
"""Sectors of which every set is tried."""
EACH_OF = 128
"""Sectors of which each is tried alone, all before it, and all but it; of more so many, evenly spread."""

Choose = Callable[[int], Iterator[tuple[int, ...]]]


def thorough(seed: int, rounds: int = 500) -> Choose:
    """Every set of up to ten sectors; of more each prefix, each alone, all but each, and `rounds` at random.

    Of very many sectors the first three are tried for some, evenly spread.
    """
    chance = random.Random(seed)

    def choose(count: int) -> Iterator[tuple[int, ...]]:
        if count <= ALL_OF:
            for size in range(count + 1):
                yield from combinations(range(count), size)
            return
        yield ()
        yield tuple(range(count))
        for place in range(0, count, -(-count // EACH_OF)):
            yield tuple(range(place))
            yield (place,)
            yield tuple(other for other in range(count) if other != place)
        for _ in range(rounds):
            share = chance.random()
            yield tuple(place for place in range(count) if chance.random() < share)

    return choose


def sampled(seed: int, rounds: int = 3) -> Choose:
    """Nothing, everything, and a few sets at random: what an ordinary test run has the time for."""
    chance = random.Random(seed)

    def choose(count: int) -> Iterator[tuple[int, ...]]:
        yield ()
        if count:
            yield tuple(range(count))
        for _ in range(rounds if count > 1 else 0):
            share = chance.random()
            yield tuple(place for place in range(count) if chance.random() < share)

    return choose
