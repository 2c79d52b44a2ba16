"""The results as a Markdown table, with all that is needed to judge it: machine, versions, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.cases import Case
    from benchmarks.measure import Comparison, Sample

BEGIN = "<!-- benchmarks: begin, rewritten by `make bench` -->"
END = "<!-- benchmarks: end -->"
LIBRARIES = ("qcow2bm", "construct", "bitarray", "typer", "numpy")

HEAD = (
    (
        "| case | qemu-img | qcow2bm | ratio | of pairs | of CPU time | target "
        "| peak RSS, MiB: qemu-img | qcow2bm | ratio | target |"
    ),
    "|---|--:|--:|--:|--:|--:|---|--:|--:|--:|---|",
)


def table(results: Iterable[tuple[Case, Comparison]]) -> list[str]:
    """One line of Markdown for each case."""
    return [*HEAD, *(row(case, comparison) for case, comparison in results)]


def row(case: Case, comparison: Comparison) -> str:
    """One case."""
    ours, theirs = peak_mib(comparison.ours), peak_mib(comparison.theirs)
    cells = [
        case.title,
        seconds(comparison.theirs),
        seconds(comparison.ours),
        ratio(comparison.ratio),
        ratio(comparison.pairwise_ratio),
        ratio(comparison.cpu_ratio),
        verdict(comparison.ratio, case.target),
        f"{theirs:.0f}",
        f"{ours:.0f}",
        ratio(ours / theirs),
        verdict(ours, case.peak_rss_limit / (1 << 20)) if case.peak_rss_limit else "",
    ]
    return f"| {' | '.join(cells)} |"


def seconds(runs: Iterable[Sample]) -> str:
    """The median wall time."""
    wall = median(run.wall for run in runs)
    return f"{wall:.2f} s" if wall >= 1 else f"{wall * 1000:.1f} ms"


def peak_mib(runs: Iterable[Sample]) -> float:
    """The highest peak of all runs."""
    return max(run.peak_rss for run in runs) / (1 << 20)


def ratio(value: float) -> str:
    """Two significant digits or three."""
    return f"{value:.3g}"


def verdict(value: float, limit: float) -> str:
    """The target, and whether it is met."""
    return f"{limit:g}, {'met' if value <= limit else '**missed**'}"


def circumstances() -> list[str]:
    """When, on what, and with which versions."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    qemu = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return [
        f"- measured on {datetime.now(UTC):%Y-%m-%d}",
        f"- {cpu_model()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB RAM, Linux {platform.release()}",
        f"- {qemu}",
        f"- Python {platform.python_version()}, {libraries}",
    ]


def cpu_model() -> str:
    """As the kernel names it; some machines do not say."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def rewrite(page: Path, generated: Iterable[str]) -> None:
    """Put the lines between the page's markers."""
    text = page.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found_begin and found_end):
        raise ValueError(f"{page}: the markers {BEGIN} and {END} are gone")
    page.write_text("\n".join([before + BEGIN, "", *generated, "", END]) + after, encoding="utf-8")
