"""Bits that outlive their image, in memory or in a temporary file."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import tempfile
from pathlib import Path

import pytest

from qcow2bm.bitmap.bits import BitVector
from qcow2bm.bitmap.chunks import ONES, ZEROES
from qcow2bm.chain import held as module
from qcow2bm.chain.held import held
from qcow2bm.errors import ImageIOError
from qcow2bm.image.spill import Spill
from tests.fuzz.alone import Alone
from tests.fuzz.monster_parts import sound_image
from tests.fuzz.monsters import MONSTERS
from tests.fuzz.running import MEMORY

CHUNK = 64
RUNS = [(3, 5), (512, 1024), (1030, 1031), (2000, 2047)]


def bits() -> BitVector:
    """Chunks of all kinds; the last one is cut short."""
    vector = BitVector.marked(2047, CHUNK, RUNS)
    assert vector.chunks[1] is ONES
    return vector


@pytest.mark.parametrize("in_memory", [1 << 20, CHUNK, 0])
def test_held_bits_are_the_same_bits(monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    monkeypatch.setattr(module, "_IN_MEMORY", in_memory)
    kept = held(bits())
    assert list(kept.runs()) == RUNS
    assert (kept.length, kept.chunk_bytes) == (2047, CHUNK)
    assert kept.chunks[1] is ONES
    assert held(BitVector.filled(100, CHUNK)).chunks[0] is ZEROES


def temporary_files() -> int:
    """How many files are open that have no name."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(link.readlink()).endswith("(deleted)")
    return count


def test_the_temporary_file_goes_with_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IN_MEMORY", 0)
    before = temporary_files()
    kept = held(bits())
    assert temporary_files() == before + 1
    assert list(kept.runs()) == RUNS
    del kept
    gc.collect()
    assert temporary_files() == before


def test_where_there_is_no_room_it_is_said_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_spill: Spill, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_IN_MEMORY", 0)
    monkeypatch.setattr(Spill, "put", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ImageIOError, match=f"kept in {tmp_path}: No space left on device"):
        held(bits())


def test_a_proof_does_not_go_through_four_thousand_million_bits_one_by_one(tmp_path: Path) -> None:
    """They are 512 MiB, and would not be held in memory either."""
    monster = next(monster for monster in MONSTERS if monster.name == "bitmap_of_dense_bits")
    image, zeroes = tmp_path / "image.qcow2", tmp_path / "zeroes"
    monster.lay_out(sound_image(tmp_path), image)
    zeroes.write_bytes(bytes(1 << 20))
    with Alone() as alone:
        ended = alone.run("prove", image, "a", "--against", zeroes)
    assert ended.status == 0, ended.said
    assert "1073741824 ranges" in ended.said
    assert ended.memory < MEMORY
