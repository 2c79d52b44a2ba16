"""`qcow2bm explain`: what a problem means, what QEMU makes of it, what a repair does, and what that can cost."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Annotated

import typer

from ..checks.model import Problem, RepairClass, Severity
from ..checks.problems import PROBLEMS
from ..checks.remedies import COSTS, IN_QEMU, REMEDIES
from ..errors import UsageError
from .options import OutputOption
from .output import Cell, Column, JsonObject, Output, print_json, print_table
from .terminal import painted, width

SEVERITY_COLOURS = {
    Severity.CORRUPTION: "red",
    Severity.UNKNOWN: "red",
    Severity.BITMAP: "yellow",
    Severity.LEAK: "yellow",
}
_SEVERITIES = {
    Severity.CORRUPTION: "guest data is or may be wrong, or the next write may make it so",
    Severity.UNKNOWN: "the image cannot be judged",
    Severity.BITMAP: "data and refcounts are not concerned, but a bitmap is",
    Severity.LEAK: "wasted space, no harm to data",
    Severity.WARNING: "costs nothing today, but is not as it should be",
    Severity.HINT: "worth knowing",
}
_LABEL = 9
"""Columns of the longest label."""
_READABLE = 100
"""Columns of a line that is easy to read, on a terminal that has more."""
_SUGGESTED = 5


def problem_codes(context: typer.Context, incomplete: str) -> list[str]:
    """Codes for the shell's completion, without those that are on the line already."""
    given = context.params.get("codes") or []
    return [code for code in PROBLEMS if code.startswith(incomplete) and code not in given]


CodesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CODE]...",
        help="Codes as `check` prints them.",
        show_default=False,
        autocompletion=problem_codes,
    ),
]
ListOption = Annotated[bool, typer.Option("--list", help="List all codes instead.", show_default=False)]


def explain(codes: CodesArgument = None, *, list_all: ListOption = False, output: OutputOption = Output.HUMAN) -> int:
    """Explain problems that `check` finds: what one means, what QEMU makes of it, what to do about it.

    And what `qcow2bm repair` does about it, with what that can cost: nothing (lossless), something that the image
    refers to (lossy), or nobody knows (guess).
    """
    if bool(codes) == list_all:
        raise UsageError("name the codes to explain, or --list to see all of them")
    chosen = list(PROBLEMS.values()) if not codes else [_named(code) for code in dict.fromkeys(codes)]
    if output is Output.JSON:
        print_json({"problems": [_document(problem) for problem in chosen]})
    elif list_all:
        _print_list(chosen)
    else:
        for number, problem in enumerate(chosen):
            print(end="\n" if number else "")
            _print(problem)
    return 0


def _named(code: str) -> Problem:
    """The problem with this code.

    Raises:
        UsageError: there is none.
    """
    if code in PROBLEMS:
        return PROBLEMS[code]
    near = [known for known in PROBLEMS if len(code) > 2 and code in known]
    near = near or get_close_matches(code, PROBLEMS, n=_SUGGESTED)
    names = [known for known in PROBLEMS if known in near[:_SUGGESTED]]
    hint = f"close to it: {', '.join(names)}" if names else "`qcow2bm explain --list` shows all there are"
    raise UsageError(f"no problem has the code '{code}'", hint=hint)


# For reading


def _print_list(problems: Iterable[Problem]) -> None:
    headings = [Column("CODE"), Column("SEVERITY"), Column("REPAIR"), Column("TITLE", flexible=True)]
    rows = [
        (
            problem.code,
            Cell(problem.severity.value, SEVERITY_COLOURS.get(problem.severity)),
            problem.repair.value,
            problem.title,
        )
        for problem in problems
    ]
    print_table(headings, rows)


def _print(problem: Problem) -> None:
    print(painted(problem.code, "bold") + f": {problem.title}")
    for label, text in _sentences(problem):
        print_sentence(label, text)


def _sentences(problem: Problem) -> Iterator[tuple[str, str]]:
    severity, remedy = problem.severity, REMEDIES[problem.code]
    yield "severity", f"{severity.value}: {_SEVERITIES[severity]}; `check` ends with status {severity.exit_status}"
    yield "means", problem.meaning
    if problem.hides:
        yield "", "clusters that look like leaks may be what it has cut off"
    yield "QEMU", IN_QEMU[problem.qemu]
    yield "repair", remedy.does
    yield "class", f"{problem.repair.value}: {COSTS[problem.repair]}"
    if problem.repair is not RepairClass.NONE:
        yield "risk", remedy.risk or "none"
    yield "do", problem.advice


def print_sentence(label: str, text: str, *, indent: str = "  ", column: int = _LABEL) -> None:
    """A label and what is to be said, in lines that fit the terminal; piped in one line, however long."""
    head, columns = f"{indent}{painted(label.ljust(column), 'dim')} ", width(sys.stdout)
    room = min(columns, _READABLE) - len(indent) - column - 1 if columns is not None else None
    lines = textwrap.wrap(text, max(room, 20), break_on_hyphens=False) if room is not None else [text]
    below = " " * (len(indent) + column + 1)
    print(head + ("\n" + below).join(lines))


# For programs


def _document(problem: Problem) -> JsonObject:
    remedy = REMEDIES[problem.code]
    return {
        "code": problem.code,
        "title": problem.title,
        "severity": problem.severity.value,
        "status": problem.severity.exit_status,
        "meaning": problem.meaning,
        "hides": problem.hides,
        "qemu-img": problem.qemu.value,
        "in-qemu": IN_QEMU[problem.qemu],
        "repair": problem.repair.value,
        "remedy": remedy.does,
        "risk": remedy.risk or None,
        "advice": problem.advice,
    }
