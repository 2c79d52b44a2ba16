"""What qcow2bm says of an image's bitmaps as one value, to be compared before and after."""

from pathlib import Path

import qcow2bm

Bitmaps = list[tuple[str, bool, int, str, tuple[tuple[int, int], ...]]]


def bitmaps(path: Path) -> Bitmaps:
    """Name, recording, granularity, state and dirty ranges of every bitmap that counts, in the order of the directory.

    Where the autoclear bit is off none counts: QEMU takes the image for one without bitmaps.
    """
    with qcow2bm.open(path) as image:
        if image.bitmaps.damage is not None:
            raise AssertionError(image.bitmaps.damage)
        if not image.bitmaps.attached:
            return []
        return [
            (b.name, b.recording, b.granularity, b.state.value, tuple((e.offset, e.length) for e in b.extents()))
            for b in image.bitmaps
        ]
