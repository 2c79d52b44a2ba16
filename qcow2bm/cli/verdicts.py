"""What a check came to, in a few words."""

from __future__ import annotations

from ..checks.model import InQemu, Report, Severity
from ..checks.problems import HELD_BACK

_VERDICTS = {
    None: "clean",
    Severity.HINT: "clean",
    Severity.WARNING: "clean",
    Severity.LEAK: "leaked clusters, no harm to data",
    Severity.BITMAP: "a bitmap cannot be relied on; data and refcounts are fine",
    Severity.UNKNOWN: "cannot be judged",
    Severity.CORRUPTION: "corrupt",
}


def verdict(report: Report) -> str:
    """A report in a few words."""
    refused = any(finding.qemu is InQemu.REFUSES for finding in report.findings)
    if report.worst is Severity.BITMAP and refused:
        return "QEMU refuses to open it because of its bitmaps; data and refcounts are fine"
    if report.worst is Severity.LEAK and not report.counts.keys().isdisjoint(HELD_BACK):
        return "leaked clusters, or what damage has cut off"
    return _VERDICTS[report.worst]
