"""Run commands on hostile images: `python -m tests.fuzz --images 100000`; figures go into docs/reliability.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.fuzz.running import (
    CHANGING,
    MEMORY,
    READING,
    SECONDS,
    Material,
    quiet_core_dumps,
    remember_memory,
    try_many,
)
from tests.support.figures import measured_with, write_figures

_PORTION = 100

_material: Material | None = None


def _set_up(material: Material) -> None:
    global _material  # noqa: PLW0603 - one for each worker process
    _material = material
    quiet_core_dumps()
    remember_memory()


def _portion(first: int, stop: int) -> list[str]:
    assert _material is not None
    return try_many(_material, range(first, stop))


def main() -> int:
    """Run them; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    wanted = parser.parse_args()
    end = wanted.first + wanted.images
    bad: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        material = Material.make(Path(folder))
        with ProcessPoolExecutor(wanted.workers, initializer=_set_up, initargs=(material,)) as pool:
            starts = range(wanted.first, end, _PORTION)
            for start, found in zip(
                starts, pool.map(_portion, starts, [min(at + _PORTION, end) for at in starts]), strict=True
            ):
                bad += found
                for line in found:
                    print(line, flush=True)
                if (start // _PORTION) % 50 == 0:
                    print(f"... {start} after {time.monotonic() - started:.0f} s", flush=True)
    print(f"{wanted.images} images, {len(bad)} bad")
    if wanted.images >= 10_000:
        write_figures("hostile", _table(wanted.images, bad))
    return 1 if bad else 0


def _table(images: int, bad: list[str]) -> str:
    return (
        f"{images:,} images, one of {len(READING) + len(CHANGING)} commands on each, or one that reads a hostile file"
        f" beside a sound image: {len(bad)} with a traceback, an undocumented exit status, more than {SECONDS} s of"
        f" work, more than {MEMORY >> 20} MiB and twice the metadata, or a byte written by a command that reads or"
        f" fails. {measured_with()}"
    )


if __name__ == "__main__":
    sys.exit(main())
