"""A repair plan and its result, for reading and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..checks.model import RepairClass, Report, Severity
from ..repair.model import Patch, RepairPlan, Step
from ..repair.session import Repair
from .output import JsonObject
from .sizes import human_size
from .terminal import painted, printable
from .verdicts import verdict

_SHOWN = 6
"""Edits and guest ranges of a step that are shown for reading."""
_COLOURS = {RepairClass.LOSSLESS: "green", RepairClass.LOSSY: "yellow", RepairClass.GUESS: "red"}


def print_plan(image: Path, plan: RepairPlan) -> None:
    """What was found, the steps, what is not done and why, and what a check would say afterwards."""
    print(f"{painted(printable(image), 'bold')}: {verdict(plan.before)}")
    for number, step in enumerate(plan.steps, 1):
        print(f"\nstep {number}: " + "\n".join(step_lines(step)))
        for edit in step.edits[:_SHOWN]:
            print(f"    {_edit_line(edit)}")
        left = len(step.edits) + step.edits_left_out - _SHOWN
        if left > 0:
            print(f"    and {left} more writes")
    for step in plan.refused:
        print(f"\nnot done: {printable(step.title)} ({step.kind.value}): {printable(step.refused)}")
        for line in _guest_lines(step):
            print(line)
    if not plan.steps:
        print("nothing is repaired" if plan.refused or plan.before.exit_status else "nothing to repair")
        return
    growth = plan.plan.growth
    grows = f"the file would grow by {human_size(growth)}" if growth else "the file would not grow"
    print(f"\nwould write {human_size(plan.plan.bytes_written)}; {grows}")
    print(f"afterwards: {verdict(plan.after)}{_left(plan.after)}")


def _left(report: Report) -> str:
    counts = [f"{code} ({count})" for code, count in report.counts.items() if report.exit_status]
    return f": {', '.join(counts[:_SHOWN])}" if counts else ""


def step_lines(step: Step) -> tuple[str, ...]:
    """Title and class of a step, what it mends, and the parts of the guest's disk that are concerned."""
    kind = painted(step.kind.value, _COLOURS.get(step.kind))
    lines = [f"{printable(step.title)} [{kind}]"]
    if step.codes:
        mends = ", ".join(f"{code} ({count})" if count > 1 else code for code, count in step.codes.items())
        lines.append(f"    mends {mends}")
    if step.proof is not None:
        lines.append(f"    proof: {printable(step.proof)}")
    return (*lines, *_guest_lines(step))


def _guest_lines(step: Step) -> Iterator[str]:
    for offset, length in step.guest[:_SHOWN]:
        yield f"    guest data concerned: {offset:#x}+{human_size(length)}"
    if len(step.guest) > _SHOWN:
        total = sum(length for _, length in step.guest)
        yield f"    and {len(step.guest) - _SHOWN} more ranges, {human_size(total)} in all"


def _edit_line(edit: Patch) -> str:
    change = f"{edit.old.hex()} -> {edit.new.hex()}" if edit.length <= 16 and edit.old else ""
    return f"{edit.offset:#014x} {edit.length:>8}  {printable(edit.purpose)}  {change}".rstrip()


def print_result(report: Report, undo: Path | None, image: Path) -> None:
    """What a check says now, and how to go back."""
    colour = "green" if report.worst in (None, Severity.WARNING, Severity.HINT) else "yellow"
    print(f"\ndone; now {painted(verdict(report), colour)}{_left(report)}")
    if undo is not None:
        print(f"undo file: {printable(undo)}")
        print(f"to go back: qcow2bm undo {printable(image)} {printable(undo)}")


def repair_json(
    image: Path, session: Repair, *, changed: bool, undo: Path | None, report: Report | None = None
) -> dict[str, object]:
    """All of it as one object; `report` is of the check after the repair, where there was one."""
    plan = session.plan
    after = plan.after if report is None else report
    return {
        "image": str(image),
        "changed": changed,
        "rolled-back": session.rolled_back,
        "status-before": plan.before.exit_status,
        "status": after.exit_status,
        "verdict": after.worst.value if after.worst is not None else "clean",
        "counts-before": dict(plan.before.counts),
        "counts": dict(after.counts),
        "steps": [_step_json(step) for step in plan.steps],
        "not-done": [_step_json(step) for step in plan.refused],
        "bytes-written": plan.plan.bytes_written,
        "growth": plan.plan.growth,
        "undo-file": None if undo is None else str(undo),
    }


def _step_json(step: Step) -> JsonObject:
    return {
        "title": step.title,
        "class": step.kind.value,
        "scope": None if step.scope is None else step.scope.value,
        "mends": dict(step.codes),
        "guest-ranges": [{"offset": offset, "length": length} for offset, length in step.guest],
        "bitmap": step.bitmap,
        "proof": step.proof,
        "refused": step.refused,
        "writes": [
            {
                "offset": edit.offset,
                "length": edit.length,
                "old": edit.old.hex(),
                "new": edit.new.hex(),
                "purpose": edit.purpose,
            }
            for edit in step.edits
        ],
        "writes-left-out": step.edits_left_out,
    }
