"""`qcow2bm repair` and `check -r` as a user types them."""

import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from qcow2bm.checks.model import RepairClass, Severity
from qcow2bm.repair.model import RepairPolicy, Salvage, Scope
from tests.support.images import FIXTURES, fixture
from tests.support.raw import Raw
from tests.support.scenes import three

SCHEMA = json.loads((FIXTURES.parent / "docs" / "schemas" / "repair.schema.json").read_text())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def damaged(tmp_path: Path):
    def unpack(code: str) -> Path:
        return fixture(f"corrupt/{code}").unpack(tmp_path)

    return unpack


# ---- the plan and the repair ----


def test_a_dry_run_shows_the_plan_and_writes_nothing(damaged, run) -> None:
    image = damaged("clusters-shared")
    before = digest(image), sorted(image.parent.iterdir())
    result = run("repair", image, "--dry-run")
    assert result.status == 3  # as if it were done: a leak that is not given back without a guess
    for text in (
        "copy 1 shared clusters apart",
        "lossless",
        "L2 entry 8",
        "needs --allow guess",
        "nothing was written",
    ):
        assert text in result.out
    assert (digest(image), sorted(image.parent.iterdir())) == before


def test_a_repair_names_its_undo_file_which_brings_every_byte_back(damaged, run) -> None:
    image = damaged("clusters-shared")
    before = digest(image)
    result = run("repair", image, "--yes")
    undo = image.with_name(image.name + ".qcow2bm-undo")
    assert result.status == 3
    assert str(undo) in result.out
    assert digest(image) != before
    assert run("undo", image, undo).status == 0
    assert digest(image) == before


def test_a_second_repair_takes_another_name_for_its_undo_file(damaged, run) -> None:
    image = damaged("leak-lost-table")
    first = image.with_name(image.name + ".qcow2bm-undo")
    first.write_bytes(b"of an earlier repair")
    assert run("repair", image, "--yes", "--allow", "guess").status == 0
    assert first.read_bytes() == b"of an earlier repair"
    assert first.with_name(first.name + "-2").exists()


def test_nothing_to_do(damaged, run) -> None:
    image = fixture("office-week").unpack(damaged("leak").parent)
    before = digest(image)
    result = run("repair", image, "--yes")
    assert (result.status, digest(image)) == (0, before)
    assert "nothing to repair" in result.out
    assert not list(image.parent.glob("*undo*"))


def test_json_is_what_the_schema_says(damaged, run) -> None:
    for code, options in (("bitmap-type", []), ("l2-outside", ["--allow", "lossy"]), ("header-cluster-bits", [])):
        for more in (["--dry-run"], ["--yes"]):
            result = run("repair", damaged(code), "--output", "json", *options, *more)
            document = json.loads(result.out)
            Draft202012Validator(SCHEMA).validate(document)
            assert document["status"] == result.status
            assert document["changed"] is (more == ["--yes"] and bool(document["steps"]))


def test_lossy_steps_name_the_guest_ranges(damaged, run) -> None:
    document = json.loads(run("repair", damaged("data-outside"), "-n", "--allow", "lossy", "--output", "json").out)
    (step,) = document["steps"]
    assert (step["class"], step["guest-ranges"]) == ("lossy", [{"offset": 262144, "length": 65536}])


@pytest.mark.parametrize("code", ["l2-outside", "l2-unaligned", "l1-entry-reserved"])
def test_the_guest_ranges_of_a_step_end_with_the_disk(code: str, damaged, run) -> None:
    """An L2 table maps far more than there is of a small disk."""
    image = damaged(code)
    size = int.from_bytes(image.read_bytes()[24:32], "big")
    result = run("repair", image, "-n", "--allow", "guess", "--output", "json")
    ranges = [where for step in json.loads(result.out)["steps"] for where in step["guest-ranges"]]
    assert ranges
    assert all(0 < where["length"] <= size - where["offset"] for where in ranges)
    assert "+512 MiB" not in run("repair", image, "-n", "--allow", "guess").out


def test_without_an_undo_file_a_quarantine_is_lossy(damaged, run) -> None:
    image = damaged("bitmap-type")
    refused = run("repair", image, "--yes", "--no-undo")
    assert (refused.status, "needs --allow lossy" in refused.out) == (4, True)
    assert run("repair", image, "--yes", "--no-undo", "--allow", "lossy").status == 0
    assert not list(image.parent.glob("*undo*"))


def test_only_bitmaps_mends_nothing_else(damaged, run) -> None:
    image = damaged("refcount-too-low")
    before = digest(image)
    result = run("repair", image, "--yes", "--only", "bitmaps")
    assert (result.status, digest(image)) == (2, before)
    assert "not what was asked for" in result.out


# ---- saved plans ----


def test_a_saved_plan_is_carried_out_once_and_on_that_image_only(damaged, run, tmp_path: Path) -> None:
    image, plan = damaged("bitmap-type"), tmp_path / "plan.json"
    copy = Path(shutil.copy2(image, tmp_path / "copy.qcow2"))
    os.utime(copy, ns=(1, 1))
    assert run("repair", image, "--plan", plan).status == 0
    assert json.loads(plan.read_text())["plan"]["steps"]
    assert run("repair", copy, "--apply", plan, "--yes").status == 1, "another image, or a touched one"
    assert run("repair", image, "--apply", plan, "--yes").status == 0
    again = run("repair", image, "--apply", plan, "--yes")
    assert again.status == 1
    assert "changed since the plan was made" in again.err


def test_an_image_that_changed_since_the_plan_is_refused_untouched(damaged, run, tmp_path: Path) -> None:
    image, plan = damaged("leak"), tmp_path / "plan.json"
    run("repair", image, "--plan", plan)
    with image.open("r+b") as file:
        file.seek(0x50000)
        file.write(b"guest data")
    before = digest(image)
    assert run("repair", image, "--apply", plan, "--yes").status == 1
    assert digest(image) == before


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"kind": "qcow2bm repair plan", "version": 1}', "\xff"])
def test_what_is_no_saved_plan_is_refused(damaged, run, tmp_path: Path, text: str) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(text, encoding="latin-1")
    result = run("repair", damaged("leak"), "--apply", plan, "--yes")
    assert result.status == 64
    assert "no plan" in result.err


def test_an_edited_plan_cannot_write_anything_else(damaged, run, tmp_path: Path) -> None:
    image, plan = damaged("l2-outside"), tmp_path / "plan.json"
    run("repair", image, "--plan", plan)
    document = json.loads(plan.read_text())
    document["policy"]["allow"] = "guess"
    plan.write_text(json.dumps(document))
    before = digest(image)
    assert run("repair", image, "--apply", plan, "--yes").status == 1
    assert digest(image) == before


def test_a_plan_is_not_written_over_a_file(damaged, run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("something else")
    assert run("repair", damaged("leak"), "--plan", plan).status == 64
    assert plan.read_text() == "something else"


# ---- options that contradict each other ----


@pytest.mark.parametrize(
    "options",
    [
        ["--undo", "x", "--no-undo", "--yes"],
        ["--interactive", "--yes"],
        ["--interactive", "--output", "json"],
        ["--in-use", "rebuild", "--yes"],
        ["--against", "x", "--yes"],
        ["--against-format", "raw", "--yes"],
        ["--in-use", "snapshot", "--yes"],
        ["--snapshot", "1", "--yes"],
        ["--snapshot-is-start", "--yes"],
        ["--layer-is-newer", "--yes"],
        ["--in-use", "all-dirty", "--only", "leaks", "--yes"],
        ["--in-use", "remove", "--yes"],
        ["--apply", "x", "--allow", "lossy", "--yes"],
        ["--apply", "x", "--dry-run"],
        ["--apply", "x", "--interactive"],
        ["--stale", "--yes"],
        ["--bitmap", "daily", "--yes"],
        ["--output", "json"],
        [],  # nobody can be asked
    ],
)
def test_contradictions_are_refused_up_front(damaged, run, options: list[str]) -> None:
    image = damaged("bitmap-inconsistent")
    before = digest(image)
    result = run("repair", image, *options)
    assert (result.status, result.out) == (64, "")
    assert "Traceback" not in result.err
    assert digest(image) == before


# ---- on a terminal ----


def on_a_terminal(answers: str, *words: str | Path) -> tuple[int, str]:
    """Run the program on a pseudo terminal that types the answers; status, and all that it showed."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "qcow2bm", *words], stdin=follower, stdout=follower, stderr=follower, close_fds=True
    )
    os.close(follower)
    os.write(leader, answers.encode())
    shown = b""
    try:
        while piece := os.read(leader, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    return process.wait(), shown.decode()


def test_it_asks_once_and_no_is_no(damaged) -> None:
    image = damaged("leak")
    before = digest(image)
    status, shown = on_a_terminal("n\n", "repair", image)
    assert (status, digest(image)) == (3, before)
    assert shown.count("[y/N]") == 1
    status, shown = on_a_terminal("y\n", "repair", image)
    assert (status, digest(image) == before) == (0, False)


def test_it_asks_about_every_step(damaged) -> None:
    image = damaged("bitmap-name-duplicate")
    with image.open("r+b") as file:  # a second problem: the dirty bit
        file.seek(79)
        file.write(b"\1")
    status, shown = on_a_terminal("n\ny\n", "repair", image, "--interactive")
    assert shown.count("Do this? [y/N]") == 2
    assert "declined" in shown
    assert status == 4


# ---- check -r ----


@pytest.mark.parametrize(
    ("mend", "code", "status"),
    [("leaks", "leak", 0), ("leaks", "bitmap-type", 4), ("bitmaps", "bitmap-type", 0), ("all", "refcount-too-low", 0)],
)
def test_check_repairs_what_it_is_told_to(damaged, run, mend: str, code: str, status: int) -> None:
    image = damaged(code)
    assert run("check", "-r", mend, image).status == status


def test_check_repairs_each_image_by_itself(damaged, run, tmp_path: Path) -> None:
    image = damaged("leak")
    result = run("check", "-r", "all", "--output", "json", image, tmp_path / "missing")
    good, missing = json.loads(result.out)["images"]
    assert (result.status, good["status"], good["changed"], missing["status"]) == (1, 0, True, 1)
    assert run("check", "-r", "all", "-U", image).status == 64


def test_a_policy_is_the_same_after_it_was_saved(tmp_path: Path) -> None:
    every = RepairPolicy(
        allow=RepairClass.GUESS,
        only=frozenset({Scope.BITMAPS, Scope.LEAKS}),
        in_use=Salvage.REBUILD,
        detached=Salvage.SNAPSHOT,
        bitmaps=frozenset({"a", "\udcff"}),
        against=tmp_path / "base",
        against_format="qcow2",
        data_file=tmp_path / "data",
        snapshot="1",
        layer_is_newer=True,
        snapshot_is_start=True,
        keep_stale=False,
        keeps_undo=False,
    )
    assert all(getattr(every, field.name) != field.default for field in fields(every)), "every field off its default"
    for policy in (every, RepairPolicy()):
        assert RepairPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_the_schema_knows_the_words_of_the_program() -> None:
    step = SCHEMA["properties"]["steps"]["items"]["properties"]
    assert set(step["class"]["enum"]) | {"none"} == {kind.value for kind in RepairClass}
    assert set(step["scope"]["enum"]) == {scope.value for scope in Scope} | {None}
    assert set(SCHEMA["properties"]["verdict"]["enum"]) == {severity.value for severity in Severity} | {"clean"}


def test_a_bitmap_that_is_not_there_is_named(damaged, run) -> None:
    result = run("repair", damaged("bitmap-inconsistent"), "--in-use", "all-dirty", "--bitmap", "nosuch", "--yes")
    assert (result.status, "no bitmap is called 'nosuch'" in result.err) == (1, True)


def test_a_base_that_is_not_there_is_an_error(damaged, run, tmp_path: Path) -> None:
    image, words = damaged("bitmap-inconsistent"), ["--in-use", "rebuild", "--against", tmp_path / "nosuch"]
    result = run("repair", image, *words, "--dry-run")
    assert result.status == 1
    assert "nosuch" in result.err


@pytest.mark.parametrize("form", ["human", "json"])
def test_a_repair_that_cannot_be_reported_says_whether_it_is_done(tmp_path: Path, form: str) -> None:
    """A plan that cannot be shown is not carried out; but what was done must not look as if nothing was written."""
    image = three(tmp_path)
    raw = Raw.load(image)
    raw.set_refcount(raw.number(40), 0)
    raw.save(image)
    before = image.read_bytes()
    words = [sys.executable, "-m", "qcow2bm", "repair", str(image), "--yes", "--no-undo", "--output", form]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(words, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ("the change is done" in ended.stderr) == (form == "json")
    assert (image.read_bytes() != before) == (form == "json")
