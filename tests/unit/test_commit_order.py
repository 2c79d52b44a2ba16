"""Where the barriers stand: every edit, written down write by write, and every state that a crash could leave behind.

The order is that of "Crash-safe ordering" in the design: first what nothing refers to, then the one sector that makes
it valid, then what nothing refers to any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.errors import InterruptedChangeError
from qcow2bm.image.plan import Plan
from tests.support.qemu import check
from tests.support.raw import BITMAPS, Raw
from tests.support.recording import Event, Tape, apply, crash_states
from tests.support.scenes import SCENES, Scene
from tests.support.states import Bitmaps, bitmaps

CLEAN, LEAKS = 0, 3
SAMPLE = 6  # torn states of an edit that QEMU looks at, beside all those at barriers


@dataclass
class Recorded:
    """A commit: the file before and after, what was written in between, and the bitmaps then and now."""

    scene: Scene
    image: Path
    before: bytes
    plan: Plan
    tape: Tape
    old: Bitmaps
    new: Bitmaps

    @property
    def epochs(self) -> list[list[Event]]:
        return self.tape.epochs()

    def at_barrier(self, number: int) -> bytes:
        """The file once `number` epochs have reached the disk."""
        return apply(self.before, [event for epoch in self.epochs[:number] for event in epoch])

    def read(self, data: bytes) -> Bitmaps:
        self.image.write_bytes(data)
        return bitmaps(self.image)

    @property
    def switch(self) -> int:
        """Number of the epoch that makes the new bitmaps the valid ones."""
        return self.plan.commit_stage


@pytest.fixture(scope="module", params=SCENES, ids=[scene.name for scene in SCENES])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    scene: Scene = request.param
    image = scene.make(tmp_path_factory.mktemp("scene"))
    before, old, tape = image.read_bytes(), bitmaps(image), Tape()
    with qcow2bm.open(image, writable=True, open_file=tape.open) as opened:
        edit = opened.draft()
        scene.edit(edit)
        plan = edit.plan()
        assert not tape.events, "planning writes nothing"
        opened.commit(plan)
    return Recorded(scene, image, before, plan, tape, old, bitmaps(image))


def test_the_edit_changes_the_bitmaps_and_is_what_it_is_here_for(recorded: Recorded) -> None:
    before, after = Raw(recorded.before), Raw(recorded.at_barrier(len(recorded.epochs)))
    assert (recorded.old, BITMAPS in before.extensions()) != (recorded.new, BITMAPS in after.extensions())
    assert (recorded.tape.journal is not None) == recorded.scene.journal
    assert (before.number(48) != after.number(48)) == recorded.scene.grows_table
    if recorded.scene.links_block:
        assert len(after.blocks) > len(before.blocks)


def test_a_barrier_follows_every_stage_and_the_last_write(recorded: Recorded) -> None:
    assert [[(write.offset, write.length) for write in stage.writes] for stage in recorded.plan.stages] == [
        [(event.offset, len(event.data)) for event in epoch] for epoch in recorded.epochs
    ]
    assert recorded.tape.events[-1].kind == "barrier"
    assert not recorded.image.with_name("image.qcow2.qcow2bm-journal").exists()


def test_what_is_written_is_what_the_plan_says(recorded: Recorded) -> None:
    after = recorded.at_barrier(len(recorded.epochs))
    assert len(after) == recorded.plan.size_after
    assert sum(len(event.data) for event in recorded.tape.events) == recorded.plan.bytes_written


def test_before_the_switch_nothing_in_use_is_overwritten_but_by_higher_refcounts(recorded: Recorded) -> None:
    base = Raw(recorded.before)
    blocks = {offset // base.cluster_size for offset in base.blocks.values()}
    table = range(base.number(48), base.number(48) + base.number(56, 4) * base.cluster_size)
    for number, epoch in enumerate(recorded.epochs[: recorded.switch]):
        if number in recorded.tape.journaled:
            continue  # the journal has it, see below
        now = Raw(recorded.at_barrier(number))
        for offset in _overwritten(base, now, epoch):
            cluster = offset // base.cluster_size
            if cluster == 0:
                assert _harmless_in_the_header(now, offset), hex(offset)
            elif offset in table:
                assert base.number(offset // 8 * 8) == 0, "a refcount table entry that was in use is replaced"
            else:
                assert cluster in blocks, f"{offset:#x} is in use"
    _require_refcounts_not_below(base, recorded.at_barrier(recorded.switch))


def _overwritten(base: Raw, now: Raw, epoch: list[Event]) -> Iterator[int]:
    """Offsets of bytes that change although the old state uses their clusters."""
    for sector in (sector for event in epoch for sector in event.sectors()):
        old = now.data[sector.offset : sector.end]
        if old != sector.data and base.refcount(sector.offset // base.cluster_size):
            for place, byte in enumerate(sector.data):
                if place >= len(old) or old[place] != byte:
                    yield sector.offset + place


def _harmless_in_the_header(now: Raw, offset: int) -> bool:
    """Fields that switch in their own sector, what no extension reaches, and the pointer of detached bitmaps.

    The fields: where the backing name is, where the refcount table is, the autoclear bits.
    """
    if offset in range(8, 16) or offset in range(48, 60) or offset in range(88, 96):
        return True
    if not now.number(88) & 1 and BITMAPS in now.extensions():
        start, length = now.extensions()[BITMAPS]
        if offset in range(start, start + length):
            return True
    name = range(now.number(8), now.number(8) + now.number(16, 4))
    return offset >= now.extensions()[0][0] and offset not in name


def _require_refcounts_not_below(base: Raw, later: bytes) -> None:
    now = Raw(later)
    for cluster in range(len(base.data) // base.cluster_size + 1):
        assert now.refcount(cluster) >= base.refcount(cluster), f"cluster {cluster} is given back before the switch"


def test_the_switch_is_one_write_within_one_sector(recorded: Recorded) -> None:
    (write,) = recorded.epochs[recorded.switch]
    assert write.offset // 512 == (write.end - 1) // 512
    certain = [number for number in range(len(recorded.epochs) + 1) if number - 1 not in recorded.tape.journaled]
    states = {number: recorded.read(recorded.at_barrier(number)) for number in certain}
    assert states == {number: recorded.old if number <= recorded.switch else recorded.new for number in certain}


def test_a_rewrite_of_several_sectors_is_journaled_between_setting_and_clearing_the_mark(
    recorded: Recorded,
) -> None:
    """So that QEMU does not open an image whose header a crash tore, and no journal outlives its time."""
    if not recorded.scene.journal:
        assert not recorded.tape.journaled
        return
    mark, rewrite, unmark = sorted(recorded.tape.journaled)
    assert unmark == recorded.switch
    (write,) = recorded.epochs[rewrite]
    assert write.offset // 512 != (write.end - 1) // 512, "this scene was made to need a journal"
    marked = [Raw(recorded.at_barrier(number)).is_marked for number in range(len(recorded.epochs) + 1)]
    assert [number for number, bit in enumerate(marked) if bit] == [mark + 1, rewrite + 1]


def test_clusters_are_given_back_only_in_the_last_stage(recorded: Recorded) -> None:
    base, last = Raw(recorded.before), len(recorded.epochs) - 1
    if recorded.plan.freed:
        assert last > recorded.switch
        _require_refcounts_not_below(base, recorded.at_barrier(last))
        after = Raw(recorded.at_barrier(last + 1))
        assert all(after.refcount(cluster) == 0 for cluster in recorded.plan.freed)
    written = [event for epoch in recorded.epochs for event in epoch]
    touched = {offset // base.cluster_size for event in written for offset in range(event.offset, event.end, 512)}
    assert not touched & recorded.plan.freed, "a cluster that is given back is written in the same change"


def test_after_any_crash_the_bitmaps_are_the_old_or_the_new_ones(recorded: Recorded) -> None:
    """Where the change has a journal: a reader refuses, and the next writer puts a torn header back."""
    journal = recorded.image.with_name("image.qcow2.qcow2bm-journal")
    for name, state in crash_states(recorded.before, recorded.epochs):
        epoch = len(recorded.epochs) if name == "done" else int(name.split()[1].rstrip(","))
        if recorded.tape.journal is not None and {epoch, epoch - 1} & recorded.tape.journaled:
            journal.write_bytes(recorded.tape.journal)
            recorded.image.write_bytes(state)
            if Raw(state).is_marked:
                with pytest.raises(InterruptedChangeError, match="cut short"):
                    qcow2bm.open(recorded.image)
            else:
                assert bitmaps(recorded.image) in (recorded.old, recorded.new), name
            qcow2bm.open(recorded.image, writable=True).close()
            assert not journal.exists()
            assert not Raw.load(recorded.image).is_marked, f"{name}: the mark stays"
            assert bitmaps(recorded.image) in (recorded.old, recorded.new), name
            continue
        assert recorded.read(state) in (recorded.old, recorded.new), name


def test_after_a_crash_qemu_finds_leaks_at_most(recorded: Recorded) -> None:
    """All states at barriers and a sample of the others; a journal is the user's business first."""
    seen: set[bytes] = set()
    torn = 0
    for name, state in crash_states(recorded.before, recorded.epochs):
        digest = hashlib.sha256(state).digest()
        at_barrier = "," not in name
        if digest in seen or (not at_barrier and (torn >= SAMPLE or recorded.scene.journal)):
            continue
        seen.add(digest)
        torn += not at_barrier
        recorded.image.write_bytes(state)
        said = check(recorded.image, recorded.scene.secret)
        if Raw(state).is_marked:
            assert "Unknown incompatible feature" in said["error"]
        else:
            assert said["returncode"] in (CLEAN, LEAKS), (name, said)
    assert said["returncode"] == CLEAN, "the finished change leaks nothing"


def test_the_bitmaps_extension_stands_where_the_autoclear_bit_says(recorded: Recorded) -> None:
    after = Raw(recorded.at_barrier(len(recorded.epochs)))
    assert bool(after.number(88) & 1) == (BITMAPS in after.extensions()) == bool(recorded.new)
