"""`qcow2bm diff --into`: the difference of two disks as a bitmap of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import api
from ..bitmap.draft import Source
from ..bitmap.edit import Edit
from ..errors import BitmapSizeMismatchError, UsageError
from ..format.geometry import round_up
from ..image.plan import SECTOR
from .change import How, change
from .disks import TwoDisks, require_place_for_undo, shut_down_first, warn_if_outdated
from .progress import ProgressBar
from .references import parse_reference
from .sizes import human_size

if TYPE_CHECKING:
    from ..chain.diff import Difference  # loads numpy
    from ..chain.disk import Disk


def keep(disks: TwoDisks, into: str, granularity: int | None, how: How, *, merge: bool, recording: bool) -> int:
    """Compare the disks while the target is held open, and commit the result to it.

    Args:
        into: IMAGE#NAME.
        merge: the bitmap may be there.
        recording: of a new bitmap.

    Raises:
        UsageError, BitmapError: the bitmap cannot be made; told before anything is compared, where that can be.
        Qcow2bmError: one of the disks cannot be read, or the commit fails.
    """
    image, name = parse_reference(into)
    require_place_for_undo(how)
    warn_if_outdated(disks.new, image)

    def edit(opened: api.Image, draft: Edit) -> None:
        with disks.opened(opened.qcow2) as (old, new):
            _require_same_size(opened, new)
            if merge and name in opened.bitmaps.names:
                draft.require_usable(name)
                own = opened.bitmaps[name].granularity
                if granularity not in (None, own):
                    raise UsageError(f"bitmap '{name}' has a granularity of its own, {own} bytes")
                found = _for_image(opened, old, new, own, how)
                label = f"difference of {disks.old} and {disks.new}"
                draft.merge(name, [Source(label, opened.virtual_size, own, found.bits)])
                return
            # Added before the long work, so that what is in the way is told at once.
            draft.add(name, granularity=granularity, recording=recording)
            found = _for_image(opened, old, new, granularity, how)
            draft.replace_bits(name, found.bits)
        size = human_size(found.differing_bytes)
        draft.summary.append(f"marked is what differs between {disks.old} and {disks.new}: {size}")

    with shut_down_first():
        return change(image, edit, how)


def _require_same_size(image: api.Image, new: Disk) -> None:
    if image.virtual_size != round_up(new.size, SECTOR):
        raise BitmapSizeMismatchError(
            f"the disk has {image.virtual_size} bytes, and B has {new.size}",
            hint="a bitmap of the difference goes into an image of B's size",
        )


def _for_image(image: api.Image, old: Disk, new: Disk, granularity: int | None, how: How) -> Difference:
    """The difference in the shape of a bitmap of an image."""
    from ..chain.diff import difference

    geometry = image.qcow2.geometry
    wanted = geometry.default_granularity if granularity is None else granularity
    with ProgressBar(wanted=how.progress) as bar:
        return difference(old, new, wanted, chunk_bytes=geometry.cluster_size, progress=bar)
