"""The written pages say what the program says: those that are generated, and what README shows of `check`."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from docs import generate
from qcow2bm import __main__
from qcow2bm.checks.problems import PROBLEMS
from tests.support.images import FIXTURES, unpack

README = FIXTURES.parent / "README.md"


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch):
    """Run docs/generate.py with these arguments; its status."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def runner(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["generate.py", *words])
        return generate.main()

    return runner


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_up_to_date(name: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PAGES", {name: generate.PAGES[name]})
    assert make("--check") == 0, "run `make docs`"


def test_a_page_that_is_out_of_date_is_seen(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Guards the guard."""
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    monkeypatch.setattr(generate, "PAGES", {"problems.md": generate.problems_page})
    assert make("--check") == 1  # missing
    assert make() == make("--check") == 0
    page = tmp_path / "problems.md"
    page.write_text(page.read_text().replace("wasted space", "no problem", 1))
    assert make("--check") == 1
    assert "docs/problems.md is out of date" in capsys.readouterr().err


def test_every_problem_has_its_section() -> None:
    sections = re.findall(r"^### (.*)$", generate.problems_page(), re.MULTILINE)
    assert sorted(sections) == sorted(PROBLEMS)


def test_readme_shows_what_check_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    text = README.read_text(encoding="utf-8")
    [name] = re.findall(r"`fixtures/(corrupt/[a-z-]+)`", text)
    unpack(name, tmp_path).rename(tmp_path / "vm.qcow2")
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["check", "vm.qcow2"]) == 2
    shown = "$ qcow2bm check vm.qcow2\n" + capsys.readouterr().out
    assert textwrap.indent(shown, "    ") in text
