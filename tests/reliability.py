"""Figures for docs/reliability.md: seeded damaged images, repaired by us and by `qemu-img check -r all`.

    python -m tests.reliability --images 600

Each image is a copy of one of the bases of tests/support/bases.py with one to three damages of tests/support/damage.py;
the seed decides which. What is counted is what QEMU says of the image before and after.
"""

import argparse
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from qcow2bm.checks.model import RepairClass
from tests.support.bases import make_bases
from tests.support.damage import Generator
from tests.support.figures import measured_with, write_figures
from tests.support.repairs import BADNESS, GAVE_UP, Outcome, look, ours, theirs

FIRST_SEED = 500_000
OURS = {
    "`repair`": RepairClass.LOSSLESS,
    "`repair --allow lossy`": RepairClass.LOSSY,
    "`repair --allow guess`": RepairClass.GUESS,
}
THEIRS = "`qemu-img check -r all`"
ROWS = (
    ("sound", "sound for QEMU afterwards, or with leaks only"),
    ("worse", "worse for QEMU than before, or no longer readable"),
    ("data", "guest data changed without a word"),
    ("bitmaps", "images with a sound bitmap lost or changed"),
    ("gave-up", "crashed, or not done in a minute"),
)

_generator: Generator | None = None


def judged(before: Outcome, after: Outcome) -> Iterable[str]:
    """The rows that a repair counts for."""
    if BADNESS.get(after.status, 3) == 0:
        yield "sound"
    if after.status == GAVE_UP:
        yield "gave-up"
    if after.is_worse_than(before):
        yield "worse"
    if after.changed_data(before):
        yield "data"
    if after.lost_bitmaps(before):
        yield "bitmaps"


def one(seed: int) -> dict[str, list[str]]:
    """What becomes of one image, under each repair."""
    assert _generator is not None
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.qcow2"
        image.write_bytes(_generator.damaged(seed).data)
        before = look(image)
        results = {name: list(judged(before, ours(image, allow))) for name, allow in OURS.items()}
        results[THEIRS] = list(judged(before, theirs(image)))
        results["before"] = ["sound"] if BADNESS.get(before.status, 3) == 0 else []
        return results


def _set_up(bases: Generator) -> None:
    global _generator  # noqa: PLW0603 - one for each worker process
    _generator = bases


def figures(images: int) -> tuple[Counter[tuple[str, str]], int]:
    """How often each row counted under each repair; how many images were sound for QEMU to begin with."""
    counted: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        generator = Generator(make_bases(Path(folder)))
        with multiprocessing.Pool(os.cpu_count(), _set_up, (generator,)) as pool:
            for results in pool.imap_unordered(one, range(FIRST_SEED, FIRST_SEED + images), chunksize=4):
                for name, rows in results.items():
                    counted.update((name, row) for row in rows)
    return counted, counted["before", "sound"]


def table(counted: Counter[tuple[str, str]], images: int, sound: int) -> str:
    """The figures as Markdown."""
    names = [*OURS, THEIRS]
    last = FIRST_SEED + images - 1
    lines = [
        f"{images} images (seeds {FIRST_SEED} to {last}), {sound} of them sound for QEMU to begin with.",
        measured_with(),
        "",
        f"| images | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    lines += [f"| {text} | {' | '.join(str(counted[name, row]) for name in names)} |" for row, text in ROWS]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=600)
    images = parser.parse_args().images
    counted, sound = figures(images)
    text = table(counted, images, sound)
    write_figures("repairs", text)
    print(text)


if __name__ == "__main__":
    main()
