"""`qcow2bm invert`: dirty becomes clean, and clean becomes dirty."""

from __future__ import annotations

from .change import How, change, changing, chosen
from .options import BitmapsArgument, ImageArgument, MatchOption


@changing("invert")
def invert(image: ImageArgument, bitmaps: BitmapsArgument = None, *, match: MatchOption = None, how: How) -> int:
    """Mark clean what is dirty, and dirty what is clean, in all of the bitmaps or none. They record if they did.

    What was dirty is clean then: an incremental backup of an inverted bitmap leaves it out.
    """
    return change(image, lambda _, draft: draft.invert(*chosen(draft, bitmaps, match)), how)
