"""Clusters that only look leaked stay: what one wrong field, a lost table or an earlier repair has hidden comes back.

QEMU writes an image, one thing in it is damaged, and it is repaired with what is lossless. Then the damage is put
right by hand, as somebody would who finds it, and QEMU must find all that was there.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.checks.model import RepairClass
from tests.support.qemu import check, guest_digest, qemu_img, qemu_io
from tests.support.raw import OFFSET, Raw

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
COPIED, COMPRESSED = 1 << 63, 1 << 62
HELD = {"leak-doubtful", "leak-lost-table", "leak-unproven"}
# The specification's names; each is an offset in the header.
CLUSTER_BITS, L1_TABLE_OFFSET, NB_SNAPSHOTS, INCOMPATIBLE, REFCOUNT_ORDER = 20, 40, 60, 72, 96
DATA_FILE, EXTENDED_L2 = 4, 16

LAYOUTS = {
    "plain": (),
    "small": ("cluster_size=4k",),
    "large": ("cluster_size=256k",),
    "extended": ("extended_l2=on",),
    "narrow": ("refcount_bits=8",),
}
FIELDS: tuple[tuple[int, int, int], ...] = (
    *((CLUSTER_BITS, 4, bits) for bits in (11, 13, 14, 15, 17)),
    *((L1_TABLE_OFFSET, 8, offset << 16) for offset in (0, 1, 2, 4, 5)),
    *((NB_SNAPSHOTS, 4, number) for number in (0, 1, 3)),
    *((INCOMPATIBLE, 8, bits) for bits in (0, DATA_FILE, EXTENDED_L2, DATA_FILE | EXTENDED_L2)),
    *((REFCOUNT_ORDER, 4, order) for order in (0, 2, 3, 5, 6)),
)
"""Offset, length and a wrong value of a field."""


def create(image: Path, *options: str, size: str = "64M") -> Path:
    """An empty image."""
    qemu_img("create", "-q", "-f", "qcow2", *(f"-o{option}" for option in options), image, size)
    return image


def repair(image: Path, allow: str = "lossless", undo: Path | None = None) -> qcow2bm.RepairPlan:
    """Repair an image, with the undo file in a place where nobody looks for one, or in that one."""
    with qcow2bm.repairing(image, qcow2bm.RepairPolicy(allow=RepairClass(allow))) as session:
        session.commit(undo=undo or image.with_name("undo"))
        return session.plan


def counts(image: Path) -> dict[str, int]:
    return dict(qcow2bm.check(image).counts)


def damage(image: Path, *changes: Callable[[Raw], object]) -> None:
    raw = Raw.load(image)
    for change in changes:
        change(raw)
    raw.save(image)


def put(place: int, value: int, length: int = 8) -> Callable[[Raw], object]:
    return lambda raw: raw.put(place, value, length)


def lose_l1_entry(raw: Raw) -> None:
    raw.put(raw.number(L1_TABLE_OFFSET), 0)


def leak(raw: Raw, count: int) -> None:
    """Counted clusters at the end that nobody uses."""
    end = len(raw.data)
    raw.data.extend(bytes(count * raw.cluster_size))
    for offset in range(end, end + count * raw.cluster_size, raw.cluster_size):
        raw.set_refcount(offset, 1)


# ---- one wrong field ----


@pytest.fixture(scope="module", params=LAYOUTS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk with two snapshots, each with data of its own and data that is shared."""
    folder = tmp_path_factory.mktemp("original")
    image = create(folder / "image.qcow2", *LAYOUTS[request.param])
    qemu_io(image, "write -P 1 0 1M", "write -P 2 33M 1M")
    for number in (1, 2):
        qemu_img("snapshot", "-c", f"s{number}", image)
        qemu_io(image, f"write -P {number + 5} 0 {512 // number}k")
    yield image
    shutil.rmtree(folder)


def content(image: Path) -> list[str]:
    """What the guest reads, now and in the snapshots."""
    digests = [guest_digest(image)]
    for name in ("s1", "s2"):
        copy = Path(shutil.copy(image, image.with_name("reverted.qcow2")))
        qemu_img("snapshot", "-a", name, copy)
        digests.append(guest_digest(copy))
    return digests


def test_a_field_that_is_put_right_again_brings_everything_back(original: Path, tmp_path: Path) -> None:
    """Whatever a repair does about it is worth less than the data behind it."""
    good = content(original)
    changed = 0
    for number, (place, length, value) in enumerate(FIELDS):
        image = Path(shutil.copy(original, tmp_path / f"{number}.qcow2"))
        right = Raw.load(image).number(place, length)
        if value == right:
            continue
        damage(image, put(place, value, length))
        try:
            plan = repair(image, undo=tmp_path / f"{number}.undo")
        except qcow2bm.Qcow2bmError:
            plan = None
        damage(image, put(place, right, length))
        what = f"{value:#x} at {place}"
        assert check(image)["returncode"] in (0, 3), what
        if plan is not None and plan.steps:
            changed += 1
            assert content(image) == good, what
        image.unlink()
    assert changed < len(FIELDS) // 2


@pytest.mark.parametrize(
    ("place", "length", "value"),
    [(INCOMPATIBLE, 8, DATA_FILE), (INCOMPATIBLE, 8, EXTENDED_L2), (CLUSTER_BITS, 4, 15), (NB_SNAPSHOTS, 4, 0)],
)
def test_the_finding_says_why_and_a_guess_frees_them(tmp_path: Path, place: int, length: int, value: int) -> None:
    image = create(tmp_path / "image.qcow2")
    qemu_io(image, "write -P 1 0 1M", "write -P 2 33M 1M")
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "write -P 3 0 1M")
    damage(image, put(place, value, length))
    report = qcow2bm.check(image)
    doubtful = [finding for finding in report.findings if finding.code == "leak-doubtful"]
    assert doubtful
    assert all("; " in finding.message for finding in doubtful)
    assert repair(image, "guess", tmp_path / "guess").steps
    assert not HELD & counts(image).keys()


def test_entries_that_are_bitmaps_are_not_rewritten(tmp_path: Path) -> None:
    """Even of a small image: the bit of extended L2 entries is cleared, and their bitmaps look like wrong entries."""
    image = create(tmp_path / "image.qcow2", "extended_l2=on")
    qemu_io(image, "write -P 1 0 192k")
    damage(image, put(INCOMPATIBLE, 0))
    assert not [step.title for step in repair(image).steps]
    assert any("extended L2" in str(step.refused) for step in qcow2bm.plan_repair(image).refused)


# ---- how many ----


@pytest.mark.parametrize(("used", "leaked", "code"), [(16, 8, "leak"), (16, 9, "leak-doubtful")])
def test_a_few_clusters_are_leaks_even_in_a_small_image(tmp_path: Path, used: int, leaked: int, code: str) -> None:
    image = create(tmp_path / "image.qcow2")
    qemu_io(image, f"write -P 1 0 {used * 64}k")
    damage(image, lambda raw: leak(raw, leaked))
    assert counts(image) == {code: leaked}
    assert repair(image).after.counts == ({} if code == "leak" else {code: leaked})


def test_in_a_larger_image_a_tenth_of_it_is_too_many(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2")
    qemu_io(image, "write -P 1 0 32M")
    for leaked, code in ((50, "leak"), (10, "leak-doubtful")):  # the ten are added to the fifty
        damage(image, partial(leak, count=leaked))
        assert set(counts(image)) == {code}
    assert repair(image).steps == ()
    assert repair(image, "guess").steps
    assert check(image)["returncode"] == 0


# ---- lost tables ----


def test_a_lost_table_with_a_bad_entry_is_still_one(tmp_path: Path) -> None:
    """The cluster that the bad entry named is not given back either: nobody knows whose it was."""
    image = create(tmp_path / "image.qcow2")
    qemu_io(image, "write -P 7 0 4M")
    table = Raw.load(image).l2_entry()
    damage(image, lose_l1_entry, put(table + 5 * 8, COPIED | 0x200))
    assert counts(image) == {"leak-lost-table": 64, "leak-doubtful": 1}
    assert repair(image).steps == ()


def test_a_lost_table_whose_first_sector_is_overwritten_is_still_one(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2")
    qemu_io(image, "write -P 7 0 8M")
    table = Raw.load(image).l2_entry()
    noise = random.Random(1).randbytes(512)
    damage(image, lose_l1_entry, lambda raw: raw.data.__setitem__(slice(table, table + 512), noise))
    assert counts(image) == {"leak-lost-table": 65, "leak-doubtful": 64}


def test_compressed_clusters_of_a_lost_table_are_held_as_a_whole(tmp_path: Path) -> None:
    """A stream goes on in the cluster after the one where it begins."""
    source = tmp_path / "source"
    chance = random.Random(1)
    source.write_bytes(bytes(chance.choices(range(190), k=3 * CLUSTER)))
    image = tmp_path / "image.qcow2"
    qemu_img("convert", "-q", "-c", "-O", "qcow2", source, image)
    damage(image, lose_l1_entry)
    assert counts(image) == {"leak-lost-table": 4}


def test_a_lost_table_beside_a_data_file_is_one(tmp_path: Path) -> None:
    """Its entries name nothing in this file."""
    image = create(tmp_path / "image.qcow2", f"data_file={tmp_path / 'data.raw'}")
    qemu_io(image, "write -P 1 0 4M")
    damage(image, lose_l1_entry)
    assert counts(image) == {"leak-lost-table": 1}
    assert repair(image).steps == ()


def test_what_a_lost_table_names_is_a_table_without_copied_flags_too(tmp_path: Path) -> None:
    """A lost L1 table of a snapshot names L2 tables, whose entries have no such flag any more."""
    image = create(tmp_path / "image.qcow2")
    qemu_io(image, "write -P 1 0 640k")
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "write -P 2 0 640k", "write -P 3 1M 32M")
    raw = Raw.load(image)
    table = raw.number(raw.number(64)) & OFFSET  # the snapshot's L1 table
    l2_table = raw.number(table) & OFFSET
    assert not any(raw.number(at) & COPIED for at in range(l2_table, l2_table + 80, 8))
    damage(image, put(NB_SNAPSHOTS, 0, 4))
    held = {
        cluster
        for finding in qcow2bm.check(image).findings
        if finding.code == "leak-lost-table"
        for cluster in range(finding.values["first"], finding.values["first"] + finding.count)
    }
    data = {raw.number(at) & OFFSET for at in range(l2_table, l2_table + 80, 8)}
    assert held == {place // CLUSTER for place in (table, l2_table, *data)}


# ---- one repair after another ----


def cross_linked(image: Path) -> None:
    """Guest cluster 1 names the data of cluster 2: its own is cut off, and no check can tell whose it was."""
    qemu_io(create(image), "write -P 1 0 1M")
    place = Raw.load(image).l2_entry()
    damage(image, lambda raw: raw.put(place + 8, raw.number(place + 16)))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of which a repair has mended the damage, and held back what it had cut off."""
    image = tmp_path / "image.qcow2"
    cross_linked(image)
    before = image.read_bytes()
    assert counts(image)["leak-unproven"] == 1
    undo = tmp_path / "image.qcow2.qcow2bm-undo"
    assert repair(image, undo=undo).steps
    assert image.read_bytes() != before
    return image


def test_what_one_repair_held_back_the_next_does_not_free(image: Path) -> None:
    for _ in range(2):
        assert counts(image) == {"leak-doubtful": 1}
        assert repair(image).steps == ()
    assert repair(image, "guess").steps
    assert counts(image) == {}


def test_nor_does_one_after_another_change_of_ours(image: Path) -> None:
    """The undo files lead back, one change after the other."""
    with qcow2bm.open(image, writable=True) as opened, opened.edit(undo=f"{image}.qcow2bm-undo-2") as edit:
        edit.add("daily")
    assert counts(image) == {"leak-doubtful": 1}


def test_without_the_undo_file_it_is_a_leak_as_any_other(image: Path) -> None:
    image.with_name("image.qcow2.qcow2bm-undo").unlink()
    assert counts(image) == {"leak": 1}


def test_an_undo_file_that_is_damaged_or_undone_tells_nothing(image: Path) -> None:
    undo = image.with_name("image.qcow2.qcow2bm-undo")
    data = bytearray(undo.read_bytes())
    for place in (0, 100, 512, len(data) // 2):
        bad = data.copy()
        bad[place] ^= 0xFF
        undo.write_bytes(bad)
        assert set(counts(image)) <= {"leak", "leak-doubtful"}
    undo.write_bytes(data[:700])
    assert counts(image) == {"leak": 1}
    undo.write_bytes(data)
    qcow2bm.undo(image, undo)
    assert counts(image)["leak-unproven"] == 1


def test_an_undo_file_of_a_sound_image_holds_nothing_back(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2")
    qemu_io(image, "write -P 1 0 1M")
    with qcow2bm.open(image, writable=True) as opened, opened.edit(undo=f"{image}.qcow2bm-undo") as edit:
        edit.add("daily")
    damage(image, lambda raw: leak(raw, 3))
    assert counts(image) == {"leak": 3}
