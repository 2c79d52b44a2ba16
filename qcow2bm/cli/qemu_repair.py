"""The drop-in for `qemu-img check -r`: what the repair says in qemu-img's words, and the repair from open to close.

All is worked out beside the image, double-checked there, and only then written, by a commit that a crash cannot tear.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING

from ..checks.model import Finding, InQemu
from ..checks.runner import OPENING, Inspection, inspect
from ..errors import Qcow2bmError
from ..format.limits import MAX_SNAPSHOT_EXTRA_DATA
from ..image.overlay import OverlayFile
from ..repair.as_qemu.model import Event, Mode, Notice
from ..repair.as_qemu.repair import Repair
from .failures import Postponed
from .qemu_check_text import REMARK, lines
from .qemu_checking import check, disk_clusters, give_up, opened_as_qemu
from .qemu_options import RefusedError
from .qemu_totals import Totals

if TYPE_CHECKING:
    from ..image.file import ImageFile

Values = Mapping[str, int | str]


# In qemu-img's words


def _error(number: int | str) -> str:
    return os.strerror(int(number))


def _corrupt(why: str) -> str:
    return f"qcow2: Marking image as corrupt: {why}; further corruption events will be suppressed"


def _corrupt_block(values: Values) -> str:
    offset, index = int(values["offset"]), int(values["index"])
    place = f"{index:#x}" if index else "0"  # C's %#x has no prefix for 0
    return _corrupt(f"Refblock offset {offset:#x} unaligned (reftable index: {place})")


def _resize_failed(values: Values) -> str:
    reason, words = _error(values["reason"]), values["words"]
    told = f"{words}: {reason}" if values["reason"] == errno.EFBIG else words
    return (f"qcow2bm: {told}\n" if words else "") + f"ERROR could not resize image: {reason}"


_WORDS: dict[Notice, Callable[[Values], str]] = {
    Notice.SNAPSHOTS_OVERHANGING: lambda values: f"Discarding {values['count']} overhanging snapshots",
    Notice.SNAPSHOTS_TOO_BIG: lambda values: (
        f"Discarding {values['count']} overhanging snapshots (snapshot table is too big)"
    ),
    Notice.EXTRA_DATA_DROPPED: lambda values: (
        f"Discarding too much extra metadata in snapshot table entry {values['index']} "
        f"({values['size']} > {MAX_SNAPSHOT_EXTRA_DATA})"
    ),
    Notice.CORRUPT_BLOCK: _corrupt_block,
    Notice.CORRUPT_OVERLAP: lambda values: _corrupt(
        f"Preventing invalid write on metadata (overlaps with {values['structure']})"
    ),
    Notice.OVERLAP_AT_ENTRY: lambda _: "ERROR: Overlap check failed",
    Notice.OVERLAP_AT_TABLE: lambda _: (
        f"ERROR: Could not write L2 table; metadata overlap check failed: {_error(errno.EIO)}"
    ),
    Notice.RESIZE_FAILED: _resize_failed,
    Notice.REBUILDING: lambda _: "Rebuilding refcount structure",
    Notice.REBUILD_NEEDED: lambda _: "ERROR need to rebuild refcount structures",
    Notice.REBUILD_FAILED: lambda values: f"qcow2bm: ERROR writing {values['what']}: {_error(values['reason'])}",
    Notice.STILL_BROKEN: lambda _: "ERROR rebuilt refcount structure is still broken",
    Notice.SNAPSHOT_TABLE_FAILED: lambda values: f"ERROR failed to update snapshot table: {_error(values['reason'])}",
    Notice.FREE_FAILED: lambda values: f"qcow2_free_clusters failed: {_error(values['reason'])}",
    Notice.NOT_COUNTED: lambda _: (
        "qcow2bm: tables lie over each other, so that not all references can be counted: nothing is repaired"
    ),
    Notice.FLUSH_FAILED: lambda _: f"qcow2bm: Failed to flush the refcount block cache: {_error(errno.EIO)}",
}


def words(event: Event, totals: Totals) -> Iterator[str]:
    """The lines about an event, for standard error; of what ends the check nothing."""
    if isinstance(event.what, Notice):
        yield _WORDS[event.what](event.values)
    elif event.what.qemu in (InQemu.CORRUPTION, InQemu.LEAK, InQemu.ERROR):
        for line in lines(event.what, totals):
            yield "Repairing " + line.partition(" ")[2] if event.mended and not line.startswith(REMARK) else line


# The work


def repair(file: ImageFile, name: str, mode: Mode, totals: Totals, *, locked: bool) -> None:
    """Repair an open image as `qemu-img check -r` does; leaves what came of it in `totals`.

    Args:
        name: the image as the user calls it.

    Raises:
        RefusedError: QEMU would not open the image, or the repair could not be written; the image is as it was.
    """
    with contextlib.closing(OverlayFile(file)) as overlay:
        inspection = inspect(overlay, locked=locked, as_qemu=True)
        work = Repair(overlay, inspection, opened_as_qemu(inspection, name), mode)
        for event in work.first_pass():
            totals.say(words(event, totals))
            if isinstance(event.what, Finding) and event.what.qemu is InQemu.FAILS:
                give_up(event.what, inspection, totals)
        if _is_to_be_checked_again(work, inspection, totals):
            second = inspect(overlay, locked=locked, as_qemu=True)
            check(second, list(second.findings(OPENING)), totals)
        for event in work.close():
            totals.say(words(event, totals))
        totals.flush()
        totals.changed = _write(work)


def _is_to_be_checked_again(work: Repair, inspection: Inspection, totals: Totals) -> bool:
    """Take over what came of the first pass; True if there is to be a second one."""
    counts, view = work.counts, inspection.view
    if work.given_up:
        totals.failure = totals.failure or _error(work.reason or errno.EINVAL)
        return False
    totals.corruptions_fixed, totals.leaks_fixed = counts.corruptions_fixed, counts.leaks_fixed
    if not (counts.corruptions_fixed or counts.leaks_fixed):
        assert view is not None
        totals.corruptions, totals.leaks, totals.errors = counts.corruptions, counts.leaks, counts.errors
        totals.allocation, totals.clusters = work.allocation, disk_clusters(view)
        return False
    if work.is_dead:
        totals.failure = _error(errno.ENOMEDIUM)
    return not work.is_dead


def mend_dirty(file: ImageFile, name: str, *, locked: bool) -> None:
    """Repair an image that is marked dirty as QEMU does whenever it opens one for writing; says what it mends.

    Raises:
        RefusedError: something is left that is worse than a leak, or cannot be written; the image is as it was.
    """
    totals = Totals()
    with contextlib.closing(OverlayFile(file)) as overlay:
        inspection = inspect(overlay, locked=locked, as_qemu=True)
        work = Repair(overlay, inspection, opened_as_qemu(inspection, name), Mode.ALL)
        for event in chain(work.first_pass(), work.close()):
            totals.say(words(event, totals))
        totals.flush()
        if work.given_up or not work.counts.is_sound:
            reason = _error(work.reason or errno.EIO)
            raise RefusedError(f"Could not open '{name}': Could not repair dirty image: {reason}")
        _write(work)


def _write(work: Repair) -> bool:
    """Write the repair; False if there is none. A signal counts as long as everything can be put back."""
    with Postponed() as signals:
        try:
            return work.commit(progress=lambda _done, _total: signals.end_if_asked())
        except Qcow2bmError as error:
            raise RefusedError(f"Check failed: {error}") from None
