"""`qcow2bm clear`: start bitmaps over."""

from __future__ import annotations

from .change import How, change, changing, chosen
from .options import BitmapsArgument, ImageArgument, MatchOption


@changing("clear")
def clear(image: ImageArgument, bitmaps: BitmapsArgument = None, *, match: MatchOption = None, how: How) -> int:
    """Mark the whole disk clean in bitmaps, all of them or none. They keep recording if they did."""
    return change(image, lambda _, draft: draft.clear(*chosen(draft, bitmaps, match)), how)
