"""Loop devices: a file by another name, which is told by the kernel alone."""

from __future__ import annotations

import os
from pathlib import Path


def looped_file(device: int) -> Path | None:
    """The file behind a loop device of that number, by the name that the kernel has for it; None if it is none."""
    told = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/loop/backing_file")
    try:
        return Path(os.fsdecode(told.read_bytes().removesuffix(b"\n")))
    except OSError:
        return None
