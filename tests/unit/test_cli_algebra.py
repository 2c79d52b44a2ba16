"""`merge --op`, `invert`, `resample`, and the lists that `set` and `unset` take: what they say and what they refuse."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qcow2bm import api
from qcow2bm.bitmap.chunks import Op
from tests.support.images import unpack

GIB = 1 << 30
GRANULE = 64 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack("office-week", tmp_path)


def dirty(path: Path, name: str) -> set[int]:
    """The granules of 64 KiB that are dirty, in part or wholly."""
    with api.open(path) as opened:
        return {
            granule
            for extent in opened.bitmaps[name].extents()
            for granule in range(extent.offset // GRANULE, -(-(extent.offset + extent.length) // GRANULE))
        }


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode()), isatty=lambda: False))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Op.OR, lambda mon, tue: mon | tue),
        (Op.AND, lambda mon, tue: mon & tue),
        (Op.XOR, lambda mon, tue: mon ^ tue),
        (Op.SUBTRACT, lambda mon, tue: mon - tue),
    ],
)
def test_merge_by_every_operation(image: Path, run, op: Op, expected) -> None:
    mon, tue = dirty(image, "mon"), dirty(image, "tue")
    assert mon & tue
    assert mon - tue
    status, out, err = run("merge", image, "mon", "tue", "--op", op)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "merge 'tue' into 'mon'" + ("" if op is Op.OR else f" by '{op}'")
    assert dirty(image, "mon") == expected(mon, tue)
    assert dirty(image, "tue") == tue


def test_create_is_for_operations_that_leave_something(image: Path, run) -> None:
    before = image.read_bytes()
    for op in ("and", "subtract"):
        status, out, err = run("merge", image, "new", "mon", "tue", "--op", op, "--create")
        assert (status, out) == (64, "")
        assert f"--op {op} would leave nothing" in err
    assert run("merge", image, "mon", "tue", "--op", "nand")[0] == 64
    assert image.read_bytes() == before
    assert run("merge", image, "new", "mon", "tue", "--op", "xor", "--create")[0] == 0
    assert dirty(image, "new") == dirty(image, "mon") ^ dirty(image, "tue")


def test_invert_names_and_globs(image: Path, run) -> None:
    before = {name: dirty(image, name) for name in ("mon", "tue", "thu", "fri")}
    assert run("invert", image, "mon", "--match", "t*", "mon")[0] == 0
    everything = set(range(GIB // GRANULE))
    for name in ("mon", "tue", "thu"):
        assert dirty(image, name) == everything - before[name]
    assert dirty(image, "fri") == before["fri"]
    assert run("invert", image)[0] == 64


def test_resample_names_and_globs(image: Path, run) -> None:
    before = {name: dirty(image, name) for name in ("mon", "tue", "thu")}
    with api.open(image) as opened:
        names = opened.bitmaps.names
        recording = [bitmap.recording for bitmap in opened.bitmaps]
    status, out, _ = run("resample", image, "mon", "--match", "t*", "-g", "4k")
    assert status == 0
    assert out.splitlines()[0] == "resample 'mon' from granularity 65536 to 4096"
    with api.open(image) as opened:
        assert opened.bitmaps.names == names
        assert [bitmap.recording for bitmap in opened.bitmaps] == recording
        assert [bitmap.granularity for bitmap in opened.bitmaps][:4] == [4096, 4096, GRANULE, 4096]
    assert {name: dirty(image, name) for name in before} == before
    assert run("resample", image, "mon", "-g", "1M")[0] == 0
    assert dirty(image, "mon") == {granule // 16 * 16 + part for granule in before["mon"] for part in range(16)}
    status, out, _ = run("resample", image, "mon", "-g", "1M")
    assert out.splitlines()[-1] == "nothing to do: the image is that way already"


@pytest.mark.parametrize("size", ["256", "3k", "4G", "0"])
def test_a_granularity_that_qemu_does_not_take_is_refused(image: Path, run, size: str) -> None:
    before = image.read_bytes()
    status, out, err = run("resample", image, "mon", "-g", size)
    assert (status, out) == (64, "")
    assert "is not a power of two between 512 bytes and 2 GiB" in err
    assert image.read_bytes() == before


def test_a_list_from_a_file_and_from_stdin(image: Path, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "offset,length\n0,1\n131072,65536\n"
    (tmp_path / "list.csv").write_text(rows, encoding="ascii")
    assert run("clear", image, "mon", "tue")[0] == 0
    status, out, _ = run("set", image, "mon", "--from-extents", tmp_path / "list.csv", "--range", "1M+1")
    assert status == 0
    assert out.splitlines()[0] == "set 3 ranges of 65538 bytes in 'mon'"
    assert dirty(image, "mon") == {0, 2, 16}
    type_in(monkeypatch, rows)
    assert run("unset", image, "mon", "--from-extents", "-")[0] == 0
    assert dirty(image, "mon") == {0, 16}
    assert run("set", image, "tue", "--from-allocation", "--range", "1023M+1")[0] == 0
    with api.open(image) as opened:
        held = set(opened.allocated(GRANULE).bits.slice(0, GIB // GRANULE).search(1))
    assert dirty(image, "tue") == held | {1023 * 16}


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        ([], "", "no range is named"),
        (["--where", "data", "--range", "0+1"], "", "--where is about a list of extents"),
        (["--from-extents", "-"], "", "the list on stdin: the list of extents is empty"),
        (["--from-extents", "-"], "0,1\n1,x\n", "the list on stdin: 'length' of line 2 is no number of bytes"),
        (["--from-extents", "-"], f"0,{GIB + 1}\n", f"line 1 ends at {GIB + 1}, past the end of the disk"),
        (["--from-extents", "-", "--where", "data"], "0,1\n", "cannot tell 'data'"),
        (["--from-extents", "-", "--range", f"{GIB}+1"], "0,1\n", "is not within the disk"),
    ],
)
def test_refusals_leave_the_image_alone(
    image: Path, run, monkeypatch: pytest.MonkeyPatch, *, words: list[str], text: str, expected: str
) -> None:
    before = image.read_bytes()
    for command in ("set", "unset"):
        type_in(monkeypatch, text)
        status, out, err = run(command, image, "mon", *words)
        assert status in (1, 64)
        assert out == ""
        assert expected in err
    assert image.read_bytes() == before


def test_a_list_that_is_nowhere(image: Path, run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("set", "unset"):
        assert run(command, image, "mon", "--from-extents", "")[::2] == (
            64, "qcow2bm: --from-extents names no file; - is stdin\n",
        )  # fmt: skip
        monkeypatch.setattr(sys, "stdin", None)
        status, _, err = run(command, image, "mon", "--from-extents", "-")
        assert (status, "standard input is closed; name a file" in err) == (64, True)
        with (tmp_path / "written").open("w") as only_written:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.FileIO(only_written.fileno(), "r", closefd=False)))
            status, _, err = run(command, image, "mon", "--from-extents", "-")
        assert (status, "the list on stdin: Bad file descriptor" in err) == (1, True)


def test_a_list_that_cannot_be_opened_is_named(image: Path, run, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        status, out, err = run("set", image, "mon", "--from-extents", path)
        assert (status, out) == (1, "")
        assert str(path) in err
