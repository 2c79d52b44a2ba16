"""What belongs to an image lies beside it, under its name: names change hands, files are moved, clocks are coarse."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import qcow2bm
from qcow2bm.__main__ import main
from qcow2bm.errors import ImageIOError
from qcow2bm.image import undo as undo_module
from qcow2bm.image import undo_writer
from qcow2bm.image.file import ImageFile
from tests.support.cut_short import JOURNAL, cut_short, damaged, is_open_to_qemu
from tests.support.qemu import check, qemu_img
from tests.support.scenes import three


@pytest.mark.parametrize("exact", [False, True], ids=["a newer one", "as it was, time stamp and all"])
def test_the_journal_of_an_image_that_was_moved_away_is_set_aside(tmp_path: Path, exact: bool, capsys) -> None:
    """A backup has its name now, and it is all that leads back there."""
    image, elsewhere = damaged(tmp_path), tmp_path / "broken.qcow2"
    shutil.copy2(image, tmp_path / "backup")
    if not exact:
        qemu_img("check", "-q", "-r", "all", tmp_path / "backup", check=False)
    before = image.read_bytes()
    states = list(cut_short(image, "repair", "--yes", "--no-undo"))
    states[len(states) // 2].write(tmp_path)
    image.rename(elsewhere)
    shutil.copy2(tmp_path / "backup", image)
    assert main(["remove", str(image), "a"]) == (2 if exact else 0)  # the old one is damaged
    stale = tmp_path / f"{JOURNAL}.stale"
    assert str(stale) in capsys.readouterr().err
    assert main(["undo", str(elsewhere), str(stale)]) == 0
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("how", ["moved", "by a second name"])
def test_a_torn_image_without_its_journal_is_not_repaired_but_as_a_guess(tmp_path: Path, how: str, capsys) -> None:
    """It may be found yet, and leads back only as long as nothing else is written."""
    image, elsewhere, undo = damaged(tmp_path), tmp_path / "elsewhere.qcow2", tmp_path / "undo"
    before, torn = image.read_bytes(), 0
    for state in cut_short(image, "repair", "--yes", "--no-undo"):
        elsewhere.unlink(missing_ok=True)
        undo.unlink(missing_ok=True)
        state.write(tmp_path)
        if is_open_to_qemu(image):
            continue
        if how == "moved":
            image.rename(elsewhere)
        else:
            os.link(image, elsewhere)
        left = elsewhere.read_bytes()
        torn += 1
        assert main(["check", str(elsewhere)]) == 2
        assert "change-cut-short" in capsys.readouterr().out
        assert main(["repair", str(elsewhere), "--yes", "--allow", "lossy"]) == 2
        assert "not done: take the image for what a crash has left of it (guess)" in capsys.readouterr().out
        assert main(["add", str(elsewhere), "new"]) == 1
        assert elsewhere.read_bytes() == left
        assert main(["repair", str(elsewhere), "--yes", "--allow", "guess", "--undo", str(undo)]) in (0, 3)
        assert check(elsewhere)["returncode"] in (0, 3)
        assert main(["undo", str(elsewhere), str(undo)]) == 0
        assert elsewhere.read_bytes() == left
        assert main(["undo", str(elsewhere), str(tmp_path / JOURNAL), "--force"]) == 0
        assert elsewhere.read_bytes() == before
    assert torn >= 2


def test_no_journal_is_written_beside_a_file_that_has_taken_the_name(tmp_path: Path) -> None:
    image = damaged(tmp_path)
    before = image.read_bytes()
    with qcow2bm.repairing(image) as repair:
        image.rename(tmp_path / "moved")
        shutil.copyfile(tmp_path / "moved", image)
        with pytest.raises(ImageIOError, match="renamed or replaced"):
            repair.commit(undo=None)
    assert (tmp_path / "moved").read_bytes() == image.read_bytes() == before
    assert not (tmp_path / JOURNAL).exists()


@pytest.mark.parametrize("command", ["repair", "undo"])
def test_an_undo_file_on_another_file_system_finishes_what_was_cut_short(
    tmp_path: Path, command: str, monkeypatch
) -> None:
    """Its journal is a copy then, which is settled first; and the undo file is used up."""
    monkeypatch.setattr(undo_writer, "second_name", lambda *_: False)
    monkeypatch.setattr(undo_module, "second_name", lambda *_: False)
    image, undo = damaged(tmp_path), tmp_path / "undo"
    before = image.read_bytes()
    if command == "undo":
        assert main(["repair", str(image), "--yes", "--undo", str(undo)]) == 0
        states = list(cut_short(image, "undo", str(undo)))
    else:
        states = list(cut_short(image, "repair", "--yes", "--undo", str(undo)))
    marked = 0
    for state in states:
        state.write(tmp_path)
        if is_open_to_qemu(image):
            continue
        marked += 1
        assert main(["undo", str(image), str(undo)]) == 0
        assert image.read_bytes() == before
        assert not (tmp_path / JOURNAL).exists()
        assert main(["undo", str(image), str(undo)]) == 1, "it has been used"
    assert marked >= 2


def test_a_data_file_that_was_moved_may_have_been_written_to(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    image, undo = tmp_path / "one" / "image.qcow2", tmp_path / "one" / "undo"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={image.with_name('data.raw')}", image, "4M")
    words = ["resize", str(image), "+1M", "--data-file", str(image.with_name("data.raw"))]
    assert main([*words, "--undo", str(undo)]) == 0
    (tmp_path / "one").rename(tmp_path / "two")
    image, undo = tmp_path / "two" / "image.qcow2", tmp_path / "two" / "undo"
    assert main(["undo", str(image), str(undo)]) == 1
    assert main(["undo", str(image), str(undo), "--force"]) == 0


@pytest.mark.parametrize(("second", "least"), [(True, 1.0), (False, 0.0)], ids=["of whole seconds", "of nanoseconds"])
def test_no_later_write_leaves_the_time_stamp_of_a_change(
    tmp_path: Path, second: bool, least: float, monkeypatch
) -> None:
    """Where a file system counts seconds, a guest's write within the same one would not show."""
    slept: list[float] = []
    monkeypatch.setattr(undo_writer, "time", SimpleNamespace(time_ns=time.time_ns, sleep=slept.append))
    image, real = three(tmp_path), ImageFile.barrier

    def stamped(file: ImageFile) -> None:
        real(file)
        now = time.time_ns()
        os.utime(file.fd, ns=(now, now - now % 10**9 if second else now + 1))

    monkeypatch.setattr(ImageFile, "barrier", stamped)
    assert main(["remove", str(image), "a", "--undo", str(tmp_path / "undo")]) == 0
    assert slept
    assert least < max(slept) <= (2.0 if second else 0.011)


def test_no_journal_of_an_undo_is_written_beside_a_file_that_has_taken_the_name(tmp_path: Path, monkeypatch) -> None:
    image, undo = damaged(tmp_path), tmp_path / "undo"
    assert main(["repair", str(image), "--yes", "--undo", str(undo)]) == 0
    after, real = image.read_bytes(), undo_module.require_restorable

    def meanwhile(*words: object, **options: object) -> object:
        found = real(*words, **options)  # type: ignore[arg-type]
        image.rename(tmp_path / "moved")
        shutil.copyfile(tmp_path / "moved", image)
        return found

    monkeypatch.setattr(undo_module, "require_restorable", meanwhile)
    assert main(["undo", str(image), str(undo)]) == 1
    assert (tmp_path / "moved").read_bytes() == image.read_bytes() == after
    assert not (tmp_path / JOURNAL).exists()
    monkeypatch.undo()
    assert main(["undo", str(tmp_path / "moved"), str(undo)]) == 0
