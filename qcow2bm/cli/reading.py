"""Opening an image to look at it, and what every listing says about a bitmap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .. import api
from ..bitmap.store import State
from ..errors import InUseError, naming
from .output import Cell, JsonObject, warn
from .sizes import human_size, percent

if TYPE_CHECKING:
    from ..image.undo import Settled

T = TypeVar("T")

COLOURS = {State.READY: "green", State.ACTIVE: "yellow"}
"""All other states are red: nothing but removing such a bitmap is safe."""


@contextlib.contextmanager
def reading(path: Path, *, force_share: bool) -> Iterator[api.Image]:
    """An image opened to read, with a warning where what is read may be stale."""
    with api.open(path, force_share=force_share) as image:
        if force_share:
            warn("read without keeping writers out: what is shown may be stale", path)
        elif not image.qcow2.locked:
            warn_unlocked(path)
        yield image


def warn_opened(path: Path, *, unlocked: bool, settled: Settled | None) -> None:
    """What is to be said where an image was opened to be changed."""
    if unlocked:
        warn_unlocked(path)
    if settled is not None and settled.rolled_back:
        warn("an earlier change was cut short by a crash; it was rolled back first", path)
    if settled is not None and settled.set_aside is not None:
        text = "the journal beside it is another file's, or of an earlier state of this one"
        warn(f"{text}: it is {settled.set_aside} now", path)


def warn_unlocked(path: Path) -> None:
    """What is to be said where a file is read that locks cannot protect."""
    warn("this file system has no locks: what is shown is stale if a VM runs", path)


@contextlib.contextmanager
def reading_alone(path: Path, hint: str) -> Iterator[api.Image]:
    """An image opened to read, which nobody may write to meanwhile: for commands without -U, with their own hint."""
    try:
        with reading(path, force_share=False) as image:
            yield image
    except InUseError as error:
        error.hint = hint
        raise


def named(path: str | Path, items: Iterable[T]) -> Iterator[T]:
    """`items`, with errors on the way told to be about the image at `path`, but not those of whoever takes them."""
    with naming(path):
        yield from items


def dirty_bytes(bitmap: api.Bitmap) -> int | None:
    """The dirty bytes, if the bits are to be relied on."""
    return bitmap.dirty_bytes if bitmap.state is State.READY else None


def state_cell(bitmap: api.Bitmap) -> Cell:
    """The state in its colour."""
    return Cell(bitmap.state.value, COLOURS.get(bitmap.state, "red"))


def dirty_text(dirty: int | None, virtual_size: int) -> tuple[str, str]:
    """Dirty bytes and their share of the disk."""
    return ("-", "-") if dirty is None else (human_size(dirty), percent(dirty, virtual_size))


def bitmap_json(bitmap: api.Bitmap) -> dict[str, object]:
    """A bitmap without its bits."""
    fault = {"fault": bitmap.fault} if bitmap.fault is not None else {}
    return {
        "name": bitmap.name,
        "state": bitmap.state.value,
        **fault,
        "recording": bitmap.recording,
        "granularity": bitmap.granularity if bitmap.granularity < 1 << 64 else None,
        "bytes-on-disk": bitmap.bytes_on_disk,
    }


def bitmaps_json(bitmaps: Iterable[api.Bitmap]) -> list[JsonObject]:
    """All bitmaps without their bits."""
    return [bitmap_json(bitmap) for bitmap in bitmaps]


def complaints(bitmaps: api.Bitmaps) -> list[str]:
    """What is broken about the bitmaps of an image, for exit status 4; inconsistent ones are not broken."""
    found = [f"bitmap '{bitmap.name}' is broken: {bitmap.fault}" for bitmap in bitmaps if bitmap.fault is not None]
    if bitmaps.damage is not None:
        found.append(f"the bitmap directory is damaged: {bitmaps.damage}")
    return found
