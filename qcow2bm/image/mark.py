"""The mark of a change that a crash could tear: a feature bit, set before its first stage and cleared by its last.

Nobody defines the bit, and it is an incompatible one: whoever does not know it must not open the image, not even to
read. So QEMU, which would make sense of half a change, is kept out, and so are those who open an image for reading
first and write to it then, as `qemu-img commit` and a live block commit do. Where the bit is set nobody but qcow2bm has
used the image since, and its journal may be rolled back.

A header of version 2 has no such field.
"""

from __future__ import annotations

from ..format.header import CUT_SHORT, INCOMPATIBLE_FIELD, MAGIC
from .file import ImageFile
from .plan import Stage, Write

FEATURES = slice(INCOMPATIBLE_FIELD, INCOMPATIBLE_FIELD + 8)
"""Where the incompatible features of a version 3 header lie."""


def features_of(image: ImageFile) -> bytes:
    """The incompatible features; zeroes of what is no image of version 3."""
    head = image.read_padded(0, FEATURES.stop)
    known = head[:4] == MAGIC and int.from_bytes(head[4:8], "big") >= 3
    return head[FEATURES] if known else bytes(FEATURES.stop - FEATURES.start)


def with_mark(features: bytes) -> bytes:
    """Feature bits with the mark."""
    return (int.from_bytes(features, "big") | CUT_SHORT).to_bytes(len(features), "big")


def has_mark(features: bytes) -> bool:
    """True if feature bits have the mark."""
    return features == with_mark(features)


def is_marked(image: ImageFile) -> bool:
    """True if a change of ours has set its mark, and has not come to its end."""
    return has_mark(features_of(image))


def bracketed(before: bytes, after: bytes, stages: list[Stage]) -> list[Stage]:
    """Stages between one that sets the mark and one that clears it, each of a single sector.

    Args:
        before: feature bits as they are.
        after: as they are to be. The stages themselves leave them as `with_mark(after)`.
    """
    first = _setting("the mark keeps everybody out meanwhile", before, with_mark(before))
    last = _setting("the mark is cleared again", with_mark(after), after)
    return [*first, *stages, *last]


def _setting(purpose: str, old: bytes, new: bytes) -> list[Stage]:
    if old == new:
        return []  # what an image that was marked already is to keep stays
    text = f"header: {purpose}"
    return [Stage(text, (Write.replace(FEATURES.start, old, new, text),), journaled=True)]
