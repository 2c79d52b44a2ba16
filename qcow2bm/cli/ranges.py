"""`qcow2bm set` and `qcow2bm unset`: mark ranges of the disk dirty or clean."""

from __future__ import annotations

from .. import api
from ..bitmap.edit import Edit
from .change import How, change, changing
from .options import BitmapArgument, ImageArgument, RangesOption


@changing("set")
def set_ranges(image: ImageArgument, bitmap: BitmapArgument, *, ranges: RangesOption, how: How) -> int:
    """Mark ranges dirty: every bit that they touch, so that nothing in them is called clean."""

    def edit(_: api.Image, draft: Edit) -> None:
        for offset, length in ranges:
            draft.set_range(bitmap, offset, length)

    return change(image, edit, how)


@changing("unset")
def unset_ranges(image: ImageArgument, bitmap: BitmapArgument, *, ranges: RangesOption, how: How) -> int:
    """Mark ranges clean: only bits that lie wholly inside, so that nothing outside is called clean."""

    def edit(_: api.Image, draft: Edit) -> None:
        for offset, length in ranges:
            draft.unset_range(bitmap, offset, length)

    return change(image, edit, how)
