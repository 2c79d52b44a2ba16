"""`qcow2bm explain`, and the words about repairs: each code has some, and they agree with its class."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qcow2bm.checks.model import InQemu, RepairClass, Severity
from qcow2bm.checks.problems import PROBLEMS
from qcow2bm.checks.remedies import COSTS, IN_QEMU, REMEDIES, repair_options
from qcow2bm.cli import explain
from qcow2bm.cli.app import COMMANDS
from qcow2bm.repair.model import RepairPolicy, Scope
from qcow2bm.repair.session import repairing
from tests.support.images import Fixture, corrupt_fixtures
from tests.unit.test_cli_completion import complete
from tests.unit.test_cli_json import SCHEMAS
from tests.unit.test_cli_json import check as check_schema

ALL = list(PROBLEMS.values())
ON_REQUEST = {"bitmap-inconsistent", "bitmap-detached", "leak-detached-bitmap", "leak-unproven"}
"""Problems about which a repair does nothing unless a policy is named, or until what caused them is mended."""


# ---- the table ----


def test_every_problem_has_a_remedy_and_no_remedy_is_without_one() -> None:
    assert sorted(REMEDIES) == sorted(PROBLEMS)


def test_no_remedy_is_said_twice() -> None:
    """A code in two rows would hide the first of them."""
    from qcow2bm.checks.remedies import _ROWS

    codes = [code for _, row in _ROWS for code in row.split()]
    assert len(codes) == len(set(codes))


def test_classes_and_what_qemu_does_have_words() -> None:
    assert set(COSTS) == set(RepairClass)
    assert set(IN_QEMU) == set(InQemu)


@pytest.mark.parametrize("problem", ALL, ids=lambda problem: problem.code)
def test_remedy_and_class_agree(problem) -> None:
    does, risk = REMEDIES[problem.code]
    assert does
    assert does.startswith("nothing: ") == (problem.repair is RepairClass.NONE)
    if problem.repair is RepairClass.NONE:
        assert not risk
    if problem.repair in (RepairClass.LOSSY, RepairClass.GUESS):
        assert risk


@pytest.mark.parametrize("problem", ALL, ids=lambda problem: problem.code)
def test_advice_and_class_agree(problem) -> None:
    """The advice names `repair` where it helps, with the option that allows it, and only there."""
    allowed = re.findall(r"--allow (\w+)", problem.advice)
    assert ("qcow2bm repair IMAGE" in problem.advice) == (problem.repair is not RepairClass.NONE)
    assert set(allowed) <= {problem.repair.value}
    assert bool(allowed) == (problem.repair in (RepairClass.LOSSY, RepairClass.GUESS))
    assert (
        repair_options(problem)
        == {
            RepairClass.LOSSLESS: (),
            RepairClass.LOSSY: ("--allow", "lossy"),
            RepairClass.GUESS: ("--allow", "guess"),
            RepairClass.NONE: None,
        }[problem.repair]
    )


@pytest.mark.parametrize("problem", ALL, ids=lambda problem: problem.code)
def test_commands_and_scopes_in_texts_are_there(problem) -> None:
    text = " ".join((problem.advice, *REMEDIES[problem.code]))
    assert set(re.findall(r"qcow2bm ([a-z-]+)", text)) <= {*COMMANDS, "repair"}
    assert set(re.findall(r"--only (\w+)", text)) <= {scope.value for scope in Scope}


def test_nobody_is_sent_to_qemu_img_check_for_a_repair() -> None:
    """Its `-r` is named only where it must not be run, or does not help."""
    for problem in ALL:
        for found in re.finditer(r"(.{0,24})`qemu-img check -r", problem.advice):
            before = found.group(1)
            assert before.endswith(("run no ", "let no ", "file; ", ": a VM or ", "clears the flag; ")), problem.code
        assert "byte 95" not in problem.advice


def test_a_quarantine_is_lossless_with_an_undo_file_and_says_so() -> None:
    quarantined = [code for code, remedy in REMEDIES.items() if "quarantined" in remedy.does]
    assert len(quarantined) > 15
    for code in quarantined:
        assert PROBLEMS[code].repair is RepairClass.LOSSLESS
        assert "without an undo file" in REMEDIES[code].risk


@pytest.mark.parametrize("sample", corrupt_fixtures(), ids=lambda sample: sample.path.name)
def test_the_repair_keeps_to_the_classes_of_the_table(sample: Fixture, tmp_path: Path) -> None:
    """Each step that mends a problem has the class that its row promises; of the rest nobody may expect a step."""
    policy = RepairPolicy(allow=RepairClass.GUESS)
    with repairing(sample.unpack(tmp_path), policy, writable=False) as repair:
        steps = (*repair.plan.steps, *repair.plan.refused)
    for step in steps:
        for code in step.codes:
            promised = {PROBLEMS[code].repair}
            if code == "leak":  # what damage has left behind is no longer told from what was there before
                promised.add(RepairClass.GUESS)
            assert step.kind in promised, (step.title, code)
    mended = {code for step in steps for code in step.codes}
    code = sample.path.name
    assert (code in mended) == (PROBLEMS[code].repair is not RepairClass.NONE and code not in ON_REQUEST)


# ---- the command ----


def test_a_code(run) -> None:
    status, out, err = run("explain", "leak-unproven")
    problem, remedy = PROBLEMS["leak-unproven"], REMEDIES["leak-unproven"]
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"leak-unproven: {problem.title}",
        "  severity  leak: wasted space, no harm to data; `check` ends with status 3",
        f"  means     {problem.meaning}",
        f"  QEMU      {IN_QEMU[InQemu.LEAK]}",
        f"  repair    {remedy.does}",
        f"  class     guess: {COSTS[RepairClass.GUESS]}",
        f"  risk      {remedy.risk}",
        f"  do        {problem.advice}",
    ]


def test_lines_that_do_not_apply_are_left_out(run) -> None:
    assert "\n  risk " not in run("explain", "l1-outside")[1]  # nothing is done
    assert "\n  risk      none\n" in run("explain", "leak")[1]
    assert "may be what it has cut off" in run("explain", "l1-outside")[1]
    assert "may be what it has cut off" not in run("explain", "leak")[1]


def test_every_code_can_be_explained(run) -> None:
    status, out, _ = run("explain", *PROBLEMS)
    assert status == 0
    sections = out.split("\n\n")
    assert [section.partition(":")[0] for section in sections] == list(PROBLEMS)
    for section, problem in zip(sections, ALL, strict=True):
        assert f"\n  class     {problem.repair.value}: " in section
        assert section.rstrip().endswith(problem.advice)


def test_a_code_that_is_named_twice_is_explained_once(run) -> None:
    assert run("explain", "leak", "leak") == run("explain", "leak")


def test_all_codes(run) -> None:
    status, out, err = run("explain", "--list")
    assert (status, err) == (0, "")
    heading, *rows = out.splitlines()
    assert heading.split() == ["CODE", "SEVERITY", "REPAIR", "TITLE"]
    assert [row.split(maxsplit=3) for row in rows] == [
        [problem.code, problem.severity.value, problem.repair.value, problem.title] for problem in ALL
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["copied-l3"], "no problem has the code 'copied-l3'; close to it: copied-l1, copied-l2"),
        (["lost"], "no problem has the code 'lost'; close to it: leak-lost-table, leak-lost-bitmap"),
        (["leak", "\x1b[2J"], "no problem has the code '\\x1b[2J'; `qcow2bm explain --list` shows all there are"),
        ([""], "no problem has the code ''; `qcow2bm explain --list` shows all there are"),
        ([], "name the codes to explain, or --list to see all of them"),
        (["--list", "leak"], "name the codes to explain, or --list to see all of them"),
    ],
)
def test_usage(words: list[str], complaint: str, run) -> None:
    assert run("explain", *words) == (64, "", f"qcow2bm: {complaint}\n")


def test_for_programs(run) -> None:
    status, out, _ = run("explain", "--output", "json", "bitmap-flags", "l1-size")
    assert status == 0
    check_schema("explain", json.loads(out))
    flags, l1_size = json.loads(out)["problems"]
    assert flags == {
        "code": "bitmap-flags",
        "title": "unknown flags of a bitmap",
        "severity": "bitmap",
        "status": Severity.BITMAP.exit_status,
        "meaning": PROBLEMS["bitmap-flags"].meaning,
        "hides": False,
        "qemu-img": "refuses to open the image",
        "in-qemu": IN_QEMU[InQemu.REFUSES],
        "repair": "lossless",
        "remedy": REMEDIES["bitmap-flags"].does,
        "risk": REMEDIES["bitmap-flags"].risk,
        "advice": PROBLEMS["bitmap-flags"].advice,
    }
    assert (l1_size["repair"], l1_size["risk"], l1_size["hides"]) == ("none", None, True)
    listed = json.loads(run("explain", "--list", "--output", "json")[1])
    check_schema("explain", listed)
    assert [one["code"] for one in listed["problems"]] == list(PROBLEMS)


def test_the_schema_knows_the_words_of_the_program() -> None:
    """Enumerations are written twice."""
    known = SCHEMAS["explain.schema.json"]["properties"]["problems"]["items"]["properties"]
    assert known["severity"]["enum"] == [severity.value for severity in Severity]
    assert known["repair"]["enum"] == [repair.value for repair in RepairClass]
    assert known["qemu-img"]["enum"] == [qemu.value for qemu in InQemu]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_lines_fit_a_terminal(columns: int, run, monkeypatch: pytest.MonkeyPatch) -> None:
    long = run("explain", "clusters-shared")[1]
    monkeypatch.setattr(explain, "width", lambda _: columns)
    lines = run("explain", "clusters-shared")[1].splitlines()
    assert all(len(line) <= min(columns, 100) for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == " ".join(long.split())


def test_completion() -> None:
    assert complete("explain", "copied-") == ["copied-l1", "copied-l2"]
    assert complete("explain", "copied-l1", "copied-") == ["copied-l2"]
    assert complete("explain", "no-such") == []
