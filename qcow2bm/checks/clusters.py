"""Findings about clusters: those whose refcount is wrong, and those with uses that must not share one."""

from __future__ import annotations

from .census import Mismatch, Overlap, Use
from .model import Finding, Location
from .problems import found
from .view import View

_USES = {
    Use.STRUCTURE: "metadata",
    Use.BITMAP: "bitmaps",
    Use.REPEATED: "a shared L2 table",
    Use.DATA: "guest data",
    Use.SNAPSHOT: "snapshot data",
    Use.COMPRESSED: "compressed data",
}


def mismatch(view: View, run: Mismatch, code: str | None = None, owner: str = "", bitmap: str | None = None) -> Finding:
    """Clusters whose refcount is not what it should be.

    Args:
        code, owner, bitmap: of leaks whose owner is known.
    """
    offset = view.geometry.offset_of(run.first)
    leaked = run.stored > run.references
    what = "a cluster" if run.count == 1 else f"{run.count} clusters"
    text = f"{what} at {offset:#x}: refcount {run.stored}, but {run.references} references{owner}"
    if code is None and leaked and view.leak_doubt is not None and not view.blind:
        text += f"; {view.leak_doubt}"
    return found(
        code or _plain(view, leaked=leaked), text, Location("cluster", offset, bitmap=bitmap), count=run.count,
        first=run.first, refcount=run.stored, references=run.references,
    )  # fmt: skip


def _plain(view: View, *, leaked: bool) -> str:
    """The code of a cluster whose owner nobody knows."""
    if not leaked:
        return "refcount-too-low"
    return "leak-unproven" if view.blind else "leak" if view.leak_doubt is None else "leak-doubtful"


def overlap(view: View, run: Overlap) -> Finding:
    """A cluster with uses that must not share one."""
    uses = dict(run.uses)
    if Use.BITMAP in uses:
        code = "bitmap-clusters-shared"
    elif Use.STRUCTURE in uses:
        code = "metadata-overlap"
    else:
        code = "clusters-shared"
    offset = view.geometry.offset_of(run.first)
    what = "a cluster" if run.count == 1 else f"{run.count} clusters"
    times = ", ".join(f"{_USES[use]}{f' ({count} times)' if count > 1 else ''}" for use, count in run.uses)
    text = f"{what} at {offset:#x}: used by {times}"
    return found(code, text, Location("cluster", offset), count=run.count, first=run.first)
