"""Measures every case and rewrites the table in docs/performance.md."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cases import CASES, IMAGE, OLDER, Case, older
from benchmarks.measure import CommandFailedError, Comparison, Side, compare
from benchmarks.report import circumstances, rewrite, row, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"


def main() -> int:
    """Exit status 1 when a command failed; a missed target is a result, not a failure."""
    options = parse_arguments()
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    options.workdir.mkdir(parents=True, exist_ok=True)
    results = []
    try:
        for case, comparison in measure(chosen, options.workdir, options.runs):
            results.append((case, comparison))
            print(row(case, comparison), file=sys.stderr)
    except CommandFailedError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    lines = [*circumstances(), "", *table(results)]
    print("\n".join(lines))
    if len(chosen) == len(CASES):  # the page holds one whole run: rows of different days do not compare
        rewrite(PAGE, lines)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--only", action="append", choices=names, help="measure this case only; may be repeated")
    parser.add_argument("--runs", type=int, help="runs of each program in each case (default: the case's own number)")
    parser.add_argument(
        "--workdir", type=Path, default=ROOT / ".bench", help="where images go, 2 GiB (default: .bench)"
    )
    return parser.parse_args()


def measure(cases: Iterable[Case], workdir: Path, runs: int | None) -> Iterator[tuple[Case, Comparison]]:
    """Craft each image once for the neighbouring cases that share it, and take it away again."""
    for craft, sharing in groupby(cases, lambda case: case.craft):
        original = workdir / "original.qcow2"
        try:
            print("crafting an image", file=sys.stderr)
            craft(original)
            for case in sharing:
                print(f"{case.name}: {runs or case.runs} runs of each", file=sys.stderr)
                yield case, measure_case(case, original, runs or case.runs)
        finally:
            original.unlink(missing_ok=True)
            older(original).unlink(missing_ok=True)


def measure_case(case: Case, original: Path, runs: int) -> Comparison:
    """Run both sides on copies of their own, and take these away again."""
    ours, theirs = (original.with_name(f"{case.name}-{which}.qcow2") for which in ("ours", "theirs"))
    try:
        return compare(
            side(our_program(), case.ours, original, ours, fresh=case.fresh_copy),
            side(list(case.their_program), case.theirs, original, theirs, fresh=case.fresh_copy),
            runs,
        )
    finally:
        for path in (ours, theirs):
            path.unlink(missing_ok=True)


def our_program() -> list[str]:
    """The installed script, as users start it; from a plain checkout the module."""
    script = Path(sys.executable).with_name("qcow2bm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "qcow2bm"]


def side(program: list[str], commands: Iterable[str], original: Path, copy: Path, *, fresh: bool) -> Side:
    """A program on its own copy of the image."""
    places = {IMAGE: str(copy), OLDER: str(older(original))}
    lines = [[*program, *(places.get(word, word) for word in line.split())] for line in commands]
    copy_image(original, copy)
    return Side(lines, (lambda: copy_image(original, copy)) if fresh else lambda: None)


def copy_image(source: Path, target: Path) -> None:
    """A copy with the same holes, on disk before anyone is timed: a command's sync must not pay for our copying."""
    subprocess.run(["cp", "--sparse=auto", "--reflink=auto", source, target], check=True)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    if shutil.which("qemu-img") is None:
        sys.exit("benchmarks: qemu-img is missing; on Debian and Ubuntu: sudo apt-get install qemu-utils")
    sys.exit(main())
