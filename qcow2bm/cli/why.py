"""`qcow2bm why`: why a bitmap is not usable, who wrote last, and the commands that get the user out."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from ..checks.model import Severity
from ..checks.problems import PROBLEMS
from ..errors import naming
from ..repair.ways_out import LeftOut, NextBackup, Proof, Snapshot, WayOut
from ..repair.why import Diagnosis, Reason
from ..repair.why import why as diagnose
from .explain import SEVERITY_COLOURS, print_sentence
from .failures import BROKEN_BITMAP
from .options import BitmapArgument, ImageArgument, OutputOption, ProgressOption
from .output import JsonObject, Output, print_json
from .progress import ProgressBar
from .terminal import painted, printable

IN_USE = 75
"""Exit status: a VM has it, try later."""
_SHOWN = 8
"""Snapshots that are named."""
_NEXT_BACKUP = {
    NextBackup.INCREMENTAL: "an incremental one, of what has changed",
    NextBackup.LARGER: "an incremental one, of what has changed and more",
    NextBackup.WHOLE: "an incremental one that copies the whole disk; the chain of backups goes on",
    NextBackup.FULL: "a full one, with which a new bitmap starts",
    NextBackup.UNDECIDED: "what `qcow2bm why` says of the bitmap afterwards",
}
_PROOF = {
    Proof.EXACT: "exact: a bit is set if its part of the disk has changed, and only then",
    Proof.SUPERSET: "superset: whatever has changed is marked, and more is",
    Proof.UNTOUCHED: "the bits stay as they are",
    Proof.UNKNOWN: "unknown: whether there is such a bitmap shows then",
    Proof.NONE: "none: there is no bitmap afterwards",
}


def why(
    image: ImageArgument,
    bitmap: BitmapArgument,
    *,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Say why a bitmap is not usable, who wrote to the image last, and which commands get you out of it.

    The whole image is checked for it, however damaged it is, and nothing is written. Exit status: 0 the bitmap is
    usable, 4 it is not, 75 a VM has the image open for writing, 1 there is no such bitmap.
    """
    with naming(image), ProgressBar(wanted=progress) as bar:
        found = diagnose(image, bitmap, progress=bar)
    status = IN_USE if found.is_running else 0 if found.is_usable else BROKEN_BITMAP
    if output is Output.JSON:
        print_json(_document(image, found, status))
    else:
        _print(image, found)
    return status


# For reading


def _print(image: Path, found: Diagnosis) -> None:
    verdict = "is usable" if found.is_usable else "is in use by a running VM" if found.is_running else "is not usable"
    colour = "green" if found.is_usable else "yellow"
    print(f"{painted(printable(image), 'bold')}: bitmap '{printable(found.name)}' {painted(verdict, colour)}")
    _print_reasons("why", found.reasons)
    _print_reasons("worth knowing", found.remarks)
    _section("who wrote last")
    for sign in found.signs:
        print_sentence("-", printable(sign.text), indent="    ", column=1)
    if found.is_running:
        _section("ways out")
        print_sentence("-", "shut the VM down and ask again: then its bits are in the file", indent="    ", column=1)
    elif found.ways:
        _section("ways out")
        for way in found.ways:
            _print_way(way, found.snapshots)
    _print_left_out(found.left_out)
    if found.elsewhere:
        _section("elsewhere in the image (`qcow2bm check` has the details)")
        codes = ", ".join(f"{code} ({count})" if count > 1 else code for code, count in found.elsewhere.items())
        print_sentence("-", codes, indent="    ", column=1)


def _section(title: str) -> None:
    print(f"\n  {painted(title, 'bold')}")


def _print_reasons(title: str, reasons: Iterable[Reason]) -> None:
    chosen = list(reasons)
    if not chosen:
        return
    _section(title)
    for reason in chosen:
        colour = SEVERITY_COLOURS.get(PROBLEMS[reason.code].severity) if reason.code is not None else None
        head = f"{painted(reason.code, colour)}: " if reason.code is not None else ""
        more = f", and {reason.count - 1} more" if reason.count > 1 else ""
        print(f"    {head}{printable(reason.message)}{more}")
        print_sentence("means", reason.meaning, indent="      ", column=5)


def _print_way(way: WayOut, snapshots: tuple[Snapshot, ...]) -> None:
    print(f"    {painted(shell_line(way.command), 'green')}")
    label = 11
    print_sentence("does", way.does, indent="      ", column=label)
    print_sentence("proof", _PROOF[way.proof], indent="      ", column=label)
    if way.condition is not None:
        print_sentence("if", way.condition, indent="      ", column=label)
    if way.name == "snapshot":
        for snapshot in snapshots[:_SHOWN]:
            print_sentence("snapshot", printable(_of_snapshot(snapshot)), indent="      ", column=label)
        if len(snapshots) > _SHOWN:
            print_sentence("", f"and {len(snapshots) - _SHOWN} more: `qcow2bm info`", indent="      ", column=label)
    print_sentence("next backup", _NEXT_BACKUP[way.next_backup], indent="      ", column=label)
    cost = f"{way.kind.value}: {way.risk}" if way.risk else way.kind.value
    print_sentence("class", cost, indent="      ", column=label)


def _of_snapshot(snapshot: Snapshot) -> str:
    return f"ID {snapshot.id}, '{snapshot.name}', taken {_time(snapshot.date)}"


def _print_left_out(left_out: tuple[LeftOut, ...]) -> None:
    if left_out:
        _section("not here")
        for name, reason in left_out:
            print_sentence("-", f"{name}: {printable(reason)}", indent="    ", column=1)


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def shell_line(words: Iterable[str]) -> str:
    r"""A command as it can be pasted into a shell, with nothing invisible in it: odd bytes as `$'\xff'`."""
    return " ".join(shlex.quote(word) if word.isprintable() else _escaped(word) for word in words)


def _escaped(word: str) -> str:
    """A word in the quotes that bash, zsh and others know for it."""
    parts = []
    for character in word:
        if character in "\\'":
            parts.append(f"\\{character}")
        elif character.isprintable():
            parts.append(character)
        else:
            parts += [f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape")]
    return "$'" + "".join(parts) + "'"


# For programs


def _document(image: Path, found: Diagnosis, status: int) -> JsonObject:
    return {
        "image": str(image),
        "bitmap": found.name,
        "status": status,
        "usable": found.is_usable,
        "running": found.is_running,
        "state": found.state.value if found.state is not None else None,
        "recording": found.recording,
        "reasons": [_reason(reason) for reason in found.reasons],
        "remarks": [_reason(reason) for reason in found.remarks],
        "signs": [{"kind": sign.kind, "text": sign.text} for sign in found.signs],
        "modified": found.modified.isoformat() if found.modified is not None else None,
        "holders": list(found.holders),
        "snapshots": [
            {"id": one.id, "name": one.name, "date": datetime.fromtimestamp(one.date, UTC).isoformat()}
            for one in found.snapshots
        ],
        "ways-out": [_way(way) for way in found.ways],
        "left-out": [{"name": one.name, "reason": one.reason} for one in found.left_out],
        "elsewhere": found.elsewhere,
        "complete": found.complete,
    }


def _reason(reason: Reason) -> JsonObject:
    severity: Severity | None = PROBLEMS[reason.code].severity if reason.code is not None else None
    return {
        "code": reason.code,
        "severity": severity.value if severity is not None else None,
        "message": reason.message,
        "meaning": reason.meaning,
        "count": reason.count,
    }


def _way(way: WayOut) -> JsonObject:
    return {
        "name": way.name,
        "command": list(way.command),
        "does": way.does,
        "proof": way.proof.value,
        "condition": way.condition,
        "next-backup": way.next_backup.value,
        "class": way.kind.value,
        "risk": way.risk or None,
    }
