"""`qcow2bm set` and `qcow2bm unset`: mark ranges of the disk dirty or clean."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .. import api
from ..bitmap.edit import Edit
from ..bitmap.extents import MAX_LIST_BYTES, Where, decoded, parse_extents
from ..errors import UsageError, naming
from .change import How, change, changing
from .options import BitmapArgument, ImageArgument, RangesOption
from .reading import named
from .sizes import Range

ExtentsOption = Annotated[
    Path | None,
    typer.Option(
        "--from-extents", metavar="FILE", show_default=False,
        help="Ranges from a list: JSON of `qemu-img map`, `nbdinfo --map` or `show`, or CSV. "
        "It may come through a pipe; `-` is stdin.",
    ),
]  # fmt: skip
WhereOption = Annotated[
    Where | None,
    typer.Option(
        "--where", show_default="what the list is about, where that is safe",
        help="Which rows of the list count. `allocated`: what the image holds itself; `present`: what any layer holds. "
        "Needed for a map (`qemu-img map`, `base:allocation`) with zeroes that may have been written, and for `unset`.",
    ),
]  # fmt: skip
AllocationOption = Annotated[
    bool,
    typer.Option(
        "--from-allocation", show_default=False,
        help="All that the image holds itself and not its backing file: data, compressed clusters, zeroes.",
    ),
]  # fmt: skip


_STDIN = Path("-")


@changing("set")
def set_ranges(
    image: ImageArgument,
    bitmap: BitmapArgument,
    *,
    ranges: RangesOption = None,
    from_extents: ExtentsOption = None,
    where: WhereOption = None,
    from_allocation: AllocationOption = False,
    how: How,
) -> int:
    """Mark ranges dirty: every bit that they touch, so that nothing in them is called clean."""
    text = _read(ranges, from_extents, where, otherwise=from_allocation)

    def edit(opened: api.Image, draft: Edit) -> None:
        if ranges or from_extents is not None:
            draft.set_ranges(bitmap, _all_ranges(opened, ranges, from_extents, text, where))
        if from_allocation:
            draft.require_usable(bitmap)
            draft.merge(bitmap, [opened.allocated(opened.bitmaps[bitmap].granularity)])

    return change(image, edit, how)


@changing("unset")
def unset_ranges(
    image: ImageArgument,
    bitmap: BitmapArgument,
    *,
    ranges: RangesOption = None,
    from_extents: ExtentsOption = None,
    where: WhereOption = None,
    how: How,
) -> int:
    """Mark ranges clean: only bits that lie wholly inside them, so that nothing outside is called clean."""
    text = _read(ranges, from_extents, where)

    def edit(opened: api.Image, draft: Edit) -> None:
        draft.unset_ranges(bitmap, _all_ranges(opened, ranges, from_extents, text, where, to_unset=True))

    return change(image, edit, how)


def _read(ranges: list[Range] | None, listed: Path | None, where: Where | None, *, otherwise: bool = False) -> str:
    """The list of extents, whole, before the image is opened: whoever prints it may have the image open until then.

    Raises:
        UsageError: nothing says what to mark, `where` is about no list, or the list is no text.
        ImageIOError: the list cannot be read.
    """
    if where is not None and listed is None:
        raise UsageError("--where is about a list of extents", hint="name one with --from-extents")
    if not ranges and listed is None and not otherwise:
        raise UsageError("no range is named", hint="use --range OFF+LEN or --from-extents FILE")
    if listed is None:
        return ""
    if listed == Path():
        raise UsageError("--from-extents names no file", hint="- is stdin")
    with naming(_title(listed)):
        if listed != _STDIN:
            with listed.open("rb") as file:
                return decoded(file.read(MAX_LIST_BYTES + 1))
        if sys.stdin is None:
            raise UsageError("standard input is closed", hint="name a file")
        return decoded(sys.stdin.buffer.read(MAX_LIST_BYTES + 1))


def _title(listed: Path) -> str | Path:
    return "the list on stdin" if listed == _STDIN else listed


def _all_ranges(
    image: api.Image,
    ranges: list[Range] | None,
    listed: Path | None,
    text: str,
    where: Where | None,
    *,
    to_unset: bool = False,
) -> Iterator[tuple[int, int]]:
    """The ranges of the command line and those of the list, in order, as they come: there may be millions."""
    found: list[Iterator[tuple[int, int]]] = [iter(sorted(ranges or []))]
    if listed is not None:
        rows = parse_extents(text, where=where, size=image.virtual_size, to_unset=to_unset)
        found.append(named(_title(listed), rows))
    return heapq.merge(*found)
