"""Whether references may be taken away, or the file's end: only where no refcount is below what refers to a cluster."""

from __future__ import annotations

from ..checks.model import Severity
from ..checks.runner import check_file
from ..errors import RUN_CHECK, CorruptImageError
from ..image.image import Qcow2Image

_BAD = (Severity.CORRUPTION, Severity.UNKNOWN)


def require_counted(image: Qcow2Image) -> None:
    """Check an open image; raises CorruptImageError if anything but bitmaps or leaks is wrong with it.

    With it, every table that is dropped has been seen to be one, and to be named as often as its refcount allows.
    """
    report = check_file(image.file, locked=image.locked, limit=1)
    if report.complete and not any(report.severities.get(severity) for severity in _BAD):
        return
    worst = next((finding for finding in report.findings if finding.severity in _BAD), None)
    what = worst.message if worst is not None else "not all of it can be checked"
    raise CorruptImageError(f"clusters cannot be given back, for the image is damaged: {what}", hint=RUN_CHECK)
