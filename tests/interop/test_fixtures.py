"""Every fixture is what its origin.toml says, by QEMU's word, today and with the QEMU that is installed here."""

import struct
from pathlib import Path
from typing import Any

import pytest

from fixtures.recipes import RECIPES
from tests.support.images import FIXTURES, Fixture, all_fixtures
from tests.support.qemu import check, describe, guest_digest, qemu_img, qemu_img_json, read_bitmaps

BITMAPS_EXTENSION = 0x23852875
READY = ("name", "granularity", "recording", "state", "dirty-bytes", "dirty")
INCONSISTENT = READY[:4]

every_fixture = pytest.mark.parametrize("fixture", all_fixtures(), ids=lambda fixture: fixture.name)


def expected(bitmaps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What QEMU must list: all of a ready bitmap, no bits of an inconsistent one, nothing of a detached one."""
    fields = {"ready": READY, "inconsistent": INCONSISTENT}
    return [
        {key: bitmap[key] for key in fields[bitmap["state"]]} for bitmap in bitmaps if bitmap["state"] != "detached"
    ]


def test_every_recipe_has_its_fixture_and_no_fixture_is_without_one() -> None:
    recipes = {recipe.__name__.replace("_", "-") for recipe in RECIPES}
    folders = {folder.name for folder in FIXTURES.iterdir() if folder.is_dir()} - {"__pycache__", "corrupt"}
    assert recipes == folders == {fixture.name for fixture in all_fixtures()}


@every_fixture
def test_qemu_lists_what_origin_says(fixture: Fixture, tmp_path: Path) -> None:
    origin, image = fixture.origin, fixture.unpack(tmp_path)
    listing = describe(image, secret=fixture.secret)
    assert listing["virtual-size"] == origin["virtual-size"]
    assert listing["cluster-size"] == origin["cluster-size"]
    assert listing["bitmaps"] == expected(list(fixture.bitmaps.values()))


@every_fixture
def test_qemu_checks_it_as_origin_says(fixture: Fixture, tmp_path: Path) -> None:
    said = check(fixture.unpack(tmp_path), fixture.secret)
    assert said["returncode"] == fixture.origin["check"], said
    assert said["returncode"] == 0 or fixture.origin["check-note"]


@every_fixture
def test_the_guest_data_can_be_read(fixture: Fixture, tmp_path: Path) -> None:
    assert guest_digest(fixture.unpack(tmp_path), secret=fixture.secret)


@every_fixture
def test_sidecars(fixture: Fixture, tmp_path: Path) -> None:
    image = fixture.unpack(tmp_path)
    sidecars = {sidecar["file"]: sidecar for sidecar in fixture.origin.get("sidecars", [])}
    assert {path.name for path in tmp_path.iterdir()} == {image.name, *sidecars}
    for name, sidecar in sidecars.items():
        if sidecar["role"] == "backing":
            listing = describe(tmp_path / name)
            assert listing == {
                "virtual-size": sidecar["virtual-size"],
                "cluster-size": sidecar["cluster-size"],
                "bitmaps": expected(sidecar["bitmaps"]),
            }


@every_fixture
def test_dirty_ranges_fit_the_granularity(fixture: Fixture) -> None:
    """QEMU counts whole granules, also a last one that the disk's end cuts short; its ranges end with the disk."""
    size = fixture.origin["virtual-size"]
    for bitmap in fixture.bitmaps.values():
        granularity = bitmap["granularity"]
        assert all(offset % granularity == 0 for offset, _ in bitmap["dirty"])
        assert all(length % granularity == 0 or offset + length == size for offset, length in bitmap["dirty"])
        whole = sum(-(-length // granularity) * granularity for _, length in bitmap["dirty"])
        assert bitmap["dirty-bytes"] == whole


@every_fixture
def test_it_is_small_and_names_no_machine(fixture: Fixture, tmp_path: Path) -> None:
    for packed in fixture.path.glob("*.gz"):
        assert packed.stat().st_size <= 100 * 1024
        assert packed.read_bytes()[4:8] == bytes(4), "gzip keeps a time stamp"
    fixture.unpack(tmp_path)
    for file in [*tmp_path.iterdir(), fixture.path / "origin.toml"]:
        content = file.read_bytes()
        assert not any(path in content for path in (b"/tmp/", b"/work/", b"/home/", b"/root/", b"/var/")), file.name


@pytest.mark.parametrize("name", ["in-use", "detached"])
def test_bits_that_qemu_no_longer_reads_are_on_disk_as_origin_says(name: str, tmp_path: Path) -> None:
    """With the one flag that stands in the way put right by hand, QEMU reads the bits that origin.toml promises."""
    fixture = next(fixture for fixture in all_fixtures() if fixture.name == name)
    image = fixture.unpack(tmp_path)
    revive(image)
    stored = {bitmap: [tuple(pair) for pair in said["dirty"]] for bitmap, said in fixture.bitmaps.items()}
    assert read_bitmaps(image) == stored


def test_in_use_lost_some_of_the_truth() -> None:
    bitmaps = next(fixture for fixture in all_fixtures() if fixture.name == "in-use").bitmaps
    assert {name for name, bitmap in bitmaps.items() if bitmap["dirty"] != bitmap["truth"]} == {"recording", "fine"}


def test_kinds(tmp_path: Path) -> None:
    """The fixtures are of the kind that their names promise."""
    info = {}
    for fixture in all_fixtures():
        image = fixture.unpack(tmp_path / fixture.name)
        info[fixture.name] = qemu_img_json("info", "-f", "qcow2", image, cwd=image.parent)
    data = {name: entry["format-specific"]["data"] for name, entry in info.items()}
    assert data["v2"]["compat"] == "0.10"
    assert {entry["compat"] for name, entry in data.items() if name != "v2"} == {"1.1"}
    assert data["extended-l2"]["extended-l2"]
    assert data["luks"]["encrypt"]["format"] == "luks"
    assert (data["data-file"]["data-file"], data["data-file"]["data-file-raw"]) == ("data.raw", False)
    assert (data["data-file-raw"]["data-file"], data["data-file-raw"]["data-file-raw"]) == ("data.raw", True)
    assert {name: data[name]["compression-type"] for name in ("zstd", "zlib-compressed")} == {
        "zstd": "zstd", "zlib-compressed": "zlib",
    }  # fmt: skip
    for name in ("zstd", "zlib-compressed"):
        assert check(tmp_path / name / "image.qcow2")["compressed-clusters"] > 20
    assert (data["refcount-1"]["refcount-bits"], data["refcount-64"]["refcount-bits"]) == (1, 64)
    assert info["small-clusters"]["cluster-size"] == 512
    assert info["large-clusters"]["cluster-size"] == 2 << 20
    assert info["backing-chain"]["backing-filename"] == "backing.qcow2"
    assert [snapshot["name"] for snapshot in info["internal-snapshots"]["snapshots"]] == [
        "before-upgrade", "after-upgrade",
    ]  # fmt: skip
    assert len(data["many-bitmaps"]["bitmaps"]) == 100
    assert info["many-bitmaps"]["virtual-size"] == 1 << 40
    assert max(len(bitmap["name"].encode()) for bitmap in data["unusual-names"]["bitmaps"]) == 1023


def test_internal_snapshots_can_be_read(tmp_path: Path) -> None:
    fixture = next(fixture for fixture in all_fixtures() if fixture.name == "internal-snapshots")
    image, digests = fixture.unpack(tmp_path), set()
    for name in ("before-upgrade", "after-upgrade"):
        copy = tmp_path / f"{name}.qcow2"
        qemu_img("convert", "-l", f"snapshot.name={name}", "-f", "qcow2", "-O", "qcow2", image, copy)
        digests.add(guest_digest(copy))
    assert len({guest_digest(image), *digests}) == 3


def revive(image: Path) -> None:
    """Set autoclear bit 0 and clear every in-use flag, byte by byte: by this test's own reading of the format."""
    with image.open("r+b") as file:
        content = file.read(65536)
        (header_length,) = struct.unpack_from(">I", content, 100)
        position = header_length
        while (kind := struct.unpack_from(">I", content, position)[0]) != BITMAPS_EXTENSION:
            assert kind != 0, "no bitmaps extension"
            position += 8 + -(-struct.unpack_from(">I", content, position + 4)[0] // 8) * 8
        count, _, _, directory = struct.unpack_from(">IIQQ", content, position + 8)
        file.seek(95)
        file.write(bytes([content[95] | 1]))
        for _ in range(count):
            file.seek(directory)
            entry = file.read(24)
            flags, extra, name = struct.unpack(">12xI2xHI", entry)
            file.seek(directory + 12)
            file.write(struct.pack(">I", flags & ~1))
            directory += -(-(24 + name + extra) // 8) * 8
