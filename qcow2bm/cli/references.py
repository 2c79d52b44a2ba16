"""`IMAGE#name`: a bitmap of some image. File names and bitmap names may both hold a `#`."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UsageError


def split_reference(text: str) -> tuple[str, str | None]:
    """Image and bitmap name; None where there is no name.

    The image is the shortest part before a `#` that is there as a file; if none is, the part before the first `#`.
    """
    places = [place for place, char in enumerate(text) if char == "#"]
    if not places:
        return text, None
    chosen = next((place for place in places if os.path.exists(text[:place])), None)  # noqa: PTH110 - "" is no file
    if chosen is None:
        if os.path.exists(text):  # noqa: PTH110
            return text, None
        chosen = places[0]
    return text[:chosen], text[chosen + 1 :]


def parse_reference(text: str) -> tuple[Path, str]:
    """Image and bitmap name.

    Raises:
        UsageError: one of them is missing.
    """
    image, name = split_reference(text)
    if not image or not name:
        raise UsageError(f"'{text}' does not name a bitmap of an image", hint="write IMAGE#BITMAP")
    return Path(image), name


def same_file(left: Path, right: Path) -> bool:
    """True if both names lead to one file. An image must not be opened twice: it would be locked against itself."""
    try:
        return left.samefile(right)
    except OSError:  # one is missing: opening it will say so
        return left == right
