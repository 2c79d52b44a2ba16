"""The images the benchmarks are measured on are sound, and read the same by QEMU: else the figures mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

import qcow2bm
from benchmarks.craft import GIB, KIB, MIB, BitmapSpec, Layout, bitmap_image, full_image
from benchmarks.patterns import Scattered
from tests.support.qemu import bitmap_info, check, qemu_img_json, read_bitmaps


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("cluster_size", [512, 64 * KIB, 2 * MIB])
def test_a_full_image_is_sound(tmp_path: Path, layout: Layout, cluster_size: int) -> None:
    """Every cluster mapped, whatever the layout."""
    image = tmp_path / "full.qcow2"
    full_image(image, 1000 * cluster_size, cluster_size=cluster_size, layout=layout)
    assert_sound(image, 1000, layout)


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize(("cluster_size", "extended_l2"), [(512, False), (16 * KIB, True), (64 * KIB, True)])
@pytest.mark.parametrize("snapshots", [0, 10])
def test_extended_l2_entries_and_snapshots_are_sound(
    tmp_path: Path, layout: Layout, cluster_size: int, extended_l2: bool, snapshots: int
) -> None:
    """In every combination; the last L2 table is filled in part."""
    image = tmp_path / "full.qcow2"
    clusters = 9000
    full_image(
        image,
        clusters * cluster_size,
        cluster_size=cluster_size,
        layout=layout,
        extended_l2=extended_l2,
        snapshots=snapshots,
    )
    assert_sound(image, clusters, layout)
    info = qemu_img_json("info", image)
    assert info["format-specific"]["data"]["extended-l2"] == extended_l2
    assert [row["name"] for row in info.get("snapshots", [])] == [f"daily-{n}" for n in range(1, snapshots + 1)]


def assert_sound(image: Path, clusters: int, layout: Layout) -> None:
    """And that QEMU saw what was to be checked."""
    found = check(image)
    assert found["returncode"] == 0
    assert found["allocated-clusters"] == found["total-clusters"] == clusters
    assert found.get("compressed-clusters", 0) == (clusters if layout == "compressed" else 0)


def test_bitmaps_read_the_same_by_qemu_and_by_us(tmp_path: Path) -> None:
    """Random bits, so that a slip of the generator shows."""
    image = tmp_path / "bitmaps.qcow2"
    bitmap_image(image, 8 * GIB, [BitmapSpec(f"b{number}", 64 * KIB, Scattered(0.01)) for number in range(3)])
    assert check(image)["returncode"] == 0
    assert [row["name"] for row in bitmap_info(image)] == ["b0", "b1", "b2"]
    with qcow2bm.open(image) as ours:
        for name, ranges in read_bitmaps(image).items():
            assert [(extent.offset, extent.length) for extent in ours.bitmaps[name].extents()] == ranges
