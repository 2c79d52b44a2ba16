"""The mark of a change that a crash could tear: two feature bits, set before its first stage and cleared by its last.

The corrupt bit keeps QEMU from writing to the image. But QEMU sets it too, when it finds damage, and its repair writes
to an image that has it. So an autoclear bit that nobody defines stands beside it: whoever writes to the image must
clear it, and QEMU's repair does. Where both are set nobody has opened the image for writing since. But `qemu-img
commit` and a live block commit make writable what they have open already, and look at neither: what they have allocated
is found by the refcounts (`disk_refcounts.py`). The bits lie in one sector, and change together.

A header of version 2 has no such fields.
"""

from __future__ import annotations

from ..format.header import AUTOCLEAR_FIELD, INCOMPATIBLE_FIELD, MAGIC, Incompatible
from .file import ImageFile
from .plan import Stage, Write

FEATURES = slice(INCOMPATIBLE_FIELD, AUTOCLEAR_FIELD + 8)
"""Where the three feature fields of a version 3 header lie."""

OURS = 1 << 63
"""The autoclear bit of the mark."""


def features_of(image: ImageFile) -> bytes:
    """The feature fields; zeroes of what is no image of version 3."""
    head = image.read_padded(0, FEATURES.stop)
    known = head[:4] == MAGIC and int.from_bytes(head[4:8], "big") >= 3
    return head[FEATURES] if known else bytes(FEATURES.stop - FEATURES.start)


def with_mark(features: bytes) -> bytes:
    """Feature fields with the mark."""
    incompatible, autoclear = int.from_bytes(features[:8], "big"), int.from_bytes(features[-8:], "big")
    marked = (incompatible | Incompatible.CORRUPT).to_bytes(8, "big"), (autoclear | OURS).to_bytes(8, "big")
    return marked[0] + features[8:-8] + marked[1]


def has_mark(features: bytes) -> bool:
    """True if feature fields have both bits of the mark."""
    return features == with_mark(features)


def is_marked(image: ImageFile) -> bool:
    """True if a change of ours has set its mark, and nobody has written to the image since."""
    return has_mark(features_of(image))


def bracketed(before: bytes, after: bytes, stages: list[Stage]) -> list[Stage]:
    """Stages between one that sets the mark and one that clears it, each of a single sector.

    Args:
        before: feature fields as they are.
        after: as they are to be. The stages themselves leave them as `with_mark(after)`.
    """
    first = _setting("the corrupt bit keeps QEMU out meanwhile", before, with_mark(before))
    last = _setting("the corrupt bit is cleared again", with_mark(after), after)
    return [*first, *stages, *last]


def _setting(purpose: str, old: bytes, new: bytes) -> list[Stage]:
    if old == new:
        return []  # what an image that was marked already is to keep stays
    text = f"header: {purpose}"
    return [Stage(text, (Write.replace(FEATURES.start, old, new, text),), journaled=True)]
