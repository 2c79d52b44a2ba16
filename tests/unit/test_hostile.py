"""Images that lie about sizes and places: refused or planned within a bounded time and memory."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import Edit
from qcow2bm.errors import CorruptImageError, ProofError, Qcow2bmError
from qcow2bm.image import proof
from tests.support.qemu import qemu_img
from tests.support.raw import BITMAPS, OFFSET, Raw
from tests.support.recording import Tape
from tests.support.scenes import add_data, create, remove_all, three

COPIED = 1 << 63
SECONDS = 60  # on a shared machine; what is not bounded takes for ever
MEMORY = 96 << 20


def bounded(image: Path, edit: Callable[[Edit], object]) -> Qcow2bmError | None:
    """Plan an edit within `SECONDS` and `MEMORY`; the refusal, if it is one."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with qcow2bm.open(image) as opened:
            draft = opened.draft()
            edit(draft)
            draft.plan()
    except Qcow2bmError as error:
        return error
    else:
        return None
    finally:
        assert time.monotonic() - start < SECONDS
        assert tracemalloc.get_traced_memory()[1] < MEMORY
        tracemalloc.stop()


def add_many(edit: Edit) -> None:
    """Takes every hole there is."""
    for number in range(40):
        edit.add(f"new {number}", recording=False)


def test_an_l1_table_whose_entries_all_name_one_l2_table_is_walked_once(tmp_path: Path) -> None:
    image = three(tmp_path)
    raw = Raw.load(image)
    entries, end = 1 << 16, len(raw.data)
    end += -end % raw.cluster_size
    raw.data += bytes(end - len(raw.data)) + raw.data[raw.number(40) :][:8] * entries
    raw.put(40, end)
    raw.put(36, entries, 4)
    raw.save(image)
    tape = Tape()
    with qcow2bm.open(image, open_file=tape.open) as opened:
        draft = opened.draft()
        draft.disable("a")
        draft.plan()
    table = raw.number(raw.number(40)) & OFFSET
    assert sum(1 for offset, _ in tape.reads if offset == table) == 1
    assert tape.bytes_read < entries * 8 + 16 * raw.cluster_size
    assert bounded(image, add_data) is None


@pytest.mark.parametrize("small", [1 << 17, 0], ids=["plain", "numpy"])
def test_an_l2_table_that_names_itself_ends_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(proof, "_SMALL", small)
    image = three(tmp_path)
    raw = Raw.load(image)
    table = raw.number(raw.number(40)) & OFFSET
    for at in range(table, table + raw.cluster_size, 8):
        raw.put(at, table | COPIED)
    raw.save(image)
    bounded(image, remove_all)
    raw.set_refcount(table, 0)
    raw.save(image)
    assert isinstance(bounded(image, add_many), ProofError)


def test_an_l1_table_that_names_itself_is_refused_or_harmless(tmp_path: Path) -> None:
    image = three(tmp_path)
    raw = Raw.load(image)
    raw.put(raw.number(40), raw.number(40) | COPIED)
    raw.save(image)
    bounded(image, remove_all)
    raw.set_refcount(raw.number(40), 0)
    raw.save(image)
    assert isinstance(bounded(image, add_many), ProofError)


CLAIMS = (
    ("l1_size", lambda raw: raw.put(36, (32 << 20) // 8, 4)),
    ("l1 above 32 MiB", lambda raw: raw.put(36, 0xFFFFFFFF, 4)),
    ("l1 offset", lambda raw: raw.put(40, 1 << 50)),
    ("refcount table clusters", lambda raw: raw.put(56, 128, 4)),
    ("refcount table offset", lambda raw: raw.put(48, 1 << 50)),
    ("refcount block", lambda raw: raw.put(raw.number(48), 1 << 50)),
    ("snapshots", lambda raw: (raw.put(60, 65536, 4), raw.put(64, 1 << 40))),
    ("snapshots within", lambda raw: (raw.put(60, 65536, 4), raw.put(64, raw.number(40)))),
    ("L2 table", lambda raw: raw.put(raw.number(40), 1 << 50)),
    ("directory size", lambda raw: raw.put(raw.extensions()[BITMAPS][0] + 8, 60 << 20)),
    ("directory offset", lambda raw: raw.put(raw.extensions()[BITMAPS][0] + 16, 1 << 50)),
    ("bitmaps", lambda raw: raw.put(raw.extensions()[BITMAPS][0], 65535, 4)),
    ("name and extra data", lambda raw: raw.put(raw.directory[0] + 20, 0xFFFFFFFF, 4)),
    ("bitmap table size", lambda raw: raw.put(raw.directory[0] + 8, 0xFFFFFFFF, 4)),
    ("bitmap table offset", lambda raw: raw.put(raw.directory[0], 1 << 50)),
    ("bitmap data", lambda raw: raw.put(raw.bitmap_data("a")[0], 1 << 50)),
)


@pytest.mark.parametrize("claim", CLAIMS, ids=[name for name, _ in CLAIMS])
@pytest.mark.parametrize("sparse", [False, True], ids=["small file", "sparse TiB"])
def test_claims_beyond_the_end_cost_no_time_and_no_memory(
    tmp_path: Path, claim: tuple[str, Callable[[Raw], object]], sparse: bool
) -> None:
    image = three(tmp_path)
    raw = Raw.load(image)
    claim[1](raw)
    raw.save(image)
    if sparse:
        os.truncate(image, 1 << 40)
    error = bounded(image, remove_all)
    if not sparse:
        assert isinstance(error, Qcow2bmError)


def test_a_snapshots_l1_table_of_32_gib_is_refused(tmp_path: Path) -> None:
    image = three(tmp_path)
    qemu_img("snapshot", "-c", "s", image)
    raw = Raw.load(image)
    raw.put(raw.number(64) + 8, 0xFFFFFFFF, 4)
    raw.save(image)
    assert isinstance(bounded(image, remove_all), CorruptImageError)
    os.truncate(image, 1 << 40)
    assert isinstance(bounded(image, remove_all), CorruptImageError)


def test_an_image_of_small_clusters_with_a_large_disk_is_planned_in_bounded_time(tmp_path: Path) -> None:
    image = create(tmp_path, "8G", "cluster_size=512")
    assert bounded(image, add_data) is None
