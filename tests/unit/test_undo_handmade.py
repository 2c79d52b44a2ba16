"""Undo files and journals made by hand, with every checksum right: an answer at once, in little memory, or none."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.__main__ import main
from qcow2bm.image.file import ImageFile
from qcow2bm.image.plan import SECTOR
from qcow2bm.image.undo_layout import (
    MAX_STAGES,
    PIECE,
    KeptHead,
    KeptPart,
    RecordHead,
    State,
    Summary,
    crc,
    seen,
    zeroes_crc,
)
from tests.support.scenes import tiny

SECONDS = 5
"""Of work, which an endless loop takes as well as one through a tebibyte."""
JOURNAL = "image.qcow2.qcow2bm-journal"


def summary(image: Path, state: State = State.COMPLETE, **fields: int) -> Summary:
    """A header that fits the image as it is."""
    opened, status = ImageFile.open(image), image.stat()
    facts = {"size_before": opened.size, "mtime_before_ns": 0, "mtime_ns": status.st_mtime_ns, "records": 0}
    found = Summary(state, **{**facts, **seen(opened), **fields})
    opened.close()
    return found


def record(stage: int, offset: int, old: bytes = b"", new: bytes = b"", **fields: int) -> bytes:
    facts = {"length": len(new), "filled": 0, "filled_crc": 0, **fields}
    head = RecordHead(
        stage=stage, offset=offset, old_stored=len(old), new_stored=len(new), crc=crc(new, crc(old)), **facts
    )
    return head.build() + old + new


def part(kind: KeptPart, offset: int, length: int, body: bytes = b"") -> bytes:
    return KeptHead(offset, length, len(body), kind, crc(body)).build() + body


def write(file: Path, head: Summary, parts: Sequence[bytes]) -> None:
    file.write_bytes(head.build() + b"".join(parts))


def timed(*words: str | Path) -> int:
    began = time.process_time()
    status = main([str(word) for word in words])
    assert time.process_time() - began < SECONDS
    return status


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tiny(tmp_path)


# ---- what takes for ever ----


@pytest.mark.parametrize("words", [["check"], ["list"], ["undo", "--list"]], ids=" ".join)
def test_a_journal_that_says_it_filled_exabytes(image: Path, words: list[str]) -> None:
    head = summary(image, State.IN_PROGRESS, size_after=(1 << 63) - 1, records=1, mtime_ns=0)
    write(image.with_name(JOURNAL), head, [record(0, image.stat().st_size, filled=1 << 62)])
    before = image.read_bytes()
    file = [image.with_name(JOURNAL)] if words[0] == "undo" else []
    timed(words[0], image, *file, *words[1:])
    assert image.read_bytes() == before


@pytest.mark.parametrize("filled", [True, False])
def test_a_record_as_large_as_a_sparse_file_of_tebibytes(image: Path, filled: bool) -> None:
    os.truncate(image, 1 << 42)
    undo, length = image.with_name("undo"), 1 << 41
    right = zeroes_crc(length) if filled else 0
    records = [record(0, 1 << 40, length=length, filled=length, filled_crc=right)]
    write(undo, summary(image, size_before=1 << 42, records=1), records)
    status = timed("undo", image, undo)
    assert status == (0 if filled else 1)
    assert image.stat().st_blocks * 512 < 1 << 20, "what is a hole needs no zeroes"


def test_an_undo_file_of_next_to_nothing_but_a_hole(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undo, length = image.with_name("undo"), 1 << 40
    head = RecordHead(0, 512, length, old_stored=length, new_stored=length, filled=0, filled_crc=0, crc=0)
    write(undo, summary(image, size_before=1 << 41, records=1), [head.build()])
    os.truncate(undo, 3 << 40)
    assert timed("undo", image, undo) == 1
    assert "is damaged: next to nothing of its" in capsys.readouterr().err


def test_bytes_that_are_given_up_again_and_again(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undo = image.with_name("undo")
    head = summary(image, given_up=2000, given_up_at=SECTOR)
    write(undo, head, [part(KeptPart.GIVEN_UP, 1024, 512)] * 2000)
    assert timed("undo", image, undo) == 1
    assert "names the bytes at 0x400 twice" in capsys.readouterr().err


def test_a_cluster_that_is_filled_again_and_again(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undo = image.with_name("undo")
    write(undo, summary(image, records=2000), [record(0, 1024, length=512, filled=512)] * 2000)
    assert timed("undo", image, undo) == 1
    assert "names the bytes at 0x400 twice" in capsys.readouterr().err


def test_more_stages_than_a_change_has(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is flushed when it is put back."""
    undo, data = image.with_name("undo"), image.read_bytes()
    records = [record(stage, 1024, data[1024:1032], data[1024:1032]) for stage in range(MAX_STAGES + 1)]
    write(undo, summary(image, records=len(records)), records)
    assert timed("undo", image, undo) == 1
    assert "more stages than any change" in capsys.readouterr().err
    write(undo, summary(image, records=MAX_STAGES), records[:-1])
    assert timed("undo", image, undo) == 0


# ---- what takes memory, or ends in an internal error ----


@pytest.mark.parametrize(("length", "pieces"), [(1 << 30, 2), (1 << 60, 2)])
def test_a_range_of_zeroes_that_was_kept_is_not_held_in_memory(image: Path, length: int, pieces: int) -> None:
    undo = image.with_name("undo")
    kept = [part(KeptPart.RANGE, 0, length, label) for label in (b"image header", b"bitmap directory entry: x")]
    kept += [part(KeptPart.PIECE, length // pieces * number, length // pieces) for number in range(pieces)]
    write(undo, summary(image, size_before=1 << 61, kept=len(kept), kept_at=SECTOR), kept)
    tracemalloc.start()
    try:
        assert timed("undo", image, undo, "--list") == 0
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_a_kept_piece_that_is_too_long(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undo = image.with_name("undo")
    head = summary(image, size_before=1 << 40, kept=1, kept_at=SECTOR)
    write(undo, head, [part(KeptPart.PIECE, 0, PIECE + 1, bytes(PIECE + 1))])
    assert timed("undo", image, undo, "--list") == 1
    assert "is damaged in kept part 0" in capsys.readouterr().err


NOTED = {"path": "/x", "size_before": 1, "size_after": 2, "mtime_ns": 3}


@pytest.mark.parametrize(
    "label",
    [
        json.dumps(NOTED).replace("1", "1e999", 1),
        "[" * 100_000,
        json.dumps({**NOTED, "size_before": -1}),
        json.dumps({**NOTED, "size_after": "x"}),
    ],
    ids=["infinite", "nested", "negative", "a word"],
)
def test_a_note_of_a_data_file_that_says_nothing(image: Path, label: str, capsys: pytest.CaptureFixture[str]) -> None:
    undo = image.with_name("undo")
    body = b"data file: " + label.encode()
    write(undo, summary(image, kept=1, kept_at=SECTOR), [part(KeptPart.RANGE, 0, 0, body)])
    for words in (["--list"], ["--list", "--output", "json"], ["--force"]):
        assert timed("undo", image, undo, *words) == 0
        assert "truncate" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("field", ["size_before", "size_after"])
def test_a_size_that_no_file_has(image: Path, field: str) -> None:
    undo = image.with_name("undo")
    write(undo, summary(image, **{field: 1 << 63}), [])
    assert timed("undo", image, undo) == 1


def test_an_image_is_never_cut_to_nothing(image: Path) -> None:
    undo, before = image.with_name("undo"), image.read_bytes()
    write(undo, summary(image, size_before=0), [])
    assert timed("undo", image, undo) == 1
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    "bad",
    [
        lambda: record(0, 512, length=8),
        lambda: record(0, 512, new=bytes(8), filled=8),
        lambda: record(0, 512, length=16, filled=8),
        lambda: record(0, 512, old=bytes(4), new=bytes(8)),
    ],
    ids=["old alone", "filled and rewritten", "more old than new", "half an old one"],
)
def test_a_record_that_is_neither_a_rewrite_nor_a_fill(
    image: Path, bad: Callable[[], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    undo = image.with_name("undo")
    write(undo, summary(image, records=1), [bad()])
    before = image.read_bytes()
    assert timed("undo", image, undo) == 1
    assert "is damaged in record 0" in capsys.readouterr().err
    assert image.read_bytes() == before


# ---- checksums of zeroes ----


@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 7 * PIECE + 5])
@pytest.mark.parametrize("start", [0, 1, 0xDEADBEEF])
def test_the_checksum_of_zeroes_is_that_of_their_bytes(length: int, start: int) -> None:
    assert zeroes_crc(length, start) == crc(bytes(length), start)


def test_the_checksum_of_very_many_zeroes_is_that_of_its_parts() -> None:
    assert zeroes_crc((1 << 60) + 12345) == zeroes_crc(12345, zeroes_crc(1 << 60))
    assert zeroes_crc(1 << 60) == zeroes_crc(1 << 59, zeroes_crc(1 << 59))


def test_the_fixtures_here_are_believed_where_nothing_is_wrong(image: Path) -> None:
    undo, data = image.with_name("undo"), image.read_bytes()
    write(undo, summary(image, records=1), [record(0, 1024, b"\1" * 8, data[1024:1032])])
    qcow2bm.undo(image, undo)
    assert image.read_bytes() == data[:1024] + b"\1" * 8 + data[1032:]


def test_an_image_that_is_cut_to_its_header_is_one_all_the_same(image: Path) -> None:
    undo = image.with_name("undo")
    os.truncate(image, 112)
    data = image.read_bytes()
    write(undo, summary(image, records=1), [record(0, 24, b"\1" * 8, data[24:32])])
    qcow2bm.undo(image, undo)
    assert image.read_bytes() == data[:24] + b"\1" * 8 + data[32:]
