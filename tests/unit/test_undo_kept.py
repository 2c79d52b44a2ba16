"""What an undo file keeps although nothing overwrites it, and when it is on the disk: before the first overwrite."""

from __future__ import annotations

import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.errors import UndoError
from qcow2bm.image.file import ImageFile
from qcow2bm.image.overlay import OverlayFile
from qcow2bm.image.plan import Kept, Plan, Stage, Write
from qcow2bm.image.undo import UndoFile
from qcow2bm.image.undo_layout import State
from qcow2bm.image.undo_reader import UndoReader
from qcow2bm.image.undo_writer import UndoWriter
from tests.support.recording import Tape
from tests.support.scenes import add_data, one, straddling, three

MIB = 1 << 20
JOURNAL = "image.qcow2.qcow2bm-journal"


# ---- what is kept ----


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Any bytes will do: an undo file does not ask what it keeps."""
    path = tmp_path / "image.qcow2"
    path.write_bytes(random.Random(1).randbytes(3 * MIB + 77))
    return path


def written(image: Path, *kept: Kept, stages: tuple[Stage, ...] = ()) -> Path:
    """A complete undo file of a change that does what `stages` say."""
    undo = image.with_name("undo")
    undo.unlink(missing_ok=True)
    file = ImageFile.open(image, writable=True)
    writer = UndoWriter.create(undo, file, stages, file.size, kept=kept)
    for stage in stages:
        for write in stage.writes:
            file.write_at(write.offset, write.read())
    writer.complete(file)
    file.close()
    return undo


def rewrite(image: Path, offset: int, length: int) -> Stage:
    """Other bytes at a place."""
    old = image.read_bytes()[offset : offset + length]
    return Stage("rewrite", (Write.replace(offset, old, bytes(byte ^ 0xFF for byte in old), "other bytes"),))


RANGES = (
    Kept("header", 0, 112),
    Kept("entry of 'a'", 70_000, 40),
    Kept("entry of 'a'", 70_040, 24),  # names may be equal
    Kept("", 80_000, 1),
    Kept("data", 2 * MIB - 5, MIB + 10),
    Kept("inside the data", 2 * MIB, 4096),
    Kept("across the end of the data", 3 * MIB - 9, 50),
    Kept("nothing", 500, 0),
    Kept("\udcff\n'", 512, 512),
)


def test_ranges_come_back_in_order_with_labels_and_bytes(image: Path) -> None:
    data = image.read_bytes()
    with UndoReader(written(image, *RANGES)) as undo:
        kept = undo.kept()
        assert kept.ranges == RANGES
        for wanted in RANGES:
            assert kept.read(wanted.offset, wanted.length) == data[wanted.offset : wanted.offset + wanted.length]
        assert kept.read(70_030, 20) == data[70_030:70_050], "ranges that touch are one"


def test_what_was_not_kept_is_not_made_up(image: Path) -> None:
    with UndoReader(written(image, *RANGES)) as undo:
        kept = undo.kept()
        for offset, length in [
            (112, 1),
            (100, 20),
            (69_999, 2),
            (70_064, 1),
            (79_999, 1),
            (2 * MIB - 6, 2),
            (1 << 60, 0),
        ]:
            assert kept.holds(offset, length) == (length == 0)
            assert kept.read(offset, length) == (None if length else b"")


def test_a_range_is_cut_at_the_end_of_the_file_and_reads_as_zeroes_there(image: Path) -> None:
    size = image.stat().st_size
    with UndoReader(written(image, Kept("tail", size - 77, 1000), Kept("outside", size + 5, 9))) as undo:
        kept = undo.kept()
        assert kept.ranges == (Kept("tail", size - 77, 77), Kept("outside", size, 0))
        assert kept.read(size - 77, 1000) == image.read_bytes()[-77:] + bytes(923)


def test_the_bytes_are_those_from_before_the_change_and_undo_does_not_need_them(image: Path) -> None:
    before = image.read_bytes()
    undo = written(image, *RANGES, stages=(rewrite(image, 70_000, 600), rewrite(image, 2 * MIB, 512)))
    assert image.read_bytes() != before
    with UndoReader(undo) as held:
        assert held.kept().read(2 * MIB, 4096) == before[2 * MIB : 2 * MIB + 4096]
        assert held.bytes_replaced == 600 + 512
    qcow2bm.undo(image, undo)
    assert image.read_bytes() == before
    with UndoReader(undo) as held:
        assert held.state is State.UNDONE
        assert held.kept().ranges == RANGES, "they stay readable"


def test_kept_ranges_have_no_part_in_recognising_the_image(image: Path) -> None:
    undo = written(image, *RANGES, stages=(rewrite(image, 600, 100),))
    data = bytearray(image.read_bytes())
    data[70_001] ^= 1  # in a range that was kept, and not written
    stamp = image.stat().st_mtime_ns
    image.write_bytes(data)
    os.utime(image, ns=(stamp, stamp))
    qcow2bm.undo(image, undo)
    data[600:700] = bytes(byte ^ 0xFF for byte in data[600:700])
    assert image.read_bytes() == data


def test_no_byte_of_the_image_is_kept_twice_however_many_ranges_it_lies_in(image: Path) -> None:
    """A damaged image may have thousands of bitmaps that all name the same clusters."""
    undo = written(image, *(Kept(f"bitmap {number}", number, 2 * MIB) for number in range(1000)))
    assert 2 * MIB < undo.stat().st_size < 2 * MIB + 200_000
    with UndoReader(undo) as held:
        assert held.kept().read(999, 2 * MIB) == image.read_bytes()[999 : 999 + 2 * MIB]


def test_a_hole_costs_no_space_and_no_time_however_large_it_claims_to_be(image: Path) -> None:
    os.truncate(image, 1 << 43)
    undo = written(image, Kept("all", 0, 1 << 43))
    assert undo.stat().st_size < 5 * MIB
    with UndoReader(undo) as held:
        assert held.kept().holds(0, 1 << 43)
        assert held.kept().read(1 << 42, 4096) == bytes(4096)


def test_zeroes_take_no_space(image: Path) -> None:
    image.write_bytes(bytes(MIB) + b"x" * MIB)
    undo = written(image, Kept("all", 0, 2 * MIB))
    assert MIB < undo.stat().st_size < MIB + 2000
    with UndoReader(undo) as held:
        assert held.kept().read(0, 2 * MIB) == image.read_bytes()


def test_every_flipped_byte_of_what_is_kept_is_found_and_does_not_stand_in_the_way_of_undo(image: Path) -> None:
    before = image.read_bytes()
    undo = written(image, Kept("one", 1000, 60), Kept("two", 5000, 300), stages=(rewrite(image, 600, 8),))
    after, stamp, good = image.read_bytes(), image.stat().st_mtime_ns, undo.read_bytes()
    start = len(good) - 4 * (8 * 3 + 4 * 2 + 4) - len(b"onetwo") - 360  # two ranges, two pieces
    for place in range(start, len(good)):
        bad = bytearray(good)
        bad[place] ^= 0x80
        undo.write_bytes(bad)
        with UndoReader(undo) as held, pytest.raises(UndoError, match=rf"{undo} is damaged in kept part [0-3]"):
            held.kept()
    for length in range(start, len(good), 7):
        undo.write_bytes(good[:length])
        with UndoReader(undo) as held, pytest.raises(UndoError, match="is damaged in kept part"):
            held.kept()
    image.write_bytes(after)
    os.utime(image, ns=(stamp, stamp))
    qcow2bm.undo(image, undo)
    assert image.read_bytes() == before


def test_a_file_that_claims_to_keep_more_than_there_is_costs_no_memory(image: Path) -> None:
    """With a header whose checksum is right."""
    undo = written(image, Kept("one", 1000, 60))
    with UndoReader(undo) as held:
        summary = held._summary
    for fields in ({"kept": 1 << 60}, {"kept_at": 1 << 60}, {"kept_at": 3}, {"kept": 3}):
        undo.write_bytes(replace(summary, **fields).build() + undo.read_bytes()[512:])
        tracemalloc.start()
        with UndoReader(undo) as held, pytest.raises(UndoError, match="is damaged in kept part"):
            held.kept()
        assert tracemalloc.get_traced_memory()[1] < MIB
        tracemalloc.stop()


# ---- on the disk before the first overwrite ----


class Log:
    """What is done to files, in order, by name: with the image's writes by its recording file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        self._names = {folder: "folder", folder / "undo": "undo", folder / JOURNAL: "journal"}
        self._real = {name: getattr(os, name) for name in ("fsync", "fdatasync", "pwrite", "link", "unlink")}
        for name in ("fsync", "fdatasync", "pwrite"):
            monkeypatch.setattr(os, name, self._with_descriptor(name))
        monkeypatch.setattr(os, "link", self._link)
        monkeypatch.setattr(os, "unlink", self._unlink)

    def _with_descriptor(self, kind: str):
        def call(fd: int, *rest: object) -> object:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            self._note(kind, self._names.get(path, "image"))
            return self._real[kind](fd, *rest)

        return call

    def _link(self, source: Path, target: Path, **options: bool) -> None:
        self._note("link", self._names[target])
        self._real["link"](source, target, **options)

    def _unlink(self, path: Path, **options: object) -> None:
        self._note("unlink", self._names.get(Path(path), "other"))
        self._real["unlink"](path, **options)

    def _note(self, kind: str, name: str) -> None:
        line = f"{kind} {name}"
        if not self.lines or self.lines[-1] != line:  # a run of writes is one line
            self.lines.append(line)


def commit_plain(image: Path, undo: Path | None) -> None:
    with qcow2bm.open(image, writable=True) as opened, opened.edit(undo=undo) as edit:
        add_data(edit)


def repair_like(image: qcow2bm.Image) -> Plan:
    """A journaled plan of several stages, as a repair's: a new cluster, one rewritten, and the header."""
    overlay = OverlayFile(image.qcow2.file)
    size = overlay.size
    overlay.write_at(size, b"new" * 1000)
    overlay.write_at(65536 * 3, b"rewritten")
    overlay.write_at(400, b"header")
    return overlay.plan(image.qcow2, {size // 65536, size // 65536 + 1}, ("repair",))


def commit_repair(image: Path, undo: Path | None, tape: Tape | None = None) -> None:
    with qcow2bm.open(image, writable=True, open_file=(tape or Tape()).open) as opened:
        opened.commit(repair_like(opened), undo=undo)


DURABLE = ["pwrite undo", "fsync undo", "pwrite undo", "fsync undo", "fsync folder"]
"""Records, then the header that makes them count, then the folder that knows the file."""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(tmp_path, monkeypatch)


def test_the_undo_file_is_durable_before_the_image_is_touched(tmp_path: Path, log: Log) -> None:
    image = one(tmp_path)
    log.lines.clear()
    commit_plain(image, tmp_path / "undo")
    assert log.lines[:6] == [*DURABLE, "pwrite image"]
    assert log.lines[-2:] == ["pwrite undo", "fsync undo"], "that it is complete is said last"


def test_the_undo_file_of_a_repair_is_its_journal_by_a_second_name(tmp_path: Path, log: Log) -> None:
    image = three(tmp_path)
    log.lines.clear()
    commit_repair(image, tmp_path / "undo")
    assert log.lines[:8] == [*DURABLE, "link journal", "fsync folder", "pwrite image"]
    assert log.lines[-4:] == ["pwrite undo", "fsync undo", "unlink journal", "fsync folder"]
    assert not any("pwrite journal" in line for line in log.lines)


def test_where_there_are_no_hard_links_the_journal_is_a_file_of_its_own(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = three(tmp_path)
    before = image.read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", refuse)
    log.lines.clear()
    commit_repair(image, tmp_path / "undo")
    durable = [line.replace("undo", "journal") for line in DURABLE]
    assert log.lines[:11] == [*DURABLE, *durable, "pwrite image"]
    assert not (tmp_path / JOURNAL).exists()
    qcow2bm.undo(image, tmp_path / "undo")
    assert image.read_bytes() == before


def test_a_journal_without_an_undo_file_is_durable_too(tmp_path: Path, log: Log) -> None:
    for number, (make, edit) in enumerate([(straddling, add_data), (three, None)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        log._names = {folder: "folder", folder / JOURNAL: "journal"}
        image = make(folder)
        log.lines.clear()
        if edit is not None:
            with qcow2bm.open(image, writable=True) as opened, opened.edit() as draft:
                edit(draft)
        else:
            commit_repair(image, None)
        lines = log.lines[log.lines.index("pwrite journal") :]
        assert lines[:6] == [*(line.replace("undo", "journal") for line in DURABLE), "pwrite image"]


# ---- a crash between the last write and the end ----


def done_but_not_noted(folder: Path) -> tuple[Path, Path, bytes]:
    """A repair whose process died after the last write, its undo file and journal as they were; and the old bytes."""
    image, undo = three(folder), folder / "undo"
    before, tape = image.read_bytes(), Tape()
    commit_repair(image, undo, tape)
    assert tape.journal is not None
    undo.write_bytes(tape.journal)
    os.link(undo, folder / JOURNAL)
    return image, undo, before


def test_a_repair_that_was_done_is_kept_and_its_undo_file_with_it(tmp_path: Path) -> None:
    image, undo, before = done_but_not_noted(tmp_path)
    after = image.read_bytes()
    qcow2bm.open(image).close()
    with qcow2bm.open(image, writable=True) as opened:
        assert not opened.qcow2.rolled_back
    assert image.read_bytes() == after
    assert not (tmp_path / JOURNAL).exists()
    with pytest.raises(UndoError, match="nobody knows what was written since"):
        qcow2bm.undo(image, undo)
    assert image.read_bytes() == after
    qcow2bm.undo(image, undo, force=True)
    assert image.read_bytes() == before


def test_a_torn_repair_is_rolled_back_by_undo_itself_and_its_undo_file_is_then_used(tmp_path: Path) -> None:
    image, undo, before = done_but_not_noted(tmp_path)
    torn = bytearray(image.read_bytes())
    torn[65536 * 3 : 65536 * 3 + 512] = before[65536 * 3 : 65536 * 3 + 512]
    torn[:512] = before[:512]
    torn[72] |= 0x40  # the mark, which is cleared last
    image.write_bytes(torn)
    qcow2bm.undo(image, undo)
    assert image.read_bytes() == before
    assert not (tmp_path / JOURNAL).exists()
    with UndoFile(undo) as old:
        assert old.state is State.UNDONE
    with pytest.raises(UndoError, match="used already"):
        qcow2bm.undo(image, undo)


def test_another_undo_file_is_not_taken_for_the_journal(tmp_path: Path) -> None:
    """What a crash left is settled, and then that other file is refused for what it is."""
    image, undo, before = done_but_not_noted(tmp_path)
    torn = bytearray(image.read_bytes())
    torn[65536 * 3 : 65536 * 3 + 512] = before[65536 * 3 : 65536 * 3 + 512]
    torn[:512] = before[:512]
    torn[72] |= 0x40  # the mark, which is cleared last
    image.write_bytes(torn)
    other = tmp_path / "other"
    other.write_bytes(undo.read_bytes())
    with UndoFile(other) as file:
        file._set_state(State.UNDONE)
    with pytest.raises(UndoError, match="used already"):
        qcow2bm.undo(image, other)
    assert image.read_bytes() == before


def test_a_journal_that_says_complete_is_dropped_whatever_the_image_looks_like(tmp_path: Path) -> None:
    """A crash between that word and the removal of the second name: a VM may have run since."""
    image, undo, _ = done_but_not_noted(tmp_path)
    with UndoFile(undo) as old:
        old._set_state(State.COMPLETE)
    data = bytearray(image.read_bytes())
    data[65536 * 3] ^= 0xFF
    image.write_bytes(data)
    with qcow2bm.open(image, writable=True) as opened:
        assert not opened.qcow2.rolled_back
    assert image.read_bytes() == data
    assert undo.exists()


def test_a_repair_that_fails_and_is_put_back_leaves_neither_undo_file_nor_journal(tmp_path: Path) -> None:
    image = three(tmp_path)
    before = image.read_bytes()
    with pytest.raises(qcow2bm.Qcow2bmError, match="put back"):
        commit_repair(image, tmp_path / "undo", Tape(fail_at=3))
    assert image.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.qcow2"]


def test_a_repair_of_a_device_needs_an_undo_file_which_is_its_journal(tmp_path: Path) -> None:
    image = three(tmp_path)
    before = image.read_bytes()

    def on_device(undo: Path | None) -> None:
        with qcow2bm.open(image, writable=True, open_file=Tape(device=True).open) as opened:
            overlay = OverlayFile(opened.qcow2.file)
            overlay.write_at(65536 * 3, b"rewritten")
            overlay.write_at(400, b"header")
            opened.commit(overlay.plan(opened.qcow2, (), ("repair",)), undo=undo)

    with pytest.raises(UndoError, match="--undo"):
        on_device(None)
    assert image.read_bytes() == before
    on_device(tmp_path / "undo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.qcow2", "undo"]
    qcow2bm.undo(image, tmp_path / "undo")
    assert image.read_bytes() == before


def test_a_journal_in_the_way_is_never_overwritten(tmp_path: Path) -> None:
    image = three(tmp_path)
    before = image.read_bytes()
    with qcow2bm.open(image, writable=True) as opened:
        plan = repair_like(opened)
        (tmp_path / JOURNAL).write_bytes(b"mine")
        with pytest.raises(UndoError, match="cannot create"):
            opened.commit(plan, undo=tmp_path / "undo")
    assert (tmp_path / JOURNAL).read_bytes() == b"mine"
    assert image.read_bytes() == before
    assert not (tmp_path / "undo").exists()


def test_an_undo_file_that_does_not_fit_is_removed_and_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = three(tmp_path)
    before = image.read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UndoError, match="undo: No space left"):
        commit_repair(image, tmp_path / "undo")
    assert image.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.qcow2"]


def test_what_a_plan_wants_kept_is_in_the_undo_file(tmp_path: Path) -> None:
    image = three(tmp_path)
    before = image.read_bytes()
    with qcow2bm.open(image, writable=True) as opened:
        opened.commit(replace(repair_like(opened), kept=(Kept("x", 65536, 600),)), undo=tmp_path / "undo")
    with UndoReader(tmp_path / "undo") as held:
        assert held.kept().ranges == (Kept("x", 65536, 600),)
        assert held.kept().read(65536, 600) == before[65536 : 65536 + 600]
