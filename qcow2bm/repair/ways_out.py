"""The commands that make a bitmap usable again, or give it up: what each does, what it proves, what it costs.

Only those that apply to the image at hand are offered. What speaks for or against one is decided here from values; the
image itself is read elsewhere (`why.py`), and the work is done by `qcow2bm repair`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ..bitmap.store import State
from ..checks.model import RepairClass
from ..checks.problems import NOT_ITS_OWN, PROBLEMS
from ..checks.remedies import REMEDIES, repair_options
from ..format.header import CHANGE_CUT_SHORT
from ..format.limits import MAX_BITMAP_NAME
from ..format.text import encode_name
from .model import Salvage

STATES = frozenset({"bitmap-inconsistent", "bitmap-detached", "bitmap-active"})
"""Problems that are states of a bitmap, and no damage."""

_LOST = frozenset(code for code, remedy in REMEDIES.items() if "this bitmap is quarantined" in remedy.does)
_EMPTY = frozenset({"bitmaps-extension-missing"})
_RENAMED = frozenset({"bitmap-name", "bitmap-name-duplicate"})
_RISKS = list(RepairClass)
_PART = "bitmap"
"""How the codes of problems begin that `--only bitmaps` takes care of."""


class NextBackup(Enum):
    """What the next backup has to be."""

    INCREMENTAL = "incremental"
    """An incremental one, of what has changed."""
    LARGER = "larger"
    """An incremental one, of what has changed and more."""
    WHOLE = "whole"
    """An incremental one that copies the whole disk."""
    FULL = "full"
    """A full one, with which a new bitmap starts."""
    UNDECIDED = "undecided"
    """That depends on what has become of the bitmap then."""


class Proof(Enum):
    """What is known of the bits afterwards."""

    EXACT = "exact"
    """Each bit is set if its part of the disk has changed, and only then."""
    SUPERSET = "superset"
    """Whatever has changed is marked, and more is."""
    UNTOUCHED = "untouched"
    """The bits stay as they are stored."""
    UNKNOWN = "unknown"
    """Nobody knows before it is done whether there is such a bitmap."""
    NONE = "none"
    """No bitmap is left."""


class Snapshot(NamedTuple):
    """An internal snapshot that can be read: names as text, the date in seconds since 1970, UTC."""

    id: str
    name: str
    date: int


@dataclass(frozen=True, slots=True)
class Case:
    """What there is to know for finding the ways out.

    Attributes:
        image, name: as they are named on a command line.
        state: the bitmap's; None if nobody knows whether there is one.
        version: of the format.
        has_backing, is_encrypted: of the image.
        snapshots: the internal ones that can be read.
        recording: whether QEMU records writes in the bitmap.
        is_attached: False if the autoclear bit is off, so that none of the bitmaps counts.
        siblings: how many bitmaps are in the same state, this one included.
        own: codes of the problems that concern this bitmap.
        others: codes of those that keep QEMU from opening the image all the same.
        table_is_shared: something else uses a cluster of its table.
        interrupted: a change of ours was cut short and is not settled.
    """

    image: str
    name: str
    state: State | None
    version: int = 3
    has_backing: bool = False
    is_encrypted: bool = False
    snapshots: tuple[Snapshot, ...] = ()
    recording: bool = True
    is_attached: bool = True
    siblings: int = 1
    own: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    table_is_shared: bool = False
    interrupted: bool = False

    @property
    def damage(self) -> frozenset[str]:
        """The codes of all problems that are no state of a bitmap."""
        return (self.own | self.others) - STATES


@dataclass(frozen=True, slots=True)
class WayOut:
    """A command.

    Attributes:
        name: what it is called in the options of `repair`, or the command's name.
        command: its words. BASE, ID and JOURNAL stand for what only the user knows.
        does: in a sentence.
        condition: under which the proof holds; None if always.
        kind: what it can cost.
        risk: the same in words; empty if nothing.
    """

    name: str
    command: tuple[str, ...]
    does: str
    next_backup: NextBackup
    proof: Proof
    kind: RepairClass = RepairClass.LOSSLESS
    condition: str | None = None
    risk: str = ""


class LeftOut(NamedTuple):
    """A way that does not lead out of this image's trouble, and why."""

    name: str
    reason: str


def ways_out(case: Case) -> tuple[list[WayOut], list[LeftOut]]:
    """The ways that are open, the cheapest for the next backup first within each kind, and those that are not."""
    ways: list[WayOut] = []
    closed: list[LeftOut] = []
    for way in _all(case):
        if isinstance(way, WayOut):
            ways.append(way)
        else:
            closed.append(way)
    return ways, closed


def _all(case: Case) -> Iterator[WayOut | LeftOut]:
    if case.interrupted:
        yield WayOut(
            "settle", _words(case, "repair"),
            "settles the change that was cut short, as any command does that writes: it is rolled back, or kept if it "
            "was done", NextBackup.UNDECIDED, Proof.UNTOUCHED,
        )  # fmt: skip
    if CHANGE_CUT_SHORT in case.damage:
        yield WayOut(
            "undo", _words(case, "undo", "JOURNAL"),
            "puts back all that the change that was cut short has replaced; JOURNAL lies where the image lay then",
            NextBackup.UNDECIDED, Proof.UNKNOWN,
        )  # fmt: skip
    yield from _mended(case)
    if case.state is State.INCONSISTENT:
        yield from _salvaged(case, "--in-use")
        yield _given_up(case, "--in-use")
    elif case.state is State.DETACHED:
        yield from _salvaged(case, "--detached")
        yield _given_up(case, "--detached")


def _words(case: Case, command: str, *more: str) -> tuple[str, ...]:
    """A command line; a name that begins with a dash is not taken for an option."""
    dashed = any(word.startswith("-") and word == case.name for word in more)
    image = f"./{case.image}" if case.image.startswith("-") else case.image
    return ("qcow2bm", command, *(("--",) if dashed else ()), image, *more)


# Damage


def _mended(case: Case) -> Iterator[WayOut | LeftOut]:
    """The repair of what is damaged, as one command, and what it leaves."""
    codes = sorted(case.damage)
    if not case.is_attached:
        if case.state is State.BROKEN:
            yield LeftOut("repair", "the bitmaps are detached, and no broken one among them is worth mending")
        codes = [code for code in codes if not code.startswith(_PART)]
    for code in codes:
        if repair_options(PROBLEMS[code]) is None:
            yield LeftOut("repair", f"{code}: {REMEDIES[code].does}; {PROBLEMS[code].advice}")
    rows = [PROBLEMS[code] for code in codes if repair_options(PROBLEMS[code]) is not None]
    if not rows and not (case.state is State.BROKEN and case.is_attached):
        return
    riskiest = max(rows or [PROBLEMS[NOT_ITS_OWN[0]]], key=lambda row: _RISKS.index(row.repair))
    options = repair_options(riskiest) or ()
    if all(row.code.startswith(_PART) for row in rows):
        options = (*options, "--only", "bitmaps")
    does = "; ".join(dict.fromkeys(REMEDIES[row.code].does for row in rows or [riskiest]))
    next_backup, proof = _after_mending(case)
    risk = "; ".join(dict.fromkeys(REMEDIES[row.code].risk for row in rows or [riskiest] if REMEDIES[row.code].risk))
    yield WayOut("repair", _words(case, "repair", *options), does, next_backup, proof, riskiest.repair, risk=risk)


def _after_mending(case: Case) -> tuple[NextBackup, Proof]:
    """What becomes of this bitmap when the damage is repaired."""
    if CHANGE_CUT_SHORT in case.damage:
        return NextBackup.FULL, Proof.UNKNOWN
    renamed = bool(case.own) and case.own <= _RENAMED and len(encode_name(case.name)) <= MAX_BITMAP_NAME
    if case.state is None and case.own != _EMPTY:
        return NextBackup.UNDECIDED, Proof.UNKNOWN
    if case.state is None or case.own & _LOST or (case.state is State.BROKEN and not renamed):
        return NextBackup.FULL, Proof.NONE
    if case.state in (State.INCONSISTENT, State.DETACHED):
        return NextBackup.UNDECIDED, Proof.UNTOUCHED
    if not case.own.isdisjoint(NOT_ITS_OWN):
        return (NextBackup.FULL, Proof.NONE) if case.table_is_shared else (NextBackup.LARGER, Proof.SUPERSET)
    return NextBackup.INCREMENTAL, Proof.UNTOUCHED


# Salvage


_BASE = (
    "BASE holds the disk as it was when the bitmap began, neither older nor newer: a raw file, or a qcow2 image with "
    "its chain"
)
_SINCE = "the snapshot was taken when the bitmap began, or before"
_AT_ONCE = (
    "the snapshot was taken at the very moment the bitmap began (the program that knows no bitmaps may have gone back "
    "to an older one, and then nothing seems to have changed)"
)
_BELOW = ", and the backing file is as it was then, none having been changed, put in or taken away since (`rebase`)"
_LAYER = "nothing had been written to this overlay when the bitmap began" + _BELOW


def _salvaged(case: Case, option: str) -> Iterator[WayOut | LeftOut]:
    """The policies that keep the bitmap, those of the smallest next backup first."""
    if case.version < 3:
        text = "bitmaps need version 3 of the format, and the image has version 2"
        for policy in (Salvage.REBUILD, Salvage.SNAPSHOT, Salvage.ALLOCATED, Salvage.ALL_DIRTY):
            yield LeftOut(policy.value, text)
        return
    if case.siblings > 1 and not case.is_attached:
        text = f"the {case.siblings} detached bitmaps count again only together, and what this relies on is true of one"
        for policy in (Salvage.REBUILD, Salvage.SNAPSHOT, Salvage.ALLOCATED):
            yield LeftOut(policy.value, text)
    else:
        yield _rebuilt(case, option)
        yield _unlike_snapshot(case, option)
        yield _allocated(case, option)
    yield _way(case, option, Salvage.ALL_DIRTY, "marks the whole disk", NextBackup.WHOLE)


def _way(
    case: Case,
    option: str,
    policy: Salvage,
    does: str,
    backup: NextBackup,
    *more: str,
    proof: Proof = Proof.SUPERSET,
    condition: str | None = None,
) -> WayOut:
    several = ""
    if case.siblings > 1 and case.is_attached:
        more = (*more, "--bitmap", case.name)
    elif case.siblings > 1:  # detached bitmaps count again only all together
        several = f"; so it does for all {case.siblings} bitmaps in this state"
    words = _words(case, "repair", option, policy.value, *more)
    return WayOut(policy.value, words, does + several, backup, proof, condition=condition)


def _rebuilt(case: Case, option: str) -> WayOut | LeftOut:
    if case.is_encrypted:
        return LeftOut(Salvage.REBUILD.value, "the image is encrypted, and its disk can be compared only with the key")
    does = "marks what differs between the disk and BASE, the disk as it was when the bitmap began; reads both in full"
    proof = Proof.EXACT
    if not case.recording:  # it stands for a time that is over, and the disk has changed since
        does, proof = f"{does}; the stale bits are kept beside that", Proof.SUPERSET
    return _way(
        case, option, Salvage.REBUILD, does, NextBackup.INCREMENTAL, "--against", "BASE", proof=proof, condition=_BASE
    )


def _unlike_snapshot(case: Case, option: str) -> WayOut | LeftOut:
    if not case.snapshots:
        return LeftOut(Salvage.SNAPSHOT.value, "the image has no internal snapshot")
    identity = case.snapshots[0].id if len(case.snapshots) == 1 else "ID"
    does = (
        "marks the clusters that are not those of an internal snapshot, for whatever was written since lies elsewhere"
    )
    condition = (_SINCE if case.is_attached else _AT_ONCE) + _BELOW
    words = ("--snapshot", identity, *(() if case.is_attached else ("--snapshot-is-start",)))
    return _way(case, option, Salvage.SNAPSHOT, does, NextBackup.LARGER, *words, condition=condition)


def _allocated(case: Case, option: str) -> WayOut | LeftOut:
    if not case.has_backing:
        text = (
            "the image has no backing file: it holds the disk from its beginning, and not what came after some backup"
        )
        return LeftOut(Salvage.ALLOCATED.value, text)
    does = "marks all that this overlay holds itself, and what the stale bits mark"
    return _way(case, option, Salvage.ALLOCATED, does, NextBackup.LARGER, "--layer-is-newer", condition=_LAYER)


def _given_up(case: Case, option: str) -> WayOut:
    """Its removal: alone where that is possible."""
    command = _words(case, "remove", case.name)
    others = ""
    if case.damage or not case.is_attached:
        # What is lossy elsewhere must not be done along with it.
        command = _words(case, "repair", option, Salvage.REMOVE.value, "--allow", "lossy", "--only", "bitmaps")
        others = f", and with it all others in this state ({case.siblings - 1})" if case.siblings > 1 else ""
    return WayOut(
        Salvage.REMOVE.value, command, f"removes it{others}", NextBackup.FULL, Proof.NONE, RepairClass.LOSSY,
        risk="the bits are gone, as far as no undo file keeps them",
    )  # fmt: skip
