"""What a repair is, as values: what the user allows, the steps, and the plan they come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from ..checks.model import RepairClass, Report
from ..image.plan import Plan

GuestRange = tuple[int, int]
"""Offset and length of a part of the guest's disk, in bytes."""


class Scope(Enum):
    """The part of an image that a step mends; `--only` names them."""

    HEADER = "header"
    SNAPSHOTS = "snapshots"
    MAPPINGS = "mappings"
    REFCOUNTS = "refcounts"
    LEAKS = "leaks"
    BITMAPS = "bitmaps"


class Salvage(Enum):
    """What to do with a bitmap that is in use, or detached."""

    KEEP = "keep"
    REMOVE = "remove"
    ALL_DIRTY = "all-dirty"
    ALLOCATED = "allocated"
    REBUILD = "rebuild"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, slots=True)
class RepairPolicy:
    """What a repair may do.

    Attributes:
        allow: the riskiest class of steps that are taken.
        only: the parts that are mended; empty for all.
        in_use: what becomes of bitmaps whose last writer died.
        detached: what becomes of bitmaps that a foreign writer has made void.
        bitmaps: names of the bitmaps that the two are about; empty for all.
        against: the disk exactly as it was when the bitmap began, which `Salvage.REBUILD` compares with.
        against_format: "raw" or "qcow2", of that copy; None for raw, or for what it cannot but be.
        data_file: the external data file of the image, for `Salvage.REBUILD`.
        snapshot: id or name of the internal snapshot that `Salvage.SNAPSHOT` compares with.
        layer_is_newer: for `Salvage.ALLOCATED` the user's word that nothing had been written to the image when the
            bitmap began.
        snapshot_is_start: the user's word that the snapshot was taken at the very moment the bitmap began.
        keep_stale: unite salvaged bits with those on the disk; None for what is right for the policy.
        keeps_undo: an undo file is written, so that nothing that is taken out of the image is lost.
    """

    allow: RepairClass = RepairClass.LOSSLESS
    only: frozenset[Scope] = frozenset()
    in_use: Salvage = Salvage.KEEP
    detached: Salvage = Salvage.KEEP
    bitmaps: frozenset[str] = frozenset()
    against: Path | None = None
    against_format: str | None = None
    data_file: Path | None = None
    snapshot: str | None = None
    layer_is_newer: bool = False
    snapshot_is_start: bool = False
    keep_stale: bool | None = None
    keeps_undo: bool = True

    def to_json(self) -> dict[str, object]:
        """All fields, for `from_json`."""
        return {field.name.replace("_", "-"): _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RepairPolicy:
        """The policy that `to_json` has written.

        Raises:
            KeyError, TypeError, ValueError: it has not.
        """
        if document.keys() != {field.name.replace("_", "-") for field in fields(cls)}:
            raise KeyError("a policy has other fields")
        return cls(**{name.replace("-", "_"): _FROM_JSON[name](value) for name, value in document.items()})

    @classmethod
    def lossless(cls, only: str | None = None) -> RepairPolicy:
        """All that nothing is lost by, or that of one part."""
        return cls(only=frozenset() if only is None else frozenset({Scope(only)}))

    def covers(self, scope: Scope | None) -> bool:
        """True if steps of this part are wanted."""
        return scope is None or not self.only or scope in self.only

    def allows(self, kind: RepairClass) -> bool:
        """True if steps of this class are taken."""
        return _RISKS.index(kind) <= _RISKS.index(self.allow)


def _plain(value: object) -> object:
    """A field's value as JSON has it."""
    if isinstance(value, frozenset):
        return sorted(_plain(member) for member in value)  # type: ignore[type-var]
    if isinstance(value, Enum):
        return value.value
    return str(value.resolve()) if isinstance(value, Path) else value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _or_none(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


_FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "allow": RepairClass,
    "only": lambda names: frozenset(map(Scope, names)),
    "in-use": Salvage,
    "detached": Salvage,
    "bitmaps": lambda names: frozenset(map(_text, names)),
    "against": _or_none(Path),
    "against-format": _or_none(_text),
    "data-file": _or_none(Path),
    "snapshot": _or_none(_text),
    "layer-is-newer": _flag,
    "snapshot-is-start": _flag,
    "keep-stale": _or_none(_flag),
    "keeps-undo": _flag,
}
_RISKS = (RepairClass.LOSSLESS, RepairClass.LOSSY, RepairClass.GUESS)


@dataclass(frozen=True, slots=True)
class Patch:
    """Bytes that a step changes. `old` and `new` are equally long; of bulk data only the first bytes are kept."""

    offset: int
    length: int
    old: bytes
    new: bytes
    purpose: str


@dataclass(slots=True)
class Step:
    """One thing that a repair does, or would do if it were allowed.

    Attributes:
        title: what is done, in a line.
        kind: what it can cost.
        scope: the part it mends; None for a consequence of other steps, which is never asked about, nor left out by
            `only`.
        codes: the problems it mends, each with how often.
        guest: ranges of the guest's disk, up to its end, whose content is given up or guessed; none for a lossless
            step.
        edits: what it writes, once it has been taken; the first of them, `edits_left_out` more were made.
        proof: of a salvaged bitmap, how sure its bits are.
        refused: why it is not taken; None if it is.
    """

    title: str
    kind: RepairClass
    scope: Scope | None
    codes: Mapping[str, int] = field(default_factory=dict)
    guest: tuple[GuestRange, ...] = ()
    bitmap: str | None = None
    proof: str | None = None
    refused: str | None = None
    edits: list[Patch] = field(default_factory=list)
    edits_left_out: int = 0

    @property
    def key(self) -> str:
        """What the step is, whatever it finds: the same in every round, and in a saved plan."""
        return f"{self.scope.value if self.scope else '-'}: {', '.join(sorted(self.codes))}: {self.bitmap or '-'}"


Proposal = tuple[Step, Callable[[], object]]
"""A step, and how to take it."""


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """A repair worked out to the end, before anything is written.

    Attributes:
        before: what was found.
        after: what a check finds once the steps are done; judged on the repaired image, which does not exist yet.
        steps: what is done, in order.
        refused: what is not, each with the reason.
        plan: the writes, as one change.
    """

    before: Report
    after: Report
    steps: tuple[Step, ...]
    refused: tuple[Step, ...]
    plan: Plan

    def __str__(self) -> str:
        lines = [f"{step.title} [{step.kind.value}]" for step in self.steps] or ["nothing to do"]
        lines += [f"not done: {step.title} [{step.kind.value}]: {step.refused}" for step in self.refused]
        return "\n".join(lines)
