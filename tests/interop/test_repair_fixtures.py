"""Every damaged fixture is repaired and checked again, at each class of risk, beside QEMU's own repair."""

import hashlib
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qcow2bm
from qcow2bm.checks.model import RepairClass
from qcow2bm.checks.problems import PROBLEMS
from tests.support.images import FIXTURES, Fixture, corrupt_fixtures
from tests.support.qemu import check, guest_digest, qemu_img
from tests.support.raw import Raw
from tests.support.tools import QemuError

RESIDUE: dict[str, dict[str, dict[str, int]]] = tomllib.loads((FIXTURES / "residue.toml").read_text())
"""Code to class of risk to what a check finds after the repair; what is missing is clean."""

BADNESS = {0: 0, 3: 0, 2: 1, 1: 2, 63: 2}
"""Exit statuses of `qemu-img check` from good to bad. Leaks that QEMU frees may be what damage has cut off."""


@dataclass(frozen=True)
class Case:
    """A damaged fixture, and what its guest reads, if QEMU can read it."""

    fixture: Fixture
    image: Path
    digest: str | None
    qemu_before: dict[str, Any]
    qemu_after: dict[str, Any]

    @property
    def code(self) -> str:
        return self.fixture.path.name


def digest(image: Path, secret: str | None) -> str | None:
    try:
        return guest_digest(image, secret)
    except QemuError:
        return None


@pytest.fixture(scope="module", params=corrupt_fixtures(), ids=lambda fixture: fixture.path.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    fixture: Fixture = request.param
    folder = tmp_path_factory.mktemp("repair")
    image = fixture.unpack(folder)
    theirs = Path(shutil.copy(image, folder / "theirs.qcow2"))
    if fixture.secret is None:
        qemu_img("check", "-q", "-r", "all", "-f", "qcow2", theirs, check=False)
    after = check(theirs, fixture.secret)
    theirs.unlink()
    yield Case(fixture, image, digest(image, fixture.secret), check(image, fixture.secret), after)
    shutil.rmtree(folder)


def test_the_residue_is_stated_for_problems_that_there_are() -> None:
    assert set(RESIDUE) <= set(PROBLEMS)
    assert all(set(left) <= set(PROBLEMS) for classes in RESIDUE.values() for left in classes.values())


def classes(code: str) -> list[str]:
    """The classes of risk that come to different ends."""
    residue = RESIDUE.get(code, {})
    lossless, lossy, guess = (residue.get(name, {}) for name in ("lossless", "lossy", "guess"))
    return [
        "lossless",
        *(["lossy"] if lossy not in (lossless, guess) else []),
        *(["guess"] if guess != lossless else []),
    ]


def test_a_repair_leaves_its_stated_residue_and_can_be_undone(case: Case, tmp_path: Path) -> None:
    for allow in classes(case.code):
        require_repaired(case, allow, tmp_path / allow)


def require_repaired(case: Case, allow: str, folder: Path) -> None:
    shutil.copytree(case.image.parent, folder)  # with its backing file, or data file
    image, undo = folder / case.image.name, folder / "undo"
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    expected = RESIDUE.get(case.code, {}).get(allow, {})
    with qcow2bm.repairing(image, qcow2bm.RepairPolicy(allow=RepairClass(allow))) as repair:
        plan = repair.plan
        report = repair.commit(undo=undo)
    assert dict(report.counts) == dict(plan.after.counts) == expected
    # What QEMU's repair gives up without asking, ours gives up only if it may.
    other = case.qemu_before if allow == "lossless" else case.qemu_after
    assert BADNESS[check(image, case.fixture.secret)["returncode"]] <= BADNESS[other["returncode"]]
    if case.digest is not None and not any(step.guest for step in plan.steps):
        assert digest(image, case.fixture.secret) == case.digest
    again = qcow2bm.plan_repair(image, qcow2bm.RepairPolicy(allow=RepairClass(allow)))
    assert not again.steps or set(expected) & {"leak", "leak-lost-table"}, "a second repair finds nothing to do"
    if plan.steps:
        has_data_file = bool(Raw.load(image).number(72) & 4)  # to which a guest writes unseen
        qcow2bm.undo(image, undo, force=has_data_file)
    assert hashlib.sha256(image.read_bytes()).hexdigest() == before
