"""Whatever is done to an image, a check ends with a report, writes nothing, and both kinds of census agree on it."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.checks import runner, walk
from qcow2bm.checks.problems import PROBLEMS
from qcow2bm.errors import NotQcow2Error, UnsupportedVersionError
from tests.support.bases import lay_out, make_bases
from tests.support.damage import Generator

if TYPE_CHECKING:
    from pathlib import Path

    from qcow2bm.checks.model import Report
    from tests.support.damage import Damaged

SECONDS = 10
EVERYTHING = 1 << 60


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(make_bases(tmp_path_factory.mktemp("bases")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def checked(image: Path, *, plainly: bool) -> Report | str:
    """The report, by one kind of census; or the name of the refusal."""
    limit = EVERYTHING if plainly else -1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(walk, "PLAIN_ENTRIES", limit)
        patched.setattr(walk, "PLAIN_BLOCKS", limit)
        try:
            return runner.check(image, owners=True, limit=None)
        except (NotQcow2Error, UnsupportedVersionError) as error:
            return type(error).__name__


def bytes_of(image: Path) -> str:
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@given(st.integers(0, 1 << 40))
def test_a_damaged_image_gets_one_report(generator: Generator, folder: Path, seed: int) -> None:
    damaged: Damaged = generator.damaged(seed)
    image = lay_out(damaged.base, damaged.data, folder)
    before, start = bytes_of(image), time.monotonic()
    plain, bulk = checked(image, plainly=True), checked(image, plainly=False)
    assert time.monotonic() - start < 2 * SECONDS, damaged.name
    assert bytes_of(image) == before, damaged.name
    if isinstance(plain, str) or isinstance(bulk, str):
        assert plain == bulk, damaged.name
        return
    assert plain.counts == bulk.counts, damaged.name
    assert plain.allocation == bulk.allocation, damaged.name
    # Neighbours are joined as they come, so a mismatch and an overlap of the same clusters may change places.
    assert sorted(plain.findings, key=str) == sorted(bulk.findings, key=str), damaged.name
    assert all(PROBLEMS[finding.code] is finding.problem for finding in plain.findings)
    assert sum(plain.counts.values()) == sum(finding.count for finding in plain.findings), damaged.name
    assert plain.counts or damaged.applied, "an undamaged image is clean"
