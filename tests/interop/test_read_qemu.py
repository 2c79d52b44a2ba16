"""Everything that QEMU wrote, read by us: the fixtures, and images of random guest writes.

What we say must equal what origin.toml says and what the installed QEMU says when it opens the same file.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import qcow2bm
from qcow2bm.api import Bitmap, Image
from qcow2bm.errors import BitmapInconsistentError
from tests.support.images import Fixture, all_fixtures, fixture
from tests.support.qemu import StorageDaemon, describe, qemu_img, qemu_img_json

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

STALE = ("inconsistent", "detached")

every_fixture = pytest.mark.parametrize("fixture", all_fixtures(), ids=lambda fixture: fixture.name)


def describe_ours(bitmap: Bitmap) -> dict[str, Any]:
    """A bitmap in the words of origin.toml."""
    state = bitmap.state.value
    ranges = [[extent.offset, extent.length] for extent in bitmap.extents(stale=state in STALE)]
    return {
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "recording": bitmap.recording,
        "state": state,
        "dirty-bytes": whole_granules(ranges, bitmap.granularity),
        "dirty": ranges,
    }


def whole_granules(ranges: list[list[int]], granularity: int) -> int:
    """QEMU's count of dirty bytes: whole granules, also a last one that the disk's end cuts short."""
    return sum(-(-length // granularity) * granularity for _, length in ranges)


def without_truth(bitmaps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a killed daemon knew, which is on no disk."""
    return [{key: value for key, value in bitmap.items() if key != "truth"} for bitmap in bitmaps]


def readable_by_qemu(bitmaps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `describe` can say: nothing of detached bitmaps, no bits of inconsistent ones."""
    return [
        {key: bitmap[key] for key in bitmap if bitmap["state"] == "ready" or not key.startswith("dirty")}
        for bitmap in bitmaps
        if bitmap["state"] != "detached"
    ]


def require_dirty_bytes(image: Image) -> None:
    """`dirty_bytes` is the sum of the extents: it leaves out what lies past the end of the disk."""
    for bitmap in image.bitmaps:
        if bitmap.state.value == "ready":
            assert bitmap.dirty_bytes == sum(extent.length for extent in bitmap.extents())


@every_fixture
def test_we_read_what_origin_says(fixture: Fixture, tmp_path: Path) -> None:
    """Order of the directory, names, granularity, recording, state, every extent and the count."""
    with qcow2bm.open(fixture.unpack(tmp_path)) as image:
        assert image.virtual_size == fixture.origin["virtual-size"]
        assert image.qcow2.geometry.cluster_size == fixture.origin["cluster-size"]
        assert [describe_ours(bitmap) for bitmap in image.bitmaps] == without_truth(fixture.origin.get("bitmaps", []))
        require_dirty_bytes(image)
        assert image.bitmaps.damage is None
        assert image.bitmaps.attached == ("bitmaps" in fixture.origin and fixture.name != "detached")


@every_fixture
def test_we_read_what_qemu_reads_today(fixture: Fixture, tmp_path: Path) -> None:
    path = fixture.unpack(tmp_path)
    theirs = describe(path, secret=fixture.secret)
    info = qemu_img_json("info", "-f", "qcow2", path, cwd=tmp_path)
    with qcow2bm.open(path) as image:
        assert readable_by_qemu([describe_ours(bitmap) for bitmap in image.bitmaps]) == theirs["bitmaps"]
        assert image.virtual_size == theirs["virtual-size"]
        assert image.backing_file == info.get("backing-filename")
        assert image.backing_format == info.get("backing-filename-format")
        assert image.data_file == info["format-specific"]["data"].get("data-file")
        named = [snapshot.name.decode() for snapshot in image.snapshots()]
        assert named == [snapshot["name"] for snapshot in info.get("snapshots", [])]


SIDECARS = [
    (one.name, sidecar["file"]) for one in all_fixtures() for sidecar in one.origin.get("sidecars", [])
    if sidecar["role"] == "backing"
]  # fmt: skip


@pytest.mark.parametrize(("name", "file"), SIDECARS, ids=str)
def test_we_read_backing_files(name: str, file: str, tmp_path: Path) -> None:
    one = fixture(name)
    one.unpack(tmp_path)
    sidecar = next(sidecar for sidecar in one.origin["sidecars"] if sidecar["file"] == file)
    with qcow2bm.open(tmp_path / file) as image:
        assert [describe_ours(bitmap) for bitmap in image.bitmaps] == sidecar["bitmaps"]
        require_dirty_bytes(image)


@every_fixture
def test_stale_bits_are_given_only_to_those_who_ask(fixture: Fixture, tmp_path: Path) -> None:
    with qcow2bm.open(fixture.unpack(tmp_path)) as image:
        for bitmap in image.bitmaps:
            if bitmap.state.value in STALE:
                with pytest.raises(BitmapInconsistentError):
                    list(bitmap.extents())
                with pytest.raises(BitmapInconsistentError):
                    _ = bitmap.dirty_bytes


@every_fixture
def test_reading_leaves_the_file_alone(fixture: Fixture, tmp_path: Path) -> None:
    path = fixture.unpack(tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    with qcow2bm.open(path) as image:
        for bitmap in image.bitmaps:
            describe_ours(bitmap)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def random_requests(chance: random.Random, size: int) -> list[str]:
    """A guest's session: from single sectors to stretches that fill whole clusters of bits."""
    requests = []
    for _ in range(chance.randrange(1, 40)):
        length = min(chance.choice((512, 4 * KIB, 64 * KIB, 700 * KIB, 9 * MIB)) * chance.randrange(1, 4), size)
        offset = chance.randrange(0, size - length + 1, 512)
        # Zeroes and discards make long dirty stretches and cost the disk nothing.
        verb = chance.choice(("write -z", "discard") if length > MIB else ("write -P 9", "write -z", "discard"))
        requests.append(f"{verb} {offset} {length}")
    return requests


@pytest.mark.parametrize("seed", range(24))
def test_random_writes(seed: int, tmp_path: Path) -> None:
    """Several granularities at once, over sessions, with bits changed by QMP in between."""
    chance = random.Random(seed)
    cluster_size = chance.choice((512, 1 * KIB, 4 * KIB, 64 * KIB, 2 * MIB))
    size = chance.randrange(12 * MIB, 64 * MIB if cluster_size < 4 * KIB else 3 * GIB, 512)
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", image, str(size))
    granularities = chance.sample([512, 1 * KIB, 4 * KIB, 32 * KIB, 64 * KIB, 1 * MIB, 16 * MIB, 2 * GIB], k=4)
    for session in range(3):
        with StorageDaemon(image) as vm:
            for granularity in granularities:
                vm.add_bitmap(f"{session}-{granularity}", granularity, recording=chance.random() < 0.8)
            vm.io(*random_requests(chance, size))
            known = sorted(vm.bitmaps())
            vm.disable_bitmap(chance.choice(known))
            vm.clear_bitmap(chance.choice(known))
            vm.merge_bitmaps(chance.choice(known), chance.sample(known, k=2))
        with qcow2bm.open(image) as ours:
            assert [describe_ours(bitmap) for bitmap in ours.bitmaps] == describe(image)["bitmaps"]
            require_dirty_bytes(ours)
