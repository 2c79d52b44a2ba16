"""Images that lie about sizes and places: a check ends with a report, in bounded time and memory, and writes nothing.

Smaller than they could be, so that the tests are quick: what is not bounded would still take for ever.
"""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2bm.image.file import ImageFile
from qcow2bm.image.overlay import OverlayFile
from qcow2bm.repair.counts import _Table
from qcow2bm.repair.model import RepairPolicy
from qcow2bm.repair.workshop import Workshop
from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import BITMAPS, Raw
from tests.support.scenes import three

COPIED = 1 << 63
SECONDS = 60  # on a shared machine
MEMORY = 256 << 20

Lie = Callable[[Raw], int]
"""Makes an image lie; the length the file is to have afterwards, 0 to leave it."""


def appended(raw: Raw, data: bytes) -> int:
    """Put data behind the image; where it is."""
    end = len(raw.data) + -len(raw.data) % raw.cluster_size
    raw.data += bytes(end - len(raw.data)) + data
    return end


def l1_at(raw: Raw, entries: list[int]) -> None:
    raw.put(40, appended(raw, struct.pack(f">{len(entries)}Q", *entries)))
    raw.put(36, len(entries), 4)


def one_l2_table_for_all(raw: Raw) -> int:
    l1_at(raw, [raw.number(raw.number(40))] * (1 << 16))
    return 0


def l2_tables_in_a_hole(raw: Raw) -> int:
    l1_at(raw, [COPIED | (1000 + number) << 16 for number in range(1 << 16)])
    return 1 << 40


def tables_that_name_themselves(raw: Raw) -> int:
    table = raw.number(40)
    raw.put(table, table | COPIED)
    raw.put(table + 8, raw.number(48) | COPIED)
    return 0


def data_far_out_in_a_hole(raw: Raw) -> int:
    table = raw.l2_entry()
    for number in range(64):
        raw.put(table + 8 * number, COPIED | (1 << 46) + (number << 40))
    return 1 << 62


def exabytes(_: Raw) -> int:
    return 1 << 62


def one_refcount_block_for_all(raw: Raw) -> int:
    block = raw.number(raw.number(48))
    raw.put(48, appended(raw, struct.pack(">Q", block) * (1 << 16)))
    raw.put(56, (1 << 19) // raw.cluster_size, 4)
    return 1 << 44


def snapshots_where_nothing_is(raw: Raw) -> int:
    raw.put(60, 65536, 4)
    raw.put(64, 1 << 40)
    return 0


def snapshots_of_one_large_table(raw: Raw) -> int:
    entry = struct.pack(">QIHHIIQII", raw.number(40), 1 << 22, 1, 1, 0, 0, 0, 0, 16) + bytes(16) + b"1n" + bytes(6)
    raw.put(64, appended(raw, entry * 4096))
    raw.put(60, 4096, 4)
    return 0


def encryption_header_of_exabytes(raw: Raw) -> int:
    raw.put(32, 2, 4)
    raw.insert_extension(struct.pack(">QQ", 1 << 16, 1 << 61), before=BITMAPS, kind=0x0537BE77)
    return 1 << 62


def bitmap_tables_over_each_other(raw: Raw) -> int:
    start = appended(raw, struct.pack(">Q", raw.cluster_size) * (1 << 16))
    entries = b"".join(
        struct.pack(">QIIBBHI", start, 1 << 13, 1, 1, 16, 8, 0) + b"%08d" % number for number in range(2000)
    )
    at = raw.extensions()[BITMAPS][0]
    directory = appended(raw, entries)
    raw.put(at, 2000, 4)
    raw.put(at + 8, len(entries))
    raw.put(at + 16, directory)
    return 0


LIES: list[Lie] = [
    one_l2_table_for_all,
    l2_tables_in_a_hole,
    tables_that_name_themselves,
    data_far_out_in_a_hole,
    exabytes,
    one_refcount_block_for_all,
    snapshots_where_nothing_is,
    snapshots_of_one_large_table,
    encryption_header_of_exabytes,
    bitmap_tables_over_each_other,
]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    image = tmp_path_factory.mktemp("honest") / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_io(image, "write 0 128k", "write 8M 64k")
    qemu_img("bitmap", "--add", image, "daily")
    return image.read_bytes()


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("words", [["check", "--owners"], ["qemu-img", "check"]], ids=lambda words: words[0])
def test_a_lie_is_checked_in_bounded_time_and_memory(lie: Lie, words: list[str], honest: bytes, tmp_path: Path) -> None:
    image, raw = tmp_path / "image.qcow2", Raw(honest)
    length = lie(raw)
    raw.save(image)
    if length:
        try:
            os.truncate(image, length)
        except OSError:  # what this file system can hold
            os.truncate(image, 1 << 43)
    before = image.stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-m", "qcow2bm", *words, image], capture_output=True, timeout=SECONDS, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY, 4 * MEMORY)),
    )  # fmt: skip
    assert done.returncode in (0, 1, 2, 3, 4), done.stderr[-500:]
    assert b"internal error" not in done.stderr, done.stderr[-500:]
    assert image.stat().st_mtime_ns == before


def test_no_memory_is_taken_for_a_refcount_table_as_long_as_the_header_says(tmp_path: Path) -> None:
    """Where it has not been mended yet, as when that was declined, and a refcount is to be raised."""
    image = three(tmp_path)
    raw = Raw.load(image)
    raw.put(56, 0x7FFF_FFFF, 4)
    raw.save(image)
    with contextlib.closing(ImageFile.open(image)) as file, contextlib.closing(OverlayFile(file)) as overlay:
        shop = Workshop(overlay, RepairPolicy())
        assert shop.found("refcount-table-size")
        tracemalloc.start()
        try:
            assert not _Table(shop).block(5)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()
