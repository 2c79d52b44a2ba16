"""Which ways out of a bitmap's trouble are offered, from values alone; and that a shell takes them as printed."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bitmap.store import State
from qcow2bm.checks.model import RepairClass
from qcow2bm.checks.problems import PROBLEMS
from qcow2bm.cli.why import shell_line
from qcow2bm.repair.model import Salvage
from qcow2bm.repair.ways_out import Case, NextBackup, Proof, Snapshot, WayOut, ways_out

MONDAY, FRIDAY = Snapshot("1", "monday", 0), Snapshot("2", "friday", 86400)
IN_USE = Case("vm.qcow2", "daily", State.INCONSISTENT, own=frozenset({"bitmap-inconsistent"}))
DETACHED = Case("vm.qcow2", "daily", State.DETACHED, is_attached=False, own=frozenset({"bitmap-detached"}))


def but(case: Case, **changes: object) -> Case:
    from dataclasses import replace

    return replace(case, **changes)  # type: ignore[arg-type]


def open_ways(case: Case) -> dict[str, WayOut]:
    ways, _ = ways_out(case)
    names = [way.name for way in ways]
    assert len(set(names)) == len(names)
    return {way.name: way for way in ways}


def closed(case: Case) -> dict[str, str]:
    return {left_out.name: left_out.reason for left_out in ways_out(case)[1]}


# ---- in use, and detached ----


@pytest.mark.parametrize(("case", "option"), [(IN_USE, "--in-use"), (DETACHED, "--detached")])
def test_every_policy_is_offered_or_left_out_with_a_reason(case: Case, option: str) -> None:
    """Nothing but what the repair knows, and what is offered names the options that it needs."""
    for backing in (False, True):
        for encrypted in (False, True):
            for snapshots in ((), (MONDAY,), (MONDAY, FRIDAY)):
                this = but(case, has_backing=backing, is_encrypted=encrypted, snapshots=snapshots)
                ways, left_out = open_ways(this), closed(this)
                assert {*ways, *left_out} == {policy.value for policy in Salvage} - {"keep"}
                assert set(left_out) == {
                    *(["rebuild"] if encrypted else []),
                    *(["snapshot"] if not snapshots else []),
                    *(["allocated"] if not backing else []),
                }
                salvages = [way for way in ways.values() if way.name != "remove"]
                assert all(way.command[:5] == ("qcow2bm", "repair", "vm.qcow2", option, way.name) for way in salvages)
                assert all(way.kind is RepairClass.LOSSLESS for way in salvages)
                assert all(way.next_backup is not NextBackup.FULL for way in salvages)


def test_what_each_policy_proves_and_costs() -> None:
    ways = open_ways(but(IN_USE, has_backing=True, snapshots=(MONDAY,)))
    assert [(way.name, way.proof, way.next_backup) for way in ways.values()] == [
        ("rebuild", Proof.EXACT, NextBackup.INCREMENTAL),
        ("snapshot", Proof.SUPERSET, NextBackup.LARGER),
        ("allocated", Proof.SUPERSET, NextBackup.LARGER),
        ("all-dirty", Proof.SUPERSET, NextBackup.WHOLE),
        ("remove", Proof.NONE, NextBackup.FULL),
    ]
    unconditional = [way.name for way in ways.values() if way.condition is None]
    assert unconditional == ["all-dirty", "remove"]
    assert ways["rebuild"].command[5:] == ("--against", "BASE")
    assert ways["allocated"].command[5:] == ("--layer-is-newer",)
    assert ways["remove"].kind is RepairClass.LOSSY


def test_a_bitmap_that_does_not_record_is_not_rebuilt_exactly() -> None:
    """It stands for a time that is over: what differs today says nothing of that."""
    way = open_ways(but(IN_USE, recording=False))["rebuild"]
    assert way.proof is Proof.SUPERSET
    assert "stale bits" in way.does


def test_the_snapshot_is_named_where_there_is_only_one() -> None:
    assert open_ways(but(IN_USE, snapshots=(FRIDAY,)))["snapshot"].command[5:] == ("--snapshot", "2")
    assert open_ways(but(IN_USE, snapshots=(MONDAY, FRIDAY)))["snapshot"].command[5:] == ("--snapshot", "ID")


def test_of_a_foreign_writer_only_a_snapshot_of_that_very_moment_proves_anything() -> None:
    in_use, detached = (open_ways(but(case, snapshots=(MONDAY,)))["snapshot"] for case in (IN_USE, DETACHED))
    assert in_use.condition is not None
    assert detached.condition is not None
    assert "or before, and" in in_use.condition
    assert "at the very moment" in detached.condition
    assert in_use.command[5:] == ("--snapshot", "1")
    assert detached.command[5:] == ("--snapshot", "1", "--snapshot-is-start")


def test_one_that_shares_clusters_is_kept_unless_its_table_is_shared() -> None:
    """Bits that lie where something else does count as dirty; without its table nobody knows where they are."""
    case = Case("vm.qcow2", "daily", State.READY, own=frozenset({"bitmap-clusters-shared"}))
    way = open_ways(case)["repair"]
    assert (way.next_backup, way.proof) == (NextBackup.LARGER, Proof.SUPERSET)
    way = open_ways(but(case, table_is_shared=True))["repair"]
    assert (way.next_backup, way.proof) == (NextBackup.FULL, Proof.NONE)


def test_what_must_hold_of_a_backing_file_is_said_where_there_is_one() -> None:
    alone = open_ways(but(IN_USE, snapshots=(MONDAY,)))["snapshot"].condition
    above = open_ways(but(IN_USE, snapshots=(MONDAY,), has_backing=True))["snapshot"].condition
    assert alone is not None
    assert above is not None
    # An image without a backing file may have had one then, and `rebase` leaves no trace of it.
    assert alone == above
    assert "the backing file is as it was then" in alone


def test_in_use_one_is_removed_alone_and_detached_ones_together() -> None:
    remove = open_ways(but(IN_USE, siblings=3))["remove"]
    assert remove.command == ("qcow2bm", "remove", "vm.qcow2", "daily")
    assert "others" not in remove.does
    remove = open_ways(but(DETACHED, siblings=3))["remove"]
    assert remove.command[:5] == ("qcow2bm", "repair", "vm.qcow2", "--detached", "remove")
    assert remove.command[5:] == ("--allow", "lossy", "--only", "bitmaps"), "and nothing else that is lossy"
    assert "all others in this state (2)" in remove.does
    assert "all 3 bitmaps" in open_ways(but(DETACHED, siblings=3))["all-dirty"].does
    assert "all 1" not in open_ways(IN_USE)["all-dirty"].does


def test_version_2_has_no_bitmaps_to_bring_back() -> None:
    case = but(DETACHED, version=2, has_backing=True, snapshots=(MONDAY,))
    assert list(open_ways(case)) == ["remove"]
    assert set(closed(case)) == {"rebuild", "snapshot", "allocated", "all-dirty"}


# ---- damage ----


def test_a_broken_bitmap_is_quarantined() -> None:
    case = Case("vm.qcow2", "daily", State.BROKEN, own=frozenset({"bitmap-granularity"}))
    way = open_ways(case)["repair"]
    assert way.command == ("qcow2bm", "repair", "vm.qcow2", "--only", "bitmaps")
    assert (way.next_backup, way.proof, way.kind) == (NextBackup.FULL, Proof.NONE, RepairClass.LOSSLESS)
    assert "without an undo file" in way.risk


@pytest.mark.parametrize("code", ["bitmap-name", "bitmap-name-duplicate"])
def test_one_whose_name_is_wrong_keeps_its_bits(code: str) -> None:
    for state in (State.BROKEN, State.READY):
        way = open_ways(Case("vm.qcow2", "", state, own=frozenset({code})))["repair"]
        assert (way.next_backup, way.proof) == (NextBackup.INCREMENTAL, Proof.UNTOUCHED)


def test_one_with_a_name_that_is_too_long_does_not() -> None:
    way = open_ways(Case("vm.qcow2", "n" * 1024, State.BROKEN, own=frozenset({"bitmap-name"})))["repair"]
    assert (way.next_backup, way.proof) == (NextBackup.FULL, Proof.NONE)


def test_a_sound_bitmap_beside_a_broken_one_stays() -> None:
    way = open_ways(Case("vm.qcow2", "daily", State.READY, others=frozenset({"bitmap-flags"})))["repair"]
    assert way.command[-2:] == ("--only", "bitmaps")
    assert (way.next_backup, way.proof) == (NextBackup.INCREMENTAL, Proof.UNTOUCHED)


def test_one_in_use_beside_a_broken_one_needs_both() -> None:
    """The plain `remove` would be refused: the image is damaged."""
    ways = open_ways(but(IN_USE, others=frozenset({"bitmap-flags"})))
    assert list(ways) == ["repair", "rebuild", "all-dirty", "remove"]
    assert ways["repair"].next_backup is NextBackup.UNDECIDED
    assert ways["remove"].command[:5] == ("qcow2bm", "repair", "vm.qcow2", "--in-use", "remove")


def test_the_riskiest_class_decides_the_options() -> None:
    ready = Case("vm.qcow2", "daily", State.READY)
    for codes, options, kind in (
        ({"marked-corrupt"}, (), RepairClass.LOSSLESS),
        ({"marked-corrupt", "bitmap-flags"}, (), RepairClass.LOSSLESS),
        ({"snapshot-count", "bitmap-flags"}, ("--allow", "lossy"), RepairClass.LOSSY),
        ({"snapshot-count", "compression-type-bit"}, ("--allow", "guess"), RepairClass.GUESS),
    ):
        way = open_ways(but(ready, others=frozenset(codes)))["repair"]
        assert (way.command[3:], way.kind) == (options, kind)


def test_a_change_that_was_cut_short_is_undone_and_only_if_that_cannot_be_guessed_at() -> None:
    """What its bits are then nobody knows: half of an old bitmap and half of a new one, it may be."""
    case = Case("vm.qcow2", "daily", State.READY, others=frozenset({"change-cut-short"}))
    ways = open_ways(case)
    assert list(ways) == ["undo", "repair"]
    assert ways["undo"].command == ("qcow2bm", "undo", "vm.qcow2", "JOURNAL")
    assert (ways["repair"].kind, ways["repair"].next_backup) == (RepairClass.GUESS, NextBackup.FULL)


def test_what_no_repair_can_do_is_said_with_what_can_be_done() -> None:
    case = Case("vm.qcow2", "daily", State.READY, others=frozenset({"backing-format-length"}))
    assert open_ways(case) == {}
    assert PROBLEMS["backing-format-length"].advice in closed(case)["repair"]


def test_nobody_knows_of_a_bitmap_in_a_damaged_directory() -> None:
    way = open_ways(Case("vm.qcow2", "daily", None, own=frozenset({"bitmap-directory-size"})))["repair"]
    assert (way.next_backup, way.proof) == (NextBackup.UNDECIDED, Proof.UNKNOWN)
    way = open_ways(Case("vm.qcow2", "daily", None, own=frozenset({"bitmaps-extension-missing"})))["repair"]
    assert (way.next_backup, way.proof) == (NextBackup.FULL, Proof.NONE)


def test_a_broken_one_without_a_known_reason_is_quarantined_all_the_same() -> None:
    way = open_ways(Case("vm.qcow2", "daily", State.BROKEN))["repair"]
    assert way.command[-2:] == ("--only", "bitmaps")
    assert way.next_backup is NextBackup.FULL


def test_a_broken_one_that_is_detached_is_not_worth_mending() -> None:
    case = Case(
        "vm.qcow2", "daily", State.BROKEN, is_attached=False, own=frozenset({"bitmap-flags", "bitmap-detached"})
    )
    assert open_ways(case) == {}
    assert "detached" in closed(case)["repair"]


def test_what_was_cut_short_is_settled_first() -> None:
    ways, _ = ways_out(but(IN_USE, interrupted=True))
    assert [way.name for way in ways][:2] == ["settle", "rebuild"]


def test_a_usable_bitmap_needs_nothing() -> None:
    assert ways_out(Case("vm.qcow2", "daily", State.READY)) == ([], [])


def test_names_that_look_like_options() -> None:
    case = but(IN_USE, image="-vm.qcow2", name="-n")
    assert open_ways(case)["remove"].command == ("qcow2bm", "remove", "--", "./-vm.qcow2", "-n")
    assert open_ways(case)["all-dirty"].command == ("qcow2bm", "repair", "./-vm.qcow2", "--in-use", "all-dirty")


# ---- on a shell's line ----

BYTES = st.binary(min_size=1, max_size=20).filter(lambda data: b"\0" not in data)
NAMES = st.one_of(
    BYTES.map(lambda data: data.decode("utf-8", "surrogateescape")), st.text("ab '\\\"$`\n\x1b\x7f\u202eé")
)


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_a_shell_takes_a_command_as_it_is_printed(words: list[str]) -> None:
    line = shell_line(words)
    assert line.isprintable()
    script = f"printf '%s\\0' {line}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert done.stdout == b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
