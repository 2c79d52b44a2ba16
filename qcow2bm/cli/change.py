"""What every command that changes bitmaps does: open, draft, plan, then print the plan or carry it out and say so."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import api
from ..bitmap.edit import Edit
from ..errors import UsageError, naming
from ..image.plan import DataFile, DiskSize, Plan, Stage
from .committing import commit, reporting
from .options import DryRunOption, NoLockOption, OutputOption, ProgressOption, UndoOption
from .output import JsonObject, Output, print_json, warn
from .progress import ProgressBar
from .reading import bitmaps_json, warn_opened
from .sizes import human_size
from .terminal import painted, printable


@dataclass(frozen=True, slots=True)
class How:
    """The options that all changing commands have."""

    command: str
    dry_run: bool
    undo: Path | None
    use_locks: bool
    output: Output
    progress: bool | None


def _how(
    command: str,
    *,
    dry_run: DryRunOption = False,
    undo: UndoOption = None,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> How:
    return How(command, dry_run, undo, not no_lock, output, progress)


def changing(command: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the options that all changing commands have, behind its own; it gets them as `how`."""
    shared = {
        name: parameter
        for name, parameter in inspect.signature(_how, eval_str=True).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        signature = inspect.signature(function, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "how"]

        @functools.wraps(function)
        def called(*words: object, **options: Any) -> int:  # noqa: ANN401 - whatever the signature below says
            how = _how(command, **{name: options.pop(name) for name in shared if name in options})
            return function(*words, how=how, **options)

        # What Typer reads the command line from.
        called.__signature__ = signature.replace(parameters=[*own, *shared.values()])  # type: ignore[attr-defined]
        return called

    return decorate


def change(path: Path, edit: Callable[[api.Image, Edit], object], how: How) -> int:
    """Let `edit` draft what is wanted, then commit it all at once, or print the plan of it."""

    def drafted(image: api.Image) -> Plan:
        image.qcow2.require_writable()
        draft = image.draft()
        edit(image, draft)
        _warn_of_broken(path, draft)
        return draft.plan()

    return change_as_planned(path, drafted, how)


def change_as_planned(path: Path, planned: Callable[[api.Image], Plan], how: How) -> int:
    """Let `planned` say what to write, then commit it, or print it.

    A dry run opens the image as a reader, so that it cannot write even if it wanted to.
    """
    with api.open(path, writable=not how.dry_run, use_locks=how.use_locks) as image:
        warn_opened(path, unlocked=how.use_locks and not image.qcow2.locked, settled=image.qcow2.settled)
        with naming(path):
            plan = planned(image)
        if how.dry_run:
            _print_plan(path, plan, how)
        else:
            with ProgressBar(wanted=how.progress) as bar:
                commit(image, plan, undo=how.undo, progress=bar)
            with reporting(path):
                _print_result(image, plan, how)
    return 0


def _warn_of_broken(path: Path, draft: Edit) -> None:
    """The change is sound, and the image may still not open: who starts a VM next wants to know."""
    broken = draft.broken()
    if broken:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        what = f"bitmap '{broken[0].name}' is broken ({broken[0].fault}){others}"
        ways = "`qcow2bm repair --only bitmaps` or `qcow2bm remove` takes it out"
        warn(f"{what}: QEMU may refuse the whole image as long as it stays; {ways}", path)


def chosen(draft: Edit, names: list[str] | None, patterns: list[str] | None) -> list[str]:
    """The bitmaps named, then those that match a pattern, each once.

    Raises:
        UsageError: there is neither name nor pattern.
        BitmapNotFoundError: a pattern matches none.
    """
    if not names and not patterns:
        raise UsageError("no bitmap is named", hint="name some, or use --match GLOB")
    matching = draft.names(*patterns) if patterns else []
    return list(dict.fromkeys([*(names or []), *matching]))


# What it prints


def _print_plan(path: Path, plan: Plan, how: How) -> None:
    if how.output is Output.JSON:
        print_json({**_summary_json(path, plan, how), "stages": [_stage_json(plan, stage) for stage in plan.stages]})
        return
    _print_summary(plan)
    for number, stage in enumerate(plan.stages, 1):
        mark = "  <- the new state becomes the valid one" if stage is plan.stages[plan.commit_stage] else ""
        print(f"\n{painted(f'stage {number}: {stage.name}', 'bold')}{mark}")
        for write in stage.writes:
            print(f"  {write.offset:#014x}  {write.length:>9}  {printable(write.purpose)}")
    if plan:
        print(f"\nwould write {human_size(plan.bytes_written)}; {_growth(plan, 'would grow', 'would not grow')}")
        _print_cuts(plan, plan.cut_to, how, "would be")
        if plan.then is not None and how.undo is None:
            print("at most: what the change puts at the file's end then moves to the front, if that makes it shorter")
        print("dry run: nothing was written")


def _print_result(image: api.Image, plan: Plan, how: How) -> None:
    undo = how.undo if plan else None
    if how.output is Output.JSON:
        rest = {
            "undo-file": None if undo is None else str(undo),
            "rolled-back": image.qcow2.rolled_back,
            "bitmaps": bitmaps_json(image.bitmaps),
            "file-size": image.qcow2.file.size,
        }
        print_json({**_summary_json(image.path, plan, how), **rest})
        return
    _print_summary(plan)
    if plan:
        print(f"wrote {human_size(plan.bytes_written)}; {_growth(plan, 'grew', 'did not grow')}")
        size = image.qcow2.file.size
        _print_cuts(plan, plan.cut_to if how.undo is not None else size if size < plan.size_after else None, how, "was")
    if undo is not None:
        print(f"undo file: {printable(undo)}")


def _print_summary(plan: Plan) -> None:
    for line in plan.summary:
        print(printable(line))
    if not plan:
        print("nothing to do: the image is that way already")


def _growth(plan: Plan, grows: str, stays: str) -> str:
    return f"the file {grows} by {human_size(plan.growth)}" if plan.growth else f"the file {stays}"


def _print_cuts(plan: Plan, cut_to: int | None, how: How, was: str) -> None:
    """What becomes of the end of the file, and of the data file, where nothing uses it any more."""
    data_file = plan.data_file
    cuts = [("the file", cut_to)] if cut_to is not None else []
    if data_file is not None and data_file.cut_to < data_file.extend_to:
        cuts.append(("the data file", data_file.cut_to))
    for what, size in cuts:
        if how.undo is None:
            print(f"{what} {was} cut to {human_size(size)}")
        else:
            print(f"{what} keeps its length, so that `undo` can put all of it back; it could be {human_size(size)}")
    if data_file is not None and data_file.extend_to > data_file.size_before:
        print(f"the data file {was} extended to {human_size(data_file.extend_to)}")
    if data_file is not None and how.undo is not None:
        print("the data file is not part of the undo file: `undo` leaves it as it is then")


def _file_size(plan: Plan, how: How) -> int:
    return plan.cut_to if plan.cut_to is not None and how.undo is None else plan.size_after


def _summary_json(path: Path, plan: Plan, how: How) -> dict[str, object]:
    return {
        "command": how.command,
        "image": str(path),
        "dry-run": how.dry_run,
        "changed": bool(plan) and not how.dry_run,
        "summary": list(plan.summary),
        "bytes-written": plan.bytes_written,
        "growth": plan.growth,
        "file-size": _file_size(plan, how),
        **({} if plan.disk is None else {"resize": _resize_json(plan, plan.disk, how)}),
    }


def _resize_json(plan: Plan, disk: DiskSize, how: How) -> JsonObject:
    return {
        "virtual-size-before": disk.old,
        "virtual-size-after": disk.new,
        "new-bytes-not-zero": disk.not_zero,
        "data-file": None if plan.data_file is None else _data_file_json(plan.data_file, how),
    }


def _data_file_json(file: DataFile, how: How) -> JsonObject:
    size = file.extend_to if how.undo is not None else file.cut_to
    action = "kept" if size == file.size_before else "extended" if size > file.size_before else "cut"
    return {"path": str(file.path), "size-before": file.size_before, "size-after": size, "action": action}


def _stage_json(plan: Plan, stage: Stage) -> JsonObject:
    writes = [
        {"offset": write.offset, "length": write.length, "purpose": write.purpose, "overwrites": write.old is not None}
        for write in stage.writes
    ]
    commits = stage is plan.stages[plan.commit_stage]
    return {"name": stage.name, "atomic": stage.is_atomic, "commits": commits, "writes": writes}
