"""Two directory entries that name one bitmap table: the second is broken, and nothing may be freed under the first."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import State
from qcow2bm.errors import ProofError
from tests.support.raw import BITMAPS, Raw
from tests.support.scenes import three


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """An image whose second bitmap names the first one's table."""
    image = three(tmp_path)
    with qcow2bm.open(image) as opened:
        first = opened.bitmaps["a"].stored
        table, place = first.entry.bitmap_table_offset, first.entry.size
    raw = Raw.load(image)
    start, _ = raw.extensions()[BITMAPS]
    directory = raw.number(start + 16)
    raw.data[directory + place : directory + place + 8] = table.to_bytes(8, "big")
    raw.save(image)
    return image


def test_the_second_bitmap_is_broken_and_its_bits_are_not_read(shared: Path) -> None:
    with qcow2bm.open(shared) as opened:
        first, second, *_ = opened.bitmaps
        assert (first.state, second.state) == (State.READY, State.BROKEN)
        assert second.fault == "its table is another bitmap's"
        assert second.bytes_on_disk == 0


@pytest.mark.parametrize("which", [0, 1])
def test_neither_is_removed_from_under_the_other(shared: Path, which: int) -> None:
    before = shared.read_bytes()
    with qcow2bm.open(shared, writable=True) as opened, pytest.raises(ProofError), opened.edit() as edit:
        edit.remove(opened.bitmaps.names[which])
    assert shared.read_bytes() == before
