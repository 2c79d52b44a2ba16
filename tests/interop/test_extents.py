"""Ranges from lists of real programs, and what an image holds itself: each beside a second opinion of QEMU's.

QEMU 7.2 has no `block-dirty-bitmap-populate`. What that was to do, marking all that is allocated in one node, is held
against `qemu-img map` (depth 0 and present) and the `qemu:allocation-depth` context of qemu-nbd.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.bitmap.extents import Where
from tests.interop.ranges import joined, mark, unmark
from tests.support.daemon import connect, spawn
from tests.support.images import FIXTURES
from tests.support.qemu import Ranges, check, qemu_img, qemu_io, read_bitmaps, run

KIB, MIB = 1 << 10, 1 << 20
SIZE = 9 * MIB + 512
GRANULE = 64 * KIB
ROOT = FIXTURES.parent


def program(*words: str | Path, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qcow2bm", *map(str, words)], input=stdin, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(params=["", "extended_l2=on,cluster_size=128k", "cluster_size=4k"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An overlay with data, compressed clusters, zeroes of either kind and a discarded cluster, and two bitmaps."""
    base, path = tmp_path / "base.qcow2", tmp_path / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, str(SIZE))
    qemu_io(base, "write -P 1 0 1M", "write -P 2 5M 1M")
    options = ("-o", request.param) if request.param else ()
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", *options, path, str(SIZE))
    qemu_io(path, "write -P 3 512k 200k", "write -z 2M 1M", "write -z -u 3100k 99k", f"write -P 4 {SIZE - 512} 512")
    qemu_io(path, "write -P 6 7M 2M", "discard 7M 128k")
    qemu_io(path, "write -c -P 5 4M 2M")
    for name, granularity in (("b", GRANULE), ("fine", 512)):
        qemu_img("bitmap", "--add", "--disable", "-g", str(granularity), path, name)
    return path


def mapped(image: Path) -> str:
    return qemu_img("map", "--output=json", "-f", "qcow2", image).stdout


def exported(image: Path, context: str, *options: str) -> str:
    """What nbdinfo prints of a metadata context of qemu-nbd."""
    with tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder:
        link, log = Path(folder, "n"), Path(folder, "log")
        argv = ["qemu-nbd", "-r", "-t", "-f", "qcow2", *options, "-k", str(link), str(image)]
        with spawn(argv, cwd=image.parent, log=log) as server:
            try:
                connect(link, server, log).close()
                return run("nbdinfo", "--json", f"--map={context}", f"nbd+unix:///?socket={link}").stdout
            finally:
                server.kill()


def rows(text: str, start: str, chosen: Callable[[dict[str, object]], object]) -> Ranges:
    return joined([(row[start], row["length"]) for row in json.loads(text) if chosen(row)])


def marked(ranges: Ranges, granularity: int) -> Ranges:
    found: Ranges = []
    for offset, length in ranges:
        found = mark(found, offset, length, granularity=granularity, size=SIZE)
    return found


def unmarked(ranges: Ranges, granularity: int) -> Ranges:
    found: Ranges = [(0, SIZE)]
    for offset, length in ranges:
        found = unmark(found, offset, length, granularity=granularity, size=SIZE)
    return found


# ---- lists ----


def test_a_map_of_qemu_img(image: Path) -> None:
    """Piped, as users would; then each choice, set and unset."""
    text = mapped(image)
    data = rows(text, "start", lambda row: row["data"])
    program("set", image, "b", "--from-extents", "-", "--where", "data", stdin=text)
    program("set", image, "fine", "--range", f"0+{SIZE}")
    program("unset", image, "fine", "--from-extents", "-", "--where", "zero", stdin=text)
    found = read_bitmaps(image)
    assert found["b"] == marked(data, GRANULE)
    assert found["fine"] == unmarked(rows(text, "start", lambda row: row["zero"]), 512)
    assert data
    assert check(image)["returncode"] == 0


def test_every_choice_of_a_map(image: Path) -> None:
    text = mapped(image)
    choices: dict[Where, Callable[[dict[str, object]], object]] = {
        Where.PRESENT: lambda row: row["present"],
        Where.ALLOCATED: lambda row: row["present"] and row["depth"] == 0,
        Where.ALL: lambda _: True,
    }
    for where, chosen in choices.items():
        with qcow2bm.open(image, writable=True) as opened, opened.edit() as draft:
            for name in ("b", "fine"):
                draft.clear(name)
                draft.set_ranges(name, qcow2bm.read_extents(text.encode(), where=where, size=SIZE))
        ranges = rows(text, "start", chosen)
        assert read_bitmaps(image) == {"b": marked(ranges, GRANULE), "fine": marked(ranges, 512)}


def test_lists_of_nbdinfo(image: Path) -> None:
    contexts: list[tuple[str, tuple[str, ...], Callable[[dict[str, object]], object]]] = [
        ("base:allocation", (), lambda row: "hole" not in str(row["description"])),
        ("qemu:allocation-depth", ("-A",), lambda row: row["type"] == 1),
        ("qemu:dirty-bitmap:fine", ("-B", "fine"), lambda row: row["type"] == 1),
    ]
    program("set", image, "fine", "--range", "1M+3k", "--range", f"{SIZE - 1}+1")
    for context, options, chosen in contexts:
        text = exported(image, context, *options)
        with qcow2bm.open(image, writable=True) as opened, opened.edit() as draft:
            draft.clear("b")
            where = Where.DATA if context == "base:allocation" else None
            draft.set_ranges("b", qcow2bm.read_extents(text.encode(), where=where))
        assert read_bitmaps(image, ["b"])["b"] == marked(rows(text, "offset", chosen), GRANULE)


@pytest.mark.parametrize("form", ["json", "csv"])
def test_our_own_extents(tmp_path: Path, form: str) -> None:
    """`show` prints a bitmap, `set` makes another one of it."""
    image = tmp_path / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    program("add", image, "fine", "-g", "512")
    program("set", image, "fine", "--range", "1M+3k", "--range", "5M+512", "--range", f"{SIZE - 1}+1")
    text = program("show", image, "fine", "--extents", "--output", form)
    program("add", image, "again", "-g", "512")
    program("set", image, "again", "--from-extents", "-", stdin=text)
    found = read_bitmaps(image)
    assert found["again"] == found["fine"] == [(MIB, 3 * KIB), (5 * MIB, 512), (SIZE - 512, 512)]


def test_ranges_and_a_list_together_and_what_touches_counts_as_one(image: Path) -> None:
    """Neither half of a granule takes it out; both do."""
    program("set", image, "b", "--range", f"0+{SIZE}")
    halves = f"offset,length\n{GRANULE},{GRANULE // 2}\n{5 * GRANULE},{GRANULE // 2}\n"
    rest = f"{GRANULE + GRANULE // 2}+{GRANULE // 2}"
    program("unset", image, "b", "--from-extents", "-", "--range", rest, stdin=halves)
    assert read_bitmaps(image, ["b"])["b"] == [(0, GRANULE), (2 * GRANULE, SIZE - 2 * GRANULE)]


def test_a_hundred_thousand_ranges(tmp_path: Path) -> None:
    """Every other granule, in one pass: the disk has 200,000."""
    path = tmp_path / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(200_000 * GRANULE))
    qemu_img("bitmap", "--add", path, "b")
    text = "offset,length\n" + "".join(f"{at * GRANULE + 5},7\n" for at in range(0, 200_000, 2))
    program("set", path, "b", "--from-extents", "-", stdin=text)
    assert read_bitmaps(path)["b"] == [(at * GRANULE, GRANULE) for at in range(0, 200_000, 2)]
    whole = "".join(f"{at * GRANULE},{GRANULE}\n" for at in range(0, 200_000, 4))
    program("unset", path, "b", "--from-extents", "-", stdin=whole)
    assert read_bitmaps(path)["b"] == [(at * GRANULE, GRANULE) for at in range(2, 200_000, 4)]


# ---- what the image holds itself ----


def test_from_allocation_is_what_qemu_says_is_allocated_here(image: Path) -> None:
    here = rows(mapped(image), "start", lambda row: row["present"] and row["depth"] == 0)
    depth = rows(exported(image, "qemu:allocation-depth", "-A"), "offset", lambda row: row["type"] == 1)
    assert here == depth
    for name in ("b", "fine"):
        program("set", image, name, "--from-allocation")
    assert read_bitmaps(image) == {"b": marked(here, GRANULE), "fine": marked(here, 512)}
    program("set", image, "b", "--from-allocation", "--range", f"{3 * GRANULE}+1")
    assert read_bitmaps(image, ["b"])["b"] == marked([*here, (3 * GRANULE, 1)], GRANULE)
    assert check(image)["returncode"] == 0
