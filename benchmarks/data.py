"""Images that hold real data, the same on every run: for what reads guest data."""

from __future__ import annotations

import subprocess
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PIECE = 1 << 20


def data_image(path: Path, size: int, *, compressed: bool = False) -> None:
    """An image of that size, full of random bytes; to be compressed, of words that compress to about a quarter."""
    raw = path.with_suffix(".raw")
    chance = Random(1)
    words = [chance.randbytes(8) for _ in range(500)]
    try:
        with raw.open("wb") as file:
            for _ in range(size // PIECE):
                file.write(b"".join(chance.choices(words, k=PIECE // 8)) if compressed else chance.randbytes(PIECE))
        options = ("-c",) if compressed else ()
        subprocess.run(["qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", raw, path], check=True)
    finally:
        raw.unlink(missing_ok=True)
