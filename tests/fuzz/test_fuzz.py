"""Six hundred hostile images that are always the same; `make fuzz` runs a hundred thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2bm.cli.app import COMMANDS
from tests.fuzz.images import hostile
from tests.fuzz.running import CHANGING, READING, try_one
from tests.support.bases import make_bases
from tests.support.damage import Generator

IMAGES = 600
PARTS = 10


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(make_bases(tmp_path_factory.mktemp("bases")))


@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_an_image_holds_a_command_ends_well(generator: Generator, part: int, tmp_path: Path) -> None:
    numbers = range(part * IMAGES // PARTS, (part + 1) * IMAGES // PARTS)
    bad = [wrong for number in numbers if (wrong := try_one(generator, number, tmp_path)) is not None]
    assert not bad, "\n".join(bad)


def test_an_image_is_the_same_each_time(generator: Generator) -> None:
    assert [hostile(generator, number) for number in range(20)] == [hostile(generator, number) for number in range(20)]


def test_every_command_is_tried() -> None:
    """A new command must be put in one of the lists, or among those that read no image that somebody else made."""
    elsewhere = {"explain", "undo", "copy", "rename", "enable", "disable", "set", "unset", "import", "rebuild", "prove"}
    tried = {line.split()[0] for line in (*READING, *CHANGING)} - {"qemu-img"}
    assert set(COMMANDS) == tried | elsewhere
