"""What breaks the format, as a value: a permanent code and what is wrong in words.

Each rule of the format is stated once, next to the structure it is about, as a generator of faults. Who opens an image
to work on it raises the first one; the checker reports them all, and `checks/problems.py` has a row for each code.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import CorruptImageError


class Weight(Enum):
    """What a fault means for whoever wants to read on."""

    FATAL = "fatal"
    """Nothing else can be found: the geometry itself is unknown."""
    BREAKS = "breaks"
    """What was meant is uncertain: no work on such a structure. A checker reads on."""
    MINOR = "minor"
    """Against the letter of the specification, and without any doubt about what was meant."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule of the format that does not hold.

    Attributes:
        code: the problem's permanent code.
        message: what is wrong, one line, no final full stop.
    """

    code: str
    message: str
    weight: Weight = Weight.BREAKS

    @classmethod
    def of(cls, error: CorruptImageError) -> Fault:
        """What a parser raised, as the fault it is."""
        assert error.code is not None, f"no problem has been named for: {error.message}"
        return cls(error.code, error.message)
