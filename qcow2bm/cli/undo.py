"""`qcow2bm undo`: put back what a command changed, or only bitmaps that a repair took out; or show what could be."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import api
from ..errors import UndoError, UsageError, naming
from ..image.plan import Plan
from .committing import commit, reporting
from .failures import Postponed
from .options import DryRunOption, ImageArgument, NoLockOption, OutputOption, ProgressOption, UndoOption
from .output import Cell, Column, JsonObject, Output, print_json, print_pairs, print_table, warn
from .progress import ProgressBar
from .reading import warn_opened
from .sizes import exact_size, human_size
from .terminal import printable

if TYPE_CHECKING:
    from ..bitmap.bring_back import Quarantine
    from ..bitmap.edit import Edit
    from ..bitmap.quarantine import Quarantined
    from ..image.undo_data_file import NotedDataFile

UndoFileArgument = Annotated[
    Path, typer.Argument(metavar="UNDO-FILE", help="The file that --undo made.", show_default=False)
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Do it although the time stamp of the image or its data file says that it was written to, or none tells.",
        show_default=False,
    ),
]
ListOption = Annotated[
    bool, typer.Option("--list", help="Show what the undo file holds; change nothing.", show_default=False)
]
BitmapOption = Annotated[
    list[str] | None,
    typer.Option("--bitmap", metavar="NAME", help="Bring back this quarantined bitmap only.", show_default=False),
]
NumberOption = Annotated[
    list[int] | None,
    typer.Option("--number", metavar="N", help="The same, by its number in --list.", show_default=False),
]
AsOption = Annotated[
    str | None, typer.Option("--as", metavar="NEW", help="Another name for that bitmap.", show_default=False)
]
StaleOption = Annotated[
    bool,
    typer.Option(
        "--stale", help="Bring it back although it may lack writes; it then does not record.", show_default=False
    ),
]

_COLUMNS = (
    Column("#", right=True),
    Column("NAME", flexible=True),
    Column("RECORDING"),
    Column("GRANULARITY", right=True),
    Column("DIRTY", right=True),
    Column("COMES BACK"),
    Column("WHY IT WAS TAKEN OUT"),
)


def undo(
    image: ImageArgument,
    undo_file: UndoFileArgument,
    *,
    show: ListOption = False,
    bitmap: BitmapOption = None,
    number: NumberOption = None,
    new_name: AsOption = None,
    stale: StaleOption = False,
    dry_run: DryRunOption = False,
    keep: UndoOption = None,
    force: ForceOption = False,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Put back what a command changed: the image is then, byte for byte, what it was before.

    Refused if the image has changed since, and if nothing tells, as after a restart of the machine. --force overrides
    the time stamp, not changed content. An external data file is not part of it: it stays as it is.

    With --bitmap only one bitmap comes back, as a new one beside those there are: one that a repair took out of the
    image and put into its undo file (quarantine). It has its name, granularity, bits, and records as it did. If the
    image has been written to since, a bitmap that recorded lacks those writes: then it comes back only with --stale,
    and does not record. Several that are named come back together. --as, --stale, --dry-run and --undo go with it.
    """
    wanted = _Wanted(tuple(bitmap or ()), tuple(number or ()), new_name, stale, dry_run, keep)
    wanted.require_sense(show=show, force=force)
    if show:
        _show(image, undo_file, output)
    elif wanted:
        _bring_back(image, undo_file, wanted, use_locks=not no_lock, output=output, progress=progress)
    else:
        with Postponed():  # done half, it would have to be done again
            noted = _noted(undo_file)
            api.undo(image, undo_file, force=force, use_locks=not no_lock)
        with reporting(image):
            if output is Output.JSON:
                print_json({**_head(image, undo_file), "changed": True, "data-file": _data_file_json(noted)})
            else:
                print(f"{printable(image)} is as it was before")
                if noted is not None:
                    warn(f"its data file {noted.path} is not part of that: {_data_file_state(noted)}")
    return 0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The bitmaps that shall come back, and how."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    new_name: str | None
    stale: bool
    dry_run: bool
    keep: Path | None

    def __bool__(self) -> bool:
        return bool(self.names or self.numbers)

    def require_sense(self, *, show: bool, force: bool) -> None:
        """Raise UsageError for options that contradict each other."""
        if show and (self or force):
            raise UsageError("--list changes nothing: it goes without --bitmap, --number and --force")
        if not self and (self.new_name is not None or self.stale or self.dry_run or self.keep is not None):
            raise UsageError("--as, --stale, --dry-run and --undo go with --bitmap or --number")
        if self and force:
            raise UsageError("--force is for undoing all", hint="--stale brings back a bitmap that may lack writes")
        if self.new_name is not None and len(self.names) + len(self.numbers) > 1:
            raise UsageError("--as names one bitmap, and several shall come back")


# The data file, which no undo file holds


def _noted(undo_file: Path) -> NotedDataFile | None:
    """What is noted of it; None also where the undo file cannot be read, of which `api.undo` says more."""
    try:
        with naming(undo_file), api.open_undo(undo_file) as held:
            return held.undo.data_file
    except UndoError:
        return None


def _data_file_state(noted: NotedDataFile) -> str:
    if noted.size_after == noted.size_before:
        return "its length never changed, and what was written there stays"
    return (
        f"the change made it {noted.size_after} bytes long, and so it stays; it had {noted.size_before}, "
        f"which `truncate -s {noted.size_before}` makes of it"
    )


def _data_file_json(noted: NotedDataFile | None) -> JsonObject | None:
    if noted is None:
        return None
    return {
        "path": noted.path,
        "size-before": noted.size_before,
        "size-after": noted.size_after,
        "changed": noted.has_changed(),
    }


# What the undo file holds


def _show(image: Path, undo_file: Path, output: Output) -> None:
    with ExitStack() as stack:
        with naming(image):
            held = stack.enter_context(api.open_undo(undo_file))
            undo, quarantined = held.undo, held.bitmaps
            noted = undo.data_file
            made = None if undo.made_ns is None else datetime.fromtimestamp(undo.made_ns // 10**9, UTC).isoformat()
            facts = {
                "made": made,
                "state": undo.state.name.lower().replace("_", "-"),
                "bytes-replaced": undo.bytes_replaced,
                "size-before": undo.size_before,
                "size-after": undo.size_after,
                "obstacle": api.why_not_undone(image, held),
                "data-file": _data_file_json(noted),
            }
        if output is Output.JSON:
            bitmaps = [_quarantined_json(bitmap) for bitmap in quarantined]
            print_json({**_head(image, undo_file), "changed": False, **facts, "quarantined": bitmaps})
            return
        obstacle = facts["obstacle"]
        print_pairs(
            [
                ("undo file", str(undo_file)),
                ("made", made or "-"),
                ("state", str(facts["state"])),
                ("replaced", exact_size(undo.bytes_replaced)),
                ("file grew by", exact_size(undo.size_after - undo.size_before)),
                ("can be undone", Cell("yes", "green") if obstacle is None else Cell(f"no: {obstacle}", "red")),
                *([("data file", f"not part of it: {noted.path}")] if noted is not None else []),
                ("quarantined", f"bitmaps: {len(quarantined)}" if quarantined else "nothing"),
            ]
        )
        if quarantined:
            print()
            print_table(_COLUMNS, [_row(bitmap) for bitmap in quarantined])


def _row(bitmap: Quarantined) -> list[str | Cell]:
    comes = Cell("yes", "green")
    if bitmap.fault is not None:
        comes = Cell(f"no: {bitmap.fault}", "red")
    elif bitmap.doubt is not None:
        comes = Cell(f"with --stale: {bitmap.doubt}", "yellow")
    return [
        str(bitmap.number),
        bitmap.name,
        "yes" if bitmap.recording else "no",
        human_size(bitmap.granularity) if bitmap.granularity < 1 << 64 else "-",
        human_size(bitmap.dirty_bytes) if bitmap.fault is None else "-",
        comes,
        bitmap.why or "-",
    ]


def _quarantined_json(bitmap: Quarantined) -> JsonObject:
    return {
        "number": bitmap.number,
        "name": bitmap.name,
        "recording": bitmap.recording,
        "granularity": bitmap.granularity if bitmap.granularity < 1 << 64 else None,
        "virtual-size": bitmap.virtual_size,
        "dirty-bytes": bitmap.dirty_bytes if bitmap.fault is None else None,
        "why": bitmap.why,
        "fault": bitmap.fault,
        "doubt": bitmap.doubt,
    }


# Bringing bitmaps back


def _bring_back(
    path: Path, undo_file: Path, wanted: _Wanted, *, use_locks: bool, output: Output, progress: bool | None
) -> None:
    with ExitStack() as stack:
        image = stack.enter_context(api.open(path, writable=not wanted.dry_run, use_locks=use_locks))
        warn_opened(path, unlocked=use_locks and not image.qcow2.locked, settled=image.qcow2.settled)
        with naming(path):
            image.qcow2.require_writable()
            held = stack.enter_context(api.open_undo(undo_file))
            draft = image.draft()
            back = _drafted(held, draft, wanted)
            plan = draft.plan()
        if not wanted.dry_run:
            with ProgressBar(wanted=progress) as bar:
                commit(image, plan, undo=wanted.keep, progress=bar)
            stack.enter_context(reporting(path))
        if output is Output.JSON:
            facts = {
                "dry-run": wanted.dry_run,
                "brought-back": back,
                "rolled-back": image.qcow2.rolled_back,
                "bytes-written": plan.bytes_written,
                "growth": plan.growth,
                "new-undo-file": None if wanted.dry_run or wanted.keep is None else str(wanted.keep),
            }
            print_json({**_head(path, undo_file), "changed": not wanted.dry_run, **facts})
        else:
            _print_back(plan, back, wanted)


def _drafted(held: Quarantine, draft: Edit, wanted: _Wanted) -> list[JsonObject]:
    """Draft all that shall come back; what each comes to."""
    back: list[JsonObject] = []
    for bitmap in held.choose(wanted.names, wanted.numbers):
        doubt = held.bring_back(draft, bitmap, wanted.new_name, stale=wanted.stale)
        name = bitmap.name if wanted.new_name is None else wanted.new_name
        recording = bitmap.recording and doubt is None
        back.append({"number": bitmap.number, "name": name, "recording": recording, "doubt": doubt})
    return back


def _print_back(plan: Plan, back: Sequence[JsonObject], wanted: _Wanted) -> None:
    for bitmap in back:
        if bitmap["doubt"] is not None:
            warn(f"bitmap '{bitmap['name']}' does not record and may be stale: {bitmap['doubt']}")
        verb = "would come back" if wanted.dry_run else "is back"
        print(f"bitmap '{printable(bitmap['name'])}' {verb}, {'recording' if bitmap['recording'] else 'not recording'}")
    if wanted.dry_run:
        for write in plan.writes():
            print(f"  {write.offset:#014x}  {write.length:>9}  {printable(write.purpose)}")
        print(f"would write {human_size(plan.bytes_written)}; dry run: nothing was written")
        return
    print(f"wrote {human_size(plan.bytes_written)}")
    if wanted.keep is not None:
        print(f"undo file: {printable(wanted.keep)}")


def _head(image: Path, undo_file: Path) -> JsonObject:
    return {"command": "undo", "image": str(image), "undo-file": str(undo_file)}
