"""Merges, inversions and other granularities beside the real QEMU, and every result read back by it.

What QEMU can do itself (merging, and with a new bitmap another granularity) is compared bit by bit. The other
operations are worked out here on sets of sectors, from what QEMU reads. QCOW2BM_ROUNDS multiplies the random images.
"""

from __future__ import annotations

import functools
import operator
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.bitmap.chunks import Op
from qcow2bm.errors import BitmapLimitError, UsageError
from tests.interop.ranges import joined
from tests.support.qemu import (
    Ranges,
    StorageDaemon,
    bitmap_info,
    check,
    guest_digest,
    qemu_img,
    read_bitmap_nbd,
    read_bitmaps,
)

ROUNDS = int(os.environ.get("QCOW2BM_ROUNDS", "1"))
KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512
GRANULARITIES = (512, 4 * KIB, 64 * KIB, MIB, 2 << 30)
EXACT: dict[Op, Callable[[set[int], set[int]], set[int]]] = {
    Op.OR: operator.or_,
    Op.AND: operator.and_,
    Op.XOR: operator.xor,
    Op.SUBTRACT: operator.sub,
}
SHAPES = [("512", 3 * MIB + 3 * SECTOR), ("4k", 9 * MIB + SECTOR), ("64k", 33 * MIB), ("2M", 70 * MIB + 5 * SECTOR)]


def sectors(ranges: Ranges) -> set[int]:
    return {sector for offset, length in ranges for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR))}


def ranges_of(dirty: Iterable[int]) -> Ranges:
    return joined([(sector * SECTOR, SECTOR) for sector in dirty])


def rounded_out(dirty: set[int], granularity: int, size: int) -> Ranges:
    """The granules that hold one of the sectors."""
    granules = {sector * SECTOR // granularity for sector in dirty}
    return joined([(at * granularity, min(size, (at + 1) * granularity) - at * granularity) for at in granules])


def name_of(granularity: int) -> str:
    return f"g{granularity}"


@pytest.fixture(scope="module", params=[(*shape, seed) for shape in SHAPES for seed in range(ROUNDS)], ids=str)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An image with a bitmap of every granularity, each of which recorded writes of its own; the disk's size."""
    cluster, size, seed = request.param
    image = tmp_path_factory.mktemp("recorded") / "vm.qcow2"
    draw = random.Random(f"{cluster} {size} {seed}")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", image, str(size))
    with StorageDaemon(image) as daemon:
        for granularity in GRANULARITIES:
            daemon.add_bitmap(name_of(granularity), granularity)
            start = draw.randrange(size // SECTOR)
            daemon.write(start * SECTOR, min(size - start * SECTOR, draw.choice([1, 100, 3000]) * SECTOR))
            for _ in range(6):
                start = draw.randrange(size // SECTOR)
                daemon.write(start * SECTOR, min(size - start * SECTOR, draw.choice([1, 1, 9, 150]) * SECTOR))
            daemon.disable_bitmap(name_of(granularity))
    return image, size


@pytest.fixture
def copies(recorded: tuple[Path, int], tmp_path: Path) -> tuple[Path, Path, int]:
    """One for us, one for QEMU, and the disk's size."""
    image, size = recorded
    return Path(shutil.copy(image, tmp_path / "ours")), Path(shutil.copy(image, tmp_path / "theirs")), size


# ---- what QEMU can do itself ----


def test_merges_at_any_granularities_are_qmps(copies: tuple[Path, Path, int]) -> None:
    """Into new bitmaps and into those that hold something, one source at a time and several."""
    ours, theirs, _ = copies
    pairs = [(target, source) for target in GRANULARITIES for source in GRANULARITIES if target != source]
    with qcow2bm.open(ours, writable=True) as image, image.edit() as edit:
        for target, source in pairs:
            edit.add(f"{target} of {source}", granularity=target, recording=False)
            edit.merge(f"{target} of {source}", [name_of(source)])
        edit.merge(name_of(MIB), [name_of(512), name_of(64 * KIB)])
        edit.merge(name_of(512), [name_of(4 * KIB), name_of(MIB)], op="or")
    with StorageDaemon(theirs) as daemon:
        for target, source in pairs:
            daemon.add_bitmap(f"{target} of {source}", target, recording=False)
            daemon.merge_bitmaps(f"{target} of {source}", [name_of(source)])
        daemon.merge_bitmaps(name_of(MIB), [name_of(512), name_of(64 * KIB)])
        daemon.merge_bitmaps(name_of(512), [name_of(4 * KIB), name_of(MIB)])
    assert read_bitmaps(ours) == read_bitmaps(theirs)
    assert check(ours)["returncode"] == 0


def test_a_merge_is_qemu_imgs_and_qemu_nbd_reads_it(copies: tuple[Path, Path, int]) -> None:
    ours, theirs, _ = copies
    with qcow2bm.open(ours, writable=True) as image, image.edit() as edit:
        edit.merge(name_of(64 * KIB), [name_of(512), name_of(MIB)])
    qemu_img("bitmap", "--merge", name_of(512), "--merge", name_of(MIB), theirs, name_of(64 * KIB))
    found = read_bitmap_nbd(ours, name_of(64 * KIB))
    assert found == read_bitmap_nbd(theirs, name_of(64 * KIB))
    assert found


def test_resampled_is_what_qemu_merges_into_a_new_bitmap_of_that_granularity(copies: tuple[Path, Path, int]) -> None:
    """Each bitmap to each granularity; its name, flags and place stay."""
    ours, theirs, _ = copies
    before, digest = bitmap_info(ours), guest_digest(ours)
    with StorageDaemon(theirs) as daemon:
        for source in GRANULARITIES:
            for target in GRANULARITIES:
                daemon.add_bitmap(f"{source} as {target}", target, recording=False)
                daemon.merge_bitmaps(f"{source} as {target}", [name_of(source)])
        wanted = daemon.dirty()
    for target in GRANULARITIES:
        copy = Path(shutil.copy(ours, ours.with_name("copy")))
        with qcow2bm.open(copy, writable=True) as image, image.edit() as edit:
            edit.enable(name_of(512))
            edit.resample(*map(name_of, GRANULARITIES), granularity=target)
        found = read_bitmaps(copy)
        assert found == {name_of(source): wanted[f"{source} as {target}"] for source in GRANULARITIES}
        after = bitmap_info(copy)
        assert [(entry["name"], entry["granularity"]) for entry in after] == [(e["name"], target) for e in before]
        assert [entry["name"] for entry in after if entry["flags"]] == [name_of(512)]
        assert check(copy)["returncode"] == 0
        assert guest_digest(copy) == digest


# ---- the other operations ----


@pytest.mark.parametrize("op", Op)
def test_every_operation_holds_the_exact_result_and_no_granule_more(copies: tuple[Path, Path, int], op: Op) -> None:
    """Every bitmap as the target of the others, in an order of its own."""
    ours, theirs, size = copies
    known = {name: sectors(ranges) for name, ranges in read_bitmaps(ours).items()}
    wanted: dict[str, Ranges] = {}
    with qcow2bm.open(theirs) as other, qcow2bm.open(ours, writable=True) as image, image.edit() as edit:
        for place, granularity in enumerate(GRANULARITIES):
            target = name_of(granularity)
            names = [name_of(one) for one in (*GRANULARITIES[place + 1 :], *GRANULARITIES[:place])][: 1 + place % 3]
            edit.merge(target, [other.bitmaps[name].source for name in names], op=op)
            exact = functools.reduce(EXACT[op], [known[name] for name in (target, *names)])
            wanted[target] = rounded_out(exact, granularity, size)
    assert read_bitmaps(ours) == wanted
    assert check(ours)["returncode"] == 0


def test_inverted_twice_is_as_before_to_the_byte_of_its_bits(copies: tuple[Path, Path, int]) -> None:
    ours, _, size = copies
    before = read_bitmaps(ours)
    everything = set(range(size // SECTOR))
    for expected in ({n: ranges_of(everything - sectors(r)) for n, r in before.items()}, before):
        with qcow2bm.open(ours, writable=True) as image, image.edit() as edit:
            edit.invert(*before)
        assert read_bitmaps(ours) == expected
        assert check(ours)["returncode"] == 0


def test_clusters_that_an_operation_empties_are_given_back(recorded: tuple[Path, int], tmp_path: Path) -> None:
    """A bitmap less itself holds no cluster of data, one and its inverse hold none either."""
    image = Path(shutil.copy(recorded[0], tmp_path / "vm.qcow2"))
    names = list(map(name_of, GRANULARITIES))
    with qcow2bm.open(image, writable=True) as opened:
        with opened.edit() as edit:
            for name in names:
                edit.copy(name, f"not {name}")
                edit.invert(f"not {name}")
                edit.merge(f"not {name}", [name])
                edit.merge(name, [name], op="subtract")
        for name in names:
            assert not any(opened.bitmaps[name].stored.table)
            assert set(opened.bitmaps[f"not {name}"].stored.table) == {1}
    assert set(map(tuple, read_bitmaps(image, names).values())) == {()}
    assert check(image)["returncode"] == 0


# ---- refusals ----


def test_what_qemu_could_not_hold_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "large.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "4T")
    qemu_img("bitmap", "--add", "-g", "64k", image, "b")
    before = image.read_bytes()
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        with pytest.raises(BitmapLimitError, match="larger granularity"):
            edit.resample("b", granularity=512)
        for wrong in (0, 256, 1000, 4 << 30, -512):
            with pytest.raises(UsageError, match="not a power of two"):
                edit.resample("b", granularity=wrong)
        with pytest.raises(UsageError, match="or, and, xor, subtract"):
            edit.merge("b", [], op="nand")
    assert image.read_bytes() == before
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.resample("b", granularity=1024)  # the finest that there may be
    assert bitmap_info(image)[0]["granularity"] == 1024


def test_operations_stacked_without_end_are_refused_with_words(copies: tuple[Path, Path, int]) -> None:
    """Each is made of the one before; a plan of tens is fine."""
    ours, _, _ = copies
    before = ours.read_bytes()
    with qcow2bm.open(ours, writable=True) as image:
        draft = image.draft()
        for _ in range(400):
            draft.merge(name_of(64 * KIB), [name_of(512)], op="xor")
            draft.merge(name_of(64 * KIB), [name_of(MIB)], op="and")
        with pytest.raises(UsageError, match="too many operations on one bitmap"):
            draft.plan()
    assert ours.read_bytes() == before
