"""Undo files and the journal: the old bytes come back to the last one, or nothing is touched."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import tracemalloc
from collections.abc import Callable
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
from crc32c import crc32c

import qcow2bm
from qcow2bm import Edit
from qcow2bm.__main__ import main
from qcow2bm.errors import InterruptedChangeError, UndoError
from qcow2bm.image import undo as undo_module
from qcow2bm.image import undo_writer
from qcow2bm.image.file import ImageFile
from qcow2bm.image.image import settle_interrupted
from qcow2bm.image.undo import Settled, State, UndoFile
from tests.support.qemu import check, qemu_img, qemu_io
from tests.support.raw import BITMAPS, OFFSET, Raw
from tests.support.recording import PowerCutError, Tape
from tests.support.scenes import (
    SCENES,
    Scene,
    add_data,
    behind_another,
    one,
    remove_all,
    several,
    small,
    straddling,
    three,
    tiny,
)
from tests.support.states import Bitmaps, bitmaps

JOURNAL = "image.qcow2.qcow2bm-journal"
USED_HEADER = 132  # magic, fields and checksum; the rest of the first sector is padding
RECORD = ("stage", "offset", "length", "old_stored", "new_stored", "filled", "filled_crc", "crc")
RECORD_FORMAT = "<6Q2I"
RECORD_SIZE = struct.calcsize(RECORD_FORMAT) + 4


def change(image: Path, edit: Callable[[Edit], object], undo: Path | None = None, tape: Tape | None = None) -> None:
    with qcow2bm.open(image, writable=True, open_file=(tape or Tape()).open) as opened, opened.edit(undo=undo) as draft:
        edit(draft)


def cut(image: Path, edit: Callable[[Edit], object], number: int, *, partial: bool, undo: Path | None = None) -> bool:
    """Change an image and cut the power at a write; False if the change was done before that."""
    tape = Tape(fail_at=number, power_cut=True, partial=partial)
    try:
        change(image, edit, undo, tape)
    except PowerCutError:
        # A process without power does not tidy up.
        if tape.journal is not None:
            (image.parent / JOURNAL).write_bytes(tape.journal)
        return True
    return False


@pytest.fixture
def undone(tmp_path: Path) -> tuple[Path, Path, bytes]:
    """A changed image of small clusters, its undo file, and its bytes before."""
    image, undo = tiny(tmp_path), tmp_path / "undo"
    before = image.read_bytes()
    change(image, lambda edit: edit.rename("a", "b"), undo)
    return image, undo, before


# ---- putting back ----


@pytest.mark.parametrize("scene", SCENES, ids=[scene.name for scene in SCENES])
def test_undo_gives_back_every_byte_and_the_length_after_every_kind_of_edit(tmp_path: Path, scene: Scene) -> None:
    image, undo = scene.make(tmp_path), tmp_path / "undo"
    before = image.read_bytes()
    change(image, scene.edit, undo)
    assert image.read_bytes() != before
    qcow2bm.undo(image, undo, force="data file" in scene.name)  # to which a guest writes unseen
    assert image.read_bytes() == before


def test_free_clusters_get_their_old_content_back(tmp_path: Path) -> None:
    """Whoever looks for lost data looks there."""
    image, undo = three(tmp_path), tmp_path / "undo"
    raw = Raw.load(image)
    free = next(n for n in range(1, len(raw.data) // raw.cluster_size) if not raw.refcount(n))
    raw.data[free * raw.cluster_size :][:9] = b"precious!"
    raw.data[free * raw.cluster_size : free * raw.cluster_size + 9] = b"precious!"
    raw.save(image)
    before = image.read_bytes()
    change(image, several, undo)
    assert b"precious!" not in image.read_bytes()
    qcow2bm.undo(image, undo)
    assert image.read_bytes() == before


def test_who_does_not_own_the_image_may_undo_but_cannot_set_its_time_stamp(
    undone: tuple[Path, Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, os.strerror(1))

    image, undo, before = undone
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        qcow2bm.undo(image, undo)
    assert image.read_bytes() == before
    with UndoFile(undo) as old:
        assert old.state is State.UNDONE


def test_an_undo_file_is_used_once(undone: tuple[Path, Path, bytes]) -> None:
    image, undo, before = undone
    qcow2bm.undo(image, undo)
    with pytest.raises(UndoError, match="used already"):
        qcow2bm.undo(image, undo)
    assert image.read_bytes() == before


def test_edits_are_undone_one_after_the_other(tmp_path: Path) -> None:
    image = three(tmp_path)
    states = []
    for number, edit in enumerate((add_data, lambda edit: edit.clear("a"), remove_all)):
        states.append(image.read_bytes())
        change(image, edit, tmp_path / str(number))
    for number in (2, 1, 0):
        qcow2bm.undo(image, tmp_path / str(number))
        assert image.read_bytes() == states[number]


def test_edits_are_not_undone_out_of_order_not_even_by_force(tmp_path: Path) -> None:
    image = three(tmp_path)
    change(image, add_data, tmp_path / "first")
    change(image, lambda edit: edit.clear("a"), tmp_path / "second")
    after = image.read_bytes()
    with pytest.raises(UndoError):
        qcow2bm.undo(image, tmp_path / "first")
    with pytest.raises(UndoError):
        qcow2bm.undo(image, tmp_path / "first", force=True)
    assert image.read_bytes() == after


def test_a_change_that_comes_to_nothing_leaves_no_undo_file(tmp_path: Path) -> None:
    image, undo = one(tmp_path), tmp_path / "undo"
    change(image, lambda edit: edit.enable("a"), undo)
    assert not undo.exists()


def test_a_change_that_fails_and_is_put_back_leaves_no_undo_file(tmp_path: Path) -> None:
    image, undo = one(tmp_path), tmp_path / "undo"
    with pytest.raises(qcow2bm.Qcow2bmError, match="put back"):
        change(image, add_data, undo, Tape(fail_at=2))
    assert not undo.exists()


# ---- refusing ----


def refused(image: Path, undo: Path, match: str | None = "has changed") -> None:
    before = image.read_bytes()
    with pytest.raises(UndoError, match=match):
        qcow2bm.undo(image, undo)
    assert image.read_bytes() == before


def with_stamp_kept(image: Path, touch: Callable[[], object]) -> None:
    """Change an image and put its time stamp back: only the content can tell."""
    stamp = image.stat()
    touch()
    os.utime(image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def poke(image: Path, offset: int, value: int, length: int = 1) -> Callable[[], None]:
    def do() -> None:
        raw = Raw.load(image)
        raw.put(offset, value, length)
        raw.save(image)

    return do


def test_after_a_change_of_the_first_sector_undo_is_refused(undone: tuple[Path, Path, bytes]) -> None:
    image, undo, _ = undone
    for offset in (63, 100, 300, 511):
        with_stamp_kept(image, poke(image, offset, Raw.load(image).number(offset, 1) ^ 1))
        refused(image, undo)
        with_stamp_kept(image, poke(image, offset, Raw.load(image).number(offset, 1) ^ 1))
    qcow2bm.undo(image, undo)


def test_after_a_change_of_a_refcount_undo_is_refused(undone: tuple[Path, Path, bytes]) -> None:
    image, undo, before = undone
    place = next(at for at in range(512, len(before)) if image.read_bytes()[at] != before[at])
    with_stamp_kept(image, poke(image, place, 77))
    refused(image, undo)


def test_after_a_change_of_what_the_edit_wrote_undo_is_refused(tmp_path: Path) -> None:
    """The new directory, table and data: QEMU marks bitmaps in use right there, in place."""
    image, undo = three(tmp_path), tmp_path / "undo"
    change(image, add_data, undo)
    raw = Raw.load(image)
    table, data = raw.tables()["new"][0], raw.number(raw.bitmap_data("new")[0]) & OFFSET
    for place in (raw.directory[0] + 15, table + 7, data + 5000):
        old = raw.number(place, 1)
        with_stamp_kept(image, poke(image, place, old ^ 1))
        refused(image, undo)
        with pytest.raises(UndoError):
            qcow2bm.undo(image, undo, force=True)
        with_stamp_kept(image, poke(image, place, old))
    qcow2bm.undo(image, undo)


def test_after_a_change_of_length_undo_is_refused(undone: tuple[Path, Path, bytes]) -> None:
    image, undo, _ = undone
    size = image.stat().st_size
    with_stamp_kept(image, lambda: os.truncate(image, size + 512))
    refused(image, undo)
    with_stamp_kept(image, lambda: os.truncate(image, size - 512))
    refused(image, undo)


@pytest.mark.parametrize(
    "touch",
    [
        lambda image: qemu_img("bitmap", "--disable", image, "a"),
        lambda image: qemu_img("bitmap", "--add", image, "z"),
        lambda image: qemu_img("snapshot", "-c", "s", image),
        lambda image: qemu_img("resize", "-q", image, "8M"),
    ],
    ids=["disable", "add", "snapshot", "resize"],
)
def test_after_qemu_changed_the_image_undo_is_refused(tmp_path: Path, touch: Callable[[Path], object]) -> None:
    image, undo = three(tmp_path), tmp_path / "undo"
    change(image, lambda edit: edit.remove("b"), undo)
    with_stamp_kept(image, lambda: touch(image))
    refused(image, undo)


def test_after_a_guest_write_undo_is_refused_by_the_time_stamp_unless_forced(tmp_path: Path) -> None:
    image, undo = three(tmp_path), tmp_path / "undo"
    change(image, lambda edit: edit.disable("a", "b"), undo)
    qemu_io(image, "write -P 8 1M 512")
    refused(image, undo)
    again = tmp_path / "again"
    again.mkdir()
    image, undo = three(again), tmp_path / "undo 2"
    old = bitmaps(image)
    change(image, lambda edit: edit.disable("a", "b"), undo)
    os.utime(image)
    refused(image, undo, "written to since")
    qcow2bm.undo(image, undo, force=True)
    assert bitmaps(image) == old


def test_the_undo_file_of_another_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    image, other, undo = three(tmp_path), one(tmp_path / "other"), tmp_path / "undo"
    change(image, several, undo)
    refused(other, undo)


# ---- damaged undo files ----


def test_every_flipped_byte_of_an_undo_file_is_found_before_anything_is_written(
    undone: tuple[Path, Path, bytes],
) -> None:
    """Only the padding of its first sector means nothing: there a flip is harmless."""
    image, undo, before = undone
    after, stamp = image.read_bytes(), image.stat()
    good = undo.read_bytes()
    assert 512 < len(good) < 4096
    for place in range(len(good)):
        for mask in (0x01, 0xFF):
            bad = bytearray(good)
            bad[place] ^= mask
            undo.write_bytes(bad)
            if USED_HEADER <= place < 512:
                continue
            try:
                qcow2bm.undo(image, undo)
            except UndoError:
                assert image.read_bytes() == after, place
            else:
                raise AssertionError(f"byte {place} flipped by {mask:#x}, and nobody noticed")
    padded = good[:USED_HEADER] + bytes(byte ^ 0xFF for byte in good[USED_HEADER:512]) + good[512:]
    undo.write_bytes(padded)
    assert image.stat().st_mtime_ns == stamp.st_mtime_ns
    qcow2bm.undo(image, undo)
    assert image.read_bytes() == before


def test_an_undo_file_cut_short_anywhere_is_found(undone: tuple[Path, Path, bytes]) -> None:
    image, undo, _ = undone
    after, good = image.read_bytes(), undo.read_bytes()
    for length in range(len(good)):
        undo.write_bytes(good[:length])
        with pytest.raises(UndoError):
            qcow2bm.undo(image, undo)
    assert image.read_bytes() == after


@pytest.mark.parametrize("claim", [3, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("field", RECORD[:6])
def test_a_record_that_claims_more_than_there_is_costs_no_memory(
    undone: tuple[Path, Path, bytes], field: str, claim: int
) -> None:
    """With checksums that are right: a made-up file, not a damaged one."""
    image, undo, _ = undone
    data = bytearray(undo.read_bytes())
    head = dict(zip(RECORD, struct.unpack_from(RECORD_FORMAT, data, 512), strict=True))
    head[field] = claim
    length = head["old_stored"] + head["new_stored"]
    head["crc"] = crc32c(bytes(data[512 + RECORD_SIZE :][:length])) if length < len(data) else 0
    built = struct.pack(RECORD_FORMAT, *head.values())
    data[512 : 512 + RECORD_SIZE] = built + crc32c(built).to_bytes(4, "little")
    undo.write_bytes(data)
    tracemalloc.start()
    if field == "stage":  # a number like any other
        qcow2bm.undo(image, undo)
    else:
        refused(image, undo, None)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def as_version_1(data: bytes) -> bytes:
    """An undo file as it was written before version 2: without what is kept, and without the time it was made."""
    assert data[:16] == b"QCOW2BM undo 4\n\0"
    fields = data[16:64]
    header = b"QCOW2BM undo 1\n\0" + fields + crc32c(fields).to_bytes(4, "little")
    return header.ljust(512, b"\0") + data[512:]


def test_a_file_of_version_1_is_read_and_used_as_ever(undone: tuple[Path, Path, bytes]) -> None:
    image, undo, before = undone
    undo.write_bytes(as_version_1(undo.read_bytes()))
    with UndoFile(undo) as old:
        assert old.state is State.COMPLETE
        assert old.made_ns == image.stat().st_mtime_ns, "the only time that it knows"
        assert old.kept().ranges == ()
    qcow2bm.undo(image, undo)
    assert image.read_bytes() == before
    assert undo.read_bytes()[:16] == b"QCOW2BM undo 1\n\0"
    with pytest.raises(UndoError, match="used already"):
        qcow2bm.undo(image, undo)


def test_a_file_of_a_later_version_is_refused(undone: tuple[Path, Path, bytes]) -> None:
    image, undo, _ = undone
    undo.write_bytes(undo.read_bytes().replace(b"QCOW2BM undo 4", b"QCOW2BM undo 5", 1))
    refused(image, undo, "not an undo file")


# ---- an undo that is cut short ----


def damaged(folder: Path) -> Path:
    """Refcounts and a flag are missing: mending them is a change in place, in more than one sector."""
    image = three(folder)
    raw = Raw.load(image)
    for offset in (raw.number(40), *(table for table, _ in raw.tables().values())):
        raw.set_refcount(offset, 0)
    raw.put(raw.number(40), raw.number(raw.number(40)) & ~(1 << 63))
    raw.save(image)
    return image


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_the_undo_of_a_repair_cut_short_at_any_write_is_finished_by_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Half of a repair put back is worse than either state: a journal keeps readers off and tells the next writer."""
    image, undo, journal = damaged(tmp_path), tmp_path / "undo", tmp_path / JOURNAL
    before = image.read_bytes()
    assert main(["repair", str(image), "--yes", "--undo", str(undo)]) == 0
    after, kept, stamp = image.read_bytes(), undo.read_bytes(), image.stat().st_mtime_ns
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no links here")))
    for number in count():
        image.write_bytes(after)
        os.utime(image, ns=(stamp, stamp))
        undo.write_bytes(kept)
        tape = Tape(fail_at=number, power_cut=True)
        with contextlib.closing(tape.open(image, writable=True)) as file, UndoFile(undo) as old:
            try:
                old.restore(file)
            except PowerCutError:
                assert journal.exists()
            else:
                assert number >= 2
                break
        with pytest.raises(InterruptedChangeError) if number else contextlib.nullcontext():
            qcow2bm.open(image).close()
        with contextlib.closing(ImageFile.open(image, writable=True)) as file:
            assert settle_interrupted(file, writable=True) == Settled(rolled_back=number > 0)
        assert image.read_bytes() == (before if number else after)  # nothing was put back before the first write
        assert not journal.exists()
    assert image.read_bytes() == before
    assert not journal.exists()


# ---- the file itself ----


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    image, undo = one(tmp_path), tmp_path / "undo"
    undo.write_bytes(b"mine")
    before = image.read_bytes()
    with pytest.raises(UndoError, match="cannot create"):
        change(image, add_data, undo)
    assert undo.read_bytes() == b"mine"
    assert image.read_bytes() == before


def test_a_symlink_is_never_followed(tmp_path: Path) -> None:
    image, undo, target = one(tmp_path), tmp_path / "undo", tmp_path / "target"
    undo.symlink_to(target)
    with pytest.raises(UndoError, match="cannot create"):
        change(image, add_data, undo)
    assert not target.exists()
    undo.unlink()
    change(image, add_data, target)
    undo.symlink_to(target)
    refused(image, undo, "cannot open")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    image = one(tmp_path)
    before = image.read_bytes()
    with pytest.raises(UndoError, match="nowhere/undo: No such file"):
        change(image, add_data, tmp_path / "nowhere" / "undo")
    assert image.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"x" * 600, bytes(1024)])
def test_another_file_is_no_undo_file(undone: tuple[Path, Path, bytes], tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "other"
    other.write_bytes(content)
    refused(undone[0], other, "not an undo file")


def test_a_pipe_or_folder_is_no_undo_file(undone: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        refused(undone[0], place, None)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_the_undo_file_is_no_more_open_than_the_image(tmp_path: Path, mode: int) -> None:
    image, undo = one(tmp_path), tmp_path / "undo"
    image.chmod(mode)
    mask = os.umask(0)
    try:
        change(image, add_data, undo)
    finally:
        os.umask(mask)
    assert undo.stat().st_mode & 0o777 == mode


# ---- the journal ----

JOURNALLED = (Scene("moved extensions", behind_another, remove_all), Scene("switch", straddling, add_data))


@pytest.mark.parametrize("scene", JOURNALLED, ids=[scene.name for scene in JOURNALLED])
@pytest.mark.parametrize("partial", [False, True], ids=["whole", "half"])
@pytest.mark.parametrize("undo", [False, True], ids=["journal", "journal and undo file"])
def test_after_power_is_cut_at_any_write_readers_refuse_and_the_next_writer_settles_it(
    tmp_path: Path, scene: Scene, partial: bool, undo: bool
) -> None:
    (tmp_path / "done").mkdir()
    done = scene.make(tmp_path / "done")
    old = bitmaps(done)
    change(done, scene.edit)
    new = bitmaps(done)
    number = refused = 0
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        image = scene.make(folder)
        if not cut(image, scene.edit, number, partial=partial, undo=folder / "undo" if undo else None):
            break
        if (folder / JOURNAL).exists():
            if Raw.load(image).is_marked:
                refused += 1
                with pytest.raises(InterruptedChangeError, match="cut short"):
                    qcow2bm.open(image)
            else:
                assert bitmaps(image) in (old, new)
            qcow2bm.open(image, writable=True).close()
            assert not (folder / JOURNAL).exists()
        assert bitmaps(image) in (old, new)
        assert check(image)["returncode"] in (0, 3)
        qemu_io(image, "write 0 512")  # opens: the mark is gone
        with qcow2bm.open(image, writable=True) as opened:
            assert not opened.qcow2.rolled_back
        number += 1
    assert refused >= 2
    assert not (folder / JOURNAL).exists()
    assert check(image)["returncode"] == 0


def torn(folder: Path) -> tuple[Path, Bitmaps]:
    """An image whose header was torn by a power cut, with its journal, and the bitmaps it had."""
    for number in range(20):
        where = folder / f"torn{number}"
        where.mkdir()
        image = straddling(where)
        old = bitmaps(image)
        assert cut(image, add_data, number, partial=True)
        if (where / JOURNAL).exists() and Raw.load(image).is_marked:
            return image, old
    raise AssertionError("no write tears the header")


def test_a_rollback_cut_short_at_any_write_is_finished_by_the_next_one(tmp_path: Path) -> None:
    image, old = torn(tmp_path)
    journal = image.parent / JOURNAL
    kept, record = image.read_bytes(), journal.read_bytes()
    number = 0
    while True:
        image.write_bytes(kept)
        journal.write_bytes(record)
        try:
            tape = Tape(fail_at=number, power_cut=True, partial=True)
            qcow2bm.open(image, writable=True, open_file=tape.open).close()
        except PowerCutError:
            pass
        else:
            break
        assert journal.exists()
        qcow2bm.open(image, writable=True).close()
        assert bitmaps(image) == old
        assert check(image)["returncode"] in (0, 3)
        number += 1
    assert number >= 2


def test_a_finished_rewrite_is_kept_though_its_journal_is_still_there(tmp_path: Path) -> None:
    """Going back would revive bitmaps that a VM has not recorded in since."""
    image = straddling(tmp_path)
    tape = Tape()
    change(image, add_data, None, tape)
    new = bitmaps(image)
    assert tape.journal is not None
    (tmp_path / JOURNAL).write_bytes(tape.journal)
    with qcow2bm.open(image, writable=True) as opened:
        assert not opened.qcow2.rolled_back
    assert bitmaps(image) == new
    assert not (tmp_path / JOURNAL).exists()


def test_an_undo_cut_short_at_any_write_is_finished_by_doing_it_again(tmp_path: Path) -> None:
    image, undo = small(tmp_path), tmp_path / "undo"
    before = image.read_bytes()
    change(image, lambda edit: edit.merge("daily", ["full", "sectors"]), undo)
    after, kept, stamp = image.read_bytes(), undo.read_bytes(), image.stat().st_mtime_ns
    number = refused = 0
    while True:
        image.write_bytes(after)
        os.utime(image, ns=(stamp, stamp))
        undo.write_bytes(kept)
        tape = Tape(fail_at=number, power_cut=True, partial=True)
        file = tape.open(image, writable=True)
        try:
            with UndoFile(undo) as old:
                old.restore(file)
        except PowerCutError:
            pass
        else:
            break
        finally:
            file.close()
        with UndoFile(undo) as old:
            assert old.state is State.IN_PROGRESS
        # Nothing has kept others from the image meanwhile; but where all is as it was before there is nothing to lose.
        try:
            qcow2bm.undo(image, undo)
        except UndoError:
            refused += 1
            qcow2bm.undo(image, undo, force=True)
        assert image.read_bytes() == before
        number += 1
    assert refused >= number - 2 >= 2  # all but where nothing was put back yet, or everything was


def test_a_damaged_journal_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    image, _ = torn(tmp_path)
    path = image.parent / JOURNAL
    journal = bytearray(path.read_bytes())
    journal[-1] ^= 1
    path.write_bytes(journal)
    kept = image.read_bytes()
    with pytest.raises(UndoError, match="damaged"):
        qcow2bm.open(image, writable=True)
    assert image.read_bytes() == kept
    assert path.read_bytes() == journal


@pytest.mark.parametrize("content", [b"", bytes(40), bytes(5000)], ids=["empty", "short", "records without header"])
def test_a_journal_whose_writing_was_cut_short_is_dropped_for_the_image_is_untouched(
    tmp_path: Path, content: bytes
) -> None:
    image = straddling(tmp_path)
    before = image.read_bytes()
    (tmp_path / JOURNAL).write_bytes(content)
    with qcow2bm.open(image, writable=True) as opened:
        assert not opened.qcow2.rolled_back
    assert not (tmp_path / JOURNAL).exists()
    assert image.read_bytes() == before


def test_a_journal_is_not_rolled_back_over_what_somebody_else_wrote_since(tmp_path: Path) -> None:
    image, _ = torn(tmp_path)
    raw = Raw.load(image)
    raw.data[raw.extensions()[BITMAPS][0] + 23] ^= 0x55  # in the pointer that was being switched
    raw.save(image)
    kept = image.read_bytes()
    with pytest.raises(UndoError, match="has changed"):
        qcow2bm.open(image, writable=True)
    assert image.read_bytes() == kept
    assert (image.parent / JOURNAL).exists()


def test_the_journal_lies_beside_the_image_itself_not_beside_a_link_to_it(tmp_path: Path) -> None:
    image, old = torn(tmp_path)
    link = tmp_path / "link.qcow2"
    link.symlink_to(image)
    with pytest.raises(InterruptedChangeError):
        qcow2bm.open(link)
    qcow2bm.open(link, writable=True).close()
    assert bitmaps(image) == old
    assert not (image.parent / JOURNAL).exists()


def test_a_journal_cannot_be_made_on_a_device_without_a_place_for_it(tmp_path: Path) -> None:
    image = straddling(tmp_path)
    os.truncate(image, 4 << 20)
    before = image.read_bytes()
    with pytest.raises(UndoError, match="--undo"):
        change(image, add_data, None, Tape(device=True))
    assert image.read_bytes() == before
    change(image, add_data, tmp_path / "undo", Tape(device=True))
    assert not (tmp_path / JOURNAL).exists()
    qcow2bm.undo(image, tmp_path / "undo")
    assert image.read_bytes() == before


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_journal_belongs_to_whom_the_image_belongs_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Else who owns the image could not settle what root's undoing left, cut short."""
    image, undo, given = damaged(tmp_path), tmp_path / "undo", dict[str, int]()
    assert main(["repair", str(image), "--yes", "--undo", str(undo)]) == 0

    def fchown(fd: int, uid: int, _: int) -> None:
        given[Path(f"/proc/self/fd/{fd}").readlink().name] = uid

    monkeypatch.setattr(os, "fchown", fchown)
    if not links:
        monkeypatch.setattr(undo_module, "second_name", lambda *_: False)
    assert main(["undo", str(image), str(undo)]) == 0
    assert given == ({} if links else {JOURNAL: image.stat().st_uid})


def test_a_copy_whose_folder_cannot_be_flushed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, undo = damaged(tmp_path), tmp_path / "undo"
    assert main(["repair", str(image), "--yes", "--undo", str(undo)]) == 0
    before = image.read_bytes()

    def fails(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(undo_module, "second_name", lambda *_: False)
    monkeypatch.setattr(undo_writer, "sync_folder", fails)
    assert main(["undo", str(image), str(undo)]) == 1
    assert image.read_bytes() == before
    assert not (tmp_path / JOURNAL).exists()
    monkeypatch.undo()
    assert main(["undo", str(image), str(undo)]) == 0
