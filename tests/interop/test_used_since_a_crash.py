"""What comes between a crash and the next command: a VM, QEMU's own repair, a restored backup. None of it is undone.

Each image is in the state that a power cut at some moment leaves, journal and undo file included; then something else
happens to it, and only then the next command of ours runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.__main__ import main
from qcow2bm.errors import InterruptedChangeError, UndoError, UnsupportedImageError
from qcow2bm.image import undo_reader, undo_writer
from qcow2bm.image.undo import State, UndoFile
from tests.crash.disk import Folder
from tests.crash.recorder import recorded
from tests.support.cut_short import JOURNAL, cut_short, damage, damaged, is_open_to_qemu
from tests.support.qemu import bitmap_info, check, guest_digest, qemu_img, qemu_io
from tests.support.raw import BITMAPS, Raw
from tests.support.scenes import MIB, three


def guest_writes(image: Path) -> None:
    qemu_io(image, "write -P 119 3M 64k", "write -P 120 64k 64k")


def mended_by_qemu(image: Path) -> None:
    """The usual answer to an image that is marked corrupt; and then the VM runs."""
    qemu_img("check", "-q", "-r", "all", image, check=False)
    guest_writes(image)


def restored(image: Path) -> None:
    shutil.copyfile(image.with_name("backup"), image)


@pytest.mark.parametrize("happens", [guest_writes, mended_by_qemu, restored], ids=lambda what: what.__name__)
def test_what_has_happened_since_a_crash_is_not_rolled_back(tmp_path: Path, happens: Callable[[Path], None]) -> None:
    image = damaged(tmp_path)
    shutil.copyfile(image, tmp_path / "backup")
    qemu_img("check", "-q", "-r", "all", tmp_path / "backup", check=False)
    tried = 0
    for state in cut_short(image, "repair", "--yes", "--no-undo"):
        state.write(tmp_path)
        if happens is not restored and not is_open_to_qemu(image):
            continue
        tried += 1
        happens(image)
        status, data = check(image)["returncode"], image.read_bytes()
        with qcow2bm.open(image, writable=True) as opened:
            assert not opened.qcow2.rolled_back
        assert image.read_bytes() == data
        assert check(image)["returncode"] == status
        assert not (tmp_path / JOURNAL).exists()
    assert tried >= (3 if happens is restored else 1)


def test_version_2_has_no_mark_so_a_torn_repair_is_put_back_by_force_alone(tmp_path: Path) -> None:
    """QEMU may have used the image, and nothing would tell: nobody but the user knows."""
    image = damaged(tmp_path, version=2)
    before, torn = image.read_bytes(), 0
    states = list(cut_short(image, "repair", "--yes", "--no-undo"))
    after = image.read_bytes()
    for state in states:
        state.write(tmp_path)
        data = image.read_bytes()
        if data in (before, after):
            qcow2bm.open(image, writable=True).close()
            assert image.read_bytes() == data
            continue
        torn += 1
        with pytest.raises(InterruptedChangeError):
            qcow2bm.open(image)
        with pytest.raises(UndoError, match="nothing has kept others"):
            qcow2bm.open(image, writable=True)
        assert image.read_bytes() == data
        assert main(["undo", str(image), str(tmp_path / JOURNAL), "--force"]) == 0
        assert image.read_bytes() == before
        assert not (tmp_path / JOURNAL).exists()
    assert torn


def test_an_older_undo_file_does_not_bring_back_a_bitmap_that_misses_a_guest_write(tmp_path: Path) -> None:
    """The time stamp of before a crash must not come back over what a VM wrote after it."""
    image, older = three(tmp_path), tmp_path / "older"
    assert main(["remove", str(image), "a", "--undo", str(older)]) == 0
    damage(image)
    for state in list(cut_short(image, "repair", "--yes", "--no-undo")):
        state.write(tmp_path)
        if is_open_to_qemu(image):
            guest_writes(image)
            qcow2bm.open(image, writable=True).close()
            assert main(["undo", str(image), str(older)]) == 1
            assert "a" not in {entry["name"] for entry in bitmap_info(image)}


@pytest.mark.parametrize("command", ["remove", "undo"])
def test_a_change_cut_short_is_not_undone_over_guest_writes(tmp_path: Path, command: str) -> None:
    """Nothing kept the VM out, and bitmaps that come back would miss what it wrote."""
    image, undo = three(tmp_path), tmp_path / "undo"
    if command == "undo":
        assert main(["remove", str(image), "a", "--undo", str(undo)]) == 0
        states = list(cut_short(image, "undo", str(undo)))
    else:
        states = list(cut_short(image, "remove", "a", "--undo", str(undo)))
    refused = 0
    for state in states:
        state.write(tmp_path)
        guest_writes(image)
        before = image.read_bytes()
        if main(["undo", str(image), str(undo)]) == 1:
            refused += 1
            assert image.read_bytes() == before
        else:
            assert any(length for _, length in _dirty(image, "a") if length), "it knows the guest's writes"
    assert refused


def _dirty(image: Path, name: str) -> list[tuple[int, int]]:
    with qcow2bm.open(image) as opened:
        found = [(extent.offset, extent.length) for extent in opened.bitmaps[name].extents()]
    return [part for part in found if part[0] <= 3 * MIB < part[0] + part[1]]


def test_a_data_file_shows_no_time_stamp_so_its_image_is_restored_by_force_alone(tmp_path: Path) -> None:
    image, undo = tmp_path / "image.qcow2", tmp_path / "undo"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data.raw'}", image, "4M")
    qemu_img("bitmap", "--add", image, "a")
    qemu_io(image, "write 1M 64k")
    assert main(["remove", str(image), "a", "--undo", str(undo)]) == 0
    digest = guest_digest(image)
    assert main(["undo", str(image), str(undo)]) == 1
    assert main(["undo", str(image), str(undo), "--force"]) == 0
    assert guest_digest(image) == digest


def test_an_undo_file_cannot_have_the_name_of_the_journal(tmp_path: Path) -> None:
    """The next command would take it for one, and remove it."""
    image = three(tmp_path)
    before = image.read_bytes()
    assert main(["add", str(image), "new", "--undo", str(tmp_path / JOURNAL)]) == 1
    assert image.read_bytes() == before


def test_a_name_with_no_room_for_that_of_a_journal_is_no_obstacle(tmp_path: Path) -> None:
    image = three(tmp_path).rename(tmp_path / ("i" * 250))
    assert main(["list", str(image)]) == 0
    assert main(["add", str(image), "new"]) == 0
    assert len(bitmap_info(image)) == 4


# ---- undo by force: it passes over what nothing tells, never over what something does ----


@pytest.mark.parametrize(
    "since",
    [
        ("amend", "-f", "qcow2", "-o", "lazy_refcounts=on"),
        ("rebase", "-u", "-b", ""),
    ],
    ids=["amended", "rebased"],
)
def test_a_header_that_qemu_has_written_anew_is_not_put_back(tmp_path: Path, since: tuple[str, ...]) -> None:
    """It drops what is dead, and the end of the old bitmaps extension may lie in the second sector."""
    image, undo = small_of_three(tmp_path), tmp_path / "undo"
    assert main(["remove", str(image), "--match", "*", "--undo", str(undo)]) == 0
    qemu_img(*since, image)
    if since[0] == "amend":
        qemu_img(*since[:-1], "lazy_refcounts=off", image)
    before = image.read_bytes()
    for options in ([], ["--force"]):
        assert main(["undo", str(image), str(undo), *options]) == 1
    assert image.read_bytes() == before
    assert check(image)["returncode"] == 0


def small_of_three(folder: Path) -> Path:
    image = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    for name in "abc":
        qemu_img("bitmap", "--add", image, name)
    qemu_io(image, "write -P 1 1M 1M")
    return image


def test_bitmaps_do_not_come_back_from_clusters_that_somebody_has_used_since(tmp_path: Path) -> None:
    """Used and given back: refcounts, header and length are what they were, and the bitmaps would read as clean."""
    image, undo = small_of_three(tmp_path), tmp_path / "undo"
    assert main(["remove", str(image), "--match", "*", "--undo", str(undo)]) == 0
    length = image.stat().st_size
    qemu_io(image, "write -P 9 12M 640k", "discard 12M 640k", options=("-d", "unmap"))
    with image.open("r+b") as file:
        file.truncate(length)
    before = image.read_bytes()
    for options in ([], ["--force"]):
        assert main(["undo", str(image), str(undo), *options]) == 1
    assert image.read_bytes() == before


@pytest.mark.parametrize("length", ["64k", "128k", "256k"])
def test_force_does_not_put_back_what_was_free_over_guest_data(tmp_path: Path, length: str) -> None:
    """A VM has taken the very clusters that a change, cut short, had begun to fill."""
    image, undo, refused = tmp_path / "image.qcow2", tmp_path / "undo", 0
    qemu_img("create", "-q", "-f", "qcow2", image, "4M")
    qemu_io(image, "write -P 1 0 1M")
    for state in list(cut_short(image, "add", "new", "--undo", str(undo))):
        state.write(tmp_path)
        qemu_io(image, f"write -P 119 2M {length}")
        before, status = image.read_bytes(), check(image)["returncode"]
        if main(["undo", str(image), str(undo), "--force"]) == 1:
            refused += 1
            assert image.read_bytes() == before
        qemu_io(image, f"read -P 119 2M {length}")
        assert check(image)["returncode"] == status
    assert refused


def test_nobody_else_opens_what_a_crash_has_torn(tmp_path: Path) -> None:
    """Not to read it either: it would be neither the old state nor the new one."""
    image, kept_out = damaged(tmp_path), 0
    overlay, copy = tmp_path / "overlay.qcow2", tmp_path / "copy"
    qemu_img("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay)
    for state in list(cut_short(image, "repair", "--yes", "--no-undo")):
        state.write(tmp_path)
        if is_open_to_qemu(image):
            continue
        kept_out += 1
        before = image.read_bytes()
        for words in (
            ("info", image), ("check", image), ("check", "-r", "all", image), ("commit", overlay),
            ("convert", "-O", "raw", image, copy), ("bitmap", "--add", image, "x"), ("rebase", "-u", "-b", "", image),
        ):  # fmt: skip
            assert qemu_img(*words, check=False).returncode, words
        for words in (("list", image), ("show", image, "a"), ("export", image, copy)):
            assert main([str(word) for word in words]), words
        assert image.read_bytes() == before
    assert kept_out >= 2


def test_a_corrupt_bit_that_qemu_has_set_rolls_nothing_back(tmp_path: Path) -> None:
    """The image was restored, the journal was left, and later QEMU finds damage of another kind."""
    image = damaged(tmp_path)
    shutil.copyfile(image, tmp_path / "backup")
    for state in list(cut_short(image, "repair", "--yes", "--no-undo")):
        state.write(tmp_path)
        restored(image)
        raw = Raw.load(image)
        raw.put(72, raw.number(72) | 2)
        raw.save(image)
        with pytest.raises(UnsupportedImageError, match="marked corrupt"):
            qcow2bm.open(image, writable=True)
        assert image.read_bytes() == raw.data


@pytest.mark.parametrize("options", ["cluster_size=4k,refcount_bits=1", "cluster_size=512", "cluster_size=64k"])
@pytest.mark.parametrize("command", ["remove {} a", "clear {} a b", "merge {} b a", "rename {} b another-name"])
def test_a_change_that_was_done_and_not_noted_is_undone_by_force(
    tmp_path: Path, options: str, command: str, monkeypatch
) -> None:
    """What one stage raises another lowers, in the same bytes, and nobody has used the image."""
    image, undo = tmp_path / "image.qcow2", tmp_path / "undo"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "4M")
    for name in "abc":
        qemu_img("bitmap", "--add", "-g", "512", image, name)
    qemu_io(image, "write -P 1 1M 1M")
    assert main(["clear", str(image), "b"]) == 0
    before = image.read_bytes()

    def dies(_: int) -> None:
        raise ZeroDivisionError  # which is no error of ours

    with monkeypatch.context() as patch:
        patch.setattr(undo_writer, "_outlive", dies)
        assert main([*command.format(image).split(), "--undo", str(undo)]) == 1
    assert image.read_bytes() != before
    done = Folder.read(tmp_path)
    with recorded(tmp_path) as ops:
        assert main(["undo", str(image), str(undo), "--force"]) == 0
    assert image.read_bytes() == before
    for number in range(len(ops) + 1):
        done.after(ops[:number]).write(tmp_path)
        status = main(["undo", str(image), str(undo), "--force"])
        assert status == 0 or image.read_bytes() == before, "it has been used already"
        assert image.read_bytes() == before


def test_a_header_that_has_changed_is_seen_although_an_undo_had_begun(tmp_path: Path) -> None:
    """It had noted that, and put nothing back yet."""
    image, undo = small_of_three(tmp_path), tmp_path / "undo"
    assert main(["remove", str(image), "a", "--undo", str(undo)]) == 0
    with UndoFile(undo) as held:
        held._set_state(State.IN_PROGRESS)
    with image.open("r+b") as file:
        file.seek(0x500)
        file.write(b"new")
    before = image.read_bytes()
    assert main(["undo", str(image), str(undo), "--force"]) == 1
    assert image.read_bytes() == before


def each_state(folder: Path, *words: str) -> Iterator[Folder]:
    """The folder before a command, and after each thing that it does to a file in it."""
    before = Folder.read(folder)
    with recorded(folder) as ops:
        assert main(list(words)) in (0, 3)
    for number in range(len(ops) + 1):
        yield before.after(ops[:number])


def holds(image: Path, offset: str) -> bool:
    """True if a guest finds there what has been written meanwhile."""
    return not qemu_io(image, f"read -P 119 {offset} 64k", options=("-r",), check=False).returncode


@pytest.mark.parametrize("room", ["behind the end", "inside"])
def test_what_is_committed_into_an_image_after_a_crash_is_not_rolled_back(tmp_path: Path, room: str) -> None:
    """It takes the first free clusters, and so does a repair, which keeps it out as soon as it has begun to write."""
    image, overlay = three(tmp_path), tmp_path / "overlay.qcow2"
    if room == "inside":
        for name in "abc":
            qemu_img("bitmap", "--remove", image, name)
    raw = Raw.load(image)
    raw.put(raw.l2_entry(60), 1 << 63 | raw.number(48))  # the refcount table, which a repair then moves
    raw.save(image)
    qemu_img("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay)
    qemu_io(overlay, "write -P 119 256k 64k")
    committed = kept_out = 0
    for state in list(each_state(tmp_path, "repair", str(image), "--yes", "--undo", str(tmp_path / "undo"))):
        state.write(tmp_path)
        failed = qemu_img("commit", "-q", "-f", "qcow2", "-d", overlay, check=False).returncode
        if not is_open_to_qemu(image):
            assert failed
            kept_out += 1
        elif not failed and holds(image, "256k"):
            committed += 1
            main(["add", str(image), "new"])
            assert holds(image, "256k")
    assert committed
    assert kept_out >= 2


@pytest.mark.parametrize("options", ["lazy_refcounts=on", "lazy_refcounts=off"])
def test_no_undo_takes_away_what_a_guest_has_allocated_since(tmp_path: Path, options: str) -> None:
    """Lazy refcounts show nothing of it but the dirty bit, if the VM dies."""
    image, undo = tmp_path / "image.qcow2", tmp_path / "undo"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "64M")
    qemu_io(image, "write -P 1 1M 64k")
    command = ("add", str(image), "new", "--all-dirty", "--undo", str(undo))
    tried = 0
    for state in list(each_state(tmp_path, *command)):
        state.write(tmp_path)
        if not undo.exists():
            continue
        qemu_io(image, "write -P 119 1088k 64k", "flush", "abort", check=False)
        tried += 1
        main(["undo", str(image), str(undo)])
        assert holds(image, "1088k")
    assert tried > 5


def test_an_undo_by_force_that_is_cut_short_leaves_no_old_time_stamp(tmp_path: Path) -> None:
    """An older undo file would go by it, and bring back a bitmap that misses what a guest has written."""
    image, old, new = three(tmp_path), tmp_path / "old", tmp_path / "new"
    for name in "bc":
        qemu_img("bitmap", "--remove", image, name)
    damage(image)
    assert main(["remove", str(image), "a", "--undo", str(old)]) == 0
    assert main(["repair", str(image), "--yes", "--undo", str(new)]) == 0
    qemu_io(image, "write -P 119 1M 64k")
    for state in list(each_state(tmp_path, "undo", str(image), str(new), "--force")):
        state.write(tmp_path)
        main(["undo", str(image), str(old)])
        assert not Raw.load(image).extensions().get(BITMAPS), "it has come back"


def test_force_does_not_undo_a_repair_whose_clusters_somebody_has_used_since(tmp_path: Path) -> None:
    """What it took out was overwritten by a guest and given back again, so that nothing else shows it."""
    image, undo = tmp_path / "image.qcow2", tmp_path / "undo"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_img("bitmap", "--add", "-g", "512", image, "b")
    qemu_io(image, "write -P 1 1M 1M")
    raw = Raw.load(image)
    raw.put(raw.directory[0] + 12, 3, 4)  # in use, and recording
    raw.save(image)
    assert main(["repair", str(image), "--yes", "--undo", str(undo), "--in-use", "remove", "--allow", "lossy"]) == 0
    size = image.stat().st_size
    qemu_io(image, "write -P 9 12M 192k", "discard 12M 192k", options=("-d", "unmap"))
    os.truncate(image, size)
    before = image.read_bytes()
    assert main(["undo", str(image), str(undo), "--force"]) == 1
    assert image.read_bytes() == before


# ---- by force ----


@pytest.mark.parametrize("zeroes", [64, 128], ids="{}k".format)
def test_clusters_that_a_guest_has_filled_with_zeroes_since_are_not_taken_from_it(tmp_path: Path, zeroes: int) -> None:
    """They are those that the change meant to take, hold what they held, and are counted as it would count them."""
    image, undo = tmp_path / "image.qcow2", tmp_path / "undo"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    qemu_io(image, "write -P 1 0 64k")
    refused = 0
    for state in [Folder.read(tmp_path), *cut_short(image, "add", "c", "--undo", str(undo))]:
        state.write(tmp_path)
        if not undo.exists():
            continue
        qemu_io(image, f"write -P 0 64k {zeroes}k")
        verdict = check(image)["returncode"]
        for force in ([], ["--force"]):
            refused += main(["undo", str(image), str(undo), *force]) == 1
            assert check(image)["returncode"] == verdict
        qemu_io(image, "write -P 7 8M 256k")
        qemu_io(image, f"read -P 0 64k {zeroes}k", "read -P 1 0 64k", "read -P 7 8M 256k")
    assert refused >= 2


@pytest.mark.parametrize("bitmap", [False, True], ids=["no bitmap", "a bitmap"])
def test_the_room_that_a_guest_has_written_to_since_is_not_taken_from_it(
    tmp_path: Path, bitmap: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    image, undo = tmp_path / "image.qcow2", tmp_path / "undo"
    qemu_img("create", "-q", "-f", "qcow2", image, "4M")
    qemu_io(image, "write -P 1 0 1M", "discard 0 1M", "write -P 1 0 64k")
    if bitmap:
        qemu_img("bitmap", "--add", "--disable", image, "a")
    before = guest_digest(image)
    assert main(["resize", str(image), "8M", "--undo", str(undo)]) == 0
    saved = image.read_bytes(), undo.read_bytes()
    qemu_io(image, "write -P 9 6M 128k")
    digest = guest_digest(image)
    for force in ([], ["--force"]):
        assert main(["undo", str(image), str(undo), *force]) == 1
        assert guest_digest(image) == digest
    if not bitmap:
        assert "the disk would end at 4194304 bytes again, and there is data at 0x600000" in capsys.readouterr().err
    image.write_bytes(saved[0])
    undo.write_bytes(saved[1])
    os.utime(image)
    assert main(["undo", str(image), str(undo), "--force"]) == 0, "nothing is there, so nothing is lost"
    assert guest_digest(image) == before


# ---- when the machine was started again ----


@pytest.fixture
def restart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def start_again() -> None:
        for module in (undo_reader, undo_writer):
            monkeypatch.setattr(module, "this_boot", lambda: 12345)

    return start_again


def test_a_time_stamp_of_before_a_restart_does_not_say_that_no_guest_has_written(
    tmp_path: Path, restart: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A guest overwrites what is allocated and flushes, and power fails: the data is there, the time stamp is lost."""
    image, undo = three(tmp_path), tmp_path / "undo"
    qemu_io(image, "write -P 1 0 64k")
    before = bitmap_info(image)
    assert main(["remove", str(image), "--match", "*", "--undo", str(undo)]) == 0
    stamp = image.stat()
    qemu_io(image, "write -P 119 0 4k")
    os.utime(image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    restart()
    assert main(["undo", str(image), str(undo)]) == 1
    assert "the machine was started again" in capsys.readouterr().err
    assert bitmap_info(image) == []
    assert main(["undo", str(image), str(undo), "--list"]) == 0
    assert "the machine was started again" in capsys.readouterr().out
    assert main(["undo", str(image), str(undo), "--force"]) == 0
    assert bitmap_info(image) == before


def test_an_older_undo_file_does_not_go_by_a_time_stamp_of_before_a_restart(
    tmp_path: Path, restart: Callable[[], None]
) -> None:
    image, older, newer = three(tmp_path), tmp_path / "older", tmp_path / "newer"
    names = [bitmap["name"] for bitmap in bitmap_info(image)]
    assert main(["remove", str(image), names[0], "--undo", str(older)]) == 0
    restart()
    assert main(["remove", str(image), names[1], "--undo", str(newer)]) == 0
    assert main(["undo", str(image), str(newer)]) == 0
    assert main(["undo", str(image), str(older)]) == 1


@pytest.mark.parametrize("case", ["longer backing file", "end within a cluster", "end within a compressed cluster"])
def test_room_that_nobody_has_written_to_is_given_back(tmp_path: Path, case: str) -> None:
    """What lies behind the end was there before, or are the zeroes that hide a longer backing file."""
    image, undo = tmp_path / "image.qcow2", tmp_path / "undo"
    if case == "longer backing file":
        (tmp_path / "base.raw").write_bytes(b"\1" * (16 << 20))
        qemu_img("create", "-q", "-f", "qcow2", "-b", tmp_path / "base.raw", "-F", "raw", image, "8M")
    else:
        qemu_img("create", "-q", "-f", "qcow2", image, str((8 << 20) + 512))
        qemu_io(image, f"write {'-c' if 'compressed' in case else ''} -P 1 8M 512")
    before = image.read_bytes()
    assert main(["resize", str(image), "12M", "--undo", str(undo)]) == 0
    os.utime(image)
    assert main(["undo", str(image), str(undo), "--force"]) == 0
    assert image.read_bytes() == before


def test_what_a_guest_has_written_in_the_last_cluster_behind_the_old_end_is_not_taken_from_it(tmp_path: Path) -> None:
    image, undo = tmp_path / "image.qcow2", tmp_path / "undo"
    qemu_img("create", "-q", "-f", "qcow2", image, str((8 << 20) + 512))
    qemu_io(image, "write -P 1 8M 512")
    assert main(["resize", str(image), "12M", "--undo", str(undo)]) == 0
    qemu_io(image, f"write -P 2 {(8 << 20) + 4096} 512")
    digest = guest_digest(image)
    assert main(["undo", str(image), str(undo), "--force"]) == 1
    assert guest_digest(image) == digest
