"""What leaked clusters hold: of a lost table nothing is a plain leak, however damaged it is; of mere data all is."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2bm
from tests.support.images import unpack
from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import Raw

CLUSTER = 4 << 10
DATA = 40


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Forty clusters of data, every other one of the disk's first eighty."""
    image = tmp_path_factory.mktemp("mapped") / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "1M")
    qemu_io(image, *(f"write -P 1 {number * 8}k 4k" for number in range(DATA)))
    return image.read_bytes()


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """One leaked cluster, the last of the file."""
    return unpack("corrupt/leak", tmp_path_factory.mktemp("leaky")).read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checked") / "image.qcow2"


@given(st.sets(st.integers(0, DATA - 1), max_size=DATA - 1), st.integers(0, 1 << 32))
def test_nothing_of_a_damaged_lost_table_is_a_plain_leak(mapped: bytes, path: Path, bad: set[int], seed: int) -> None:
    """Entries that are left name data of the lost table, and what the others named is not given back either."""
    chance, raw = random.Random(seed), Raw(mapped)
    for number in bad:
        raw.put(raw.l2_entry(2 * number), chance.choice([chance.getrandbits(64), 1 << 62 | chance.getrandbits(40), 0]))
    raw.put(raw.number(40), 0)
    raw.save(path)
    counts = qcow2bm.check(path).counts
    assert counts.keys() <= {"leak-lost-table", "leak-doubtful"}
    assert sum(counts.values()) == DATA + 1
    assert counts["leak-lost-table"] >= DATA + 1 - len(bad)


@given(st.one_of(st.binary(max_size=1 << 10), st.text(max_size=1 << 10).map(str.encode)), st.integers(1, 64))
def test_data_is_not_taken_for_a_table(leaky: bytes, path: Path, content: bytes, times: int) -> None:
    """Bytes, text, and both over and over."""
    data = (content * times)[: 64 << 10]
    path.write_bytes(leaky[: len(leaky) - (64 << 10)] + data.ljust(64 << 10, b"\0"))
    assert qcow2bm.check(path).counts == {"leak": 1}


@pytest.mark.parametrize("flags", [0, 1 << 63])
def test_a_table_of_clusters_in_use_is_no_lost_one(leaky: bytes, path: Path, flags: int) -> None:
    """As a copy of a table is, which a crash has left: it maps nothing that anybody misses."""
    entries = [flags | offset << 16 for offset in range(1, 6)]
    path.write_bytes(leaky[: len(leaky) - (64 << 10)] + struct.pack(">5Q", *entries).ljust(64 << 10, b"\0"))
    assert qcow2bm.check(path).counts == {"leak": 1}
