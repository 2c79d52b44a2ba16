"""What lies where a journal would be and is none: every command says so, and how to get it out of the way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2bm.cli.qemu_options import RefusedError, refusing
from qcow2bm.errors import UndoError
from tests.support.scenes import three

KINDS: dict[str, Callable[[Path], object]] = {
    "junk": lambda path: path.write_bytes(b"junk" * 5000),
    "FIFO": os.mkfifo,
    "directory": Path.mkdir,
    "link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a file": lambda path: path.symlink_to("image.qcow2"),
    "image": lambda path: shutil.copy(path.with_name("image.qcow2"), path),
}
LINES = (
    "info IMAGE",
    "check IMAGE",
    "repair IMAGE --dry-run",
    "repair IMAGE --yes",
    "clear IMAGE a",
    "clear IMAGE a --dry-run",
    "qemu-img bitmap --clear -f qcow2 IMAGE a",
    "qemu-img check -f qcow2 IMAGE",
    "qemu-img check -r all -f qcow2 IMAGE",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_journal_is_to_be_moved_away_and_then_all_is_well(tmp_path: Path, run, kind: str) -> None:
    image = three(tmp_path)
    journal, before = image.with_name("image.qcow2.qcow2bm-journal"), image.read_bytes()
    KINDS[kind](journal)
    for line in LINES:
        result = run(*line.replace("IMAGE", str(image)).split())
        assert result.status != 0, line
        assert str(journal) in result.err
        assert "move it away: it is no journal that can be used" in result.err
        assert "cut short by a crash" not in result.err
    assert image.read_bytes() == before
    assert os.path.lexists(journal)
    journal.rename(tmp_path / "away")
    assert run("check", image).status == 0
    assert run("clear", image, "a").status == 0


def test_the_drop_in_says_nothing_of_advice_where_there_is_none() -> None:
    for hint, end in ((None, "is damaged"), ("move it away", "is damaged; move it away")):
        with pytest.raises(RefusedError) as caught, refusing("i.qcow2", "qcow2", writable=True):
            raise UndoError("the journal is damaged", hint=hint)
        assert caught.value.args[0] == f"Could not open 'i.qcow2': the journal {end}"


def test_a_journal_that_somebody_else_has_put_there_is_not_believed(tmp_path: Path, run, monkeypatch) -> None:
    """Whoever may write into the folder could else make anything of the image."""
    image = three(tmp_path)
    journal = image.with_name(f"{image.name}.qcow2bm-journal")
    assert run("clear", image, "a", "--undo", journal.with_name("undo")).status == 0
    journal.with_name("undo").rename(journal)
    before, real = image.read_bytes(), Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        found = list(real(path, **options))
        found[4] = 4711 if path == journal else found[4]
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = run("clear", image, "b")
    assert done.status == 1
    assert "belongs to user 4711" in done.err
    assert image.read_bytes() == before
