"""Quarantined bitmaps: out of the image, in the undo file, and back again, with every bit or not at all."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import qcow2bm
from qcow2bm import __main__, api
from qcow2bm.bitmap.bring_back import Quarantine
from qcow2bm.bitmap.quarantine import keep
from qcow2bm.bitmap.store import BitmapDirectory
from qcow2bm.errors import BitmapBrokenError, BitmapInconsistentError, UndoError
from qcow2bm.image import undo_reader
from qcow2bm.image.overlay import OverlayFile
from qcow2bm.image.plan import Kept
from qcow2bm.image.undo_layout import State
from qcow2bm.image.undo_reader import UndoReader
from tests.support.images import FIXTURES
from tests.support.qemu import bitmap_info, check, qemu_img, qemu_io
from tests.support.raw import BITMAPS, OFFSET, Raw
from tests.support.recording import Tape
from tests.support.scenes import create, three
from tests.support.states import bitmaps

IN_USE, AUTO = 1, 2
CLUSTER = 65536


def many(folder: Path, cluster: str = "512") -> Path:
    """Bitmaps of all kinds of chunks: zeroes, ones, data; recording or not; several granularities; odd size."""
    image = create(folder, str((3 << 20) + 1536), f"cluster_size={cluster}")
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("data", granularity=512)
        edit.set_range("data", 5, 100_000)
        edit.set_range("data", (3 << 20), 1536)
        edit.add("ones", granularity=4096, all_dirty=True)
        edit.add("off", granularity=512, recording=False)
        edit.set_range("off", 1 << 20, 1)
        edit.add("empty", granularity=1 << 20)
        edit.add("stays")
        edit.set_range("stays", 0, 70_000)
    return image


def quarantine(image: Path, undo: Path, *indices: int, **how: object) -> None:
    """What a repair does with bitmaps that are beyond repair, by their place in the directory."""
    with qcow2bm.open(image, writable=True) as opened:
        directory = BitmapDirectory(opened.qcow2)
        stored = directory.bitmaps
        kept = [part for index in indices for part in keep(stored[index], **how)]  # type: ignore[arg-type]
        left = [bitmap.entry.build() for index, bitmap in enumerate(stored) if index not in indices]
        assert left, "the extension itself is not what this is about"
        place, pointer = Raw.load(image).extensions()[BITMAPS][0], directory.pointer
        assert pointer is not None
        overlay, new = OverlayFile(opened.qcow2.file), b"".join(left)
        overlay.write_at(pointer.bitmap_directory_offset, new.ljust(pointer.bitmap_directory_size, b"\0"))
        overlay.write_at(place, struct.pack(">IIQ", len(left), 0, len(new)))
        plan = replace(overlay.plan(opened.qcow2, (), ("quarantine",)), kept=tuple(kept))
        opened.commit(plan, undo=undo)


@pytest.fixture
def run(capsys):
    """Run the program: exit status, stdout, stderr."""

    def runner(*words: str | Path) -> tuple[int, str, str]:
        status = __main__.main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return runner


@pytest.fixture
def taken(tmp_path: Path) -> tuple[Path, Path, list]:
    """An image whose first four bitmaps are in its undo file, and what its bitmaps were."""
    image, undo = many(tmp_path), tmp_path / "undo"
    before = bitmaps(image)
    quarantine(image, undo, 0, 1, 2, 3, why="for the test")
    assert [bitmap["name"] for bitmap in bitmap_info(image)] == ["stays"]
    return image, undo, before


def named(state: list, name: str) -> tuple:
    return next(entry for entry in state if entry[0] == name)


# ---- back again ----


def test_all_of_them_come_back_in_one_commit_with_every_bit_and_qemu_reads_them(taken, run) -> None:
    image, undo, before = taken
    words = [word for name in ("data", "ones", "off", "empty") for word in ("--bitmap", name)]
    status, out, err = run("undo", image, undo, *words)
    assert (status, err) == (0, "")
    assert "bitmap 'data' is back, recording\n" in out
    assert "bitmap 'off' is back, not recording\n" in out
    assert sorted(bitmaps(image)) == sorted(before)
    assert check(image)["returncode"] == 3, "what the test's repair has not given back is leaked"
    listed = {bitmap["name"]: (bitmap["granularity"], bitmap["flags"]) for bitmap in bitmap_info(image)}
    assert listed == {name: (granularity, ["auto"] * recording) for name, recording, granularity, _, _ in before}


@pytest.mark.parametrize("cluster", ["4k", "64k", "2M"])
def test_one_comes_back_whatever_the_cluster_size(tmp_path: Path, cluster: str) -> None:
    image, undo = many(tmp_path, cluster), tmp_path / "undo"
    before = bitmaps(image)
    quarantine(image, undo, 0)
    with qcow2bm.open(image, writable=True) as opened, api.open_undo(undo) as held, opened.edit() as edit:
        [bitmap] = held.choose(["data"])
        assert held.bring_back(edit, bitmap) is None
    assert named(bitmaps(image), "data") == named(before, "data")


def test_it_comes_back_under_another_name(taken, run) -> None:
    image, undo, before = taken
    assert run("undo", image, undo, "--bitmap", "data", "--as", "new")[0] == 0
    assert named(bitmaps(image), "new")[1:] == named(before, "data")[1:]


def test_a_name_that_is_taken_needs_another(taken, run) -> None:
    image, undo, _ = taken
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("off")
    status, _, err = run("undo", image, undo, "--bitmap", "off")
    assert status == 1
    assert "there is a bitmap called 'off' already; --as gives it another name" in err
    assert run("undo", image, undo, "--bitmap", "off", "--as", "off then")[0] == 0


def test_bringing_back_can_be_undone_and_then_the_repair_too(tmp_path: Path, run) -> None:
    image, undo = many(tmp_path), tmp_path / "undo"
    first = image.read_bytes()
    quarantine(image, undo, 0)
    second = image.read_bytes()
    status, out, _ = run("undo", image, undo, "--bitmap", "data", "--undo", tmp_path / "again")
    assert status == 0
    assert out.endswith(f"undo file: {tmp_path / 'again'}\n")
    with pytest.raises(UndoError, match="has changed"):
        qcow2bm.undo(image, undo)
    assert run("undo", image, tmp_path / "again")[0] == 0
    assert image.read_bytes() == second
    assert run("undo", image, undo)[0] == 0
    assert image.read_bytes() == first


def test_a_dry_run_writes_nothing(taken, run) -> None:
    image, undo, _ = taken
    before, held, stamp = image.read_bytes(), undo.read_bytes(), image.stat().st_mtime_ns
    status, out, _ = run("undo", image, undo, "--bitmap", "data", "--dry-run", "--undo", image.with_name("x"))
    assert status == 0
    assert "bitmap 'data' would come back, recording\n" in out
    assert "nothing was written" in out
    assert (image.read_bytes(), undo.read_bytes(), image.stat().st_mtime_ns) == (before, held, stamp)
    assert not image.with_name("x").exists()


# ---- what was written since ----


def test_after_a_guest_write_one_that_recorded_comes_back_only_as_stale_and_does_not_record(taken, run) -> None:
    image, undo, before = taken
    qemu_io(image, "write -P 8 1M 512")
    kept = image.read_bytes()
    status, _, err = run("undo", image, undo, "--bitmap", "data")
    assert status == BitmapInconsistentError.exit_status == 4
    assert "bitmap 'data' may be stale: the image has been" in err
    assert image.read_bytes() == kept
    status, out, err = run("undo", image, undo, "--bitmap", "data", "--stale")
    assert status == 0
    assert "warning: bitmap 'data' does not record and may be stale" in err
    assert "bitmap 'data' is back, not recording\n" in out
    _, recording, *rest = named(bitmaps(image), "data")
    assert (recording, rest) == (False, list(named(before, "data")[2:]))


def test_a_write_that_leaves_no_trace_but_the_time_stamp_counts(taken, run) -> None:
    image, undo, _ = taken
    os.utime(image)
    status, _, err = run("undo", image, undo, "--bitmap", "ones")
    assert status == 4
    assert "has been written to since, and it lacks those writes" in err


def test_content_that_changed_counts_though_the_time_stamp_is_the_same(taken, run) -> None:
    image, undo, _ = taken
    stamp = image.stat().st_mtime_ns
    qemu_img("bitmap", "--disable", image, "stays")
    os.utime(image, ns=(stamp, stamp))
    status, _, err = run("undo", image, undo, "--bitmap", "ones")
    assert status == 4
    assert "has been changed since" in err


def test_one_that_did_not_record_lacks_nothing(taken, run) -> None:
    image, undo, before = taken
    qemu_io(image, "write -P 8 1M 512")
    status, _, err = run("undo", image, undo, "--bitmap", "off")
    assert (status, err) == (0, "")
    assert named(bitmaps(image), "off") == named(before, "off")


def test_what_recorded_before_the_machine_was_started_again_may_lack_writes(taken, run, monkeypatch) -> None:
    image, undo, _ = taken
    monkeypatch.setattr(undo_reader, "this_boot", lambda: 12345)
    status, _, err = run("undo", image, undo, "--bitmap", "data")
    assert status == 4
    assert "the machine was started again" in err
    assert run("undo", image, undo, "--bitmap", "off")[0] == 0
    assert run("undo", image, undo, "--bitmap", "data", "--stale")[0] == 0
    assert ("data", False) in [entry[:2] for entry in bitmaps(image)]


def test_one_of_another_image_does_not_come_without_a_word(taken, run, tmp_path: Path) -> None:
    _, undo, _ = taken
    (tmp_path / "other").mkdir()
    other = create(tmp_path / "other", str((3 << 20) + 1536), "cluster_size=512")
    before = other.read_bytes()
    status, _, err = run("undo", other, undo, "--bitmap", "off")
    assert status == 4
    assert "was made for another file" in err
    assert other.read_bytes() == before
    status, _, err = run("undo", other, undo, "--bitmap", "off", "--stale")
    assert status == 0
    assert "was made for another file" in err


def test_stale_is_not_used_where_nothing_is(taken, run) -> None:
    image, undo, before = taken
    status, _, err = run("undo", image, undo, "--bitmap", "data", "--stale")
    assert (status, err) == (0, "")
    assert named(bitmaps(image), "data") == named(before, "data")


def test_on_a_device_nothing_tells_of_other_writes(taken) -> None:
    image, undo, _ = taken
    with qcow2bm.open(image, writable=True, open_file=Tape(device=True).open) as opened, api.open_undo(undo) as held:
        draft = opened.draft()
        with pytest.raises(BitmapInconsistentError, match="nothing tells"):
            held.bring_back(draft, held.choose(["data"])[0])
        held.bring_back(draft, held.choose(["off"])[0])


def test_a_disk_of_another_size_cannot_take_it_stale_or_not(taken, run) -> None:
    image, undo, _ = taken
    qemu_img("resize", "-q", image, "8M")
    for words in ((), ("--stale",)):
        status, _, err = run("undo", image, undo, "--bitmap", "off", *words)
        assert status == 1
        assert "the disk has 8388608 bytes" in err


def test_after_the_repair_was_undone_there_is_nothing_to_bring_back(taken, run) -> None:
    image, undo, before = taken
    assert run("undo", image, undo)[0] == 0
    assert bitmaps(image) == before
    for words in ((), ("--stale",)):
        status, _, err = run("undo", image, undo, "--bitmap", "data", *words)
        assert status == 1
        assert "has been used: the image is as it was" in err


def test_after_a_repair_that_a_crash_cut_short_they_are_still_in_the_image(taken, run) -> None:
    """The journal may be gone: somebody has opened the image for writing, and it was rolled back."""
    image, undo, before = taken
    after, held, stamp = image.read_bytes(), undo.read_bytes(), image.stat().st_mtime_ns
    qcow2bm.undo(image, undo)
    in_progress(undo, held)
    for words in ((), ("--stale",)):
        status, _, err = run("undo", image, undo, "--bitmap", "data", *words)
        assert status == 1
        assert "is not in the image, and so its bitmaps still are" in err
    image.write_bytes(after)
    os.utime(image, ns=(stamp, stamp))
    status, _, err = run("undo", image, undo, "--bitmap", "data")  # it was done, but that was not noted
    assert status == 4
    assert "nothing tells" in err
    assert run("undo", image, undo, "--bitmap", "data", "--stale")[0] == 0
    assert named(bitmaps(image), "data")[2:] == named(before, "data")[2:]


def in_progress(undo: Path, data: bytes) -> None:
    """An undo file as it is until its change is done."""
    undo.write_bytes(data)
    with UndoReader(undo) as held:
        summary = replace(held._summary, state=State.IN_PROGRESS, mtime_ns=0)
    undo.write_bytes(summary.build() + data[512:])


# ---- bitmaps that were no longer good ----


def put_flags(image: Path, index: int, flags: int) -> None:
    raw = Raw.load(image)
    at = raw.directory[0]
    for _ in range(index):
        extra, name = raw.number(at + 20, 4), raw.number(at + 18, 2)
        at += (24 + extra + name + 7) // 8 * 8
    raw.put(at + 12, flags, 4)
    raw.save(image)


@pytest.mark.parametrize(
    ("flags", "why"),
    [(AUTO | IN_USE, "it was in use"), (IN_USE, "it was in use"), (AUTO | 1 << 7, "unknown flags 0x82")],
)
def test_one_that_was_in_use_or_whose_flags_are_damaged_comes_back_only_as_stale(
    tmp_path: Path, run, flags: int, why: str
) -> None:
    image, undo = many(tmp_path), tmp_path / "undo"
    before = bitmaps(image)
    put_flags(image, 0, flags)
    quarantine(image, undo, 0)
    status, _, err = run("undo", image, undo, "--bitmap", "data")
    assert status == 4
    assert why in err
    assert run("undo", image, undo, "--bitmap", "data", "--stale")[0] == 0
    assert named(bitmaps(image), "data") == ("data", False, *named(before, "data")[2:])


def test_one_that_was_detached_comes_back_only_as_stale(tmp_path: Path, run) -> None:
    """The header of then says so, whatever the repair has made of it."""
    image, undo = many(tmp_path), tmp_path / "undo"
    raw = Raw.load(image)
    raw.put(88, 0)
    raw.save(image)
    quarantine(image, undo, 0)
    with UndoReader(undo) as held:
        assert [part for part in held.kept().ranges if part.label == "image header"]
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.remove(*edit.names("*"))
    status, _, err = run("undo", image, undo, "--bitmap", "data")
    assert status == 4
    assert "it was detached" in err


def test_one_that_the_repair_did_not_trust_comes_back_only_as_stale(tmp_path: Path, run) -> None:
    image, undo = many(tmp_path), tmp_path / "undo"
    quarantine(image, undo, 2, why="guest data lies in its clusters", doubtful=True)
    status, _, err = run("undo", image, undo, "--bitmap", "off")
    assert status == 4
    assert "guest data lies in its clusters" in err
    assert run("undo", image, undo, "--bitmap", "off", "--stale")[0] == 0


def test_bitmaps_that_share_a_cluster_come_back_only_as_stale(tmp_path: Path, run) -> None:
    image, undo = many(tmp_path), tmp_path / "undo"
    raw = Raw.load(image)
    raw.put(raw.bitmap_data("off")[0], raw.number(raw.bitmap_data("data")[0]))
    raw.save(image)
    quarantine(image, undo, 0, 2)
    for name in ("data", "off"):
        status, _, err = run("undo", image, undo, "--bitmap", name)
        assert status == 4
        assert "had another use in it or in another bitmap" in err


def entry_of(raw: Raw, name: str) -> int:
    """Where the directory entry of a bitmap is."""
    at, size, _ = raw.directory
    return next(
        place for place in range(at, at + size, 8) if raw.data[place + 24 : place + 24 + len(name)] == name.encode()
    )


def outside_data(raw: Raw) -> None:
    raw.put(raw.bitmap_data("data")[0], 1 << 40)


def reserved_entry(raw: Raw) -> None:
    raw.put(raw.bitmap_data("data")[0], raw.number(raw.bitmap_data("data")[0]) | 1 << 60)


def all_ones_entry(raw: Raw) -> None:
    raw.put(raw.bitmap_data("data")[0], raw.number(raw.bitmap_data("data")[0]) | 1)


def outside_table(raw: Raw) -> None:
    raw.put(entry_of(raw, "data"), 1 << 40)


def unaligned_table(raw: Raw) -> None:
    raw.put(entry_of(raw, "data"), raw.number(entry_of(raw, "data")) + 8)


def huge_table(raw: Raw) -> None:
    raw.put(entry_of(raw, "data") + 8, 0xFFFFFFF0, 4)


def short_table(raw: Raw) -> None:
    raw.put(entry_of(raw, "data") + 8, 1, 4)


def other_type(raw: Raw) -> None:
    raw.put(entry_of(raw, "data") + 16, 7, 1)


def odd_granularity(raw: Raw) -> None:
    raw.put(entry_of(raw, "data") + 17, 200, 1)


BAD: list[tuple[Callable[[Raw], None], str]] = [
    (outside_data, "its data: the cluster at 0x10000000000 .* lies outside the file"),
    (reserved_entry, "its table: entry .* has reserved bits set"),
    (all_ones_entry, "its table: entry .* has an offset and the all-ones bit"),
    (outside_table, "its table at 0x10000000000 lies outside the file"),
    (unaligned_table, "its directory entry: its table's offset .* is not a cluster's"),
    (huge_table, "its directory entry: its table has 4294967280 entries"),
    (short_table, "its directory entry: its table has 1 entries, the disk needs 2"),
    (other_type, "its directory entry: its type 7 is not known"),
    (odd_granularity, r"its directory entry: its granularity 2\^200"),
]


@pytest.mark.parametrize(("damage", "part"), BAD, ids=[damage.__name__ for damage, _ in BAD])
def test_one_that_cannot_be_read_never_comes_back_and_the_part_is_named(
    tmp_path: Path, run, damage: Callable[[Raw], None], part: str
) -> None:
    image, undo = many(tmp_path), tmp_path / "undo"
    raw = Raw.load(image)
    damage(raw)
    raw.save(image)
    before = image.read_bytes()
    quarantine(image, undo, 0)
    assert undo.stat().st_size < 200_000, "no more than the file has of it"
    after = image.read_bytes()
    for words in ((), ("--stale",)):
        with qcow2bm.open(image, writable=True) as opened, Quarantine(undo) as held:
            [bitmap] = held.choose(["data"])
            with pytest.raises(BitmapBrokenError, match=part):
                held.bring_back(opened.draft(), bitmap, stale=bool(words))
        status, _, err = run("undo", image, undo, "--bitmap", "data", *words)
        assert status == 4
        assert "bitmap 'data' cannot be brought back" in err
    assert image.read_bytes() == after
    assert run("undo", image, undo, "--list")[0] == 0
    assert json.loads(run("undo", image, undo, "--list", "--output", "json")[1])["quarantined"][0]["fault"]
    qcow2bm.undo(image, undo)
    assert image.read_bytes() == before


def removed_with(image: Path, undo: Path, *kept: Kept) -> None:
    """The first bitmap is removed, and of the image these ranges are kept."""
    with qcow2bm.open(image, writable=True) as opened:
        draft = opened.draft()
        draft.remove("data")
        opened.commit(replace(draft.plan(), kept=kept), undo=undo)


@pytest.mark.parametrize("part", ["table", "data"])
def test_what_was_not_kept_is_not_made_up(tmp_path: Path, part: str) -> None:
    image, undo = many(tmp_path), tmp_path / "undo"
    with qcow2bm.open(image) as opened:
        everything = keep(BitmapDirectory(opened.qcow2).find("data"))
    removed_with(image, undo, *(one for one in everything if one.label != f"bitmap {part}"))
    with qcow2bm.open(image, writable=True) as opened, Quarantine(undo) as held:
        assert "was not kept" in str(held.bitmaps[0].fault)
        with pytest.raises(BitmapBrokenError, match=f"its {part}.* at 0x"):
            held.bring_back(opened.draft(), held.bitmaps[0], stale=True)


def test_a_disk_size_that_no_bitmap_fits_takes_no_memory(tmp_path: Path) -> None:
    """A made-up undo file: the header says that the disk has 2^60 bytes."""
    image, undo = many(tmp_path), tmp_path / "undo"
    put_flags(image, 0, IN_USE)
    raw = Raw.load(image)
    header = bytearray(raw.data[:112])
    header[24:32] = (1 << 60).to_bytes(8, "big")
    with qcow2bm.open(image) as opened:
        everything = keep(BitmapDirectory(opened.qcow2).find("data"))
    place = len(raw.data)
    raw.data += bytes(header).ljust(512, b"\0")
    raw.save(image)
    removed_with(image, undo, Kept("image header", place, 112), *everything[1:])
    with Quarantine(undo) as held:
        assert "too small for a disk of 1152921504606846976 bytes" in str(held.bitmaps[0].fault)


@pytest.mark.parametrize(
    "kept",
    [
        (Kept("bitmap directory entry: ", 0, 10),),
        (Kept("bitmap directory entry: ", 0, 0),),
        (Kept("bitmap directory entry: ", 512, 64), Kept("image header", 600, 100)),
        (Kept("image header", 0, 104), Kept("bitmap directory entry: ", 0, 104)),
    ],
    ids=["short", "nothing", "no header", "no entry"],
)
def test_nonsense_with_the_right_labels_is_a_bitmap_that_cannot_come_back(
    tmp_path: Path, kept: tuple[Kept, ...]
) -> None:
    image, undo = many(tmp_path), tmp_path / "undo"
    with qcow2bm.open(image, writable=True) as opened:
        draft = opened.draft()
        draft.disable("data")
        opened.commit(replace(draft.plan(), kept=kept), undo=undo)
    with Quarantine(undo) as held:
        [bitmap] = held.bitmaps
        assert bitmap.fault is not None
        assert bitmap.number == 1


# ---- what keep() takes ----


def test_only_what_lies_in_the_file_is_kept_whatever_the_numbers_say(tmp_path: Path) -> None:
    """A table of 2^32 entries, and one whose entries name all of a file that is mostly a hole."""
    image = three(tmp_path)
    raw = Raw.load(image)
    huge_table_at = entry_of(raw, "a")
    raw.put(huge_table_at + 8, 0xFFFFFFFF, 4)
    raw.save(image)
    os.truncate(image, 1 << 40)
    with qcow2bm.open(image) as opened:
        tracemalloc.start()
        kept = keep(BitmapDirectory(opened.qcow2).bitmaps[0])
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()
        limit = 8 * opened.qcow2.geometry.max_bitmap_table_entries
        assert [(part.label.partition(":")[0], part.length) for part in kept] == [
            ("image header", 112), ("bitmap directory entry", 32), ("bitmap table", limit),
        ]  # fmt: skip


def test_a_table_that_begins_within_a_cluster_is_none_and_names_no_data(tmp_path: Path) -> None:
    image = many(tmp_path)
    raw = Raw.load(image)
    unaligned_table(raw)
    raw.save(image)
    with qcow2bm.open(image) as opened:
        labels = [part.label.partition(":")[0] for part in keep(BitmapDirectory(opened.qcow2).bitmaps[0])]
    assert labels == ["image header", "bitmap directory entry", "bitmap table"]


def test_where_the_granularity_is_nonsense_table_and_data_are_kept_all_the_same(tmp_path: Path) -> None:
    """Somebody may know better what it was."""
    image = many(tmp_path)
    with qcow2bm.open(image) as opened:
        healthy = [(part.offset, part.length) for part in keep(BitmapDirectory(opened.qcow2).bitmaps[0])]
    for granularity in (12, 200):
        raw = Raw.load(image)
        raw.put(entry_of(raw, "data") + 17, granularity, 1)
        raw.save(image)
        with qcow2bm.open(image) as opened:
            assert [(part.offset, part.length) for part in keep(BitmapDirectory(opened.qcow2).bitmaps[0])] == healthy
    assert len(healthy) > 3


def test_neighbouring_clusters_are_one_range_and_each_is_kept_once(tmp_path: Path) -> None:
    image = many(tmp_path)
    raw = Raw.load(image)
    first, second = raw.bitmap_data("data")[:2]
    raw.put(second, raw.number(first))
    raw.save(image)
    with qcow2bm.open(image) as opened:
        directory = BitmapDirectory(opened.qcow2)
        assert [part.length for part in keep(directory.find("data")) if part.label == "bitmap data"] == [512]
        assert [part for part in keep(directory.find("empty")) if part.label == "bitmap data"] == []
    raw.put(second, raw.number(raw.bitmap_data("off")[0]))
    raw.save(image)
    with qcow2bm.open(image) as opened:
        kept = keep(BitmapDirectory(opened.qcow2).find("data"))
    assert [(part.offset, part.length) for part in kept if part.label == "bitmap data"] == [
        (raw.number(first), 512),
        (raw.number(second), 512),
    ]


def test_data_that_the_file_has_only_in_part_reads_as_zeroes_past_its_end(tmp_path: Path) -> None:
    image, undo = create(tmp_path, "64M"), tmp_path / "undo"
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("stays")
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("a", granularity=512)
        edit.set_range("a", 0, 512)
    raw = Raw.load(image)
    data = raw.number(raw.bitmap_data("a")[0]) & OFFSET
    end = len(raw.data)
    raw.data.extend(raw.data[data : data + CLUSTER])  # a copy at the end of the file, which ends within it
    raw.put(raw.bitmap_data("a")[0], end)
    raw.save(image)
    os.truncate(image, end + 100)
    quarantine(image, undo, 1)
    with Quarantine(undo) as held:
        assert (held.bitmaps[0].fault, held.bitmaps[0].dirty_bytes) == (None, 512)


# ---- which one ----


def duplicates(folder: Path) -> Path:
    """Three bitmaps: two of one name, and one without any."""
    image = create(folder, "4M")
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        for number, name in enumerate(["stays", "mon", "tue", "wed"]):
            edit.add(name, granularity=4096)
            edit.set_range(name, number << 20, 4096)
    raw = Raw.load(image)
    at = entry_of(raw, "tue")
    raw.data[at + 24 : at + 27] = b"mon"
    at = entry_of(raw, "wed")
    raw.put(at + 18, 0, 2)
    raw.data[at + 24 : at + 32] = bytes(8)
    size_at = raw.extensions()[BITMAPS][0] + 8
    raw.put(size_at, raw.number(size_at) - 8)
    raw.save(image)
    return image


def test_those_of_one_name_or_none_are_told_apart_by_number(tmp_path: Path, run) -> None:
    image, undo = duplicates(tmp_path), tmp_path / "undo"
    quarantine(image, undo, 1, 2, 3)
    listed = json.loads(run("undo", image, undo, "--list", "--output", "json")[1])["quarantined"]
    assert [(bitmap["number"], bitmap["name"], bitmap["fault"]) for bitmap in listed] == [
        (1, "mon", None), (2, "mon", None), (3, "", None),
    ]  # fmt: skip
    status, _, err = run("undo", image, undo, "--bitmap", "mon")
    assert status == 64
    assert "keeps 2 bitmaps called 'mon'; choose with --number 1 or 2" in err
    status, _, err = run("undo", image, undo, "--number", "3")
    assert status == 64
    assert "1 to 1023 bytes, this one has 0; --as gives it another name" in err
    status, _, err = run("undo", image, undo, "--number", "7")
    assert (status, "keeps no bitmap with the number 7" in err) == (1, True)
    status, _, err = run("undo", image, undo, "--number", "1", "--number", "2")
    assert (status, "already" in err) == (1, True)
    assert run("undo", image, undo, "--number", "2")[0] == 0
    assert named(bitmaps(image), "mon")[4] == ((2 << 20, 4096),)
    assert run("undo", image, undo, "--number", "3", "--as", "was nameless", "--stale")[0] == 0
    assert named(bitmaps(image), "was nameless")[4] == ((3 << 20, 4096),)


def test_a_name_that_is_not_there_is_said(taken, run) -> None:
    image, undo, _ = taken
    status, _, err = run("undo", image, undo, "--bitmap", "stays")
    assert status == 1
    assert f"{undo} keeps no bitmap called 'stays'; --list shows those it keeps" in err


# ---- the command line ----


def test_the_list_shows_what_there_is(taken, run) -> None:
    image, undo, _ = taken
    held = undo.read_bytes()
    status, out, err = run("undo", image, undo, "--list")
    assert (status, err) == (0, "")
    for text in ("complete", "can be undone  yes", "bitmaps: 4", "data", "for the test"):
        assert text in out
    parsed = json.loads(run("undo", image, undo, "--list", "--output", "json")[1])
    assert (parsed["state"], parsed["obstacle"], parsed["changed"]) == ("complete", None, False)
    assert parsed["size-before"] == parsed["size-after"] == image.stat().st_size
    assert [(b["name"], b["dirty-bytes"], b["why"]) for b in parsed["quarantined"]] == [
        ("data", 100_352 + 1536, "for the test"),
        ("ones", (3 << 20) + 1536, "for the test"),
        ("off", 512, "for the test"),
        ("empty", 0, "for the test"),
    ]
    assert undo.read_bytes() == held


def test_the_list_says_why_the_image_cannot_be_put_back(taken, run) -> None:
    image, undo, _ = taken
    os.utime(image)
    assert "no: the image was written to since" in run("undo", image, undo, "--list")[1]
    image.unlink()
    status, out, _ = run("undo", image, undo, "--list")
    assert (status, "no: No such file" in out) == (0, True)


def test_the_list_of_a_plain_change(tmp_path: Path, run) -> None:
    image, undo = three(tmp_path), tmp_path / "undo"
    with qcow2bm.open(image, writable=True) as opened, opened.edit(undo=undo) as edit:
        edit.add("new")
    status, out, _ = run("undo", image, undo, "--list")
    assert (status, "quarantined    nothing" in out) == (0, True)
    qcow2bm.undo(image, undo)
    parsed = json.loads(run("undo", image, undo, "--list", "--output", "json")[1])
    assert (parsed["state"], parsed["quarantined"]) == ("undone", [])
    assert "used already" in parsed["obstacle"]


def test_the_list_of_a_damaged_file_is_an_error_that_names_it(taken, run) -> None:
    image, undo, _ = taken
    data = bytearray(undo.read_bytes())
    data[-1] ^= 1
    undo.write_bytes(data)
    status, _, err = run("undo", image, undo, "--list")
    assert status == 1
    assert f"{undo} is damaged in kept part" in err


@pytest.mark.parametrize(
    "words",
    [
        ["--list", "--bitmap", "data"],
        ["--list", "--force"],
        ["--as", "x"],
        ["--stale"],
        ["--dry-run"],
        ["--undo", "x"],
        ["--bitmap", "data", "--force"],
        ["--bitmap", "data", "--bitmap", "off", "--as", "x"],
        ["--bitmap", "data", "--number", "1", "--as", "x"],
    ],
    ids=" ".join,
)
def test_options_that_contradict_each_other_are_refused(taken, run, words: list[str]) -> None:
    image, undo, _ = taken
    before = image.read_bytes()
    assert run("undo", image, undo, *words)[0] == 64
    assert image.read_bytes() == before


SCHEMA = json.loads((FIXTURES.parent / "docs" / "schemas" / "undo.schema.json").read_text(encoding="utf-8"))


def valid(document: str) -> dict:
    """Against the schema, which must know every key."""
    parsed: dict = json.loads(document)
    Draft202012Validator(SCHEMA).validate(parsed)
    assert set(parsed) <= set(SCHEMA["properties"])
    for name in ("quarantined", "brought-back"):
        known = set(SCHEMA["properties"][name]["items"]["properties"])
        assert all(set(bitmap) == known for bitmap in parsed.get(name, ()))
    return parsed


def test_json_is_what_the_schema_says(taken, run) -> None:
    image, undo, _ = taken
    json_of = ("undo", "--output", "json", image, undo)
    assert len(valid(run(*json_of, "--list")[1])["quarantined"]) == 4
    dry = valid(run(*json_of, "--bitmap", "data", "-n", "--undo", image.with_name("again"))[1])
    assert (dry["changed"], dry["dry-run"], dry["new-undo-file"]) == (False, True, None)
    back = valid(run(*json_of, "--bitmap", "data", "--undo", image.with_name("again"))[1])
    assert (back["changed"], back["new-undo-file"]) == (True, str(image.with_name("again")))
    assert back["brought-back"] == [{"number": 1, "name": "data", "recording": True, "doubt": None}]
    assert back["bytes-written"] == dry["bytes-written"] > 0
    valid(run("undo", "--output", "json", image, image.with_name("again"))[1])
    os.utime(image)
    stale = valid(run(*json_of, "--bitmap", "ones", "--as", "x", "--stale")[1])
    assert [(b["name"], b["recording"], bool(b["doubt"])) for b in stale["brought-back"]] == [("x", False, True)]
    valid(run(*json_of, "--list")[1])


def test_the_schema_tells_the_three_documents_apart() -> None:
    """Guards the guard."""
    head = {"format-version": 1, "command": "undo", "image": "a", "undo-file": "b", "changed": True}
    schema = Draft202012Validator(SCHEMA)
    assert schema.is_valid(head)
    assert not schema.is_valid({**head, "state": "complete"})
    assert not schema.is_valid({**head, "brought-back": []})
