"""What an edit refuses: QEMU's limits, and bitmaps that are not to be relied on."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import Edit
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapError,
    BitmapExistsError,
    BitmapInconsistentError,
    BitmapLimitError,
    BitmapNotFoundError,
    BitmapSizeMismatchError,
    ProofError,
    Qcow2bmError,
    UnsupportedImageError,
    UsageError,
)
from tests.support.images import unpack
from tests.support.qemu import bitmap_info, check, qemu_img
from tests.support.raw import BITMAPS, Raw
from tests.support.recording import Tape
from tests.support.scenes import create, empty, one, small, three

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def refused(image: Path, edit: Callable[[Edit], object], kind: type[Qcow2bmError], match: str) -> None:
    """An edit is refused, the image untouched, and the error says which image it is."""
    before, tape = image.read_bytes(), Tape()
    opening = qcow2bm.open(image, writable=True, open_file=tape.open)
    with opening as opened, pytest.raises(kind, match=match) as caught, opened.edit() as draft:
        edit(draft)
    assert str(caught.value).startswith(str(image))
    assert image.read_bytes() == before
    assert not tape.events


def done(image: Path, edit: Callable[[Edit], object]) -> list[str]:
    """An edit is carried out, QEMU finds no fault; the names that QEMU lists then."""
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as draft:
        edit(draft)
    assert check(image)["returncode"] == 0, check(image)
    return [bitmap["name"] for bitmap in bitmap_info(image)]


# ---- names ----


@pytest.mark.parametrize("name", ["", "x" * 1024, "ü" * 512])
def test_a_name_has_1_to_1023_bytes(tmp_path: Path, name: str) -> None:
    refused(one(tmp_path), lambda edit: edit.add(name), UsageError, "1 to 1023 bytes")
    (tmp_path / "2").mkdir()
    refused(one(tmp_path / "2"), lambda edit: edit.rename("a", name), UsageError, "1 to 1023 bytes")


@pytest.mark.parametrize("name", ["x" * 1023, "ü" * 511 + "x", "a b/c*?[1]", "日本", "-", "\n"])
def test_any_other_name_is_taken_and_qemu_lists_it(tmp_path: Path, name: str) -> None:
    assert done(one(tmp_path), lambda edit: edit.add(name)) == ["a", name]


def test_a_name_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    refused(one(tmp_path), lambda edit: edit.add("a\0b"), UsageError, "zero byte")


def test_a_name_is_unique_also_among_edits_that_are_not_yet_written(tmp_path: Path) -> None:
    image = one(tmp_path)
    exists = "a bitmap called"
    refused(image, lambda edit: edit.add("a"), BitmapExistsError, exists)
    refused(image, lambda edit: (edit.add("b"), edit.add("b")), BitmapExistsError, exists)
    refused(image, lambda edit: (edit.add("b"), edit.rename("a", "b")), BitmapExistsError, exists)
    refused(image, lambda edit: edit.copy("a", "a"), BitmapExistsError, exists)
    assert done(image, lambda edit: (edit.remove("a"), edit.add("a"))) == ["a"]
    assert done(image, lambda edit: (edit.rename("a", "b"), edit.add("a"))) == ["b", "a"]


def test_a_name_that_is_not_there_is_named(tmp_path: Path) -> None:
    image = one(tmp_path)
    edits: list[Callable[[Edit], object]] = [
        lambda edit: edit.remove("x"),
        lambda edit: edit.rename("x", "y"),
        lambda edit: edit.clear("x"),
        lambda edit: edit.enable("x"),
        lambda edit: edit.disable("x"),
        lambda edit: edit.set_range("x", 0, 1),
        lambda edit: edit.unset_range("x", 0, 1),
        lambda edit: edit.merge("x", ["a"]),
        lambda edit: edit.merge("a", ["x"]),
        lambda edit: edit.copy("x", "y"),
        lambda edit: edit.remove("a", "a"),
        lambda edit: edit.names("x*"),
    ]
    for edit in edits:
        refused(image, edit, BitmapNotFoundError, "'x|'a'")


def test_an_edit_that_is_refused_takes_the_ones_before_it_along(tmp_path: Path) -> None:
    refused(one(tmp_path), lambda edit: (edit.add("b"), edit.merge("b", ["nosuch"])), BitmapNotFoundError, "nosuch")


# ---- granularity and size ----


@pytest.mark.parametrize("granularity", [-512, 0, 1, 256, 768, 1000, 4 * GIB, 1 << 64])
def test_a_granularity_is_a_power_of_two_from_512_bytes_to_2_gib(tmp_path: Path, granularity: int) -> None:
    image = one(tmp_path)
    refused(image, lambda edit: edit.add("x", granularity=granularity), UsageError, "power of two")
    refused(image, lambda edit: edit.copy("a", "x", granularity=granularity), UsageError, "power of two")


@pytest.mark.parametrize("granularity", [512, 2 * GIB])
def test_the_outermost_granularities_are_taken(tmp_path: Path, granularity: int) -> None:
    image = one(tmp_path)
    assert done(image, lambda edit: edit.add("x", granularity=granularity)) == ["a", "x"]
    assert bitmap_info(image)[1]["granularity"] == granularity


@pytest.mark.parametrize(
    ("cluster", "expected"), [("512", 4 * KIB), ("4k", 4 * KIB), ("16k", 16 * KIB), ("64k", 64 * KIB), ("2M", 64 * KIB)]
)
def test_the_default_granularity_is_qemus(tmp_path: Path, cluster: str, expected: int) -> None:
    image = create(tmp_path, "1M", f"cluster_size={cluster}")
    qemu_img("bitmap", "--add", image, "theirs")
    done(image, lambda edit: edit.add("ours"))
    assert [bitmap["granularity"] for bitmap in bitmap_info(image)] == [expected, expected]


def test_a_bitmap_has_at_most_512_mib_of_bits(tmp_path: Path) -> None:
    """2 TiB at 512 bytes are exactly 512 MiB; QEMU draws the line at the same byte."""
    image = create(tmp_path, str(2 * TIB))
    assert done(image, lambda edit: edit.add("most", granularity=512)) == ["most"]
    (tmp_path / "2").mkdir()
    image = create(tmp_path / "2", str(2 * TIB + 512))
    refused(image, lambda edit: edit.add("x", granularity=512), BitmapLimitError, "larger granularity")
    assert qemu_img("bitmap", "--add", "-g", "512", image, "x", check=False).returncode == 1
    assert done(image, lambda edit: edit.add("x", granularity=1024)) == ["x"]
    refused(image, lambda edit: edit.copy("x", "y", granularity=512), BitmapLimitError, "larger granularity")


def test_a_disk_of_no_bytes_has_no_bitmaps(tmp_path: Path) -> None:
    refused(create(tmp_path, "0"), lambda edit: edit.add("x"), BitmapLimitError, "0 bytes")


def test_a_source_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "2").mkdir()
    image, other = one(tmp_path), small(tmp_path / "2")
    with qcow2bm.open(other) as opened:
        source = opened.bitmaps["full"].source
        refused(image, lambda edit: edit.merge("a", [source]), BitmapSizeMismatchError, "16777216")
        refused(image, lambda edit: edit.copy(source, "x"), BitmapSizeMismatchError, "16777216")


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, 0), (0, -1)])
def test_a_range_has_a_byte_and_begins_on_the_disk(tmp_path: Path, offset: int, length: int) -> None:
    image = one(tmp_path)
    refused(image, lambda edit: edit.set_range("a", offset, length), UsageError, "is empty or begins before")
    refused(image, lambda edit: edit.unset_range("a", offset, length), UsageError, "is empty or begins before")


@pytest.mark.parametrize(("offset", "length"), [(0, 4 * MIB + 1), (4 * MIB, 1), (1 << 70, 1)])
def test_a_range_lies_within_the_disk(tmp_path: Path, offset: int, length: int) -> None:
    image = one(tmp_path)
    refused(image, lambda edit: edit.set_range("a", offset, length), BitmapLimitError, "not within the disk")
    refused(image, lambda edit: edit.unset_range("a", offset, length), BitmapLimitError, "not within the disk")


def test_an_exact_name_wins_over_its_reading_as_a_pattern(tmp_path: Path) -> None:
    image = one(tmp_path)
    done(image, lambda edit: [edit.add(name) for name in ("a[1]", "a1")])
    with qcow2bm.open(image, writable=True) as opened:
        draft = opened.draft()
        assert draft.names("a[1]") == ["a[1]"]
        assert draft.names("a[0-9]") == ["a1"]
        assert draft.names("a*") == ["a", "a[1]", "a1"]


# ---- number ----


def crowd(folder: Path, count: int) -> Path:
    """An image whose directory lists `count` disabled bitmaps, which share one table: good to look at, not to edit."""
    image = one(folder)
    raw = Raw.load(image)
    table, entries = raw.tables()["a"]
    rows = [struct.pack(">QIIBBHI", table, entries, 0, 1, 16, 5, 0) + b"%05d" % n + bytes(3) for n in range(count)]
    at = -(-len(raw.data) // raw.cluster_size) * raw.cluster_size
    directory = b"".join(rows)
    raw.data += bytes(at - len(raw.data)) + directory
    place = raw.extensions()[BITMAPS][0]
    raw.data[place : place + 24] = struct.pack(">IIQQ", count, 0, len(directory), at)
    raw.save(image)
    return image


def test_an_image_holds_at_most_65535_bitmaps(tmp_path: Path) -> None:
    image = crowd(tmp_path, 65535)
    with qcow2bm.open(image) as opened:
        draft = opened.draft()
        with pytest.raises(BitmapLimitError, match="at most 65535"):
            draft.add("one more")
        with pytest.raises(BitmapLimitError, match="at most 65535"):
            draft.copy("00000", "one more")
        draft.rename("00000", "another name")
        draft.remove("00001")
        draft.add("one more")
        assert len(draft.drafts) == 65535


# ---- images ----


def test_a_version_2_image_takes_no_bitmaps(tmp_path: Path) -> None:
    refused(unpack("v2", tmp_path), lambda edit: edit.add("x"), UnsupportedImageError, "version 2")


@pytest.mark.parametrize(("bit", "word"), [(0, "dirty"), (1, "corrupt"), (5, "unknown incompatible"), (63, "unknown")])
def test_an_image_with_an_incompatible_feature_in_the_way_is_not_opened_for_writing(
    tmp_path: Path, bit: int, word: str
) -> None:
    image = one(tmp_path)
    raw = Raw.load(image)
    raw.put(72, 1 << bit)
    raw.save(image)
    with pytest.raises(UnsupportedImageError, match=word):
        qcow2bm.open(image, writable=True)


# ---- states ----

EVERY_USE: tuple[Callable[[Edit, str], object], ...] = (
    lambda edit, name: edit.rename(name, "other"),
    lambda edit, name: edit.clear(name),
    lambda edit, name: edit.enable(name),
    lambda edit, name: edit.disable(name),
    lambda edit, name: edit.set_range(name, 0, 512),
    lambda edit, name: edit.unset_range(name, 0, 512),
    lambda edit, name: edit.merge(name, []),
    lambda edit, name: edit.copy(name, "other"),
)


def unusable(image: Path, name: str, kind: type[BitmapError], match: str) -> None:
    for use in EVERY_USE:
        refused(image, lambda edit, use=use: use(edit, name), kind, match)


def test_an_inconsistent_bitmap_can_only_be_removed(tmp_path: Path) -> None:
    image = unpack("in-use", tmp_path)
    unusable(image, "fine", BitmapInconsistentError, "inconsistent")
    refused(image, lambda edit: (edit.add("x"), edit.merge("x", ["fine"])), BitmapInconsistentError, "inconsistent")
    assert done(image, lambda edit: edit.remove("fine")) == ["kept", "recording"]
    assert done(image, lambda edit: edit.add("beside them")) == ["kept", "recording", "beside them"]


def test_detached_bitmaps_can_only_be_removed_and_nothing_is_put_beside_them(tmp_path: Path) -> None:
    image = unpack("detached", tmp_path)
    unusable(image, "full", BitmapInconsistentError, "detached")
    refused(image, lambda edit: edit.add("x"), BitmapInconsistentError, "remove them first")
    refused(image, lambda edit: (edit.remove("full"), edit.add("x")), BitmapInconsistentError, "remove them first")
    assert done(image, lambda edit: (edit.remove("full", "daily"), edit.add("x"))) == ["x"]


def test_one_of_two_detached_bitmaps_can_be_removed_and_the_other_stays_detached(tmp_path: Path) -> None:
    image = unpack("detached", tmp_path)
    with qcow2bm.open(image, writable=True) as opened:
        with opened.edit() as edit:
            edit.remove("full")
        assert [(bitmap.name, bitmap.state.value) for bitmap in opened.bitmaps] == [("daily", "detached")]


def put(offset: int, value: int, length: int) -> Callable[[Raw], None]:
    return lambda raw: raw.put(raw.directory[0] + offset, value, length)


REMOVABLE = {
    "unknown flag": put(12, 1 << 5, 4),
    "type": put(16, 7, 1),
    "granularity too small": put(17, 8, 1),
    "granularity too large": put(17, 32, 1),
    "table too long": put(8, 2, 4),
}
NOT_REMOVABLE = {
    "table outside": put(0, 1 << 40, 8),
    "table not aligned": put(0, 5, 8),
    "table far too long": put(8, 1 << 28, 4),
    "data outside": lambda raw: raw.put(raw.bitmap_data("a")[0], 1 << 40),
    "data with reserved bits": lambda raw: raw.put(raw.bitmap_data("a")[0], 1 << 60),
    "data not aligned": lambda raw: raw.put(raw.bitmap_data("a")[0], 0x10200),
    "data and all ones": lambda raw: raw.put(raw.bitmap_data("a")[0], raw.number(raw.bitmap_data("a")[0]) | 1),
}


def broken(folder: Path, damage: Callable[[Raw], None]) -> Path:
    image = three(folder)
    raw = Raw.load(image)
    damage(raw)
    raw.save(image)
    with qcow2bm.open(image) as opened:
        assert opened.bitmaps["a"].state.value == "broken"
        assert opened.bitmaps["b"].state.value == "ready"
    return image


# What the broken bitmap names belongs to somebody else, so nobody's clusters are certain.
OVERLAPPING = ("table not aligned", "table far too long", "data not aligned")


@pytest.mark.parametrize("damage", [*REMOVABLE, *NOT_REMOVABLE])
def test_a_broken_bitmap_is_not_used(tmp_path: Path, damage: str) -> None:
    unusable(broken(tmp_path, {**REMOVABLE, **NOT_REMOVABLE}[damage]), "a", BitmapBrokenError, "broken")


@pytest.mark.parametrize("damage", OVERLAPPING)
def test_beside_a_broken_bitmap_that_names_what_others_use_edits_are_refused(tmp_path: Path, damage: str) -> None:
    image = broken(tmp_path, NOT_REMOVABLE[damage])
    refused(image, lambda edit: (edit.clear("b"), edit.remove("c"), add_many(edit)), ProofError, "check")


def add_many(edit: Edit) -> None:
    for number in range(10):
        edit.add(f"new {number}")


@pytest.mark.parametrize("damage", [name for name in (*REMOVABLE, *NOT_REMOVABLE) if name not in OVERLAPPING])
def test_beside_a_broken_bitmap_the_others_can_be_edited(tmp_path: Path, damage: str) -> None:
    image = broken(tmp_path, {**REMOVABLE, **NOT_REMOVABLE}[damage])
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.clear("b")
        edit.remove("c")
    with qcow2bm.open(image) as opened:
        assert [bitmap.name for bitmap in opened.bitmaps] == ["a", "b"]
        assert opened.bitmaps["b"].dirty_bytes == 0


@pytest.mark.parametrize("damage", REMOVABLE)
def test_a_broken_bitmap_whose_clusters_can_be_told_can_be_removed(tmp_path: Path, damage: str) -> None:
    """QEMU opens the image again then."""
    image = broken(tmp_path, REMOVABLE[damage])
    assert check(image)["returncode"] == 1
    assert done(image, lambda edit: edit.remove("a")) == ["b", "c"]


@pytest.mark.parametrize("damage", NOT_REMOVABLE)
def test_a_broken_bitmap_whose_clusters_cannot_be_told_is_refused_and_check_is_named(
    tmp_path: Path, damage: str
) -> None:
    image = broken(tmp_path, NOT_REMOVABLE[damage])
    refused(image, lambda edit: edit.remove("a"), Qcow2bmError, "check")


def test_of_two_bitmaps_with_one_name_the_second_is_broken_and_goes_first(tmp_path: Path) -> None:
    image = three(tmp_path)
    raw = Raw.load(image)
    at, _, _ = raw.directory
    assert raw.data[at + 32 + 24 : at + 32 + 25] == b"b"
    raw.data[at + 32 + 24] = ord("a")
    raw.save(image)
    with qcow2bm.open(image) as opened:
        assert [bitmap.state.value for bitmap in opened.bitmaps] == ["ready", "broken", "ready"]
        before = opened.bitmaps["a"].granularity
    assert done(image, lambda edit: edit.remove("a")) == ["a", "c"]
    with qcow2bm.open(image) as opened:
        assert opened.bitmaps["a"].granularity == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw, place: raw.put(place, 2, 4),
        lambda raw, place: raw.put(place, 4, 4),
        lambda raw, place: raw.put(place, 0, 4),
        lambda raw, place: raw.put(place + 4, 1, 4),
        lambda raw, place: raw.put(place + 8, 95),
        lambda raw, place: raw.put(place + 16, 0),
        lambda raw, place: raw.put(place + 16, 1 << 40),
        lambda raw, place: raw.put(place + 16, 0x50200),
    ],
    ids=["few", "many", "none", "reserved", "size", "offset 0", "outside", "not aligned"],
)
def test_a_damaged_directory_takes_no_edit_at_all(tmp_path: Path, damage: Callable[[Raw, int], None]) -> None:
    image = three(tmp_path)
    raw = Raw.load(image)
    damage(raw, raw.extensions()[BITMAPS][0])
    raw.save(image)
    for edit in (lambda edit: edit.add("x"), lambda edit: edit.remove("a"), lambda edit: edit.disable("a")):
        refused(image, edit, BitmapBrokenError, "directory is damaged")


def test_the_autoclear_bit_without_the_extension_takes_no_edit(tmp_path: Path) -> None:
    image = empty(tmp_path)
    raw = Raw.load(image)
    raw.put(88, 1)
    raw.save(image)
    refused(image, lambda edit: edit.add("x"), BitmapBrokenError, "no bitmaps extension")


def test_a_header_without_room_is_said_and_a_shorter_name_advised(tmp_path: Path) -> None:
    name = "n" * 250 + "/" + "n" * 120
    image = create(tmp_path, "1M", "cluster_size=512", f"backing_file={name}", "backing_fmt=qcow2")
    refused(image, lambda edit: edit.add("x"), Qcow2bmError, "no room.*shorter backing file name")
