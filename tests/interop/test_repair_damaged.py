"""Seeded damaged images, repaired at each class of risk beside QEMU's own repair.

`DAMAGE_ROUNDS=N` repairs N images for each of the bases; `make reliability` does so for docs/reliability.md.
"""

import os
from pathlib import Path

import pytest

from tests.support.bases import ROWS, make_bases
from tests.support.damage import Generator
from tests.support.repairs import CLASSES, look, ours

ROUNDS = int(os.environ.get("DAMAGE_ROUNDS", "1"))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(make_bases(tmp_path_factory.mktemp("bases")))


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_no_repair_makes_it_worse(generator: Generator, number: int, tmp_path: Path) -> None:
    for turn in range(ROUNDS):
        damaged = generator.damaged(100_000 + turn * len(ROWS) + number)
        image = tmp_path / "image.qcow2"
        image.write_bytes(damaged.data)
        before = look(image)
        for allow in CLASSES:
            after = ours(image, allow)
            story = f"seed {damaged.seed}, {damaged.base.name}, {allow.value}: {damaged.applied}"
            assert not after.is_worse_than(before), story
            assert not after.changed_data(before), story
            assert not after.lost_bitmaps(before), story
