"""`qcow2bm diff`: where two disks differ, as a bitmap, a list or a summary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .disks import DataFilesOption, DiskFormat, TwoDisks, format_of, shut_down_first
from .extent_list import members, print_csv, print_rows, rows
from .forms import DirtyOnlyOption, ExtentsOption, Form, FormOption
from .options import DryRunOption, GranularityOption, NoLockOption, ProgressOption, UndoOption
from .output import Output, print_json, print_pairs
from .progress import ProgressBar
from .sizes import exact_size, percent

if TYPE_CHECKING:
    from ..chain.diff import Difference  # loads numpy

OldArgument = Annotated[Path, typer.Argument(metavar="A", help="The older disk: raw or qcow2.", show_default=False)]
NewArgument = Annotated[Path, typer.Argument(metavar="B", help="The newer disk.", show_default=False)]
IntoOption = Annotated[
    str | None,
    typer.Option(
        "--into", metavar="IMAGE#NAME", show_default=False,
        help="Keep the result as a new bitmap in an image of B's size, which may be B itself.",
    ),
]  # fmt: skip
MergeOption = Annotated[
    bool,
    typer.Option("--merge", help="With --into: the bitmap may be there, and keeps what it marks.", show_default=False),
]
DisabledOption = Annotated[
    bool, typer.Option("--disabled", help="With --into: QEMU shall not record in the new bitmap.", show_default=False)
]
FormatAOption = Annotated[
    DiskFormat | None,
    typer.Option(
        "--format-a", show_default=False,
        help="The format of A. Only a name that ends in .qcow2, or what cannot be anything but raw, needs none.",
    ),
]  # fmt: skip
FormatBOption = Annotated[
    DiskFormat | None, typer.Option("--format-b", help="The format of B, likewise.", show_default=False)
]


def diff(
    old: OldArgument,
    new: NewArgument,
    *,
    granularity: GranularityOption = None,
    into: IntoOption = None,
    merge: MergeOption = False,
    disabled: DisabledOption = False,
    format_a: FormatAOption = None,
    format_b: FormatBOption = None,
    data_file: DataFilesOption = None,
    extents: ExtentsOption = False,
    dirty_only: DirtyOnlyOption = False,
    dry_run: DryRunOption = False,
    undo: UndoOption = None,
    no_lock: NoLockOption = False,
    output: FormOption = Form.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Compare two disks, with their backing chains: what of B differs from A?

    Prints a summary, or with --extents the ranges, or keeps the result as a bitmap of an image: the next incremental
    backup by it copies what A lacks. What is zero in both disks, or the same bytes of one file, is not read. What lies
    past the end of A differs.

    Exit status 0, whether the disks differ or not.
    """
    disks = TwoDisks(old, new, format_of(old, format_a), format_of(new, format_b), data_file, use_locks=not no_lock)
    if into is not None:
        _require(not extents and not dirty_only, "--extents lists the result, --into keeps it: give one of them")
        _require(output is not Form.CSV, "csv is a form of --extents only")
        _require(not (merge and disabled), "--disabled is for a new bitmap")
        from .change import How  # what changes images is not needed to compare
        from .diff_into import keep

        form = Output.JSON if output is Form.JSON else Output.HUMAN
        how = How("diff", dry_run, undo, not no_lock, form, progress)
        return keep(disks, into, granularity, how, merge=merge, recording=not disabled)
    _require(not (merge or disabled or dry_run or undo), "--merge, --disabled, --dry-run and --undo go with --into")
    _require(extents or not dirty_only, "--dirty-only goes with --extents")
    _require(extents or output is not Form.CSV, "csv is a form of --extents only")
    found = _compared(disks, granularity, progress)
    if extents:
        _print_extents(found, output, dirty_only=dirty_only)
    elif output is Form.JSON:
        print_json(_document(found))
    else:
        _print_summary(found)
    return 0


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise UsageError(text)


def _compared(disks: TwoDisks, granularity: int | None, progress: bool | None) -> Difference:
    from ..chain.diff import difference

    with shut_down_first(), disks.opened() as (old, new), ProgressBar(wanted=progress) as bar:
        return difference(old, new, granularity, progress=bar)


# What it prints


def _document(found: Difference) -> dict[str, object]:
    return {
        **_head(found),
        "differing-granules": found.differing_granules,
        "differing-bytes": found.differing_bytes,
        "differing-extents": sum(1 for _ in found.extents()),
    }


def _head(found: Difference) -> dict[str, object]:
    return {
        "old": str(found.old),
        "new": str(found.new),
        "old-size": found.old_size,
        "new-size": found.new_size,
        "granularity": found.granularity,
    }


def _print_summary(found: Difference) -> None:
    differing = found.differing_bytes
    share = percent(differing, found.new_size)
    pairs = [
        ("A", f"{found.old}, {exact_size(found.old_size)}"),
        ("B", f"{found.new}, {exact_size(found.new_size)}"),
        ("granularity", exact_size(found.granularity)),
        ("differing", f"{exact_size(differing)}, {share} of B"),
        ("granules", str(found.differing_granules)),
        ("extents", str(sum(1 for _ in found.extents()))),
    ]
    if found.new_size > found.old_size:
        pairs.append(("past A", f"{exact_size(found.new_size - found.old_size)} at the end of B, which differ"))
    elif found.new_size < found.old_size:
        pairs.append(("past B", f"{exact_size(found.old_size - found.new_size)} at the end of A, which B has no more"))
    print_pairs(pairs)


def _print_extents(found: Difference, output: Form, *, dirty_only: bool) -> None:
    listed = rows(found.extents(), found.new_size, dirty_only=dirty_only)
    if output is Form.JSON:
        print_json(_head(found), ("extents", members(listed)))
    elif output is Form.CSV:
        print_csv(listed)
    else:
        print_rows(listed, found.new_size)
