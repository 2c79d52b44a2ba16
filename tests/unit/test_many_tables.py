"""Tables that are many, far out, or all the same: counted as few are, and mended without filling a disk."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

import qcow2bm
from qcow2bm.checks import runner
from qcow2bm.checks.counters import Counters
from qcow2bm.checks.model import RepairClass
from qcow2bm.errors import CorruptImageError
from qcow2bm.image import mapping_tables
from qcow2bm.image.image import Qcow2Image
from qcow2bm.image.mapping_tables import MappingTables
from qcow2bm.repair.model import RepairPolicy
from qcow2bm.repair.session import plan_repair
from tests.support.qemu import check, qemu_img
from tests.support.raw import OFFSET, Raw
from tests.support.scenes import create, three

COPIED = 1 << 63
CLUSTER = 1 << 16


def test_far_references_count_although_others_were_asked_for_before() -> None:
    """A refcount block that was forgotten so would be a leak, and be given away."""
    counters = Counters(near=10)
    counters.add_each(np.array([100]), 1)
    assert counters.slice(100, 102) is not None
    counters.add_each(np.array([101]), 1)
    found = counters.slice(100, 102)
    assert found is not None
    assert found.tolist() == [1, 1]


def test_far_and_near_references_are_found_among_others() -> None:
    counters = Counters(near=10)
    counters.add_each(np.array([3, 100]), 1)
    counters.add_run(200, 300, 1)
    for cluster, expected in ((3, True), (4, False), (100, True), (101, False), (250, True), (300, False)):
        assert counters.any_of(np.array([cluster])) is expected, cluster


def with_l1(image: Path, entries: list[int]) -> Path:
    """An L1 table at the end of the file."""
    raw = Raw.load(image)
    end = len(raw.data) + -len(raw.data) % CLUSTER
    table = struct.pack(f">{len(entries)}Q", *entries)
    raw.data += bytes(end - len(raw.data)) + table + bytes(-len(table) % CLUSTER)
    raw.put(40, end)
    raw.put(36, len(entries), 4)
    for at in range(end, len(raw.data), CLUSTER):
        raw.set_refcount(at, 1)
    raw.save(image)
    return image


@pytest.fixture(params=[1 << 60, -1], ids=["plain", "numpy"])
def _limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping_tables, "_SMALL", request.param)


@pytest.mark.usefixtures("_limit")
def test_few_tables_and_many_are_told_alike(tmp_path: Path) -> None:
    image = three(tmp_path)
    qemu_img("snapshot", "-c", "s", image)
    raw = Raw.load(image)
    table = raw.number(raw.number(40)) & OFFSET
    holes = [1 << 30, (1 << 30) + CLUSTER]
    with_l1(image, [table | COPIED, 0, table, holes[1] | COPIED, holes[0]])
    with image.open("r+b") as file:
        file.truncate(1 << 31)
    with Qcow2Image.open(image) as opened:
        mapping = MappingTables(opened)
        assert mapping.count() == 3
        assert mapping.l2_tables() == {table: 0}
        found = [(reference.offset, reference.owner) for reference in mapping.l2_references({table, holes[0]})]
    active = "an L2 table (the active L1 table, index {})"
    assert {offset for offset, _ in found} == {table, holes[0]}
    assert (holes[0], active.format(4)) in found
    assert len([owner for offset, owner in found if offset == table]) == 3, "twice by the disk, once by the snapshot"


@pytest.mark.usefixtures("_limit")
def test_an_unaligned_table_is_refused_however_many_there_are(tmp_path: Path) -> None:
    image = with_l1(three(tmp_path), [512 + CLUSTER])
    with qcow2bm.open(image) as opened, pytest.raises(CorruptImageError, match="not cluster-aligned"):
        opened.usage()


def test_copied_flags_of_l1_entries_in_a_row_are_one_finding_and_all_are_mended(tmp_path: Path) -> None:
    image = create(tmp_path, "8G")
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("a")
    raw = Raw.load(image)
    first = len(raw.data) + -len(raw.data) % CLUSTER
    raw.data += bytes(first - len(raw.data)) + bytes(8 * CLUSTER)
    for number in range(8):
        raw.put(raw.number(40) + 8 * number, first + number * CLUSTER)
        raw.set_refcount(first + number * CLUSTER, 1)
    raw.save(image)
    report = runner.check(image)
    assert [(finding.code, finding.count) for finding in report.findings] == [("copied-l1", 8)]
    with qcow2bm.repairing(image) as session:
        session.commit(undo=None)
    assert check(image)["returncode"] == 0
    assert not runner.check(image).counts


def test_a_repair_copies_no_more_apart_than_the_disk_takes_twice(tmp_path: Path) -> None:
    """Any number of entries may name one cluster; QEMU would not copy them, and nobody may fill the disk."""
    image = create(tmp_path, "4M", "cluster_size=64k")
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("a", granularity=512, all_dirty=True)
    raw = Raw.load(image)
    end = len(raw.data) + -len(raw.data) % CLUSTER
    raw.data += bytes(end - len(raw.data)) + struct.pack(">Q", end + CLUSTER) * (CLUSTER // 8) + b"x" * CLUSTER
    raw.put(raw.number(40), end | COPIED)
    raw.save(image)
    plan = plan_repair(image, RepairPolicy(allow=RepairClass.GUESS))
    assert plan.plan.size_after <= len(raw.data) + 2 * (4 << 20) + 4097 * CLUSTER
    assert any("more room" in str(step.refused) for step in plan.refused)
