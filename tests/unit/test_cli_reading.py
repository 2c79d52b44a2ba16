"""`info`, `list`, `show` and `dump` on what QEMU wrote, and on what is damaged."""

from __future__ import annotations

import csv
import io
import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from qcow2bm import api
from qcow2bm.bitmap.structures import STRUCTURES
from tests.support.images import all_fixtures, fixture, unpack


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack("office-week", tmp_path)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def directory_offset(path: Path) -> int:
    with api.open(path) as opened:
        return opened.bitmaps._directory.pointer.bitmap_directory_offset


# ---- all of them, on every fixture ----


@pytest.mark.parametrize("sample", all_fixtures(), ids=lambda sample: sample.name)
def test_reading_says_what_qemu_says_and_writes_nothing(sample, tmp_path, run) -> None:
    path = sample.unpack(tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    status, out, err = run("list", path, "--output", "json")
    assert (status, err) == (0, "")
    [listed] = json.loads(out)["images"]
    assert listed["virtual-size"] == sample.origin["virtual-size"]
    assert [bitmap["name"] for bitmap in listed["bitmaps"]] == list(sample.bitmaps)
    for bitmap in listed["bitmaps"]:
        expected = sample.bitmaps[bitmap["name"]]
        assert bitmap["granularity"] == expected["granularity"]
        assert bitmap["recording"] == expected["recording"]
        dirty = sum(length for _, length in expected["dirty"]) if bitmap["state"] == "ready" else None
        assert bitmap["dirty-bytes"] == dirty
    assert run("info", path)[0] == run("dump", path)[0] == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("name", ["office-week", "granularities", "unusual-names"])
def test_extents_are_qemus_ranges_and_cover_the_disk(name, tmp_path, run) -> None:
    path = unpack(name, tmp_path)
    for bitmap, expected in fixture(name).bitmaps.items():
        status, out, _ = run("show", "--extents", "--output", "json", "--", path, bitmap)
        extents = json.loads(out)["extents"]
        assert status == 0
        assert [[e["offset"], e["length"]] for e in extents if e["dirty"]] == [list(p) for p in expected["dirty"]]
        assert sum(e["length"] for e in extents) == fixture(name).origin["virtual-size"]
        assert all(a["offset"] + a["length"] == b["offset"] for a, b in pairwise(extents))


# ---- list ----


def test_list_for_humans(image: Path, run) -> None:
    status, out, err = run("list", image)
    assert (status, err) == (0, "")
    assert out.splitlines()[:2] == [
        "NAME  STATE  RECORDING  GRANULARITY     DIRTY  SHARE  ON DISK",
        "mon   ready  no              64 KiB    82 MiB  8.0 %  128 KiB",
    ]


def test_list_of_an_image_without_bitmaps_says_so(tmp_path: Path, run) -> None:
    assert run("list", unpack("no-bitmaps", tmp_path)) == (0, "no bitmaps\n", "")


def test_an_unreadable_image_does_not_hide_the_others(image: Path, tmp_path: Path, run) -> None:
    (tmp_path / "raw").write_bytes(b"raw" * 1000)
    status, out, err = run("list", tmp_path / "missing", tmp_path / "raw", image)
    assert status == 1  # of 1 and 63 the worse one
    assert out.count(str(image)) == 6
    assert "missing: No such file or directory" in err
    assert "raw: not a qcow2 image" in err


def test_each_image_has_its_own_verdict_in_json(image: Path, tmp_path: Path, run) -> None:
    status, out, _ = run("list", tmp_path / "missing", image, "--output", "json")
    missing, good = json.loads(out)["images"]
    assert (status, missing["status"], good["status"]) == (1, 1, 0)
    assert missing["error"]["message"] == "No such file or directory"


def test_an_inconsistent_bitmap_is_listed_with_status_0(tmp_path: Path, run) -> None:
    status, out, _ = run("list", unpack("in-use", tmp_path))
    assert status == 0
    assert all("inconsistent" in line and " - " in line for line in out.splitlines()[1:])


def test_a_broken_bitmap_is_reported_and_the_others_are_listed(image: Path, run) -> None:
    patch(image, directory_offset(image) + 16, b"\x07")  # an unknown type
    status, out, err = run("list", image)
    assert status == 4
    assert "mon   broken" in out
    assert "tue   ready" in out
    assert "warning: bitmap 'mon' is broken: its type 7 is not known" in err


def test_a_damaged_directory_is_reported(image: Path, run) -> None:
    patch(image, directory_offset(image) + 32 + 18, b"\xff\xff")  # the second name's length
    status, out, err = run("list", image)
    assert status == 4
    assert "mon   ready" in out
    assert "the bitmap directory is damaged" in err
    assert run("show", image, "mon")[0] == 0


def test_names_that_are_no_text_are_escaped_and_survive_json(image: Path, run) -> None:
    patch(image, directory_offset(image) + 24, b"\x1b\xff\n")
    assert run("list", image)[1].splitlines()[1].startswith("\\x1b\\xff\\n  ready")
    out = run("list", image, "--output", "json")[1]
    assert out.isascii()
    assert json.loads(out)["images"][0]["bitmaps"][0]["name"] == "\x1b\udcff\n"


def test_force_share_warns(image: Path, run) -> None:
    for words in (["list", image], ["info", image], ["show", image, "mon"], ["dump", image]):
        status, _, err = run(*words, "-U")
        assert status == 0
        assert "warning: read without keeping writers out: what is shown may be stale" in err


# ---- show ----


def test_show_for_humans(image: Path, run) -> None:
    status, out, err = run("show", image, "mon")
    assert (status, err) == (0, "")
    assert "dirty        82 MiB (85983232 bytes), 8.0 % of the disk" in out
    assert "extents      79" in out
    strip = next(line for line in out.splitlines() if "|" in line)
    assert len(strip.split("|")[1]) == 64
    assert strip.endswith("| 1 GiB")


def test_show_as_csv(image: Path, run) -> None:
    _, out, _ = run("show", image, "mon", "--extents", "--dirty-only", "--output", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [[int(row["offset"]), int(row["length"])] for row in rows] == fixture("office-week").bitmaps["mon"]["dirty"]
    assert {row["dirty"] for row in rows} == {"true"}


def test_show_of_an_inconsistent_bitmap_describes_it_and_ends_with_4(tmp_path: Path, run) -> None:
    path = unpack("in-use", tmp_path)
    status, out, err = run("show", path, "kept")
    assert status == 4
    assert "state        inconsistent" in out
    assert "dirty" not in out
    assert "bitmap 'kept' is inconsistent" in err


def test_extents_of_an_inconsistent_bitmap_only_if_asked_for_as_stale(tmp_path: Path, run) -> None:
    path = unpack("in-use", tmp_path)
    status, out, _ = run("show", path, "kept", "--extents")
    assert (status, out) == (4, "")
    status, out, _ = run("show", path, "kept", "--extents", "--stale")
    assert status == 0
    assert out.startswith("   OFFSET")


def test_show_of_a_bitmap_that_is_not_there(image: Path, run) -> None:
    status, out, err = run("show", image, "sun")
    assert (status, out) == (1, "")
    assert f"{image}: no bitmap is called 'sun'" in err


# ---- info ----


def test_info_for_humans(tmp_path: Path, run) -> None:
    _, out, _ = run("info", unpack("internal-snapshots", tmp_path))
    assert "format        qcow2 version 3" in out
    assert "autoclear     bitmaps" in out
    assert "before-upgrade" in out
    assert "guest-data" in out


def test_info_names_what_the_image_names_and_opens_none_of_it(tmp_path: Path, run) -> None:
    path = unpack("backing-chain", tmp_path)
    for other in tmp_path.iterdir():
        if other != path:
            other.unlink()
    status, out, _ = run("info", path, "--output", "json")
    assert status == 0
    assert json.loads(out)["backing-file"] == "backing.qcow2"
    path = unpack("data-file", tmp_path / "d")
    (tmp_path / "d" / "data.raw").unlink()
    status, out, _ = run("info", path, "--output", "json")
    assert status == 0
    assert json.loads(out)["data-file"] == "data.raw"


def test_info_shows_what_it_can_of_a_truncated_image(image: Path, run) -> None:
    with image.open("r+b") as file:
        file.truncate(100_000)
    status, out, err = run("info", image)
    assert status == 2
    assert "virtual size  1 GiB" in out
    assert "their directory is damaged" in out
    assert "lie outside the file" in err


def test_info_calls_an_unknown_feature_as_the_image_does(image: Path, run) -> None:
    patch(image, 80, (1 << 9).to_bytes(8, "big"))  # compatible features
    row = bytes([1, 9]) + b"time travel".ljust(46, b"\0")
    patch(image, 0x78, row)  # the first row of the feature name table
    assert json.loads(run("info", image, "--output", "json")[1])["features"]["compatible"] == ["time travel"]


# ---- dump ----


def test_dump_gives_each_field_its_place(image: Path, run) -> None:
    data = image.read_bytes()
    status, out, _ = run("dump", image, "--output", "json")
    assert status == 0
    structures = json.loads(out)["structures"]
    assert [structure["structure"] for structure in structures] == list(STRUCTURES)
    for structure in structures:
        assert structure["error"] is None
        for part in structure["parts"]:
            for field in part["fields"]:
                raw = data[field["offset"] : field["offset"] + field["length"]]
                value = raw.hex() if isinstance(field["value"], str) else int.from_bytes(raw, "big")
                assert value == field["value"], field


def test_dump_of_one_structure(image: Path, run) -> None:
    status, out, _ = run("dump", image, "--structure", "bitmap-directory")
    assert status == 0
    assert out.startswith("bitmap 0 'mon'\n")
    assert "bitmap_table_offset" in out
    assert "refcount" not in out


@pytest.mark.parametrize(
    ("offset", "data", "status"),
    [
        (4, struct.pack(">I", 9), 1),  # version
        (20, struct.pack(">I", 63), 2),  # cluster_bits
        (20, struct.pack(">I", 0xFFFFFFFF), 2),
        (36, struct.pack(">I", 0xFFFFFFFF), 2),  # l1_size
        (40, struct.pack(">Q", 1 << 62), 2),  # l1_table_offset
        (48, struct.pack(">Q", 1 << 62), 2),  # refcount_table_offset
        (56, struct.pack(">I", 0xFFFFFFFF), 2),  # refcount_table_clusters
        (60, struct.pack(">IQ", 0xFFFFFFFF, 0x10000), 2),  # nb_snapshots
        (72, struct.pack(">Q", 1 << 40), 1),  # an unknown incompatible feature
        (96, struct.pack(">I", 200), 2),  # refcount_order
        (100, struct.pack(">I", 3), 2),  # header_length
        (0x74, struct.pack(">I", 0xFFFFFFF0), 2),  # an extension's length
    ],
)
def test_dump_shows_the_header_whatever_is_wrong_with_the_image(offset, data, status, image, run) -> None:
    patch(image, offset, data)
    got, out, err = run("dump", image)
    assert got == status
    assert "cluster_bits" in out
    assert "Traceback" not in err
    assert "internal error" not in err
    assert run("dump", image, "--output", "json")[0] == status


def test_dump_of_damaged_bitmaps_shows_what_comes_before_and_ends_with_4(image: Path, run) -> None:
    patch(image, directory_offset(image) + 32 + 18, b"\xff\xff")
    status, out, err = run("dump", image)
    assert status == 4
    assert "bitmap 0 'mon'" in out
    assert "bitmap 1" not in out
    assert "table of bitmap 'mon'" in out
    assert err.count("\n") == 1  # two structures, one fault, told once


@pytest.mark.parametrize("length", [4, 30, 72, 90, 104, 111, 200, 600, 70_000])
def test_dump_of_the_beginning_of_an_image(length: int, image: Path, run) -> None:
    with image.open("r+b") as file:
        file.truncate(length)
    status, out, err = run("dump", image)
    assert status == 2
    assert "magic" in out
    assert "internal error" not in err


@pytest.mark.parametrize("bit", [3, 17, 31])
def test_an_unknown_flag_breaks_a_bitmap(bit: int, image: Path, run) -> None:
    patch(image, directory_offset(image) + 12, struct.pack(">I", 1 << bit))
    status, _, err = run("list", image)
    assert status == 4
    assert f"bitmap 'mon' is broken: it has unknown flags {1 << bit:#x}" in err
