"""An image as it was before a change, read from an undo file that stands beside it.

A repair mends damage, and with it goes the evidence that clusters without any reference were cut off by it. The undo
file keeps the damage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UndoError
from ..image.file import UNDO_SUFFIX, ImageFile
from ..image.overlay import OverlayFile
from ..image.undo_layout import State
from ..image.undo_reader import UndoReader
from ..image.undo_standing import Since, since, to_put_back

_STATES = 4
"""Changes that are followed backwards."""
_FILES = 16
"""Undo files beside an image that are opened."""


def earlier_states(file: ImageFile) -> Iterator[OverlayFile]:
    """The image as it was before each change that an undo file beside it knows, and whose work is all still there.

    To be closed before the next is asked for. A state has earlier ones in its turn, up to four.
    """
    if _depth(file) > _STATES:
        return
    for path in _beside(file.path):
        try:
            with UndoReader(path) as undo:
                if undo.state is State.COMPLETE and undo.records and since(undo, file) is not Since.CHANGED:
                    yield as_before(undo, file)
        except UndoError:
            continue  # a damaged one tells nothing


def _depth(file: ImageFile) -> int:
    depth = 0
    while isinstance(file, OverlayFile):
        file, depth = file.base, depth + 1
    return depth


def _beside(image: Path) -> list[Path]:
    """Undo files with the name that a repair gives them, the newest first."""
    real = image.resolve()
    prefix = real.name + UNDO_SUFFIX
    try:
        with os.scandir(real.parent) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(prefix) and entry.is_file()]
    except OSError:
        return []
    names.sort(key=lambda name: (len(name), name), reverse=True)
    return [real.with_name(name) for name in names[:_FILES]]


def as_before(undo: UndoReader, file: ImageFile) -> OverlayFile:
    """The image with the bytes back that the change has replaced, and as long as it was.

    Raises:
        UndoError: the undo file is damaged.
    """
    overlay = OverlayFile(file)
    for record in reversed(undo.records):
        for start, stop in to_put_back(record, overlay, record.end):
            overlay.write_at(start, undo.old(record, start, stop))
    overlay.size = undo.size_before
    return overlay
