"""Every problem code has a damaged image that shows it; QEMU's check and ours say of it what origin.toml says."""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qcow2bm
from fixtures.corrupt_recipes import CORRUPTIONS
from qcow2bm.checks.model import Severity
from qcow2bm.checks.problems import PROBLEMS
from tests.support.images import FIXTURES, Fixture, corrupt_fixtures
from tests.support.qemu import StorageDaemon, check

NUMBERS = ("corruptions", "leaks", "check-errors")

BOUNDED = {"snapshot-l1-excessive", "bitmap-tables-excessive"}
"""Where our check stops, because tables take more room than the file has. QEMU goes on, and counts more."""


@dataclass(frozen=True)
class Unpacked:
    """A damaged fixture, its image, and what the QEMU installed here says of it."""

    fixture: Fixture
    image: Path
    said: dict[str, Any]

    @property
    def code(self) -> str:
        return self.image.parent.name

    @property
    def findings(self) -> dict[str, int]:
        return {finding["code"]: finding["count"] for finding in self.fixture.origin["findings"]}


def code_of(fixture: Fixture) -> str:
    return fixture.path.name


@pytest.fixture(scope="module", params=corrupt_fixtures(), ids=code_of)
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unpacked]:
    """One fixture after the other: unpacked and checked by QEMU once, for all tests."""
    fixture: Fixture = request.param
    folder = tmp_path_factory.mktemp("corrupt") / code_of(fixture)
    image = fixture.unpack(folder)
    yield Unpacked(fixture, image, check(image, fixture.secret))
    shutil.rmtree(folder)


def test_every_problem_has_its_fixture_and_no_fixture_is_without_one() -> None:
    folders = {folder.name for folder in (FIXTURES / "corrupt").iterdir()}
    assert folders == set(CORRUPTIONS) == set(PROBLEMS) == {code_of(fixture) for fixture in corrupt_fixtures()}


def test_it_shows_its_problem_and_is_what_its_recipe_says(damaged: Unpacked) -> None:
    assert damaged.code in damaged.findings
    assert damaged.findings == CORRUPTIONS[damaged.code].findings, "make the fixture again"


# ---- bytes ----


def to_bytes(text: str) -> bytes:
    digits, _, times = text.partition("*")
    return bytes.fromhex(digits) * int(times or 1)


def test_the_recipe_changed_the_bytes_that_origin_says(damaged: Unpacked) -> None:
    origin, data = damaged.fixture.origin, bytearray(damaged.image.read_bytes())
    assert hashlib.sha256(data).hexdigest() == origin["after"] != origin["before"]
    size, new_size = origin.get("size", [len(data), len(data)])
    assert len(data) == new_size
    for offset, old, new in origin.get("patches", []):
        there = slice(offset, offset + len(to_bytes(new)))
        assert data[there] == to_bytes(new)
        data[there] = to_bytes(old)
    if size <= new_size and "more-patches" not in origin:
        assert not any(data[size:])
        assert hashlib.sha256(data[:size]).hexdigest() == origin["before"]


def test_it_is_small_and_names_no_machine(damaged: Unpacked) -> None:
    for packed in damaged.fixture.path.glob("*.gz"):
        assert packed.stat().st_size <= 100 * 1024
        assert packed.read_bytes()[4:8] == bytes(4), "gzip keeps a time stamp"
    for file in [*damaged.image.parent.iterdir(), damaged.fixture.path / "origin.toml"]:
        content = file.read_bytes()
        assert not any(path in content for path in (b"/tmp/", b"/work/", b"/home/", b"/root/", b"/var/")), file.name


# ---- checks ----


def test_qemu_checks_it_as_origin_says(damaged: Unpacked) -> None:
    origin, said = damaged.fixture.origin, damaged.said
    assert said["returncode"] == origin["qemu-check"], said
    assert "error" in said or {key: said.get(key, 0) for key in NUMBERS} == {
        key: origin[f"qemu-{key}"] for key in NUMBERS
    }


def test_our_check_finds_what_origin_says(damaged: Unpacked, tmp_path: Path) -> None:
    if damaged.fixture.origin.get("needs") == "writer":
        assert not qcow2bm.check(damaged.image).counts
        copy = Path(shutil.copy(damaged.image, tmp_path))
        with StorageDaemon(copy):
            report = qcow2bm.check(copy, force_share=True)
    else:
        report = qcow2bm.check(damaged.image)
    assert dict(report.counts) == damaged.findings
    assert {finding.code for finding in report.findings} == set(damaged.findings)
    assert all(finding.problem is PROBLEMS[finding.code] for finding in report.findings)
    worst = next(severity for severity in Severity if severity in {PROBLEMS[c].severity for c in damaged.findings})
    assert report.exit_status == worst.exit_status


def test_the_drop_in_says_what_qemu_img_says(damaged: Unpacked) -> None:
    from qcow2bm.cli.qemu_check import run

    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        status = run(["--output=json", str(damaged.image)])
    assert status == damaged.said["returncode"], errors.getvalue()
    assert bool(output.getvalue()) == ("error" not in damaged.said)
    if output.getvalue():
        ours, theirs = (
            {key: said.get(key, 0) for key in NUMBERS} for said in (json.loads(output.getvalue()), damaged.said)
        )
        if damaged.code in BOUNDED:
            assert 0 < ours["corruptions"] < theirs["corruptions"]
            ours["corruptions"] = theirs["corruptions"]
        assert ours == theirs
