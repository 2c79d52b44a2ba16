"""Hostile images that are always the same: six hundred, and a hundred for QEMU's word; `make fuzz` runs many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2bm import __main__
from qcow2bm.cli.app import COMMANDS
from tests.fuzz import verdict
from tests.fuzz.running import CHANGING, READING, Material, case, try_one

IMAGES = 600
JUDGED = 100
PARTS = 10


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material.make(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_an_image_holds_a_command_ends_well(material: Material, part: int, tmp_path: Path) -> None:
    numbers = range(part * IMAGES // PARTS, (part + 1) * IMAGES // PARTS)
    bad = [wrong for number in numbers if (wrong := try_one(material, number, tmp_path)) is not None]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("part", range(PARTS))
def test_qemu_never_thinks_otherwise(material: Material, part: int) -> None:
    numbers = range(part * JUDGED // PARTS, (part + 1) * JUDGED // PARTS)
    bad = verdict.try_many(material.generator, numbers)
    assert not bad, "\n".join(bad)


def test_qemu_s_other_opinion_is_noticed(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that calls everything clean and says that everything is done."""
    monkeypatch.setattr(verdict, "run_here", lambda _words: ("", 0))
    bad = verdict.try_many(material.generator, range(8))
    assert any("`check`: clean, but QEMU's check says" in wrong for wrong in bad)


def test_an_image_is_the_same_each_time(material: Material) -> None:
    assert [case(material, number) for number in range(60)] == [case(material, number) for number in range(60)]


def test_every_command_is_tried(material: Material) -> None:
    """A new command must be put in one of the lists, or among those that read no file."""
    reads_no_file = {"explain"}
    with_a_file = [line for side in material.sides for line in (*side.reading, *side.changing)]
    tried = {line.split()[0] for line in (*READING, *CHANGING, *with_a_file)} - {"qemu-img"}
    assert set(COMMANDS) == tried | reads_no_file


def test_a_file_beside_an_image_is_sound_before_it_is_damaged(material: Material, tmp_path: Path) -> None:
    """Else nothing behind the first look at it would ever be tried."""
    for side in material.sides:
        for line in (*side.reading, *side.changing):
            image, file = tmp_path / "image.qcow2", tmp_path / side.name
            image.write_bytes(side.image)
            file.write_bytes(side.data)
            words = [word.format(image=image, side=file, folder=tmp_path) for word in line.split()]
            if "qcow2" not in line.partition("--against-format ")[2]:
                # A journal is in the way; a byte is not marked; a plan is for a file with one time stamp.
                verdicts = {"info": (1,), "prove": (0, 2), "repair": (0, 1, 3)}
                assert __main__.main(words) in verdicts.get(line.split()[0], (0, 3, 4)), line
            for left in tmp_path.iterdir():
                left.unlink()
