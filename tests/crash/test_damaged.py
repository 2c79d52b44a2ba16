"""Power cuts in the middle of repairs of seeded damage: the next writer finds the damaged image or the repaired one.

`DAMAGE_ROUNDS=N` cuts N repairs of images of each of the bases short.
"""

from __future__ import annotations

import contextlib
import os
import random
from itertools import islice
from pathlib import Path

import pytest

from qcow2bm.checks.view import opened
from qcow2bm.errors import NotQcow2Error, UnsupportedImageError
from qcow2bm.repair.model import RepairPolicy
from qcow2bm.repair.session import repairing
from tests.crash.choosing import sampled
from tests.crash.disk import Folder, states
from tests.crash.recorder import recorded
from tests.support.bases import ROWS, make_bases
from tests.support.damage import Generator
from tests.support.raw import Raw
from tests.support.repairs import CLASSES

ROUNDS = int(os.environ.get("DAMAGE_ROUNDS", "1"))
STATES = 24
"""Of one repair."""
_LARGEST = 8 << 20
"""Bytes of an image: each state is a copy."""


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(make_bases(tmp_path_factory.mktemp("bases")))


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_the_next_writer_finds_the_damaged_image_or_the_repaired_one(
    generator: Generator, number: int, tmp_path: Path
) -> None:
    image, undo = tmp_path / "image.qcow2", tmp_path / "undo"
    for turn in range(ROUNDS):
        damaged = generator.damaged(500_000 + turn * len(ROWS) + number)
        raw = Raw(damaged.data)
        if len(raw.data) > _LARGEST or raw.number(4, 4) == 2:  # of which nobody knows who has used it since
            continue
        allow = CLASSES[(turn + number) % len(CLASSES)]
        image.write_bytes(damaged.data)
        before = Folder.read(tmp_path)
        with (
            contextlib.suppress(NotQcow2Error, UnsupportedImageError),  # there is nothing that could be repaired
            recorded(tmp_path) as ops,
            repairing(image, RepairPolicy(allow=allow, keeps_undo=True)) as repair,
        ):
            if repair.plan.plan:
                repair.commit(undo=undo if number % 2 else None)
        after = image.read_bytes()
        found = list(states(before, ops, 512, sampled(damaged.seed)))
        random.Random(damaged.seed).shuffle(found)
        for state in islice(found, STATES):
            story = f"seed {damaged.seed}, {damaged.base.name}, {allow.value}, {damaged.applied}: {state.name}"
            state.folder.write(tmp_path)
            marked = Raw.load(image).is_marked
            with opened(image, writable=True):
                pass
            now = image.read_bytes()
            assert not Raw(now).is_marked, story
            assert now in (damaged.data, after) or (not marked and now.startswith(damaged.data)), story
        for path in tmp_path.iterdir():
            path.unlink()
