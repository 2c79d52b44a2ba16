"""`qcow2bm repair`: work out what mends an image, show it, and carry it out."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ..checks.model import RepairClass, Report
from ..errors import OutdatedPlanError, UndoError, UsageError
from ..repair.model import RepairPolicy, Salvage, Scope, Step
from ..repair.session import Repair, default_undo, repairing
from .committing import committing, proposing, reporting
from .options import DryRunOption, ImageArgument, NoLockOption, OutputOption, ProgressOption
from .output import Output, print_json
from .progress import ProgressBar
from .reading import warn_opened
from .repair_options import (
    AgainstFormatOption,
    AgainstOption,
    Allow,
    AllowOption,
    ApplyOption,
    DataFileOption,
    DetachedOption,
    InteractiveOption,
    InUseOption,
    LayerOption,
    NamesOption,
    NoUndoOption,
    OnlyOption,
    SaveOption,
    SnapshotOption,
    StaleOption,
    StartOption,
    UndoFileOption,
    YesOption,
)
from .repair_output import print_plan, print_result, repair_json, step_lines
from .saved_plan import load_plan, save_plan
from .terminal import is_terminal, printable


@dataclass(frozen=True, slots=True)
class Manner:
    """How a repair is run; what it may do is its policy.

    Attributes:
        expected: the fingerprint of the plan that is to be carried out.
        declined: keys of steps that are not to be taken.
    """

    dry_run: bool = False
    assume_yes: bool = False
    interactive: bool = False
    undo: Path | None = None
    save: Path | None = None
    expected: str | None = None
    declined: frozenset[str] = frozenset()
    use_locks: bool = True
    output: Output = Output.HUMAN
    progress: bool | None = None


def repair(
    image: ImageArgument,
    *,
    allow: AllowOption = Allow.LOSSLESS,
    only: OnlyOption = None,
    in_use: InUseOption = Salvage.KEEP,
    detached: DetachedOption = Salvage.KEEP,
    bitmap: NamesOption = None,
    against: AgainstOption = None,
    against_format: AgainstFormatOption = None,
    data_file: DataFileOption = None,
    snapshot: SnapshotOption = None,
    layer_is_newer: LayerOption = False,
    snapshot_is_start: StartOption = False,
    stale: StaleOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    interactive: InteractiveOption = False,
    undo: UndoFileOption = None,
    no_undo: NoUndoOption = False,
    plan: SaveOption = None,
    apply: ApplyOption = None,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Repair an image and its bitmaps: plan first, then all of it or nothing, with an undo file.

    Every step is lossless, lossy (something the image refers to is given up) or a guess; only lossless ones are taken
    unless --allow says otherwise. The result is judged before anything is written, and the image is checked again
    afterwards: that is the exit status.

    Policies for --in-use and --detached: keep, remove, all-dirty, allocated, rebuild, snapshot.
    """
    policy = RepairPolicy(
        allow=RepairClass(allow.value),
        only=frozenset(only or ()),
        in_use=in_use,
        detached=detached,
        bitmaps=frozenset(bitmap or ()),
        against=against,
        against_format=None if against_format is None else against_format.value,
        data_file=data_file,
        snapshot=snapshot,
        layer_is_newer=layer_is_newer,
        snapshot_is_start=snapshot_is_start,
        keep_stale=stale,
        keeps_undo=not no_undo,
    )
    manner = Manner(
        dry_run=dry_run or plan is not None,
        assume_yes=yes,
        interactive=interactive,
        undo=undo,
        save=plan,
        use_locks=not no_lock,
        output=output,
        progress=progress,
    )
    if apply is not None:
        if policy != RepairPolicy(keeps_undo=not no_undo) or interactive or dry_run or plan is not None:
            raise UsageError("--apply carries out a plan as it was saved", hint="leave the options that make a plan")
        policy, expected, declined = load_plan(apply, keeps_undo=not no_undo)
        manner = replace(manner, expected=expected, declined=declined)
    _require_sense(policy, manner)
    document, report = run(image, policy, manner)
    if output is Output.JSON:
        with reporting(image) if document["changed"] else contextlib.nullcontext():
            print_json({"command": "repair", **document})
    return report.exit_status


def _require_sense(policy: RepairPolicy, manner: Manner) -> None:
    """Refuse options that contradict each other, before anything is opened.

    Raises:
        UsageError: they do.
    """
    if manner.undo is not None and not policy.keeps_undo:
        raise UsageError("--undo and --no-undo contradict each other")
    if manner.interactive and (manner.assume_yes or manner.output is Output.JSON):
        raise UsageError("--interactive asks, --yes and --output json do not", hint="choose one of them")
    if manner.output is Output.JSON and not (manner.dry_run or manner.assume_yes):
        raise UsageError("--output json asks nothing", hint="say --dry-run or --yes")
    if not manner.interactive and not manner.dry_run and not manner.assume_yes and not _is_terminal():
        raise UsageError("nobody can be asked here", hint="look at the plan with --dry-run, then repeat with --yes")
    if manner.interactive and not _is_terminal():
        raise UsageError("--interactive needs a terminal")
    _require_sensible_salvage(policy)


def _require_sensible_salvage(policy: RepairPolicy) -> None:
    """The options that belong to a policy for bitmaps go with it; raises as `_require_sense`."""
    salvages = (policy.in_use, policy.detached)
    for option, given, wanted in (
        ("--against", policy.against is not None, Salvage.REBUILD),
        ("--snapshot", policy.snapshot is not None, Salvage.SNAPSHOT),
    ):
        if given != (wanted in salvages):
            raise UsageError(f"{option} goes with the policy {wanted.value}, and that policy with it")
    for option, given, wanted in (
        ("--against-format", policy.against_format is not None, Salvage.REBUILD),
        ("--data-file", policy.data_file is not None, Salvage.REBUILD),
        ("--snapshot-is-start", policy.snapshot_is_start, Salvage.SNAPSHOT),
        ("--layer-is-newer", policy.layer_is_newer, Salvage.ALLOCATED),
    ):
        if given and wanted not in salvages:
            raise UsageError(f"{option} goes with the policy {wanted.value}")
    if salvages == (Salvage.KEEP, Salvage.KEEP):
        if policy.bitmaps or policy.keep_stale is not None:
            raise UsageError("--bitmap and --stale go with --in-use or --detached", hint="give one of them too")
    elif not policy.covers(Scope.BITMAPS):
        raise UsageError("--only leaves the bitmaps out, --in-use or --detached is about them")
    if Salvage.REMOVE in salvages and not policy.allows(RepairClass.LOSSY):
        raise UsageError("removing bitmaps is lossy", hint="say --allow lossy too")


def _is_terminal() -> bool:
    """True if somebody can be asked; a stream that the caller has closed is none."""
    return sys.stdin is not None and is_terminal(sys.stdin) and is_terminal(sys.stderr)


def run(image: Path, policy: RepairPolicy, manner: Manner) -> tuple[dict[str, object], Report]:
    """Repair one image; what happened as a JSON object, and what a check finds afterwards.

    Raises:
        UsageError: nobody can be asked.
        Qcow2bmError: the repair cannot be worked out or carried out; the image is as before.
    """
    declined: list[str] = []

    def ask(step: Step) -> bool:
        taken = step.key not in manner.declined and (not manner.interactive or _agrees(step_lines(step), "Do this?"))
        if not taken:
            declined.append(step.key)
        return taken

    with (
        ProgressBar(wanted=manner.progress) as bar,
        repairing(
            image, policy, writable=not manner.dry_run, use_locks=manner.use_locks, ask=ask, progress=bar
        ) as session,
    ):
        warn_opened(image, unlocked=manner.use_locks and not session.locked, settled=session.settled)
        if session.file.is_device and policy.keeps_undo and manner.undo is None and not manner.dry_run:
            text = "a repair on a device needs a journal, and that a place which a crash leaves alone"
            hint = "name a file on another disk: `qcow2bm repair DEVICE --undo FILE`"
            raise UndoError(text, hint=hint, image=image)
        if manner.expected is not None and session.fingerprint != manner.expected:
            text = "the image has changed since the plan was made"
            raise OutdatedPlanError(text, hint="make a new plan", image=image)
        if manner.save is not None:
            save_plan(manner.save, session, policy, frozenset(declined), image)
        return _finish(session, image, policy, manner)


def _finish(session: Repair, image: Path, policy: RepairPolicy, manner: Manner) -> tuple[dict[str, object], Report]:
    """Show the plan, ask, carry it out, and say what came of it."""
    human = manner.output is Output.HUMAN
    if human:
        with proposing():
            print_plan(image, session.plan)
    if manner.dry_run or not session.plan.plan:
        if human and session.plan.plan:
            print("dry run: nothing was written")
        return repair_json(image, session, changed=False, undo=None), session.plan.after
    if not (manner.assume_yes or manner.interactive or _agrees((), f"Repair {printable(image)}?")):
        print("nothing was written")
        return repair_json(image, session, changed=False, undo=None), session.plan.before
    undo = None
    if policy.keeps_undo:
        undo = manner.undo if manner.undo is not None else default_undo(image)
    with committing(session.plan.plan, None) as written:
        report = session.commit(undo=undo, progress=written)
    if human:
        with reporting(image):
            print_result(report, undo, image)
    return repair_json(image, session, changed=True, undo=undo, report=report), report


def _agrees(lines: tuple[str, ...], question: str) -> bool:
    """Ask on the terminal; anything but yes is no."""
    for line in lines:
        print(line, file=sys.stderr)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
