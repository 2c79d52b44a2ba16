"""Whole images built from nothing but fields, with offsets that point at each other: everything ends, nothing writes.

The images of tests/support/damage.py were sound once. These never were: any structure may be anywhere, in another, at
the end of the file or behind it, and any field may be at its border.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm import api
from qcow2bm.bitmap.store import State
from qcow2bm.checks import runner
from qcow2bm.checks.model import RepairClass
from qcow2bm.errors import Qcow2bmError
from qcow2bm.repair.model import RepairPolicy
from qcow2bm.repair.session import repairing

_PARTS = ("header", "reftable", "block", "l1", "l2", "snapshots", "directory", "bitmap-table", "data")
_FLAGS = (0, 1 << 63, 1 << 62, 1, 1 << 63 | 1, 1 << 56, 1 << 9)
_HUGE = (1 << 32, 1 << 40, (1 << 56) - 512, 1 << 62, (1 << 64) - 1)


class Built(bytes):
    """The bytes of an image; a failure prints where they are not zero."""

    __slots__ = ()

    def __repr__(self) -> str:
        words = ((at, self[at : at + 8].hex()) for at in range(0, len(self), 8) if any(self[at : at + 8]))
        return f"{len(self)} bytes, {dict(words)}"


@st.composite
def images(draw: st.DrawFn) -> Built:
    """Nine structures of a cluster each, in any order; every offset names one of them, or a place it should not."""
    bits = draw(st.sampled_from([9, 9, 12, 16]))
    size, order = 1 << bits, draw(st.permutations(_PARTS[1:]))
    at = {"header": 0} | {part: (index + 1) * size for index, part in enumerate(order)}
    end = size * len(_PARTS) - draw(st.sampled_from([0, 0, 1, size - 8]))

    def place(right: str) -> int:
        aim = draw(st.sampled_from(["right"] * 6 + ["other"] * 2 + ["end", "odd", "huge", "none"]))
        other = draw(st.sampled_from(_PARTS)) if aim == "other" else right
        odd = at[right] + draw(st.sampled_from([1, 8, 256, size - 1])) if aim == "odd" else at[other]
        return {"end": size * len(_PARTS), "huge": draw(st.sampled_from(_HUGE)), "none": 0}.get(aim, odd)

    def number(right: int, most: int) -> int:
        return draw(st.sampled_from([right] * 6 + [0, 1, right + 1, most >> 1, most]))

    def table(right: str) -> bytes:
        flags = [0, *draw(st.lists(st.sampled_from(_FLAGS), max_size=4))]
        return struct.pack(f">{len(flags)}Q", *(flag | place(right) for flag in flags))

    disk = draw(st.sampled_from([0, 1, size, size * size // 8, 1 << 20, 1 << 50, (1 << 63) - 512]))
    width = draw(st.sampled_from([4, 4, 4, 0, 3, 6]))
    bitmaps = struct.pack(">IIQQ", number(1, 65536), 0, number(32, 1 << 26), place("directory"))
    extension = struct.pack(">II", 0x23852875, number(24, 1 << 31)) + bitmaps + bytes(8)
    fields = (
        b"QFI\xfb", draw(st.sampled_from([3, 3, 3, 2])), number(0, 1 << 62), number(0, 1024),
        draw(st.sampled_from([bits] * 8 + [8, 21, 22])), disk, number(0, 3),
        number(-(-disk // (size * size // 8)) & 0xFFFFFFFF, 1 << 22), place("l1"), place("reftable"),
        number(1, 1 << 20), draw(st.sampled_from([1] * 6 + [0, 2, 40, 65537])), place("snapshots"),
        number(0, 1 << 5), number(0, 1), number(1, 1 << 40), width, number(104, size),
    )  # fmt: skip
    header = struct.pack(">4sIQIIQIIQQIIQQQQII", *fields)
    snapshot = struct.pack(">QIHHIIQII", place("l1"), number(1, 1 << 23), 1, 1, 0, 0, 0, 0, number(0, 1025)) + b"1s"
    granularity, flags = draw(st.sampled_from([9, 16, 16, 31, 63])), number(2, 255)
    entry = struct.pack(
        ">QIIBBHI", place("bitmap-table"), number(1, 1 << 27), flags, 1, granularity, number(1, 65535), 0
    )
    counts = draw(st.sampled_from([b"\0\1", b"\0\0", b"\0\2", b"\xff\xff"])) * len(_PARTS)
    content = {
        "header": header + extension, "reftable": table("block"), "block": counts, "l1": table("l2"),
        "l2": table("data"), "snapshots": snapshot, "directory": entry + b"n".ljust(8, b"\0"),
        "bitmap-table": table("data"), "data": draw(st.binary(max_size=16)),
    }  # fmt: skip
    built = bytearray(size * len(_PARTS))
    for part, data in content.items():
        built[at[part] : at[part] + size] = data[:size].ljust(size, b"\0")
    return Built(built[:end])


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built") / "image.qcow2"


def ended(image: Path, what: str) -> str:
    """What came of looking at an image, in words; any exception that is not ours goes through."""
    try:
        if what == "check":
            report = runner.check(image, owners=True)
            return str((report.findings, sorted(report.counts.items()), report.allocation))
        if what == "repair":
            with repairing(image, RepairPolicy(allow=RepairClass.GUESS), writable=False) as session:
                return str(session.fingerprint)
        with api.open(image) as opened:
            listed = [
                (bitmap.name, bitmap.state, bitmap.state is State.READY and bitmap.dirty_bytes)
                for bitmap in opened.bitmaps
            ]
            return str((listed, opened.usage(), len(opened.snapshots())))
    except Qcow2bmError as error:
        return f"{type(error).__name__}: {error}"


@given(images())
def test_what_never_was_an_image_is_read_to_an_end_twice_alike_and_left_alone(image: Path, data: bytes) -> None:
    image.write_bytes(data)
    before = image.stat().st_mtime_ns
    for what in ("list", "repair"):
        ended(image, what)
    assert ended(image, "check") == ended(image, "check")
    assert image.read_bytes() == data
    assert image.stat().st_mtime_ns == before


def test_most_of_them_get_past_the_header(image: Path) -> None:
    """Else the strategy would test the first look at an image and nothing else."""
    passed: list[bool] = []

    @given(images())
    def look(data: bytes) -> None:
        image.write_bytes(data)
        passed.append(ended(image, "check").startswith("(") and not ended(image, "list").startswith("NotQcow2"))

    look()
    assert sum(passed) > len(passed) // 2
