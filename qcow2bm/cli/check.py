"""`qcow2bm check`: is an image sound, and are its bitmaps?"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..checks.model import Allocation, Finding, Location, Problem, Report, Severity
from ..checks.problems import PROBLEMS
from ..checks.runner import DEFAULT_LIMIT
from ..checks.runner import check as check_image
from ..errors import Qcow2bmError, UsageError
from ..image.references import Kind
from .committing import reporting
from .failures import worst
from .list import ImagesArgument
from .options import ForceShareOption, OutputOption, ProgressOption
from .output import Cell, JsonObject, Output, complain, print_json, print_pairs, warn
from .progress import ProgressBar
from .sizes import human_size, percent
from .terminal import painted, printable
from .verdicts import verdict

OwnersOption = Annotated[
    bool,
    typer.Option("--owners", help="Say of every wrong cluster who refers to it.", show_default=False),
]
LimitOption = Annotated[
    int,
    typer.Option("--max-findings", metavar="N", min=0, help="Findings of each problem to keep; all are counted."),
]


class Mend(StrEnum):
    """What `check -r` repairs."""

    LEAKS = "leaks"
    ALL = "all"
    BITMAPS = "bitmaps"


RepairOption = Annotated[
    Mend | None,
    typer.Option(
        "--repair", "-r", show_default=False,
        help="Repair too, without asking: leaked clusters, the bitmaps, or all that nothing is lost by.",
    ),
]  # fmt: skip

_SHOWN = 3
"""Findings of each problem that are shown for reading."""
_COLOURS = {Severity.CORRUPTION: "red", Severity.UNKNOWN: "red", Severity.BITMAP: "yellow", Severity.LEAK: "yellow"}


def check(
    images: ImagesArgument,
    *,
    repair: RepairOption = None,
    owners: OwnersOption = False,
    max_findings: LimitOption = DEFAULT_LIMIT,
    force_share: ForceShareOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Check images and their bitmaps for every corruption, leak and fault. Never writes, unless asked to with -r.

    Each image is judged by itself, and the worst exit status counts: 0 clean, 2 corrupt, 3 leaked clusters only,
    4 data and refcounts are fine but a bitmap is unusable, 75 in use. Guest data is not read, and neither the backing
    file nor an external data file is opened. What -r does, and more, is `repair`.
    """
    if repair is not None:
        if force_share:
            raise UsageError("-U reads an image that others write to, -r writes to it")
        if owners or max_findings != DEFAULT_LIMIT:
            raise UsageError("--owners and --max-findings are for a check without -r")
        return _repair(images, repair, output, progress)
    documents: list[JsonObject] = []
    statuses: list[int] = []
    for path in images:
        try:
            with ProgressBar(wanted=progress) as bar:
                report = check_image(path, owners=owners, limit=max_findings, force_share=force_share, progress=bar)
        except Qcow2bmError as error:
            complain(error)
            documents.append(_failure(path, error))
            statuses.append(error.exit_status)
            continue
        if not report.locked:
            warn("read without keeping writers out: what is found may be stale", path)
        statuses.append(report.exit_status)
        if output is Output.JSON:
            documents.append(_document(path, report))
        else:
            _print(path, report)
    if output is Output.JSON:
        print_json({"images": documents})
    return worst(statuses)


def _repair(images: list[Path], mend: Mend, output: Output, progress: bool | None) -> int:
    """Repair images one after the other, each by itself."""
    from ..repair.model import RepairPolicy
    from .repair import Manner, run  # what a check alone does not need

    only = {Mend.ALL: None, Mend.LEAKS: "leaks", Mend.BITMAPS: "bitmaps"}[mend]
    policy = RepairPolicy.lossless(only)
    documents: list[JsonObject] = []
    statuses: list[int] = []
    for path in images:
        try:
            document, report = run(path, policy, Manner(assume_yes=True, output=output, progress=progress))
            documents.append(document)
            statuses.append(report.exit_status)
        except Qcow2bmError as error:
            complain(error)
            documents.append(_failure(path, error))
            statuses.append(error.exit_status)
    if output is Output.JSON:
        changed = [path for path, document in zip(images, documents, strict=True) if document.get("changed")]
        with reporting(*changed) if changed else contextlib.nullcontext():
            print_json({"images": documents})
    return worst(statuses)


def _failure(path: Path, error: Qcow2bmError) -> JsonObject:
    problem = {"message": error.message, "hint": error.hint}
    return {"image": str(path), "status": error.exit_status, "error": problem}


# For reading


def _print(path: Path, report: Report) -> None:
    """The verdict, then the problems, worst first: what was found, what it means, what to do."""
    colour = _COLOURS.get(report.worst or Severity.HINT, "green")
    print(f"{painted(printable(path), 'bold')}: {painted(verdict(report), colour)}")
    if not report.complete:
        print("  part of the image could not be checked: see below")
    if report.worst is Severity.CORRUPTION:
        print("  start no VM from it before that is settled; `qcow2bm repair --dry-run` says what can be done")
    for problem, findings in _by_problem(report):
        count = report.counts[problem.code]
        head = f"{problem.severity.value} {problem.code}" + (f" ({count})" if count > 1 else "")
        print(f"\n  {painted(head, _COLOURS.get(problem.severity))}: {problem.title}")
        for finding in findings[:_SHOWN]:
            print(f"    {printable(finding.message)}")
            for owner in finding.owners or ():
                print(f"      used by {printable(owner)}")
        hidden = count - sum(finding.count for finding in findings[:_SHOWN])
        if hidden > 0:
            print(f"    and {hidden} more")
        print(f"    means: {problem.meaning}")
        print(f"    do:    {problem.advice}")
    if report.allocation.total:
        print()
        print_pairs(_summary(report.allocation), indent="  ")


def _by_problem(report: Report) -> Iterator[tuple[Problem, list[Finding]]]:
    kept: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        kept[finding.code].append(finding)
    order = list(Severity)
    for code in sorted(report.counts, key=lambda code: order.index(PROBLEMS[code].severity)):
        yield PROBLEMS[code], kept[code]


def _summary(allocation: Allocation) -> Iterator[tuple[str, str | Cell]]:
    used = allocation.allocated
    share = percent(used, allocation.total)
    shares = f"{percent(allocation.fragmented, used)} fragmented, {percent(allocation.compressed, used)} compressed"
    yield "allocated", f"{used} of {allocation.total} clusters ({share}), {shares}"
    yield "image ends at", human_size(allocation.image_end_offset)
    for kind, size in allocation.kinds.items():
        if size:
            yield kind.value, human_size(size)
        if kind is Kind.BITMAPS:
            yield from ((f"  {printable(name)}", human_size(taken)) for name, taken in allocation.bitmaps)


# For programs


def _document(path: Path, report: Report) -> JsonObject:
    return {
        "image": str(path),
        "status": report.exit_status,
        "verdict": report.worst.value if report.worst is not None else "clean",
        "complete": report.complete,
        "stale": not report.locked,
        "severities": {severity.value: report.severities.get(severity, 0) for severity in Severity},
        "counts": dict(report.counts),
        "findings": [_finding(finding) for finding in report.findings],
        "findings-dropped": report.dropped,
        "allocation": _allocation(report.allocation),
    }


def _finding(finding: Finding) -> JsonObject:
    return {
        "code": finding.code,
        "severity": finding.severity.value,
        "repair": finding.problem.repair.value,
        "qemu-img": finding.qemu.value,
        "message": finding.message,
        "count": finding.count,
        "location": dict(_location(finding.location)),
        "values": {name.replace("_", "-"): value for name, value in finding.values.items()},
        "owners": list(finding.owners) if finding.owners is not None else None,
    }


def _location(location: Location) -> Iterable[tuple[str, object]]:
    for name in location.__slots__:
        value = getattr(location, name)
        if value is not None:
            yield name.replace("_", "-"), value


def _allocation(allocation: Allocation) -> JsonObject:
    return {
        "total-clusters": allocation.total,
        "allocated-clusters": allocation.allocated,
        "fragmented-clusters": allocation.fragmented,
        "compressed-clusters": allocation.compressed,
        "image-end-offset": allocation.image_end_offset,
        "bytes": {kind.value: size for kind, size in allocation.kinds.items()},
        "bitmaps": [{"name": name, "bytes": size} for name, size in allocation.bitmaps],
    }
