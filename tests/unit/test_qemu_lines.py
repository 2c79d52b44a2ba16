"""How often the drop-in's check says a line."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from qcow2bm.__main__ import main
from qcow2bm.checks import view
from qcow2bm.checks.model import Location
from qcow2bm.checks.problems import found
from qcow2bm.cli.qemu_check_text import lines
from qcow2bm.cli.qemu_repair import words
from qcow2bm.cli.qemu_totals import Totals
from qcow2bm.repair.as_qemu.model import Event
from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import OFFSET, Raw
from tests.support.tools import run


def test_a_line_is_said_as_often_as_it_counts_until_that_has_no_end() -> None:
    totals = Totals(repeats=5)

    def said(count: int) -> list[str]:
        return list(lines(found("l1-entry-reserved", "", Location("L1 table"), count=count, entry=1), totals))

    line = said(1)[0]
    assert said(4) == [line] * 4
    assert said(1_000_000_000) == [line, "qcow2bm: that counts 1000000000 times"]
    assert said(3) == [line] * 3
    assert said(2) == [line, "qcow2bm: that counts 2 times"]


def test_a_line_that_is_mended_keeps_the_remark_how_often_it_counts() -> None:
    """Only the line that QEMU has says in a repair that it is mended."""
    finding = found("l1-entry-reserved", "", Location("L1 table"), count=9, entry=1)
    first, remark = words(Event(finding, mended=True), Totals(repeats=0))
    assert first.startswith("Repairing ")
    assert remark == "qcow2bm: that counts 9 times"


@pytest.mark.parametrize("limit", [1 << 19, 0], ids=["visit by visit", "table by table"])
def test_a_table_that_is_named_often_is_said_of_as_qemu_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    """Where there would be too many lines their order alone is another."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "2G")
    qemu_io(image, "write -P 1 0 64k", "write -P 2 512M 64k")
    raw = Raw.load(image)
    l1 = raw.number(40)
    for index in (2, 3):
        raw.put(l1 + 8 * index, raw.number(l1 + 8 * (index - 2)))
    for index in (0, 1):
        table = raw.number(l1 + 8 * index) & OFFSET
        raw.put(table, raw.number(table) | 0x200)
        raw.put(table + 80, 1 << 55 | 1)
    raw.save(image)
    real = run("qemu-img", "check", "-f", "qcow2", image, check=False)
    with patch.object(view, "_REPEATED", limit):
        status = main(["qemu-img", "check", "-f", "qcow2", str(image)])
    ours, theirs = capsys.readouterr().err.splitlines(), real.stderr.splitlines()
    assert status == real.returncode == 2
    assert sorted(ours) == sorted(theirs)
    assert (ours == theirs) == bool(limit)
