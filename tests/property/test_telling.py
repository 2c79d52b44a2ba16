"""Wrong entries that are judged as a whole count as much as those that are told one by one."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcow2bm.__main__ import main
from qcow2bm.checks import runner, view, walk
from qcow2bm.checks.passes import copied
from qcow2bm.format.snapshot_table import parse_snapshots
from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import OFFSET, Raw

SHAPES = {
    "plain": ("cluster_size=4k",),
    "version 2": ("cluster_size=4k", "compat=0.10"),
    "extended L2": ("cluster_size=16k", "extended_l2=on"),
    "data file": ("cluster_size=4k", "data_file=data.raw"),
    "raw data file": ("cluster_size=4k", "data_file=data.raw", "data_file_raw=on"),
    "extended L2 and a data file": ("cluster_size=16k", "extended_l2=on", "data_file=data.raw"),
}
TABLES = ("l1", "l2", "refcounts", "bitmap")

_EXAMPLES = settings().max_examples
FLAGS = st.sets(st.sampled_from([0, 1, 2, 8, 9, 56, 61, 62, 63])).map(lambda bits: sum(1 << bit for bit in bits))
PLACES = st.one_of(
    st.integers(0, 80).map(lambda cluster: cluster << 12),
    st.integers(0, 1 << 20).map(lambda sector: sector << 9),
    st.sampled_from([1 << 40, 1 << 55, OFFSET]),
)
ENTRIES = st.one_of(
    st.just(0), PLACES, st.builds(int.__or__, FLAGS, PLACES), st.integers(0, (1 << 64) - 1)
)  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A small image with data in two L2 tables, and its bytes."""
    folder = tmp_path_factory.mktemp("telling")
    path = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(SHAPES[request.param]), path.name, "64M", cwd=folder)
    qemu_io(path, "write -P 1 0 64k", "write -P 2 40M 64k")
    if request.param != "version 2":
        qemu_img("bitmap", "--add", "-g", "512", path.name, "a", cwd=folder)
        qemu_img("bitmap", "--add", path.name, "b", cwd=folder)
        qemu_io(path, "write -P 3 1M 64k")
    return path, path.read_bytes()


@pytest.fixture(scope="module")
def with_a_snapshot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("snapshot") / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "64M")
    qemu_io(path, "write -P 1 0 64k")
    qemu_img("snapshot", "-c", "first", path)
    return path, path.read_bytes()


@contextlib.contextmanager
def in_bulk() -> Iterator[None]:
    """No table is too small to be judged as a whole."""
    small = ((walk, "PLAIN_ENTRIES"), (view, "PLAIN_ENTRIES"), (copied, "PLAIN_ENTRIES"))
    with contextlib.ExitStack() as stack:
        for module, limit in small:
            stack.enter_context(patch.object(module, limit, 0))
        yield


def damage(data: bytes, entries: list[int], table: str) -> Raw:
    """The image with these entries at the beginning of a table."""
    raw = Raw(data)
    at = {"l1": raw.number(40), "l2": raw.number(raw.number(40)) & OFFSET, "refcounts": raw.number(48)}.get(table, 0)
    room = 8 * raw.number(36, 4) if table == "l1" else raw.cluster_size
    if not at:
        assume(raw.number(4, 4) == 3)
        at, count = raw.tables()["a"]
        room = 8 * count
    new = struct.pack(f">{len(entries)}Q", *entries)[:room]
    keep = 8 if table == "refcounts" else 0  # what counts the header, without which there is nothing to compare
    raw.data[at + keep : at + keep + len(new)] = new
    return raw


@settings(max_examples=_EXAMPLES // 3)
@given(
    entries=st.lists(ENTRIES, min_size=1, max_size=32),
    table=st.sampled_from(TABLES),
    told=st.integers(0, 3),
)
def test_what_is_folded_is_counted_as_if_it_were_told(
    image: tuple[Path, bytes], entries: list[int], table: str, told: int
) -> None:
    path, data = image
    damage(data, entries, table).save(path)
    every = runner.check(path, limit=None)
    with in_bulk(), patch.object(runner, "TOLD", told):
        folded = runner.check(path, limit=told)
    assert folded.counts == every.counts
    assert (folded.exit_status, folded.complete) == (every.exit_status, every.complete)


@settings(max_examples=_EXAMPLES // 10)  # of two repairs each
@given(entries=st.lists(ENTRIES, min_size=1, max_size=32), table=st.sampled_from(TABLES))
def test_a_table_is_mended_as_a_whole_as_it_is_entry_by_entry(
    image: tuple[Path, bytes], entries: list[int], table: str
) -> None:
    path, data = image
    repaired = []
    for told in (None, 0):
        damage(data, entries, table).save(path)
        with in_bulk(), patch.dict(runner.inspect.__kwdefaults__, {"told": told}):
            assert main(["repair", str(path), "--yes", "--allow", "guess", "--no-undo"]) in (0, 2, 3)
        repaired.append((runner.check(path).counts, path.read_bytes()))
    assert repaired[0] == repaired[1]


SNAPSHOTS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from([b"", b"1", b"2", b"x"]),
            "extra_data": st.sampled_from([b"", bytes(15), bytes(16), struct.pack(">QQ", 0, 64 << 20)]),
            "l1_size": st.sampled_from([0, 1]),
        }
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=_EXAMPLES // 10)
@given(damaged=SNAPSHOTS)
def test_snapshots_are_counted_and_mended_alike_told_one_by_one_or_not(
    with_a_snapshot: tuple[Path, bytes], damaged: list[dict[str, Any]]
) -> None:
    path, data = with_a_snapshot
    raw = Raw(data)
    ((_, entry),) = parse_snapshots(lambda at, length: data[at : at + length], raw.number(64), 1)
    table = b"".join(replace(entry, padding=b"", **changes).build() for changes in damaged)
    raw.data[raw.number(64) : raw.number(64) + len(table)] = table
    raw.data[60:64] = struct.pack(">I", len(damaged))
    every, repaired = [], []
    for told in (None, 0):
        raw.save(path)
        with patch.object(runner, "TOLD", 0):
            every.append(runner.check(path, limit=told).counts)
        with patch.dict(runner.inspect.__kwdefaults__, {"told": told}):
            assert main(["repair", str(path), "--yes", "--allow", "guess", "--no-undo"]) in (0, 2, 3)
        repaired.append((runner.check(path).counts, path.read_bytes()))
    assert every[0] == every[1]
    assert repaired[0] == repaired[1]
