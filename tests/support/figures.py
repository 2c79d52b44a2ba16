"""The tables of figures in docs/reliability.md: each stands between `<!-- NAME -->` and `<!-- end -->`."""

import re
from pathlib import Path

from tests.support.tools import run, version

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def measured_with() -> str:
    """What the figures are of."""
    commit = run("git", "rev-parse", "--short", "HEAD", cwd=PAGE.parent).stdout.strip()
    return f"QEMU {version()}, commit {commit}."


def write_figures(name: str, table: str) -> None:
    """Put a table in the place of the one before."""
    page = PAGE.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    new, places = place.subn(lambda m: f"{m[1]}{table}\n{m[2]}", page)
    assert places == 1, f"{PAGE.name} has {places} places for the figures of '{name}'"
    PAGE.write_text(new, encoding="utf-8")
