"""How many findings are told one by one: a table of nothing but nonsense has a million of them.

What is beyond that is one finding for each table and problem, with the count of what it stands for. So neither time
nor memory grows with the number of wrong entries, and the counts are complete all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .wrong import Mask

TOLD = 512
"""Findings of each problem that are told one by one: more than anybody reads, and told within milliseconds."""


class Telling:
    """Counts the findings of each problem that have been told one by one.

    Args:
        most: how many there may be of each problem; None for all, as `qemu-img check` tells them.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._told: Counter[str] = Counter()

    @property
    def folds(self) -> bool:
        """False if everything is told one by one."""
        return self._most is not None

    def room(self, code: str) -> int:
        """How many findings of a problem may still be told one by one; not to be asked where nothing is folded."""
        assert self._most is not None
        return max(0, self._most - self._told[code])

    def take(self, code: str, count: int) -> int:
        """How many of so many findings are told one by one; they count from now on."""
        taken = count if self._most is None else min(count, self.room(code))
        self._told[code] += taken
        return taken


class Fold:
    """The wrong entries of one table: which are told one by one, and what is left of each problem.

    Attributes:
        told: the problems that are told of an entry, by its index.
        rest: problem, index of the first entry that is not told, and how many are not.
    """

    def __init__(self, telling: Telling, faults: Mapping[str, Mask]) -> None:
        self.told: dict[int, set[str]] = {}
        self.rest: list[tuple[str, int, int]] = []
        for code, mask in faults.items():
            count = int(mask.sum())
            if not count:
                continue
            taken = telling.take(code, count)
            places = mask.nonzero()[0][: taken + 1].tolist()
            for place in places[:taken]:
                self.told.setdefault(place, set()).add(code)
            if taken < count:
                self.rest.append((code, places[taken], count - taken))

    def tells(self, index: int, code: str) -> bool:
        """True if this problem of an entry is told by itself."""
        return code in self.told.get(index, ())

    def indices(self) -> Iterator[int]:
        """The entries of which something is told, in order."""
        yield from sorted(self.told)
