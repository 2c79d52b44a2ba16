"""The drop-in `qcow2bm qemu-img check` beside the real `qemu-img check`, over command lines: same words, same status.

Standard output is compared byte for byte, standard error but for the program's name. Damage itself is compared in
test_check_differential.py. Where the two are meant to differ a test of its own says so.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import StorageDaemon
from tests.support.images import FIXTURES, unpack
from tests.support.qemu import check, qemu_img, qemu_io
from tests.support.raw import Raw

OURS = [sys.executable, "-m", "qcow2bm", "qemu-img"]
REAL = ["qemu-img"]

# Damaged fixtures that the command lines name, as CODE.qcow2.
DAMAGED = (
    "leak",
    "refcount-too-low",
    "refcount-unreadable",
    "l2-entry-reserved",
    "snapshot-extra-data-size",
    "bitmap-flags",
    "bitmap-detached",
    "clusters-shared",
)
IMAGES = ("clean", "empty", "zero", "compressed", "snapshots", "wide", "v2", "many", *DAMAGED)
JSON = "--output=json"

# A row per command line that the drop-in carries out, or refuses, by itself.
SAME = [
    *([f"{name}.qcow2"] for name in IMAGES),
    *([JSON, f"{name}.qcow2"] for name in IMAGES),
    *(["-q", f"{name}.qcow2"] for name in ("clean", "leak", "refcount-too-low", "refcount-unreadable")),
    ["-q", JSON, "leak.qcow2"],
    # abbreviations, joined options, any order
    ["--out", "json", "clean.qcow2"],
    ["--o=json", "clean.qcow2"],
    ["--form", "qcow2", "clean.qcow2"],
    ["--format=qcow2", "clean.qcow2"],
    ["--force", "clean.qcow2"],
    ["--fo", "qcow2", "clean.qcow2"],
    ["--f", "qcow2", "clean.qcow2"],
    ["-fqcow2", "clean.qcow2"],
    ["-qU", "leak.qcow2"],
    ["clean.qcow2", "-q"],
    ["clean.qcow2", "--output", "json", "-f", "qcow2"],
    ["--", "clean.qcow2"],
    ["-f", "raw", "-f", "qcow2", "clean.qcow2"],
    ["--output=yaml", "--output=human", "clean.qcow2"],
    # cache modes
    *(["-T", mode, "clean.qcow2"] for mode in ("none", "off", "directsync", "writeback", "unsafe", "writethrough")),
    ["-Tnone", "clean.qcow2"],
    ["-T", "bad", "clean.qcow2"],
    ["-T", "", "clean.qcow2"],
    ["-T", "bad", "-T", "none", "clean.qcow2"],
    # usage
    [],
    ["-q"],
    ["clean.qcow2", "leak.qcow2"],
    ["clean.qcow2", "--", "-q"],
    ["--foo", "clean.qcow2"],
    ["--foo=3", "clean.qcow2"],
    ["-X", "clean.qcow2"],
    ["-qX", "clean.qcow2"],
    ["-f"],
    ["clean.qcow2", "-f"],
    ["-T"],
    ["--output"],
    ["--output", "clean.qcow2"],
    ["--output=yaml", "clean.qcow2"],
    ["--output=", "clean.qcow2"],
    ["--output=JSON", "clean.qcow2"],
    ["--force-share=yes", "clean.qcow2"],
    ["--output=yaml", "-T", "bad"],
    ["--output=yaml", "-T", "bad", "clean.qcow2"],
    ["-r"],
    # what cannot be opened
    ["none.qcow2"],
    ["-q", JSON, "none.qcow2"],
    ["-f", "qcow2", "none/none.qcow2"],
    ["-f", "qcow2", "text"],
    ["-f", "qcow2", "."],
    ["version-9.qcow2"],
    [JSON, "version-9.qcow2"],
    # names
    ["./co:lon.qcow2"],
    *([JSON, f"names/{name}"] for name in ('quo"te\\.qcow2', "new\nline\t.qcow2", "esc\x1b.qcow2", "del\x7f.qcow2")),
    *([JSON, f"names/{name}"] for name in ("ü€\U0001f600.qcow2", "bytes\udcff.qcow2")),
    ["names/bytes\udcff.qcow2"],
    ["-f", "qcow2", "names/none\udcff\x1b.qcow2"],
    ["-r", "foo", "clean.qcow2"],
    ["-rfoo", "clean.qcow2"],
    ["--repair=foo", "clean.qcow2"],
    ["-r", "foo", "--bar", "clean.qcow2"],
    ["-r", "all", "-U", "leak.qcow2"],
    ["-r", "all", "none.qcow2"],
    ["-r", "all", "a", "b"],
]

# What the real qemu-img is asked to do, with its own name in the messages.
HANDED_OVER = [
    ["--help"],
    ["-h", "--foo"],
    ["text"],
    ["-f", "raw", "text"],
    ["-f", "raw", "clean.qcow2"],
    ["-f", "qcow2", "-f", "raw", JSON, "clean.qcow2"],
    ["-f", "vmdk", "clean.qcow2"],
    ["-f", "foo", "clean.qcow2"],
    ["."],
    [""],
    ["--image-opts", "driver=qcow2,file.filename=leak.qcow2"],
    ["--image-opts", "-f", "qcow2", "clean.qcow2"],
    ["--object", "secret,id=key,data=x", "leak.qcow2"],
    ["--object", "nonsense", "leak.qcow2"],
    ['json:{"driver":"qcow2","file":{"driver":"file","filename":"leak.qcow2"}}'],
    ["file:leak.qcow2"],
    ["co:lon.qcow2"],
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images the command lines name. Nobody writes to them."""
    where = tmp_path_factory.mktemp("images")

    def create(name: str, size: str, *writes: str, options: str = "compat=1.1") -> Path:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, where / name, size)
        qemu_io(where / name, *writes)
        return where / name

    create("clean.qcow2", "10M", "write -P 1 1M 200k", "write -P 2 5M 64k", "write -P 3 4M 64k")
    create("empty.qcow2", "10M", "read 0 512")
    create("zero.qcow2", "0", "length")
    create("compressed.qcow2", "10M", *(f"write -c -P {place} {place}M 64k" for place in range(5)), "write 7M 64k")
    create("v2.qcow2", "10M", "write 1M 64k", options="compat=0.10")
    create("snapshots.qcow2", "10M", "write 1M 640k")
    qemu_img("snapshot", "-c", "before", where / "snapshots.qcow2")
    qemu_io(where / "snapshots.qcow2", "write 1M 64k")
    leak_everywhere(create("wide.qcow2", "10M", "write 1M 64k", options="refcount_bits=64"), [(1 << 64) - 1] * 2)
    many = create("many.qcow2", "10M", "write 1M 64k", options="cluster_size=4k")
    leak_everywhere(many, [1 + number % 3 for number in range(999)])
    for code in DAMAGED:
        unpack(f"corrupt/{code}", where / "unpacked").rename(where / f"{code}.qcow2")
    (where / "names").mkdir()
    for argv in SAME:
        if argv and argv[-1].startswith("names/") and "none" not in argv[-1]:
            shutil.copy(where / "leak.qcow2", where / argv[-1])
    shutil.copy(where / "leak.qcow2", where / "co:lon.qcow2")
    (where / "version-9.qcow2").write_bytes(b"QFI\xfb" + (9).to_bytes(4, "big") + bytes(4096))
    (where / "text").write_text("no image at all\n" * 100)
    return where


def leak_everywhere(path: Path, refcounts: list[int]) -> None:
    """Append clusters that nothing refers to."""
    raw = Raw.load(path)
    raw.data += bytes(-len(raw.data) % raw.cluster_size)
    for value in refcounts:
        raw.set_refcount(len(raw.data), value)
        raw.data += bytes(raw.cluster_size)
    raw.save(path)


def run(program: list[str], where: Path, argv: list[str], **environment: str) -> tuple[int, bytes, bytes]:
    """Exit status, standard output and standard error."""
    done = subprocess.run(
        [*program, "check", *map(os.fsencode, argv)],
        cwd=where,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(FIXTURES.parent), **environment},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def renamed(answer: tuple[int, bytes, bytes]) -> tuple[int, bytes, bytes]:
    """The real qemu-img's answer as if it were called qcow2bm."""
    status, output, errors = answer
    return status, output, re.sub(rb"^qemu-img: ", b"qcow2bm: ", errors, flags=re.MULTILINE)


def title(argv: list[str]) -> str:
    return ascii(" ".join(argv) or "nothing")


@pytest.mark.parametrize("argv", SAME, ids=title)
def test_says_what_qemu_img_says(images: Path, argv: list[str]) -> None:
    assert run(OURS, images, argv) == renamed(run(REAL, images, argv))


@pytest.mark.parametrize("argv", HANDED_OVER, ids=title)
def test_what_is_not_ours_is_handed_to_the_real_qemu_img(images: Path, argv: list[str]) -> None:
    assert run(OURS, images, argv) == run(REAL, images, argv)


def test_all_exit_statuses_occur(images: Path) -> None:
    """Command lines that all end alike would test little."""
    rows = (["clean.qcow2"], ["none.qcow2"], ["refcount-too-low.qcow2"], ["leak.qcow2"], ["text"])
    assert [run(REAL, images, argv)[0] for argv in rows] == [0, 1, 2, 3, 63]


def test_in_one_file_all_errors_come_first(images: Path) -> None:
    """qemu-img buffers its output to the end, and so scripts see the lines about clusters before the summary."""
    texts = []
    for program in (OURS, REAL):
        environment = os.environ | {"PYTHONPATH": str(FIXTURES.parent)}
        argv = [*program, "check", "many.qcow2"]
        done = subprocess.run(
            argv, cwd=images, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False
        )
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert texts[0].count(b"Leaked cluster ") == 999


# ---- locks ----


def test_an_image_a_vm_writes_to(tmp_path: Path) -> None:
    """Refused in the same two lines; with -U it is checked."""
    unpack("office-week", tmp_path)
    with StorageDaemon(tmp_path / "image.qcow2") as daemon:
        daemon.write(1 << 20, 1 << 20)
        daemon.flush()
        refusal = run(OURS, tmp_path, ["image.qcow2"])
        assert refusal == renamed(run(REAL, tmp_path, ["image.qcow2"]))
        assert (refusal[0], refusal[2].count(b"\n")) == (1, 2)
        for argv in (["-U", "image.qcow2"], ["-U", JSON, "image.qcow2"], [JSON, "image.qcow2"]):
            assert run(OURS, tmp_path, argv) == renamed(run(REAL, tmp_path, argv))
        assert run(OURS, tmp_path, ["-qU", "image.qcow2"])[0] == 0


# ---- repair ----


@pytest.mark.parametrize(
    ("code", "argv", "status"),
    [
        ("leak", ["-r", "leaks"], 0),
        ("leak", ["-rall", "-q"], 0),
        ("copied-l2", ["--repair=all"], 0),
        ("refcount-too-low", ["-r", "leaks"], 2),
        ("refcount-too-low", ["-r", "all", JSON], 0),
    ],
)
def test_a_repair_is_the_real_qemu_imgs(code: str, argv: list[str], status: int, tmp_path: Path) -> None:
    """Same words, same status, and the same bytes in the image afterwards."""
    answers, digests = [], []
    for program in (OURS, REAL):
        where = tmp_path / str(len(answers))
        image = unpack(f"corrupt/{code}", where)
        before = image.read_bytes()
        answers.append(run(program, where, [*argv, "image.qcow2"]))
        digests.append(hashlib.sha256(image.read_bytes()).hexdigest())
        assert (image.read_bytes() == before) == (status != 0)
        assert check(image)["returncode"] == status
    assert answers[0] == answers[1]
    assert answers[0][0] == status
    assert digests[0] == digests[1]


# ---- wanted differences ----


@pytest.mark.parametrize(
    ("name", "needed"), [("luks", None), ("backing-chain", "backing.qcow2"), ("data-file", "data.raw")]
)
def test_neither_a_key_nor_another_file_is_needed(name: str, needed: str | None, tmp_path: Path) -> None:
    """qemu-img opens all that the image names, and wants the key; a check of metadata needs none of it."""
    unpack(name, tmp_path)
    if needed is not None:
        (tmp_path / needed).unlink()
    assert run(REAL, tmp_path, ["image.qcow2"])[0] == 1
    status, output, errors = run(OURS, tmp_path, ["image.qcow2"])
    assert (status, errors) == (0, b"")
    assert output.startswith(b"No errors were found on the image.\n")


def test_no_real_qemu_img_is_needed(images: Path, tmp_path: Path) -> None:
    """On a machine without QEMU the check is done; what is for the real one says what is missing."""
    assert run(OURS, images, ["leak.qcow2"], PATH=str(tmp_path)) == run(OURS, images, ["leak.qcow2"])
    words = b"qcow2bm: there is no qemu-img on PATH, and this needs the real one\n"
    assert run(OURS, images, ["-f", "raw", "leak.qcow2"], PATH=str(tmp_path)) == (1, b"", words)
