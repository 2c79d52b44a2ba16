"""Taking clusters and giving them back: where they are found, what grows, and that a failure costs nothing."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import Edit
from qcow2bm.errors import ImageIOError, NoSpaceError, ProofError, TruncatedImageError
from qcow2bm.image.allocator import Allocator
from qcow2bm.image.image import Qcow2Image
from qcow2bm.image.refcounts import Refcounts
from tests.support.qemu import check, qemu_img
from tests.support.raw import Raw
from tests.support.recording import Tape
from tests.support.scenes import (
    Scene,
    behind_another,
    create,
    fill,
    huge,
    long_names,
    one,
    remove_all,
    small,
    three,
    tiny,
)
from tests.support.states import bitmaps

CLUSTER = 512
PER_BLOCK = 64  # refcounts of 64 bits in a block of 512 bytes


@pytest.fixture
def allocator(tmp_path: Path):
    """An allocator over an image of 512-byte clusters and 64-bit refcounts, with holes at 5 and 7..8 of every 10."""
    image = tiny(tmp_path)
    raw = Raw.load(image)
    used = len(raw.data) // CLUSTER
    for cluster in range(used, PER_BLOCK):
        raw.set_refcount(cluster * CLUSTER, int(cluster % 10 not in (5, 7, 8)))
    raw.save(image)
    with Qcow2Image.open(image) as opened:
        yield Allocator(opened, Refcounts(opened)), used


def holes(used: int) -> list[int]:
    return [cluster for cluster in range(used, PER_BLOCK) if cluster % 10 in (5, 7, 8)]


# ---- where ----


def test_a_full_block_that_many_entries_name_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tiny(tmp_path)
    raw = Raw.load(image)
    for cluster in range(PER_BLOCK):
        raw.set_refcount(cluster * CLUSTER, 1)
    table, entries = raw.number(48, 8), raw.number(56, 4) * CLUSTER // 8
    raw.data[table : table + 8 * entries] = raw.data[table : table + 8] * entries
    raw.save(image)
    with Qcow2Image.open(image) as opened:
        refcounts, read = Refcounts(opened), []
        read_block = refcounts.read_block
        monkeypatch.setattr(refcounts, "read_block", lambda index: (read.append(index), read_block(index))[1])
        assert next(refcounts.free_runs()) == (entries * PER_BLOCK, PER_BLOCK)
        assert read == [0, entries]


def test_what_a_cluster_lacks_at_the_end_of_the_file_reads_as_zeroes_and_no_cluster_behind_it(tmp_path: Path) -> None:
    with Qcow2Image.open(tiny(tmp_path)) as opened:
        file = opened.file
        assert file.read_at(file.size - 1, CLUSTER)[1:] == bytes(CLUSTER - 1)
        for offset, length in ((file.size - 1, CLUSTER + 1), (file.size - CLUSTER, CLUSTER + 1), (file.size, 1)):
            with pytest.raises(TruncatedImageError):
                file.read_at(offset, length)


def test_single_clusters_go_into_the_lowest_holes(allocator: tuple[Allocator, int]) -> None:
    taker, used = allocator
    wanted = holes(used)
    assert [taker.take() // CLUSTER for _ in wanted] == wanted


def test_contiguous_clusters_go_into_the_first_hole_that_holds_them(allocator: tuple[Allocator, int]) -> None:
    taker, used = allocator
    pairs = [cluster for cluster in holes(used) if cluster % 10 == 7]
    assert [taker.take(2) // CLUSTER for _ in pairs] == pairs
    singles = [cluster for cluster in holes(used) if cluster % 10 == 5]
    assert [taker.take() // CLUSTER for _ in singles] == singles


def test_a_long_run_crosses_the_ranges_of_several_refcount_blocks(tmp_path: Path) -> None:
    """The ranges that it fills leave no room for their own blocks, which lie in front of it."""
    image = tiny(tmp_path)
    commit(image, long_names)
    raw = Raw.load(image)
    at, size, count = raw.directory
    directory = range(at // CLUSTER, -(-(at + size) // CLUSTER))
    assert len(directory) > 2 * PER_BLOCK
    assert count == 81
    blocks = {index: offset // CLUSTER for index, offset in raw.blocks.items()}
    assert all(cluster not in directory for cluster in blocks.values())
    assert any(cluster // PER_BLOCK != index for index, cluster in blocks.items())
    assert check(image)["returncode"] == 0


@pytest.mark.parametrize("count", [PER_BLOCK - 1, PER_BLOCK, 3000, 5000, 20000])
def test_the_blocks_of_a_long_run_lie_in_front_of_it_however_many(count: int, tmp_path: Path) -> None:
    """Those that do not describe themselves lie where another block counts before they are linked."""
    with Qcow2Image.open(tiny(tmp_path)) as opened:
        refcounts = Refcounts(opened)
        taker = Allocator(opened, refcounts)
        start = taker.take(count) // CLUSTER
        assert taker.highest == start + count - 1
        taker.finish()
        blocks = {index: write.offset // CLUSTER for write in taker.prepare() for index in new_block(write.purpose)}
        for index, cluster in blocks.items():
            home = cluster // PER_BLOCK
            assert refcounts.block_offset(home) or blocks[home] // PER_BLOCK == home, index
        assert len(set(blocks.values())) == len(blocks)
        for cluster in {*range(start, start + count), *blocks.values()}:
            assert refcounts.block_offset(cluster // PER_BLOCK) or cluster // PER_BLOCK in blocks
        assert not set(blocks.values()) & set(range(start, start + count))


def new_block(purpose: str) -> list[int]:
    """The number of the refcount block that a write fills, if it is a new one."""
    return [int(purpose.rpartition(" ")[2])] if purpose.startswith("new refcount block") else []


def test_nothing_is_taken_twice(tmp_path: Path) -> None:
    with Qcow2Image.open(tiny(tmp_path)) as opened:
        taker, refcounts = Allocator(opened, Refcounts(opened)), Refcounts(opened)
        taken: set[int] = set()
        for count in (1, 3, 64, 1, 100, 2, 2, 5, 1):
            start = taker.take(count) // CLUSTER
            clusters = set(range(start, start + count))
            assert not clusters & taken
            assert not any(refcounts.get(cluster) for cluster in clusters)
            taken |= clusters


def test_what_a_plan_gives_back_it_does_not_take_again(tmp_path: Path) -> None:
    """The old bitmaps need their clusters until the last stage."""
    image = small(tmp_path)
    with qcow2bm.open(image, writable=True) as opened:
        edit = opened.draft()
        edit.remove("full", "sectors")
        edit.add("new", granularity=512)
        edit.set_range("new", 0, 512)
        plan = edit.plan()
        written = {write.offset // CLUSTER for write in plan.writes() if write.old is None}
        assert plan.freed
        assert not plan.freed & written


def test_giving_back_a_cluster_that_is_free_or_shared_or_given_back_already_is_refused(tmp_path: Path) -> None:
    image = small(tmp_path)
    raw = Raw.load(image)
    table = raw.tables()["full"][0]
    raw.set_refcount(table, 2)
    raw.save(image)
    with Qcow2Image.open(image) as opened:
        giver = Allocator(opened, Refcounts(opened))
        with pytest.raises(ProofError, match="refcount 2 instead of 1"):
            giver.free(table, 8)
        with pytest.raises(ProofError, match="refcount 0 instead of 1"):
            giver.free(1 << 30, 1)
        giver.free(raw.tables()["daily"][0], 8)
        with pytest.raises(ProofError, match="used twice"):
            giver.free(raw.tables()["daily"][0], 8)


# ---- growth ----


def commit(image: Path, edit: Callable[[Edit], object], tape: Tape | None = None) -> qcow2bm.Plan:
    """Edit an image; the plan. Growth is as predicted, or the test fails."""
    before = image.stat().st_size
    with qcow2bm.open(image, writable=True, open_file=(tape or Tape()).open) as opened:
        draft = opened.draft()
        edit(draft)
        plan = draft.plan()
        opened.commit(plan)
    assert image.stat().st_size == plan.size_after == before + plan.growth
    return plan


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_new_blocks_are_linked_and_qemu_finds_no_fault_at_every_refcount_order(tmp_path: Path, bits: int) -> None:
    image = create(tmp_path, "32M", "cluster_size=512", f"refcount_bits={bits}")
    qemu_img("bitmap", "--add", "-g", "512", image, "a")
    before = Raw.load(image)
    needed = len(before.data) // CLUSTER + 4096 // bits * 8 // 2  # enough for the next block
    plan = commit(image, fill(needed // 16 + 1))
    assert plan.growth > 0
    after = Raw.load(image)
    assert len(after.blocks) > len(before.blocks) or bits < 8
    assert check(image)["returncode"] == 0, check(image)
    assert len({offset for _, _, _, _, runs in bitmaps(image) for offset, _ in runs}) == 16


def test_the_refcount_table_moves_when_it_is_full_and_the_old_one_is_given_back(tmp_path: Path) -> None:
    image = huge(tmp_path)
    before = Raw.load(image)
    plan = commit(image, fill(160))
    after = Raw.load(image)
    assert after.number(56, 4) > before.number(56, 4)
    assert after.refcount(before.number(48) // CLUSTER) == 0
    assert before.number(48) // CLUSTER in plan.freed
    assert check(image)["returncode"] == 0
    commit(image, lambda edit: edit.remove(*edit.names("copy*")))
    assert check(image)["returncode"] == 0


def test_a_table_that_grew_has_room_for_half_as_much_again(tmp_path: Path) -> None:
    image = huge(tmp_path)
    commit(image, fill(160))
    moved = Raw.load(image).number(48)
    commit(image, lambda edit: [edit.copy("a", f"more {n}") for n in range(40)])
    assert Raw.load(image).number(48) == moved


def test_a_refcount_table_above_8_mib_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = huge(tmp_path)
    before = image.read_bytes()
    monkeypatch.setattr("qcow2bm.image.allocator.MAX_REFCOUNT_TABLE_BYTES", CLUSTER)
    with pytest.raises(NoSpaceError, match="above 8 MiB"):
        commit(image, fill(160))
    assert image.read_bytes() == before


def test_removing_everything_gives_back_everything(tmp_path: Path) -> None:
    image = small(tmp_path)
    raw = Raw.load(image)
    at, size, _ = raw.directory
    clusters = {at + offset for offset in range(0, size, CLUSTER)}
    for name, (table, entries) in raw.tables().items():
        clusters |= set(range(table, table + 8 * entries, CLUSTER))
        clusters |= {raw.number(place) & ~511 for place in raw.bitmap_data(name)}
    plan = commit(image, remove_all)
    assert plan.freed == {offset // CLUSTER for offset in clusters}
    assert check(image)["returncode"] == 0


# ---- failure ----

FAULTS = (
    Scene("data and tables", three, lambda edit: edit.merge("c", ["a", "b"])),
    Scene("remove all", three, remove_all),
    Scene("first of its kind", one, lambda edit: edit.copy("a", "x", granularity=1 << 20)),
    Scene("journal", behind_another, remove_all, journal=True),
    Scene("new refcount blocks", tiny, fill(6), links_block=True),
)


def attempt(scene: Scene, folder: Path, tape: Tape) -> tuple[Path, bytes, BaseException | None]:
    """Make the scene's image and edit it with faults; the image, its bytes before, and the error."""
    folder.mkdir()
    image = scene.make(folder)
    before = image.read_bytes()
    try:
        with qcow2bm.open(image, writable=True, open_file=tape.open) as opened, opened.edit() as edit:
            scene.edit(edit)
    except ImageIOError as error:
        return image, before, error
    except NoSpaceError as error:
        return image, before, error
    return image, before, None


@pytest.mark.parametrize("scene", FAULTS, ids=[scene.name for scene in FAULTS])
@pytest.mark.parametrize("partial", [False, True], ids=["nothing written", "half written"])
def test_when_the_nth_write_fails_everything_is_put_back_or_the_change_is_done(
    tmp_path: Path, scene: Scene, partial: bool
) -> None:
    number, outcomes = 0, set()
    while True:
        tape = Tape(fail_at=number, partial=partial)
        image, before, error = attempt(scene, tmp_path / str(number), tape)
        if error is None:
            break
        new = bitmaps(image) != bitmaps_of(before, tmp_path)
        outcomes.add(new)
        if new:
            assert "the change is done" in str(error)
            assert check(image)["returncode"] in (0, 3)
        else:
            assert in_use(image.read_bytes()) == in_use(before), f"write {number}"
            assert "put back" in str(error)
        assert {path.name for path in image.parent.iterdir()} == {"image.qcow2"}, "no journal is left"
        number += 1
    assert number > 1
    assert False in outcomes
    assert check(image)["returncode"] == 0


def in_use(data: bytes) -> tuple[int, list[bytes]]:
    """The length of a file and its clusters in use; the content of free clusters means nothing."""
    raw = Raw(data)
    size = raw.cluster_size
    clusters = range(-(-len(data) // size))
    return len(data), [data[n * size : (n + 1) * size] for n in clusters if raw.refcount(n)]


def bitmaps_of(data: bytes, folder: Path) -> object:
    copy = folder / "before.qcow2"
    copy.write_bytes(data)
    return bitmaps(copy)


@pytest.mark.parametrize("scene", FAULTS[:3], ids=[scene.name for scene in FAULTS[:3]])
def test_when_every_write_from_the_nth_on_fails_the_bitmaps_are_old_or_new_and_qemu_finds_leaks_at_most(
    tmp_path: Path, scene: Scene
) -> None:
    number = 0
    while True:
        tape = Tape(fail_at=number, sticky=True)
        image, before, error = attempt(scene, tmp_path / str(number), tape)
        if error is None:
            break
        assert check(image)["returncode"] in (0, 3), number
        assert len(bitmaps(image)) in {len(Raw(before).tables()), len(Raw(before).tables()) + 1, 0}
        number += 1
    assert number > 1


def test_a_full_disk_is_named_and_everything_is_put_back(tmp_path: Path) -> None:
    scene = FAULTS[0]
    image, before, error = attempt(scene, tmp_path / "x", Tape(fail_at=1, partial=True, code=errno.ENOSPC))
    assert isinstance(error, NoSpaceError)
    assert os.strerror(errno.ENOSPC) in str(error)
    assert str(image) in str(error)
    assert in_use(image.read_bytes()) == in_use(before)


def test_a_write_that_the_kernel_cuts_short_leaves_no_longer_file(tmp_path: Path) -> None:
    """A real limit, on the size of files: the kernel writes up to it, then refuses."""
    image = one(tmp_path)
    before = image.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, hard))
    try:
        with pytest.raises(NoSpaceError):
            commit(image, lambda edit: [edit.add(f"new {number}") for number in range(20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert in_use(image.read_bytes()) == in_use(before)


def test_a_change_that_cannot_fit_on_the_file_system_is_refused_before_the_first_write(tmp_path: Path) -> None:
    image = three(tmp_path)
    tape = Tape()
    with qcow2bm.open(image, writable=True, open_file=tape.open) as opened:
        edit = opened.draft()
        edit.add("new")
        plan = edit.plan()
        opened.qcow2.file.free_space = lambda: plan.growth - 1
        with pytest.raises(NoSpaceError, match=f"needs {plan.growth} bytes more and the file system has"):
            opened.commit(plan)
        assert not tape.events
        opened.qcow2.file.free_space = lambda: plan.growth
        opened.commit(plan)
    assert len(bitmaps(image)) == 4


def test_a_device_that_is_too_small_is_refused_by_the_plan(tmp_path: Path) -> None:
    image = three(tmp_path)
    size = image.stat().st_size
    before = image.read_bytes()
    tape = Tape(device=True)
    with qcow2bm.open(image, writable=True, open_file=tape.open) as opened:
        edit = opened.draft()
        for number in range(20):
            edit.add(f"new {number}")
        with pytest.raises(NoSpaceError, match=f"the device has {size} bytes, the change needs"):
            edit.plan()
    assert not tape.events
    assert image.read_bytes() == before


def test_a_device_with_room_keeps_its_size(tmp_path: Path) -> None:
    image = three(tmp_path)
    os.truncate(image, 4 << 20)
    with qcow2bm.open(image, writable=True, open_file=Tape(device=True).open) as opened:
        with opened.edit() as edit:
            edit.add("new")
        with opened.edit() as edit:
            edit.remove("a")
    assert image.stat().st_size == 4 << 20
    assert [row[0] for row in bitmaps(image)] == ["b", "c", "new"]
    assert check(image)["returncode"] == 0
