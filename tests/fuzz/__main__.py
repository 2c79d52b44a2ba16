"""Run commands on hostile images: `python -m tests.fuzz --images 100000`; figures go into docs/reliability.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.fuzz.running import CHANGING, MEMORY, READING, SECONDS, quiet_core_dumps, try_many
from tests.support.bases import make_bases
from tests.support.damage import Generator
from tests.support.figures import measured_with, write_figures

_PORTION = 100

_generator: Generator | None = None


def _set_up(generator: Generator) -> None:
    global _generator  # noqa: PLW0603 - one for each worker process
    _generator = generator
    quiet_core_dumps()


def _portion(first: int, stop: int) -> list[str]:
    assert _generator is not None
    return try_many(_generator, range(first, stop))


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
        generator = Generator(make_bases(Path(folder)))
        with ProcessPoolExecutor(wanted.workers, initializer=_set_up, initargs=(generator,)) as pool:
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
        f"{images:,} images, one of {len(READING) + len(CHANGING)} commands on each: {len(bad)} with a traceback, an"
        f" undocumented exit status, more than {SECONDS} s, more than {MEMORY >> 20} MiB, or a byte written by a"
        f" command that reads. {measured_with()}"
    )


if __name__ == "__main__":
    sys.exit(main())
