"""Text from an image cannot drive the terminal; tables stay in line; colour is for terminals only."""

from __future__ import annotations

import io
import sys

import pytest

from qcow2bm.cli import terminal
from qcow2bm.cli.output import Cell, Column, print_table


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def as_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in place of stdout. No fixture: pytest would put its own stream back before the test begins."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    return stream


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("daily", "daily"),
        ("Täglich 日次 💾", "Täglich 日次 💾"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x7f\x80", "\\x7f\\u0080"),
        ("\udcff\udc80", "\\xff\\x80"),  # bytes that are not UTF-8
        ("abc\u202edef", "abc\\u202edef"),  # turns the direction of writing round
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_the_invisible_is_escaped(text: str, shown: str) -> None:
    assert terminal.printable(text) == shown


def test_wide_characters_count_twice_and_combining_ones_not_at_all() -> None:
    assert terminal.columns("日次") == 4
    assert terminal.columns("cafe\u0301") == 4


def test_a_table_lines_up(capsys) -> None:
    print_table([Column("NAME"), Column("N", right=True)], [["日次", "1"], [Cell("a", "red"), "12"]])
    assert capsys.readouterr().out == "NAME   N\n日次   1\na     12\n"


def test_piped_output_is_never_shortened(capsys) -> None:
    print_table([Column("NAME", flexible=True), Column("N")], [["n" * 1023, "1"], ["a", "2"]])
    assert capsys.readouterr().out.splitlines()[1:] == ["n" * 1023 + "  1", "a".ljust(48) + "  2"]


def test_on_a_terminal_a_long_name_is_shortened_to_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = as_terminal(monkeypatch)
    print_table([Column("NAME", flexible=True), Column("N")], [["n" * 1023, "1"]])
    plain = tty.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert [len(line) for line in plain.splitlines()] == [60, 60]
    assert "…" in plain


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    as_terminal(monkeypatch)
    assert terminal.painted("x", "red") == "\x1b[31mx\x1b[0m"
    assert terminal.painted("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.painted("x", "red") == "x"


def test_a_dumb_terminal_gets_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    as_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    assert terminal.painted("x", "red") == "x"


def test_the_strip_shows_the_smallest_share_and_full_only_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = as_terminal(monkeypatch)
    assert terminal.heat_strip([0.0, 1e-9, 0.5, 0.999999, 1.0], tty) == " ▁▄▇█"


def test_the_strip_in_a_terminal_without_blocks() -> None:
    class Latin(Terminal):
        encoding = "iso-8859-1"

    assert terminal.heat_strip([0.0, 1e-9, 1.0], Latin()) == " .@"
