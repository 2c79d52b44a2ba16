"""The commit engine refuses what is not as planned before a byte is written, and puts back every byte when it fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.errors import (
    BitmapNotFoundError,
    ChangeDoneError,
    ImageIOError,
    NoSpaceError,
    OutdatedPlanError,
    UsageError,
)
from qcow2bm.image import commit as commit_module
from qcow2bm.image.file import ImageFile
from qcow2bm.image.plan import Stage
from qcow2bm.image.spill import Spill
from tests.support.qemu import check, qemu_img, qemu_io
from tests.support.raw import OFFSET, Raw
from tests.support.recording import Tape
from tests.support.scenes import small, three
from tests.support.states import bitmaps


def test_a_plan_made_before_another_was_carried_out_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    """Its free clusters are the other one's data by now, though the file has not grown."""
    image = three(tmp_path)
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size + (4 << 20))
    with qcow2bm.open(image, writable=True) as opened:
        first, second = opened.draft(), opened.draft()
        first.add("x", all_dirty=True)
        second.add("y", all_dirty=True)
        plans = first.plan(), second.plan()
        opened.commit(plans[0])
        kept = image.read_bytes()
        with pytest.raises(OutdatedPlanError):
            opened.commit(plans[1])
    assert image.read_bytes() == kept
    assert "x" in [row[0] for row in bitmaps(image)]


def test_a_plan_is_not_carried_out_on_an_image_that_is_open_read_only(tmp_path: Path) -> None:
    image = small(tmp_path)
    before = image.read_bytes()
    with qcow2bm.open(image) as opened:
        draft = opened.draft()
        draft.add("new")
        with pytest.raises(UsageError, match="read-only"):
            opened.commit(draft.plan())
    assert image.read_bytes() == before


def test_an_error_of_the_callers_own_passes_through_an_edit_as_it_is(tmp_path: Path) -> None:
    image = small(tmp_path)
    before = image.read_bytes()
    with pytest.raises(FileNotFoundError), qcow2bm.open(image, writable=True) as opened, opened.edit():
        (tmp_path / "nowhere").read_text()
    assert image.read_bytes() == before


def test_what_an_edit_refuses_is_told_to_be_about_the_image(tmp_path: Path) -> None:
    image = small(tmp_path)
    with (
        pytest.raises(BitmapNotFoundError) as caught,
        qcow2bm.open(image, writable=True) as opened,
        opened.edit() as edit,
    ):
        edit.clear("none")
    assert caught.value.image == image


def test_the_first_bitmap_may_move_the_backing_name_and_grow_the_refcount_table_at_once(tmp_path: Path) -> None:
    """Both write to the header: the one must know what the other leaves."""
    qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", "16M", cwd=tmp_path)
    image = tmp_path / "image.qcow2"
    options = "cluster_size=512,refcount_bits=64,backing_fmt=qcow2,backing_file=base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image.name, "16M", cwd=tmp_path)
    reach = 64 * 64 * 512  # entries of the table's one cluster, refcounts of a block, bytes of a cluster
    written = 0
    while (room := reach - image.stat().st_size - (24 << 10)) > 8 << 10:
        piece = room // 2 & -4096  # L2 tables cost something too: half of the room is always safe
        qemu_io(image, f"write -P 9 {written} {piece}")
        written += piece
    before = Raw.load(image)
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        for number in range(40):
            edit.add(f"b{number}", granularity=512)
            for offset in range(number * 512, 16 << 20, 2 << 20):
                edit.set_range(f"b{number}", offset, 512)
    after = Raw.load(image)
    assert before.number(48) != after.number(48), "the refcount table has moved"
    assert before.number(8) != after.number(8), "the backing file name has moved"
    assert check(image)["returncode"] == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_when_any_write_fails_every_byte_is_as_it_was_free_clusters_included(tmp_path: Path, code: int) -> None:
    """Free clusters hold what was deleted: a file that failed to change is compared by its checksum."""
    original = tmp_path / "original"
    original.mkdir()
    image = three(original)
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("gone", granularity=512)
        edit.set_range("gone", 0, 4096)
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.remove("gone")
    before = image.read_bytes()
    failures = 0
    while True:
        image.write_bytes(before)
        tape = Tape(fail_at=failures, partial=True, code=code)
        try:
            with qcow2bm.open(image, writable=True, open_file=tape.open) as opened, opened.edit() as edit:
                edit.add("new", granularity=512)
                edit.set_range("new", 4096, 512)
        except ImageIOError as error:
            if "giving clusters back" in str(error):
                break
        except NoSpaceError:
            pass
        else:
            break
        assert image.read_bytes() == before
        failures += 1
    assert failures >= 3


def test_more_old_bytes_than_are_held_in_memory_are_put_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait in a temporary file."""
    monkeypatch.setattr("qcow2bm.image.commit._IN_MEMORY", 100)
    test_when_any_write_fails_every_byte_is_as_it_was_free_clusters_included(tmp_path, errno.ENOSPC)


def test_what_fails_after_the_change_says_that_the_change_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shrink is done once the header says so: what then keeps the file's end from being cut takes nothing back."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "8M")
    qemu_io(image, "write 0 8M")

    def fail(_file: ImageFile, _size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with qcow2bm.open(image, writable=True) as opened:
        plan = qcow2bm.plan_resize(opened, 1 << 20, shrink=True)
        monkeypatch.setattr(ImageFile, "truncate", fail)
        with pytest.raises(ImageIOError, match="the change is done, but not what was to follow"):
            opened.commit(plan)
    monkeypatch.undo()
    with qcow2bm.open(image) as opened:
        assert opened.virtual_size == 1 << 20
    assert check(image)["returncode"] == 0


def test_what_fails_after_the_change_is_done_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's write is noticed as old clusters are given back: the bitmap is gone all the same."""
    image, real = three(tmp_path), commit_module._Engine._write

    def write(engine: commit_module._Engine, stage: Stage) -> None:
        if stage is engine._plan.stages[-1]:
            raise OutdatedPlanError("the image has changed")
        real(engine, stage)

    monkeypatch.setattr(commit_module._Engine, "_write", write)
    with qcow2bm.open(image, writable=True) as opened:
        draft = opened.draft()
        draft.remove("a")
        with pytest.raises(ChangeDoneError, match="the change is done, but giving clusters back failed"):
            opened.commit(draft.plan())
    assert "a" not in [row[0] for row in bitmaps(image)]


def test_a_full_disk_under_what_is_to_be_put_back_is_told_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies in a temporary file, where there is much of it."""
    image = three(tmp_path)
    before = image.read_bytes()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(commit_module, "_IN_MEMORY", 0)
    monkeypatch.setattr(Spill, "put", full)
    with qcow2bm.open(image, writable=True) as opened:
        draft = opened.draft()
        draft.rename("a", "another name")
        with pytest.raises(NoSpaceError, match="writing failed") as failure:
            opened.commit(draft.plan())
    assert image.read_bytes() == before
    assert failure.value.hint == "everything was put back as it was"


def test_an_error_in_reading_the_bits_of_another_image_names_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run
) -> None:
    """They are read while this image is written to."""
    image, other = three(tmp_path), tmp_path / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", other, "4M")
    qemu_img("bitmap", "--add", other, "theirs")
    qemu_io(other, "write 64k 128k")
    before, raw = image.read_bytes(), Raw.load(other)
    data = raw.number(raw.tables()["theirs"][0]) & OFFSET
    assert data
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if offset == data and Path(f"/proc/self/fd/{fd}").readlink() == other:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    ended = run("copy", f"{other}#theirs", f"{image}#ours")
    assert (ended.status, ended.err) == (1, f"qcow2bm: {other}: Input/output error\n")
    assert image.read_bytes() == before
