"""Edits of images that QEMU refuses to open: for a bitmap beside the one edited, or for something else altogether."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qcow2bm.__main__ import main
from qcow2bm.checks.model import InQemu
from qcow2bm.checks.problems import PROBLEMS
from tests.support.images import Fixture, corrupt_fixtures, unpack
from tests.support.tools import check, run

REFUSED = [
    fixture
    for fixture in corrupt_fixtures()
    if PROBLEMS[fixture.path.name].qemu is InQemu.REFUSES
    and fixture.path.name != "data-file-name-missing"  # QEMU opens it if the data file is named on its command line
]
EDITS = {"add": ["new"], "resize": ["+1M"]}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("fixture", REFUSED, ids=lambda fixture: fixture.path.name)
def test_no_edit_leaves_an_image_that_qemu_refuses_and_says_nothing(
    fixture: Fixture, edit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Either it refuses too, or the image opens afterwards, or it is said that it may not, and for which bitmap."""
    image = fixture.unpack(tmp_path)
    before = image.read_bytes()
    assert "error" in check(image, fixture.secret)

    foreseen = main([edit, str(image), *EDITS[edit], "--dry-run"])
    foretold = capsys.readouterr().err
    assert image.read_bytes() == before

    status = main([edit, str(image), *EDITS[edit]])
    said = capsys.readouterr().err
    assert (foreseen, foretold) == (status, said)
    if status:
        assert str(image) in said
        assert image.read_bytes() == before
    elif "error" in check(image, fixture.secret):
        assert "is broken" in said
        assert "QEMU may refuse the whole image" in said


@pytest.mark.parametrize("fixture", REFUSED, ids=lambda fixture: fixture.path.name)
def test_the_drop_in_refuses_what_qemu_img_refuses(fixture: Fixture, tmp_path: Path) -> None:
    image = fixture.unpack(tmp_path)
    before = image.read_bytes()
    ours = run(sys.executable, "-m", "qcow2bm", "qemu-img", "bitmap", "--add", image, "new", check=False)
    assert ours.returncode == 1
    assert ours.stderr
    assert image.read_bytes() == before


@pytest.mark.parametrize("drop_in", [False, True], ids=["remove", "drop-in"])
def test_an_image_opens_again_when_its_broken_bitmap_is_removed(
    drop_in: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is what neither qemu-img nor a VM can do, so it must stay possible."""
    image = unpack("corrupt/bitmap-flags", tmp_path)
    words = ["qemu-img", "bitmap", "--remove"] if drop_in else ["remove"]
    assert main([*words, str(image), "daily"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert check(image)["returncode"] == 0
