"""`qcow2bm remove`: take bitmaps away and give their clusters back."""

from __future__ import annotations

from .change import How, change, changing, chosen
from .options import BitmapsArgument, ImageArgument, MatchOption


@changing("remove")
def remove(image: ImageArgument, bitmaps: BitmapsArgument = None, *, match: MatchOption = None, how: How) -> int:
    """Remove bitmaps, all of them or none, whatever their state. Guest data is not touched."""
    return change(image, lambda _, draft: draft.remove(*chosen(draft, bitmaps, match)), how)
