"""A check in qemu-img's words: opening an image as QEMU does, the passes, and what they come to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .qemu_options import RefusedError
from .real_qemu_img import complain

if TYPE_CHECKING:
    from ..checks.model import Allocation, Finding
    from ..checks.runner import Inspection
    from ..checks.view import View

_AT_ONCE = 1 << 12


@dataclass(slots=True)
class Totals:
    """What qemu-img counts, and why it gave up, if it did.

    Attributes:
        clusters: of the virtual disk.
        changed: the image was written to.
        allocation: other statistics of the image; None as long as nothing has been checked to the end.
    """

    corruptions: int = 0
    leaks: int = 0
    errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    clusters: int = 0
    changed: bool = False
    allocation: Allocation | None = None
    failure: str | None = None
    corruption_signaled: bool = False
    pending: list[str] = field(default_factory=list)

    def say(self, lines: Iterable[str]) -> None:
        """Lines for standard error, many at a time."""
        for line in lines:
            self.pending.append(line)
            if len(self.pending) >= _AT_ONCE:
                self.flush()

    def flush(self) -> None:
        """Print what is pending."""
        if self.pending:
            with contextlib.suppress(OSError):  # nobody listens; the result counts all the same
                sys.stderr.write("\n".join(self.pending) + "\n")
            self.pending.clear()


def opened_as_qemu(inspection: Inspection, name: str) -> list[Finding]:
    """What QEMU sees as it opens an image, before any check.

    Raises:
        RefusedError: it would not open the image.
    """
    from ..checks.model import InQemu
    from ..checks.runner import OPENING
    from .qemu_check_text import REFUSALS, refusal_order

    found = [*inspection.early, *inspection.findings(OPENING)]
    if inspection.view is not None:
        _warn_of_detached(inspection.view)
    refused = [finding for finding in found if finding.qemu is InQemu.REFUSES]
    if refused:
        first = min(refused, key=lambda finding: refusal_order(finding, inspection))
        raise RefusedError(f"Could not open '{name}': {REFUSALS[first.code](first, inspection)}")
    return found


def _warn_of_detached(view: View) -> None:
    directory = view.directory
    if directory.attached or directory.extension is None or directory.damage_code == "bitmaps-extension-length":
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
    from ..checks.runner import CHECKING

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
    from .qemu_check_text import FAILED as INVALID
    from .qemu_check_text import FAILURES

    explain = FAILURES.get(finding.code)
    said, totals.failure = explain(finding, inspection) if explain is not None else ((), INVALID)
    totals.say(said)


def _count(finding: Finding, inspection: Inspection, totals: Totals) -> None:
    from ..checks.model import InQemu
    from .qemu_check_text import lines, unreadable_block

    match finding.qemu:
        case InQemu.CORRUPTION:
            totals.corruptions += finding.count
        case InQemu.LEAK:
            totals.leaks += finding.count
        case InQemu.ERROR:
            if not totals.corruption_signaled and not inspection.header.geometry.is_aligned(finding.values["offset"]):
                totals.say([unreadable_block(finding)])
                totals.corruption_signaled = True
            totals.errors += finding.count
        case InQemu.FAILS:
            give_up(finding, inspection, totals)
            return
        case _:
            return
    totals.say(lines(finding))


def disk_clusters(view: View) -> int:
    """Clusters of the virtual disk, in whole sectors as QEMU sees it."""
    return view.geometry.clusters(view.geometry.virtual_size & -512)
