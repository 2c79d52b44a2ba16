"""What QEMU's repair says and counts, as values: the command line has the words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from ...checks.model import Finding


class Mode(Enum):
    """What is mended: `-r leaks` or `-r all`."""

    LEAKS = "leaks"
    ALL = "all"


class Notice(Enum):
    """What is said beside findings; in brackets the values that go with it."""

    SNAPSHOTS_OVERHANGING = auto()
    """More snapshots than there may be are dropped (count)."""
    SNAPSHOTS_TOO_BIG = auto()
    """So are those at the end of a table that is too large (count)."""
    EXTRA_DATA_DROPPED = auto()
    """Too much extra data of a snapshot is cut (index, size)."""
    CORRUPT_BLOCK = auto()
    """The image is marked corrupt: a refcount block is not aligned (offset, index)."""
    CORRUPT_OVERLAP = auto()
    """The image is marked corrupt: a write would have destroyed something (structure)."""
    OVERLAP_AT_ENTRY = auto()
    """So an L2 entry was not mended."""
    OVERLAP_AT_TABLE = auto()
    """So the copied flags of an L2 table were not mended."""
    RESIZE_FAILED = auto()
    """The file cannot grow as far as a refcount block lies (words, reason)."""
    REBUILDING = auto()
    """New refcount structures are made."""
    REBUILD_NEEDED = auto()
    """They would have to be, which `Mode.LEAKS` does not do."""
    REBUILD_FAILED = auto()
    """They could not be (what, reason)."""
    STILL_BROKEN = auto()
    """They are made, and do not count what they should."""
    SNAPSHOT_TABLE_FAILED = auto()
    """The snapshot table could not be rewritten (reason)."""
    FREE_FAILED = auto()
    """Clusters could not be given back (reason)."""
    NOT_COUNTED = auto()
    """Tables lie over each other so often that not all references were counted: nothing is mended then."""
    FLUSH_FAILED = auto()
    """Refcount blocks could not be written at the end."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing to say: a finding, mended or not, or a notice with its values."""

    what: Finding | Notice
    mended: bool = False
    values: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(slots=True)
class Counts:
    """What is counted, of clusters or entries each: what is left, and what is mended."""

    corruptions: int = 0
    leaks: int = 0
    errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0

    def add(self, other: Counts) -> None:
        """Count all that `other` has."""
        self.corruptions += other.corruptions
        self.leaks += other.leaks
        self.errors += other.errors
        self.corruptions_fixed += other.corruptions_fixed
        self.leaks_fixed += other.leaks_fixed

    def count(self, other: int, *, mended: bool) -> None:
        """Count corruptions."""
        if mended:
            self.corruptions_fixed += other
        else:
            self.corruptions += other

    @property
    def is_sound(self) -> bool:
        """True if nothing is left that is worse than a leak."""
        return not (self.corruptions or self.errors)


class GivenUpError(Exception):
    """The check ends here.

    Attributes:
        reason: an error number; None if a finding says why.
        keeps: False if what has been mended so far is not to be written either.
    """

    def __init__(self, reason: int | None = None, *, keeps: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.keeps = keeps
