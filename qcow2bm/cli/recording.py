"""`qcow2bm enable` and `qcow2bm disable`: whether QEMU records writes in a bitmap."""

from __future__ import annotations

from .change import How, change, changing, chosen
from .options import BitmapsArgument, ImageArgument, MatchOption


@changing("enable")
def enable(image: ImageArgument, bitmaps: BitmapsArgument = None, *, match: MatchOption = None, how: How) -> int:
    """Make QEMU record writes in bitmaps, from the next start of the VM on. All of them or none."""
    return change(image, lambda _, draft: draft.enable(*chosen(draft, bitmaps, match)), how)


@changing("disable")
def disable(image: ImageArgument, bitmaps: BitmapsArgument = None, *, match: MatchOption = None, how: How) -> int:
    """Make QEMU leave bitmaps as they are. All of them or none."""
    return change(image, lambda _, draft: draft.disable(*chosen(draft, bitmaps, match)), how)
