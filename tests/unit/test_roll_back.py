"""What a change leaves that cannot be written to its end: all that can be put back is, and the message is true."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.errors import ImageIOError, Qcow2bmError
from qcow2bm.image.file import ImageFile
from qcow2bm.image.plan import Write
from qcow2bm.image.roll_back import Outcome, put_back, roll_back
from tests.crash.faults import FAULTS, Fault, failing
from tests.crash.trial import named
from tests.support.qemu import check, qemu_img, qemu_io
from tests.support.recording import Tape
from tests.support.scenes import behind_another, three
from tests.support.states import bitmaps

MIB = 1 << 20
BARRIER = (-1, 0)
NEXT_COMMAND = "the next command that opens the image for writing puts the rest back"


class Torn(ImageFile):
    """A file that counts what is written, and cannot be written to in some places."""

    def prepare(self, *bad: int) -> None:
        self.bad = bad
        self.written: list[tuple[int, int]] = []

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if any(offset <= place < offset + len(data) for place in self.bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.written.append((offset, len(data)))
        super().write_at(offset, data)

    def barrier(self) -> None:
        self.written.append(BARRIER)
        super().barrier()


@pytest.fixture
def torn(tmp_path: Path):
    """A file of 64 KiB of ones and 16 KiB more, of which 48 KiB were its old length."""
    (tmp_path / "f").write_bytes(b"\1" * (64 << 10) + b"\2" * (16 << 10))
    with contextlib.closing(Torn.open(tmp_path / "f", writable=True)) as file:
        file.prepare()
        yield file


def replaced(offset: int, old: bytes, *, in_use: bool) -> tuple[Write, Callable[[], bytes]]:
    new = b"\1" * len(old)
    return Write.replace(offset, old, new, "") if in_use else Write.fresh(offset, new, ""), lambda: old


def test_only_sectors_that_differ_are_put_back(torn: Torn) -> None:
    old = bytearray(b"\1" * 10_000)
    old[700] = old[1300] = old[9000] = 7
    put_back(torn, 100, partial(bytes, old))
    assert torn.read_at(100, 10_000) == old
    assert torn.written == [(512, 1024), (8704, 512)]


def test_what_cannot_be_put_back_of_a_range_does_not_keep_the_rest(torn: Torn) -> None:
    torn.prepare(5000)
    with pytest.raises(OSError, match="Input/output"):
        put_back(torn, 0, lambda: b"\0" + b"\1" * 4999 + b"\0" + b"\1" * 4999 + b"\0")
    assert (torn.read_at(0, 1), torn.read_at(5000, 1), torn.read_at(10_000, 1)) == (b"\0", b"\1", b"\0")


def test_free_clusters_that_cannot_be_emptied_keep_nothing_else_from_being_put_back(torn: Torn) -> None:
    torn.prepare(4096)
    stages = [
        [replaced(0, b"\0" * 512, in_use=True)],
        [replaced(4096, b"\0" * 512, in_use=False), replaced(8192, b"\0" * 512, in_use=True)],
    ]
    outcome = roll_back(torn, stages, 48 << 10)
    assert outcome.stuck is None
    assert outcome.error is not None
    assert (torn.read_at(0, 1), torn.read_at(4096, 1), torn.read_at(8192, 1)) == (b"\0", b"\1", b"\0")
    assert os.fstat(torn.fd).st_size == 48 << 10


def test_what_a_stage_stands_on_stays_where_the_stage_cannot_be_put_back(torn: Torn) -> None:
    """A header that still leads to new clusters needs them, and their refcounts."""
    torn.prepare(4096)
    stages = [
        [replaced(0, b"\0" * 512, in_use=True)],
        [replaced(8192, b"\0" * 512, in_use=True), replaced(4096, b"\0" * 512, in_use=True)],
        [replaced(12288, b"\0" * 512, in_use=True)],
    ]
    outcome = roll_back(torn, stages, 48 << 10)
    assert outcome.stuck == 1
    assert [torn.read_at(offset, 1) for offset in (0, 4096, 8192, 12288)] == [b"\1", b"\1", b"\0", b"\0"]
    assert os.fstat(torn.fd).st_size == 80 << 10


def test_each_stage_is_on_the_disk_before_the_one_that_it_stands_on_is_touched(torn: Torn) -> None:
    stages = [[replaced(offset, b"\0" * 512, in_use=True)] for offset in (0, 4096)]
    assert roll_back(torn, stages, 48 << 10) == Outcome()
    assert torn.written == [(4096, 512), BARRIER, BARRIER, (0, 512), BARRIER]  # the one in the middle for the length


def test_a_length_that_stays_is_told(torn: Torn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_file: ImageFile, _size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ImageFile, "truncate", fail)
    outcome = roll_back(torn, [], 48 << 10)
    assert (outcome.stuck, outcome.error is None) == (None, False)
    monkeypatch.undo()
    assert roll_back(torn, [], 48 << 10) == Outcome()


# ---- what a command leaves, and says ----


def with_holes(image: Path) -> None:
    """Write a file anew, with holes where it holds zeroes, and one at its end."""
    data = image.read_bytes() + bytes(MIB)
    image.unlink()
    with image.open("xb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), 4096):
            if any(data[at : at + 4096]):
                os.pwrite(file.fileno(), data[at : at + 4096], at)


@pytest.mark.parametrize("line", ["merge IMAGE sum a b --create -g 512", "add IMAGE new -g 512 --all-dirty"])
def test_on_a_full_disk_every_byte_and_the_length_are_put_back(tmp_path: Path, run, line: str) -> None:
    """There is no room to fill a hole with, not even with what was there before."""
    image = three(tmp_path)
    with_holes(image)
    before, number = image.read_bytes(), 0
    fault = named(FAULTS, "disk fills up")
    while True:
        image.write_bytes(before)
        with_holes_again(image, before)
        with failing(tmp_path, fault, number):
            result = run(*(str(image) if word == "IMAGE" else word for word in line.split()))
        if result.status == 0:
            break
        assert "(No space left on device); everything was put back as it was" in result.err
        assert image.read_bytes() == before
        number += 1
    assert number >= 2
    assert check(image)["returncode"] == 0


def with_holes_again(image: Path, data: bytes) -> None:
    image.write_bytes(data[:-MIB])
    with_holes(image)
    assert image.read_bytes() == data
    assert image.stat().st_blocks * 512 < len(data)


def full_of_bitmaps(folder: Path) -> Path:
    """An image whose disk is made smaller by a change with a journal, which another one follows."""
    image = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_io(image, "write 0 1M", "write 5M 300k", "write 20M 64k")
    for name in "abc":
        qemu_img("bitmap", "--add", image, name)
    qemu_io(image, "write 3M 300k")
    return image


def shrink(opened: qcow2bm.Image) -> None:
    plan = qcow2bm.plan_resize(opened, MIB, shrink=True)
    assert plan.journaled
    assert not plan.stages[0].journaled
    opened.commit(plan)


def drop_the_last(opened: qcow2bm.Image) -> None:
    with opened.edit() as draft:
        draft.remove("a")


@pytest.mark.parametrize(("make", "change"), [(full_of_bitmaps, shrink), (behind_another, drop_the_last)])
def test_a_hint_promises_that_the_next_command_puts_the_rest_back_only_where_a_journal_is_there_for_it(
    tmp_path: Path, make: Callable[[Path], Path], change: Callable[[qcow2bm.Image], object]
) -> None:
    image = make(tmp_path)
    before, old, promises = image.read_bytes(), bitmaps(image), []
    journal = image.with_name(image.name + ".qcow2bm-journal")
    for number in range(40):
        image.write_bytes(before)
        with (
            failing(tmp_path, named(FAULTS, "write errors"), number),
            pytest.raises(Qcow2bmError) as caught,
            qcow2bm.open(image, writable=True) as opened,
        ):
            change(opened)
        failed = caught.value
        if "the change is done" in failed.message:
            break
        promises.append(failed.hint is not None and NEXT_COMMAND in failed.hint)
        assert journal.exists() or not promises[-1], failed
        with qcow2bm.open(image, writable=True) as opened:
            assert [bitmap.name for bitmap in opened.bitmaps] == [row[0] for row in old]
        assert not journal.exists()
        assert check(image)["returncode"] in (0, 3)
    assert True in promises
    assert make is not full_of_bitmaps or False in promises


def test_without_a_journal_a_hint_names_the_undo_file_which_puts_the_rest_back(tmp_path: Path, run) -> None:
    image, undo = three(tmp_path), tmp_path / "undo"
    before, hints = image.read_bytes(), 0
    for number in range(20):
        image.write_bytes(before)
        undo.unlink(missing_ok=True)
        with qcow2bm.open(image, writable=True, open_file=Tape(fail_at=number, sticky=True).open) as opened:
            draft = opened.draft()
            draft.remove("b")
            with pytest.raises(ImageIOError) as caught:
                opened.commit(draft.plan(), undo=undo)
        if f"`qcow2bm undo --force` with {undo} puts the rest back" in (caught.value.hint or ""):
            hints += 1
            assert run("undo", image, undo, "--force").status == 0
            assert image.read_bytes() == before
        elif "the change is done" in str(caught.value):
            break
    assert hints


def test_a_change_that_follows_another_and_fails_says_once_that_the_change_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = full_of_bitmaps(tmp_path)
    real, cuts = ImageFile.truncate, []

    def fail(file: ImageFile, size: int) -> None:
        cuts.append(size)
        if len(cuts) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(file, size)

    monkeypatch.setattr(ImageFile, "truncate", fail)
    with qcow2bm.open(image, writable=True) as opened:
        plan = qcow2bm.plan_resize(opened, MIB, shrink=True)
        with pytest.raises(ImageIOError) as caught:
            opened.commit(plan)
    assert len(cuts) == 2, "the change that follows cuts the file too"
    assert str(caught.value).count("the change is done") == 1
    assert check(image)["returncode"] == 0


def test_an_error_of_close_is_none_where_all_has_been_flushed(tmp_path: Path, run) -> None:
    image, undo = three(tmp_path), tmp_path / "undo"
    for words in (
        ("add", image, "new", "--undo", undo),
        ("undo", image, undo),
        ("clear", image, "a"),
        ("export", image, tmp_path / "exported"),
        ("import", image, tmp_path / "exported", "--replace"),
        ("info", image),
        ("repair", image, "--plan", tmp_path / "plan"),
    ):
        with failing(tmp_path, Fault("close", ("close",), errno.EIO, sticky=True), 0) as stand_in:
            result = run(*words)
        assert (result.status, result.err) == (0, ""), words
        assert stand_in.happened
