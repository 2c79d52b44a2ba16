"""`resize` without QEMU: its command line, what it refuses, and images that lie to it."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.cli.sizes import Resizing, parse_resizing
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapInconsistentError,
    CorruptImageError,
    NoSpaceError,
    OutdatedPlanError,
    Qcow2bmError,
    UnsupportedImageError,
    UsageError,
)
from tests.support.images import unpack
from tests.support.raw import Raw
from tests.support.recording import Tape

GIB, MIB = 1 << 30, 1 << 20
COPIED = 1 << 63


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Six bitmaps on a disk of 1 GiB."""
    return unpack("office-week", tmp_path)


def size_of(path: Path) -> int:
    with qcow2bm.open(path) as opened:
        return opened.virtual_size


def refusal(path: Path, size: int, **options: object) -> Qcow2bmError:
    """Why a resize is refused; nothing has been written then."""
    before, tape = path.read_bytes(), Tape()
    with qcow2bm.open(path, writable=True, open_file=tape.open) as opened, pytest.raises(Qcow2bmError) as caught:
        qcow2bm.plan_resize(opened, size, **options)  # type: ignore[arg-type]
    assert not tape.events
    assert path.read_bytes() == before
    return caught.value


# ---- the command ----


@pytest.mark.parametrize(
    ("text", "expected", "of_1000"),
    [
        ("4k", Resizing(4096, 0), 4096),
        ("+1", Resizing(1, 1), 1001),
        ("-1000", Resizing(1000, -1), 0),
        ("-2k", Resizing(2048, -1), -1048),
        ("0x200", Resizing(512, 0), 512),
    ],
)
def test_sizes_as_qemu_img_takes_them(text: str, expected: Resizing, of_1000: int) -> None:
    assert parse_resizing(text) == expected
    assert expected.of(1000) == of_1000


@pytest.mark.parametrize("text", ["", "+", "-", "+-1", "--1", "1Q", "1.5G", "+ 1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_resizing(text)


def test_the_command_grows_and_shrinks(image: Path, run) -> None:
    status, out, err = run("resize", image, "+1G")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "grow the disk from 1073741824 to 2147483648 bytes"
    assert size_of(image) == 2 * GIB
    assert run("resize", image, "--shrink", "-1G")[0] == 0
    assert run("resize", image, "-512M", "--shrink")[0] == 0
    assert size_of(image) == GIB // 2
    assert run("resize", image, "512M").out.splitlines() == ["nothing to do: the image is that way already"]


def test_a_smaller_size_needs_the_option(image: Path, run) -> None:
    status, out, err = run("resize", image, "512M")
    assert (status, out) == (64, "")
    assert "--shrink" in err
    assert size_of(image) == GIB


def test_a_dry_run_writes_nothing(image: Path, run) -> None:
    before = image.read_bytes()
    status, out, _ = run("resize", image, "512M", "--shrink", "--dry-run")
    assert status == 0
    assert "give the old clusters back" in out
    assert image.read_bytes() == before
    document = json.loads(run("resize", image, "2G", "-n", "--output", "json").out)
    assert document["command"] == "resize"
    assert document["dry-run"] is True
    assert document["file-size"] >= len(before)


def test_undo_keeps_the_length_and_says_so(image: Path, tmp_path: Path, run) -> None:
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.remove("mon")  # some room in front
    before = image.read_bytes()
    status, out, _ = run("resize", image, "64k", "--shrink", "--undo", tmp_path / "undo")
    assert status == 0
    if "cut" in out or "keeps its length" in out:
        assert "keeps its length" in out
    assert run("undo", image, tmp_path / "undo")[0] == 0
    assert image.read_bytes() == before


@pytest.mark.parametrize(("option", "bytes_dirty"), [("--dirty-tail", GIB), ("--clean-tail", 0)])
def test_the_tail_is_what_was_asked_for(option: str, bytes_dirty: int, image: Path, run) -> None:
    with qcow2bm.open(image) as opened:
        old = {bitmap.name: bitmap.dirty_bytes for bitmap in opened.bitmaps}
        flags = {bitmap.name: (bitmap.recording, bitmap.granularity) for bitmap in opened.bitmaps}
    assert run("resize", image, "2G", option)[0] == 0
    with qcow2bm.open(image) as opened:
        assert {b.name: b.dirty_bytes for b in opened.bitmaps} == {n: v + bytes_dirty for n, v in old.items()}
        assert {b.name: (b.recording, b.granularity) for b in opened.bitmaps} == flags


def test_options_that_contradict_each_other(image: Path, run) -> None:
    status, _, err = run("resize", image, "2G", "--dirty-tail", "--clean-tail")
    assert status == 64
    assert "contradict" in err
    assert "--dirty-tail means nothing here" in run("resize", image, "512M", "--shrink", "--dirty-tail", "-n").out


# ---- what is refused ----


@pytest.mark.parametrize("size", [0, -512, 1, 511, 1000, GIB + 1])
def test_what_is_no_size_of_a_disk(size: int, image: Path) -> None:
    assert isinstance(refusal(image, size, shrink=True), UsageError)


def test_what_no_disk_can_have(image: Path) -> None:
    assert isinstance(refusal(image, 1 << 63), UsageError)
    assert isinstance(refusal(image, (1 << 63) - (1 << 30)), NoSpaceError)
    assert "L1 table above 32 MiB" in refusal(image, 1 << 62).message


def test_one_bitmap_in_use_is_enough(image: Path) -> None:
    raw = Raw.load(image)
    at, _, _ = raw.directory
    raw.put(at + 12, raw.number(at + 12, 4) | 1, 4)
    raw.save(image)
    found = refusal(image, 2 * GIB)
    assert isinstance(found, BitmapInconsistentError)
    assert "cannot follow the disk" in (found.hint or "")


def test_detached_bitmaps_stand_in_the_way(image: Path) -> None:
    raw = Raw.load(image)
    raw.put(88, 0)
    raw.save(image)
    assert isinstance(refusal(image, 2 * GIB), BitmapInconsistentError)


def test_broken_bitmaps_stand_in_the_way(image: Path) -> None:
    raw = Raw.load(image)
    at, _, _ = raw.directory
    raw.put(at + 16, 9, 1)  # the type
    raw.save(image)
    assert isinstance(refusal(image, 2 * GIB), BitmapBrokenError)


def test_version_2_with_snapshots(tmp_path: Path) -> None:
    image = unpack("v2", tmp_path)
    raw = Raw.load(image)
    if not raw.number(60, 4):
        raw.put(60, 1, 4)
        raw.put(64, raw.number(40))
        raw.save(image)
    found = refusal(image, size_of(image) + 512)
    assert isinstance(found, UnsupportedImageError)
    assert "internal snapshots" in found.message


def test_a_plan_is_for_the_image_it_was_made_for(image: Path) -> None:
    with qcow2bm.open(image, writable=True) as opened:
        first, second = qcow2bm.plan_resize(opened, 2 * GIB), qcow2bm.plan_resize(opened, 3 * GIB)
        opened.commit(first)
        with pytest.raises(OutdatedPlanError):
            opened.commit(second)


# ---- images that lie ----


def bounded(path: Path, size: int) -> Qcow2bmError | None:
    """Plan within a bounded time and memory; the refusal, if it is one."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with qcow2bm.open(path) as opened:
            qcow2bm.plan_resize(opened, size, shrink=True)
    except Qcow2bmError as error:
        return error
    finally:
        assert time.monotonic() - start < 60
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
        tracemalloc.stop()
    return None


def test_a_refcount_that_is_too_low_stops_a_shrink(image: Path) -> None:
    raw = Raw.load(image)
    table = raw.number(raw.number(40)) & 0x00FF_FFFF_FFFF_FE00
    raw.set_refcount(table, 0)
    raw.save(image)
    found = refusal(image, 64 * 1024, shrink=True)
    assert isinstance(found, CorruptImageError)
    assert "qcow2bm check" in (found.hint or "")


def test_an_l1_table_that_names_one_table_everywhere_stops_a_shrink(image: Path) -> None:
    raw = Raw.load(image)
    entries, end = 1 << 12, -(-len(raw.data) // raw.cluster_size) * raw.cluster_size
    raw.data += bytes(end - len(raw.data)) + raw.data[raw.number(40) :][:8] * entries
    raw.put(40, end)
    raw.put(36, entries, 4)
    raw.save(image)
    assert isinstance(bounded(image, MIB), CorruptImageError)


def test_a_long_sparse_l1_table_is_no_burden(image: Path) -> None:
    raw = Raw.load(image)
    old = raw.number(40)
    end = -(-len(raw.data) // raw.cluster_size) * raw.cluster_size
    raw.put(40, end)
    raw.put(36, 1 << 17, 4)
    raw.save(image)
    with image.open("r+b") as file:
        os.truncate(image, end + MIB)
        file.seek(end)
        file.write(raw.data[old : old + 8])
    bounded(image, 2 * GIB)
    bounded(image, MIB)


@pytest.mark.parametrize("entries", [0, 0x7FFFFFFF])
def test_tables_of_impossible_sizes(entries: int, image: Path) -> None:
    raw = Raw.load(image)
    at, _, _ = raw.directory
    raw.put(at + 8, entries, 4)
    raw.save(image)
    found = bounded(image, GIB)
    if entries:
        assert found is None, "a table that cannot be read stays as it is: the disk keeps its size"
        assert isinstance(bounded(image, 2 * GIB), BitmapBrokenError)


def test_a_table_without_entries_is_made_to_fit_and_all_dirty(image: Path) -> None:
    raw = Raw.load(image)
    at, _, _ = raw.directory
    raw.put(at + 8, 0, 4)
    raw.save(image)
    with qcow2bm.open(image, writable=True) as opened:
        opened.commit(qcow2bm.plan_resize(opened, GIB))
        assert next(iter(opened.bitmaps)).dirty_bytes == GIB
