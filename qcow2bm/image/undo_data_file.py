"""What an undo file notes of the external data file, which it does not hold: where it is, and how it was left.

Guest data written there changes nothing in the image, so without this nobody would see that undoing the change takes
the image away from newer data. It is the label of a kept range without bytes, the first of all, so that the layout is
the one that older programs read.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .plan import Kept

if TYPE_CHECKING:
    from .file import ImageFile

_LABEL = "data file: "


@dataclass(frozen=True, slots=True)
class NotedDataFile:
    """The data file of an image when a change was made.

    Attributes:
        path: absolute.
        size_before: its length before the change, in bytes.
        size_after: its length since.
        mtime_ns: its time stamp since, in nanoseconds since 1970; 0 for a device, whose writes leave none.
    """

    path: str
    size_before: int
    size_after: int
    mtime_ns: int

    @classmethod
    def of(cls, file: ImageFile, size_before: int) -> Self:
        """An open data file as it is now."""
        mtime = 0 if file.is_device else os.fstat(file.fd).st_mtime_ns
        return cls(str(file.path.resolve()), size_before, file.size, mtime)

    def kept(self) -> Kept:
        """The range that carries it."""
        return Kept(_LABEL + json.dumps(asdict(self), ensure_ascii=False), 0, 0)

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """What the label of a range says, or None if it is about something else."""
        if not label.startswith(_LABEL):
            return None
        try:
            said = json.loads(label.removeprefix(_LABEL))
            path = str(said["path"])
            before, after, mtime = (int(said[key]) for key in ("size_before", "size_after", "mtime_ns"))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None
        return cls(path, before, after, mtime) if min(before, after) >= 0 else None

    def has_changed(self) -> bool | None:
        """True if it was written to since; None if nobody knows, since it is not there, or is a device."""
        try:
            now = Path(self.path).stat()
        except (OSError, ValueError):
            return None
        if not self.mtime_ns:
            return None
        return (now.st_size, now.st_mtime_ns) != (self.size_after, self.mtime_ns)
