"""A check in qemu-img's words: opening an image as QEMU does, the passes, and what they come to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

from ..checks.model import Finding, InQemu
from ..checks.runner import CHECKING, OPENING, Inspection
from ..checks.view import View
from .qemu_options import RefusedError
from .qemu_totals import Totals
from .real_qemu_img import complain


def opened_as_qemu(inspection: Inspection, name: str) -> list[Finding]:
    """What QEMU sees as it opens an image, before any check.

    Raises:
        RefusedError: it would not open the image.
    """
    found = [*inspection.early, *inspection.findings(OPENING)]
    if inspection.view is not None:
        _warn_of_detached(inspection.view)
    refused = [finding for finding in found if finding.qemu is InQemu.REFUSES]
    if refused:
        from .qemu_check_text import REFUSALS, refusal_order

        first = min(refused, key=lambda finding: refusal_order(finding, inspection))
        raise RefusedError(f"Could not open '{name}': {REFUSALS[first.code](first, inspection)}")
    return found


def _warn_of_detached(view: View) -> None:
    directory = view.directory
    if directory.extension is None or not directory.is_ignored:
        return
    if view.header.version == 2:
        modified = (
            "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent "
            "bitmap support; so now they must all be considered inconsistent"
        )
    else:
        modified = "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
    complain(f"warning: {modified}")
    # QEMU ends this sentence with no line break, so scripts see what follows on the same line.
    sys.stderr.write("Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.")


def check(inspection: Inspection, found: list[Finding], totals: Totals) -> None:
    """Check an image that has been opened; stops where qemu-img gives up.

    Args:
        found: what has been found as it was opened.
    """
    for finding in found:
        _count(finding, inspection, totals)
    for finding in inspection.findings(CHECKING) if totals.failure is None else ():
        _count(finding, inspection, totals)
        if totals.failure is not None:
            return
    assert inspection.view is not None
    totals.allocation, totals.clusters = inspection.view.allocation, disk_clusters(inspection.view)


def give_up(finding: Finding, inspection: Inspection, totals: Totals) -> None:
    """Say what ends the check."""
    from .qemu_check_text import FAILED, FAILURES

    explain = FAILURES.get(finding.code)
    said, totals.failure = explain(finding, inspection) if explain is not None else ((), FAILED)
    totals.say(said)


def _count(finding: Finding, inspection: Inspection, totals: Totals) -> None:
    match finding.qemu:
        case InQemu.CORRUPTION:
            totals.corruptions += finding.count
        case InQemu.LEAK:
            totals.leaks += finding.count
        case InQemu.ERROR:
            if not totals.corruption_signaled and not inspection.header.geometry.is_aligned(finding.values["offset"]):
                from .qemu_check_text import unreadable_block

                totals.say([unreadable_block(finding)])
                totals.corruption_signaled = True
            totals.errors += finding.count
        case InQemu.FAILS:
            give_up(finding, inspection, totals)
            return
        case _:
            return
    totals.say(_lines()(finding, totals))


@functools.cache
def _lines() -> Callable[[Finding, Totals], Iterator[str]]:
    """What says it in QEMU's words, loaded once there is something to say."""
    from .qemu_check_text import lines

    return lines


def disk_clusters(view: View) -> int:
    """Clusters of the virtual disk, in whole sectors as QEMU sees it."""
    return view.geometry.clusters(view.geometry.virtual_size & -512)
