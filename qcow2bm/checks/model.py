"""What a check finds, as values: findings with their place, and the report of one image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from ..image.references import Kind


class Severity(Enum):
    """How bad a problem is for the user. The first is the worst."""

    CORRUPTION = "corruption"
    """Guest data is or may be wrong, or the next write may make it so."""
    UNKNOWN = "unknown"
    """A feature that is not known here: the image cannot be judged."""
    BITMAP = "bitmap"
    """Data and refcounts are not concerned, but a bitmap is unusable or breaks the format."""
    LEAK = "leak"
    """Clusters that nothing uses: wasted space, no harm to data."""
    WARNING = "warning"
    """No fault that costs anything today, but not as it should be."""
    HINT = "hint"
    """Worth knowing."""

    @property
    def exit_status(self) -> int:
        """What `check` returns when this is the worst."""
        return _STATUS[self]


_STATUS = {
    Severity.CORRUPTION: 2,
    Severity.UNKNOWN: 1,
    Severity.BITMAP: 4,
    Severity.LEAK: 3,
    Severity.WARNING: 0,
    Severity.HINT: 0,
}


class RepairClass(Enum):
    """What repairing a problem can cost."""

    LOSSLESS = "lossless"
    """All that the image says stays as it is."""
    LOSSY = "lossy"
    """Something the image refers to is given up."""
    GUESS = "guess"
    """Nobody can know what was meant."""
    NONE = "none"
    """Nothing to repair, or nothing that a repair of this image could do."""


class InQemu(Enum):
    """What `qemu-img check` makes of a problem."""

    REFUSES = "refuses to open the image"
    FAILS = "gives up the check"
    ERROR = "counts an internal error"
    CORRUPTION = "counts a corruption"
    LEAK = "counts a leak"
    SILENT = "says nothing"


@dataclass(frozen=True, slots=True)
class Problem:
    """A row of the table of problems (`checks/problems.py`).

    Attributes:
        code: permanent; scripts rely on it.
        title: the problem in a few words, whatever the image.
        meaning: what it means for the user.
        advice: what to do about it.
        hides: clusters that nothing refers to may be what this problem has cut off, and not leaks.
    """

    code: str
    severity: Severity
    repair: RepairClass
    qemu: InQemu
    title: str
    meaning: str
    advice: str
    hides: bool = False


@dataclass(frozen=True, slots=True)
class Location:
    """Where a problem is. What does not apply is None; offsets and lengths are in bytes.

    Attributes:
        structure: its name as `dump` and the specification have it.
        host_offset: where in the file.
        index: of the entry in its table.
        snapshot: as `id (name)`.
        guest_offset: the first guest byte concerned, `guest_length` of them.
    """

    structure: str
    host_offset: int | None = None
    index: int | None = None
    guest_offset: int | None = None
    guest_length: int | None = None
    bitmap: str | None = None
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem at one place, or at `count` places in a row.

    Attributes:
        message: what is wrong there.
        count: entries or clusters concerned, as qemu-img would count them.
        values: the numbers behind the message, by name.
        owners: what refers to the clusters concerned; None if nobody has looked.
        qemu: what `qemu-img check` makes of it here.
        folded: this stands for all the other entries of a table with the problem; the location is that of the first.
    """

    problem: Problem
    message: str
    location: Location
    qemu: InQemu
    count: int = 1
    values: Mapping[str, int] = field(default_factory=dict)
    owners: tuple[str, ...] | None = None
    folded: bool = False

    @property
    def code(self) -> str:
        """The problem's permanent code."""
        return self.problem.code

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return self.problem.severity


@dataclass(frozen=True, slots=True)
class Allocation:
    """Numbers of an image as a whole. Clusters of the active disk as qemu-img counts them; the rest in bytes.

    Attributes:
        total: clusters of the virtual disk.
        image_end_offset: end of the last cluster that is used or counted, 0 if that is not known.
        kinds: bytes per kind of cluster, each cluster counted once per use.
        bitmaps: name and bytes of each bitmap, table and data, in directory order.
    """

    total: int = 0
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0
    image_end_offset: int = 0
    kinds: Mapping[Kind, int] = field(default_factory=dict)
    bitmaps: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What a check of one image came to.

    Attributes:
        findings: in the order of the check, at most as many of each problem as were to be kept.
        counts: per code, how many entries or clusters: complete, whatever was kept.
        severities: per severity, the same.
        complete: False if damage kept part of the image from being checked.
        locked: False if a writer may have been at work meanwhile.
    """

    findings: tuple[Finding, ...]
    counts: Mapping[str, int]
    severities: Mapping[Severity, int]
    allocation: Allocation
    complete: bool = True
    locked: bool = True

    @property
    def worst(self) -> Severity | None:
        """The worst severity met, None if there was none."""
        return next((severity for severity in Severity if self.severities.get(severity)), None)

    @property
    def exit_status(self) -> int:
        """0 clean, 1 not known, 2 corrupt, 3 leaks only, 4 a bitmap is unusable."""
        worst = self.worst
        return worst.exit_status if worst is not None else 0

    @property
    def dropped(self) -> int:
        """How many entries or clusters were counted but not kept."""
        return sum(self.counts.values()) - sum(finding.count for finding in self.findings)


class Tally:
    """Counts all findings and keeps some: at most `limit` of each problem, all if that is None."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._kept_of: Counter[str] = Counter()
        self.kept: list[Finding] = []
        self.counts: Counter[str] = Counter()
        self.severities: Counter[Severity] = Counter()

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it if there is room."""
        self.counts[finding.code] += finding.count
        self.severities[finding.severity] += finding.count
        if self._limit is None or self._kept_of[finding.code] < self._limit:
            self._kept_of[finding.code] += 1
            self.kept.append(finding)
