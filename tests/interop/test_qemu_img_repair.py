"""The drop-in `qcow2bm qemu-img check -r` over command lines, locks, crashes and devices, and where it does better.

Damage of every kind is compared in test_repair_differential.py. What is wanted to be different from the real qemu-img
is shown here with both: what that does to the image, and that ours does not.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2bm
from qcow2bm.checks.runner import CHECKING, OPENING, inspect
from qcow2bm.checks.view import opened
from qcow2bm.errors import ImageIOError, UndoError
from qcow2bm.format.entries import get_refcount, set_refcount
from qcow2bm.image.overlay import OverlayFile
from qcow2bm.image.undo import UndoFile
from qcow2bm.repair.as_qemu.blocks import put_run
from qcow2bm.repair.as_qemu.model import Event, Mode, Notice
from qcow2bm.repair.as_qemu.references import References
from qcow2bm.repair.as_qemu.repair import Repair
from tests.support.daemon import StorageDaemon
from tests.support.device import loop_device
from tests.support.images import FIXTURES, unpack
from tests.support.qemu import bitmap_info, check, guest_digest, qemu_img, qemu_io
from tests.support.raw import Raw
from tests.support.recording import PowerCutError, Tape, crash_states
from tests.support.states import bitmaps

OURS = [sys.executable, "-m", "qcow2bm", "qemu-img"]
REAL = ["qemu-img"]
KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
JSON = "--output=json"
COPIED = 1 << 63

Answer = tuple[int, bytes, bytes]


def run(program: list[str], where: Path, *argv: str, **environment: str) -> Answer:
    """Exit status, standard output and standard error of `qemu-img ARGV`."""
    done = subprocess.run(
        [*program, *argv], cwd=where, capture_output=True, check=False, stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(FIXTURES.parent), **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def renamed(answer: Answer) -> Answer:
    """The real qemu-img's answer as if it were called qcow2bm."""
    status, output, errors = answer
    return status, output, re.sub(rb"^qemu-img: ", b"qcow2bm: ", errors, flags=re.MULTILINE)


def both(folder: Path, image: Path, *argv: str) -> tuple[Answer, Answer, Path, Path]:
    """What the real qemu-img and ours say, each with a copy of an image called like it; and the copies."""
    answers, copies = [], []
    for name, program in (("theirs", REAL), ("ours", OURS)):
        where = folder / name
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        copies.append(Path(shutil.copy(image, where)))
        answers.append(run(program, where, *argv))
    return renamed(answers[0]), answers[1], *copies


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def create(path: Path, size: str = "8M", *options: str, writes: tuple[str, ...] = ("write -P 1 0 1M",)) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *(("-o", ",".join(options)) if options else ()), path, size)
    qemu_io(path, *writes)
    return path


def damaged(path: Path, *changes: Callable[[Raw], None]) -> Path:
    raw = Raw.load(path)
    for change in changes:
        change(raw)
    raw.save(path)
    return path


def refcount(cluster: int, value: int) -> Callable[[Raw], None]:
    return lambda raw: raw.set_refcount(cluster * raw.cluster_size, value)


def leaks(count: int) -> Callable[[Raw], None]:
    """Clusters at the end of the file that nothing refers to."""

    def append(raw: Raw) -> None:
        raw.data += bytes(-len(raw.data) % raw.cluster_size)
        for _ in range(count):
            raw.set_refcount(len(raw.data), 1)
            raw.data += b"\xaa" * raw.cluster_size

    return append


def l1_entry(bits: int) -> Callable[[Raw], None]:
    """Set bits of the first entry of the L1 table."""
    return lambda raw: raw.put(raw.number(40), raw.number(raw.number(40)) | bits)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to repair, each to be copied first."""
    where = tmp_path_factory.mktemp("images")
    create(where / "clean.qcow2")
    damaged(create(where / "leak.qcow2"), leaks(3))
    damaged(create(where / "low.qcow2"), refcount(6, 3), refcount(7, 0), leaks(2))
    damaged(create(where / "mixed.qcow2"), refcount(5, 2), l1_entry(1 << 57), leaks(1))
    create(where / "many.qcow2", "8M", "cluster_size=4k")
    damaged(where / "many.qcow2", leaks(700))
    for code in ("refcount-unreadable", "snapshot-extra-data-size", "snapshot-incomplete", "bitmap-flags"):
        unpack(f"corrupt/{code}", where / "unpacked").rename(where / f"{code}.qcow2")
    (where / "text").write_text("no image at all\n" * 100)
    return where


# ---- command lines ----

SAME = [
    *(["-r", mode, f"{name}.qcow2"] for name in ("clean", "leak", "low", "mixed") for mode in ("leaks", "all")),
    *(["-r", "all", JSON, f"{name}.qcow2"] for name in ("clean", "low", "mixed", "snapshot-incomplete")),
    *(["-qr", "all", f"{name}.qcow2"] for name in ("leak", "low", "refcount-unreadable")),
    *(["-r", mode, "refcount-unreadable.qcow2"] for mode in ("leaks", "all")),
    *(["-r", mode, "snapshot-extra-data-size.qcow2"] for mode in ("leaks", "all")),
    ["-r", "all", "bitmap-flags.qcow2"],
    ["-rall", "leak.qcow2"],
    ["--repair=all", "leak.qcow2"],
    ["--rep", "leaks", "leak.qcow2"],
    ["leak.qcow2", "-r", "all", "-f", "qcow2", "-T", "none"],
    ["-r", "leaks", "-r", "all", "low.qcow2"],
    ["-r", "all", "-r", "leaks", "low.qcow2"],
    # usage
    ["-r"],
    ["-r", "all"],
    ["-r", "foo"],
    ["-r", "foo", "clean.qcow2"],
    ["-rfoo", "clean.qcow2"],
    ["--repair=", "clean.qcow2"],
    ["-r", "foo", "--bar", "clean.qcow2"],
    ["--bar", "-r", "foo", "clean.qcow2"],
    ["-r", "all", "leak.qcow2", "low.qcow2"],
    ["-r", "all", "--output=yaml", "leak.qcow2"],
    # what cannot be opened
    ["-r", "all", "-U", "leak.qcow2"],
    ["-U", "-r", "leaks", "none.qcow2"],
    ["-r", "all", "none.qcow2"],
    ["-r", "all", "-f", "qcow2", "none/none.qcow2"],
    ["-r", "all", "-f", "qcow2", "text"],
]

HANDED_OVER = [
    ["-r", "all", "text"],
    ["-r", "all", "-f", "raw", "leak.qcow2"],
    ["-h", "-r", "foo"],
    ["-r", "all", "--image-opts", "driver=qcow2,file.filename=leak.qcow2"],
    ["-r", "all", "file:leak.qcow2"],
]


def laid_out(images: Path, folder: Path, argv: list[str]) -> Path:
    """A folder with copies of the images that a command line names."""
    folder.mkdir()
    for name in argv:
        if (images / name).is_file():
            shutil.copy(images / name, folder)
    return folder


@pytest.mark.parametrize("argv", SAME, ids=" ".join)
def test_says_what_qemu_img_says(images: Path, argv: list[str], tmp_path: Path) -> None:
    theirs, our = (laid_out(images, tmp_path / name, argv) for name in ("theirs", "ours"))
    assert run(OURS, our, "check", *argv) == renamed(run(REAL, theirs, "check", *argv))
    for image in theirs.glob("*.qcow2"):
        assert check(our / image.name) | {"filename": ""} == check(image) | {"filename": ""} or "error" in check(image)


@pytest.mark.parametrize("argv", HANDED_OVER, ids=" ".join)
def test_what_is_not_ours_is_handed_to_the_real_qemu_img(images: Path, argv: list[str], tmp_path: Path) -> None:
    theirs, our = (laid_out(images, tmp_path / name, ["text", "leak.qcow2"]) for name in ("theirs", "ours"))
    assert run(OURS, our, "check", *argv) == run(REAL, theirs, "check", *argv)


def test_in_one_file_all_errors_come_first(images: Path, tmp_path: Path) -> None:
    """qemu-img buffers its output to the end: the lines of both passes stand before the summary."""
    texts = []
    for number, program in enumerate((OURS, REAL)):
        where = laid_out(images, tmp_path / str(number), ["many.qcow2"])
        argv = [*program, "check", "-r", "leaks", "many.qcow2"]
        environment = os.environ | {"PYTHONPATH": str(FIXTURES.parent)}
        done = subprocess.run(
            argv, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False
        )
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert texts[0].count(b"Repairing cluster ") == 700


def test_all_exit_statuses_occur(images: Path, tmp_path: Path) -> None:
    where = laid_out(images, tmp_path / "images", ["leak.qcow2", "low.qcow2", "mixed.qcow2", "text"])
    rows = (["leaks", "leak.qcow2"], ["leaks", "low.qcow2"], ["all", "mixed.qcow2"], ["all", "text"])
    assert [run(REAL, where, "check", "-r", *row)[0] for row in rows] == [0, 1, 2, 63]


def test_no_real_qemu_img_is_needed(images: Path, tmp_path: Path) -> None:
    where = laid_out(images, tmp_path / "images", ["low.qcow2"])
    status, _, errors = run(OURS, where, "check", "-r", "all", "low.qcow2", PATH=str(tmp_path))
    assert (status, errors.count(b"Repairing cluster")) == (0, 2)
    assert check(where / "low.qcow2")["returncode"] == 0


@pytest.mark.parametrize(
    ("name", "gone"), [("luks", None), ("backing-chain", "backing.qcow2"), ("data-file", "data.raw")]
)
def test_neither_a_key_nor_another_file_is_needed(name: str, gone: str | None, tmp_path: Path) -> None:
    image = unpack(name, tmp_path)
    if gone is not None:
        (tmp_path / gone).unlink()
    assert run(REAL, tmp_path, "check", "-r", "all", image.name)[0] == 1
    before = digest(image)
    status, output, errors = run(OURS, tmp_path, "check", "-r", "all", image.name)
    assert (status, errors, digest(image)) == (0, b"", before)
    assert output.startswith(b"No errors were found on the image.\n")


# ---- locks ----


def test_an_image_in_use_is_refused(tmp_path: Path) -> None:
    """By a writer, and by a reader: in the same two lines, and nothing is written."""
    image = damaged(create(tmp_path / "image.qcow2"), leaks(1))
    for writable in (True, False):
        with StorageDaemon(image, writable=writable):
            before = digest(image)
            answer = run(OURS, tmp_path, "check", "-r", "all", image.name)
            assert answer == renamed(run(REAL, tmp_path, "check", "-r", "all", image.name))
            assert (answer[0], answer[2].count(b"\n")) == (1, 2)
            assert digest(image) == before


# ---- all or nothing ----


@contextmanager
def worked_out(
    path: Path, mode: Mode = Mode.ALL, tape: Tape | None = None
) -> Iterator[tuple[Repair, list[Event], OverlayFile]]:
    """A repair up to its commit."""
    with contextmanager_of(path, tape) as file, closing(OverlayFile(file)) as overlay:
        inspection = inspect(overlay, locked=True, as_qemu=True)
        repair = Repair(overlay, inspection, list(inspection.findings(OPENING)), mode)
        events = [*repair.first_pass(), *repair.close()]
        yield repair, events, overlay


@contextmanager
def contextmanager_of(path: Path, tape: Tape | None) -> Iterator[Any]:
    if tape is None:
        with opened(path, writable=True) as (file, _):
            yield file
    else:
        with closing(tape.open(path, writable=True)) as file:
            yield file


HURT: dict[str, tuple[Callable[[Raw], None], ...]] = {
    "leaks": (leaks(5),),
    "counts": (refcount(6, 3), refcount(8, 2), leaks(2)),
    "rebuild": (refcount(7, 0), leaks(2)),
    "flags": (lambda raw: raw.put(raw.number(raw.number(40)) & 0xFFFFFFFFFFFE00, 5 * CLUSTER),),
}


@pytest.mark.parametrize("hurt", HURT)
def test_a_write_that_fails_leaves_the_image_as_it_was(hurt: str, tmp_path: Path) -> None:
    original = damaged(create(tmp_path / "original.qcow2"), *HURT[hurt])
    number = 0
    while True:
        image, tape = Path(shutil.copy(original, tmp_path / "image.qcow2")), Tape(fail_at=number)
        with worked_out(image, tape=tape) as (repair, _, _overlay):
            try:
                repair.commit()
            except ImageIOError:
                assert digest(image) == digest(original)
            else:
                break
        number += 1
    assert number >= 1
    assert check(image)["returncode"] == 0
    assert not list(tmp_path.glob("*journal*"))


def test_an_interrupted_repair_is_rolled_back_by_the_next(tmp_path: Path) -> None:
    """Power fails between two writes; the next repair puts back what was there, and repairs all of it."""
    original = damaged(create(tmp_path / "original.qcow2"), refcount(7, 0), leaks(3))
    image = Path(shutil.copy(original, tmp_path / "image.qcow2"))
    tape = Tape(fail_at=2, power_cut=True)
    with worked_out(image, tape=tape) as (repair, _, _overlay), pytest.raises(PowerCutError):
        repair.commit()
    assert list(tmp_path.glob("image.qcow2.*journal*"))
    assert digest(image) != digest(original)
    expected = run(OURS, tmp_path, "check", "-r", "all", Path(shutil.copy(original, tmp_path / "copy.qcow2")).name)
    assert run(OURS, tmp_path, "check", "-r", "all", image.name) == expected
    assert digest(image) == digest(tmp_path / "copy.qcow2")
    assert check(image)["returncode"] == 0


def test_an_undo_file_brings_the_image_back(tmp_path: Path) -> None:
    image = damaged(create(tmp_path / "image.qcow2"), refcount(7, 0), refcount(9, 4), leaks(3))
    before, undo = digest(image), tmp_path / "undo"
    with worked_out(image) as (repair, _, _overlay):
        repair.commit(undo=undo)
    assert check(image)["returncode"] == 0
    assert digest(image) != before
    with opened(image, writable=True) as (file, _), UndoFile(undo) as kept:
        kept.restore(file)
    assert digest(image) == before


def test_a_signal_puts_everything_back(tmp_path: Path) -> None:
    """SIGTERM while it repairs: the image is the old one or the new one, and no journal is left."""
    original = damaged(create(tmp_path / "original.qcow2", "8M", "cluster_size=4k"), leaks(1500))
    for delay in (0.05, 0.2, 0.35, 0.5):
        image = Path(shutil.copy(original, tmp_path / "image.qcow2"))
        environment = os.environ | {"PYTHONPATH": str(FIXTURES.parent)}
        with subprocess.Popen(
            [*OURS, "check", "-q", "-r", "all", str(image)], env=environment, stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
        assert digest(image) == digest(original) or check(image)["returncode"] == 0
        assert not list(tmp_path.glob("*journal*"))


# ---- block devices ----


def on_a_device(folder: Path, name: str, *changes: Callable[[Raw], None], size: int = 32 * MIB) -> Path:
    """The content of a device with a damaged image on it, of which the device may be cut to a smaller size then."""
    disk = folder / name
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    with loop_device(disk) as device:
        create(device)
        qemu_img("bitmap", "--add", device, "b")
    damaged(disk, *changes)
    os.truncate(disk, size)
    return disk


def detached(raw: Raw) -> None:
    """The bitmap does not count: something that knows no bitmaps wrote to the image."""
    raw.put(88, 0)


def in_use(raw: Raw) -> None:
    """The bitmap is in use, so that QEMU does not write it anew."""
    raw.put(raw.directory[0] + 15, raw.number(raw.directory[0] + 15, 1) | 1, 1)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ((in_use, refcount(30, 1)), 32 * MIB),
        ((in_use, refcount(6, 3), refcount(31, 2)), 32 * MIB),
        ((in_use, refcount(7, 0)), 32 * MIB),
        ((in_use, refcount(0, 0)), 32 * MIB),
        ((in_use, lambda raw: raw.put(raw.number(48) + 8, 1 << 40)), 32 * MIB),
        ((detached,), 32 * MIB),
        ((in_use, refcount(7, 0)), 23 * CLUSTER),
        ((in_use, refcount(7, 0)), 24 * CLUSTER),
    ],
    ids=["leak", "counts", "rebuild", "header", "block-outside", "detached", "full", "nearly-full"],
)
def test_a_device_is_repaired_as_qemu_does(
    changes: tuple[Callable[[Raw], None], ...], size: int, tmp_path: Path
) -> None:
    answers, found = [], []
    for number, program in enumerate((REAL, OURS)):
        disk = on_a_device(tmp_path, f"disk{number}", *changes, size=size)
        with loop_device(disk) as device:
            status, output, errors = renamed(run(program, tmp_path, "check", "-r", "all", str(device)))
            answers.append((status, output, errors.replace(os.fsencode(device), b"DEVICE")))
            found.append(check(device) | {"filename": ""})
    assert answers[0] == answers[1]
    assert found[0] == found[1]
    assert (answers[0][0], b"No space left" in answers[0][2]) == ((0, False) if size == 32 * MIB else (1, True))


def test_a_new_snapshot_table_on_a_device_is_refused(tmp_path: Path) -> None:
    """It needs a journal, for which there is no place; nothing is written."""

    def cut(raw: Raw) -> None:
        raw.put(raw.number(64) + 36, 0, 4)

    disk = on_a_device(tmp_path, "disk")
    with loop_device(disk) as device:
        qemu_img("snapshot", "-c", "one", device)
    damaged(disk, cut)
    before = digest(disk)
    with loop_device(disk) as device:
        status, _, errors = run(OURS, tmp_path, "check", "-r", "all", str(device))
    assert status == 1
    assert b"needs a journal" in errors
    assert digest(disk) == before


@pytest.mark.parametrize("hurt", HURT)
def test_no_crash_on_a_device_does_harm(hurt: str, tmp_path: Path) -> None:
    """Every torn state has the guest's data, is at most as corrupt as before, and the same repair finishes it."""
    image = damaged(create(tmp_path / "image.qcow2"), *HURT[hurt])
    before, data, was = image.read_bytes(), guest_digest(image), check(image)
    tape = Tape(device=True)
    with worked_out(image, tape=tape) as (repair, _, _overlay):
        assert not repair.plan(journaled=False).journaled
        repair.commit()
    states = 0
    for name, state in crash_states(before, tape.epochs()):
        image.write_bytes(state)
        now = check(image)
        assert now.get("corruptions", 0) <= was.get("corruptions", 0), name
        assert guest_digest(image) == data, name
        with worked_out(image) as (repair, _, _overlay):
            repair.commit()
        assert check(image)["returncode"] == 0, name
        states += 1
    assert states >= 2


# ---- `qemu-img bitmap` on a dirty image ----


def killed(folder: Path) -> Path:
    """An image with lazy refcounts and a bitmap, as a VM that was killed leaves it."""
    image = folder / "image.qcow2"
    folder.mkdir(exist_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", image, "1M")
    qemu_img("bitmap", "--add", "-g", "4k", image, "old")
    script = ("write -P 1 0 100k", "flush", f"sigraise {int(signal.SIGKILL)}")
    done = qemu_io(image, *script, options=("-d", "unmap"), check=False)
    assert done.returncode == -signal.SIGKILL
    return image


def test_bitmap_on_a_dirty_image_repairs_it_first(tmp_path: Path) -> None:
    """With the lines of `-r all`; then the bitmap is there, and the image is clean."""
    image = killed(tmp_path / "made")
    theirs, our, their_copy, our_copy = both(tmp_path, image, "bitmap", "--add", image.name, "new")
    assert our == theirs
    assert b"Rebuilding refcount structure\n" in our[2]
    assert bitmap_info(our_copy) == bitmap_info(their_copy)
    assert [entry["name"] for entry in bitmap_info(our_copy)] == ["old", "new"]
    assert check(our_copy)["returncode"] == 0
    assert guest_digest(our_copy) == guest_digest(image)


def test_bitmap_on_a_dirty_image_beyond_repair_changes_nothing(tmp_path: Path) -> None:
    """QEMU goes on although something is left that is worse than a leak, and calls the image clean."""
    image = damaged(killed(tmp_path / "made"), l1_entry(2))
    before = digest(image)
    status, _, errors = run(OURS, image.parent, "bitmap", "--add", image.name, "new")
    assert status == 1
    assert errors.endswith(b"Could not open 'image.qcow2': Could not repair dirty image: Input/output error\n")
    assert digest(image) == before


# ---- wanted differences ----


def test_snapshots_beside_bitmaps_are_kept(tmp_path: Path) -> None:
    """QEMU writes the header as it opens the image, before it knows of snapshots: `-r leaks` drops them all."""
    image = create(tmp_path / "image.qcow2")
    qemu_img("snapshot", "-c", "precious", image)
    qemu_io(image, "write -P 2 0 1M")
    qemu_img("bitmap", "--add", image, "daily")
    damaged(image, leaks(1))
    theirs, our, their_copy, our_copy = both(tmp_path, image, "check", "-r", "leaks", image.name)
    assert b"precious" not in run(REAL, tmp_path, "snapshot", "-l", str(their_copy))[1]
    assert theirs[1].count(b"leaked clusters") == 1
    assert run(REAL, tmp_path, "snapshot", "-l", str(our_copy)) == run(REAL, tmp_path, "snapshot", "-l", str(image))
    assert (our[0], our[2].count(b"\n")) == (0, 2)
    assert bitmaps(our_copy) == bitmaps(image)
    qemu_img("bitmap", "--remove", our_copy, "daily")
    qemu_img("snapshot", "-a", "precious", our_copy)
    assert check(our_copy)["returncode"] == 0


def test_sound_bitmaps_are_not_touched(tmp_path: Path) -> None:
    """Not a byte of them, while QEMU writes them anew."""
    image = create(tmp_path / "image.qcow2")
    qemu_img("bitmap", "--add", image, "daily")
    qemu_io(image, "write -P 3 2M 1M")
    data = damaged(image, leaks(1)).read_bytes()
    _, our, their_copy, our_copy = both(tmp_path, image, "check", "-r", "all", image.name)
    assert our[0] == 0
    changed = [at for at in range(0, len(data), 512) if our_copy.read_bytes()[at : at + 512] != data[at : at + 512]]
    block = Raw(data).blocks[0]
    assert changed == [block + (len(data) // CLUSTER - 1) * 2 // 512 * 512]
    assert bitmaps(our_copy) == bitmaps(image) == bitmaps(their_copy)
    assert their_copy.read_bytes()[: len(data)] != our_copy.read_bytes()


def test_guest_data_that_is_taken_for_a_table_is_not_written_to(tmp_path: Path) -> None:
    """An L1 entry that names a cluster of guest data: QEMU turns its bytes into zero clusters, and says all is well."""
    image = create(tmp_path / "image.qcow2", "64M", "cluster_size=4k", writes=("write -P 7 0 64k",))
    raw = Raw.load(image)
    table = raw.number(raw.number(40)) & 0xFFFFFFFFFFFE00
    victim = raw.number(table) & 0xFFFFFFFFFFFE00
    damaged(image, lambda raw: raw.put(raw.number(40) + 8, COPIED | victim))
    _, our, their_copy, our_copy = both(tmp_path, image, "check", "-r", "all", image.name)
    clusters = [copy.read_bytes()[victim : victim + 4096] for copy in (their_copy, our_copy)]
    assert clusters[0] != b"\x07" * 4096
    assert clusters[1] == b"\x07" * 4096
    assert our[0] == 2
    assert b"Preallocated cluster is not properly aligned" in our[2]
    # What was read before is still read.
    before, after = (qcow2bm.check(path).counts for path in (image, our_copy))
    assert after["zero-unaligned"] == before["zero-unaligned"] == 512


@pytest.mark.parametrize("offset", [1 << 40, (1 << 55) - CLUSTER])
def test_a_file_does_not_grow_to_absurd_sizes(offset: int, tmp_path: Path) -> None:
    """For the sake of one entry of the refcount table; ours rebuilds the refcounts instead."""
    image = damaged(create(tmp_path / "image.qcow2"), lambda raw: raw.put(raw.number(48) + 16, offset))
    status, _, errors = run(OURS, tmp_path, "check", "-r", "all", image.name)
    assert status == 0
    assert b"ERROR could not resize image: File too large\nRebuilding refcount structure\n" in errors
    assert image.stat().st_size < 4 * MIB
    assert check(image)["returncode"] == 0


def test_a_file_grows_a_little_as_qemu_lets_it(tmp_path: Path) -> None:
    image = damaged(create(tmp_path / "image.qcow2"), lambda raw: raw.put(raw.number(48) + 16, 64 * MIB))
    theirs, our, their_copy, our_copy = both(tmp_path, image, "check", "-r", "all", image.name)
    assert our == theirs
    assert our_copy.stat().st_size == their_copy.stat().st_size == 64 * MIB + CLUSTER


def test_what_is_given_back_keeps_its_bytes(tmp_path: Path) -> None:
    """An encryption header that a damaged length has cut off: QEMU punches it out, and the disk is lost."""
    image = unpack("corrupt/encryption-header-outside", tmp_path)
    raw = Raw.load(image)
    at, _ = raw.extensions()[0x0537BE77]
    damaged(image, lambda raw: raw.put(at + 8, 0x400000), lambda raw: raw.put(at, 4 * CLUSTER))
    place = raw.data.index(b"LUKS\xba\xbe")
    damaged(image, lambda raw: raw.put(at, place))
    before = image.read_bytes()
    status, _, errors = run(OURS, tmp_path, "check", "-r", "all", image.name)
    assert status == 2
    assert b"Repairing cluster" in errors
    assert image.read_bytes()[place : place + CLUSTER] == before[place : place + CLUSTER]


def test_the_dirty_bit_stays_while_corruption_is_left(tmp_path: Path) -> None:
    """QEMU clears it whenever it closes an image, and the next VM starts with refcounts that are too low."""
    image = killed(tmp_path / "made")
    _, our, their_copy, our_copy = both(tmp_path, image, "check", "-r", "leaks", image.name)
    assert our[0] == 1
    dirty = [Raw.load(copy).number(72) & 1 for copy in (their_copy, our_copy)]
    assert dirty == [0, 1]


def test_without_all_references_nothing_is_repaired(tmp_path: Path) -> None:
    """Not even what has been found before that; else clusters in use would be freed."""
    image = damaged(unpack("corrupt/snapshot-l1-excessive", tmp_path), leaks(1), lambda raw: raw.put(88, 1 << 40))
    before = digest(image)
    status, _, errors = run(OURS, tmp_path, "check", "-r", "all", image.name)
    assert (status, digest(image)) == (1, before)
    assert b"nothing is repaired" in errors


# ---- its parts ----


@given(st.data())
def test_a_run_of_refcounts_is_that_many_refcounts(data: st.DataObject) -> None:
    order = data.draw(st.integers(0, 6))
    bits, size = 1 << order, 64
    entries = size * 8 // bits
    first = data.draw(st.integers(0, entries))
    count, value = data.draw(st.integers(0, entries - first)), data.draw(st.integers(0, (1 << bits) - 1))
    start = data.draw(st.binary(min_size=size, max_size=size))
    block, expected = bytearray(start), bytearray(start)
    put_run(block, order, first, count, value)
    for index in range(first, first + count):
        set_refcount(expected, index, order, value)
    assert block == expected


@given(wanted=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=12))
def test_free_clusters_are_the_lowest(wanted: list[tuple[int, int]]) -> None:
    """Against counts in a plain list, which take the first gap that is long enough."""
    references, counts = _references()
    for start, length in wanted:
        free = next(at for at in range(start, 500) if not any(counts[at : at + length]))
        assert references.take(start, length) == free
        counts[free : free + length] = [1] * length
    order = 4
    block = references.block(0)
    assert [get_refcount(block, index, order) for index in range(len(counts))] == counts
    for start in range(70):
        used = next((at for at in range(start, 70) if counts[at]), None)
        assert references.next_used(start, 70) == used


_MADE: list[bytes] = []


def _references() -> tuple[References, list[int]]:
    """The references of an image with gaps, and how often each of the first 600 clusters is referred to."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image.qcow2")
        if not _MADE:
            create(image, "4M", "cluster_size=4k", writes=("write 0 200k",))
            qemu_img("snapshot", "-c", "s", image)
            qemu_io(image, "discard 32k 40k", "write 0 8k", options=("-d", "unmap"))
            qemu_img("snapshot", "-d", "s", image)
            _MADE.append(image.read_bytes())
        image.write_bytes(_MADE[0])
        with opened(image) as (file, _):
            inspection = inspect(file, locked=True, as_qemu=True)
            for _finding in inspection.findings(OPENING + CHECKING):
                pass
            assert inspection.view is not None
            census = inspection.view.census
            return References(inspection.view), [census.references(cluster) for cluster in range(600)]


def test_many_leaks_in_a_row_are_one_event(tmp_path: Path) -> None:
    """And two: one as they are found, one as they are mended. Each has a line of its own all the same."""
    image = damaged(create(tmp_path / "image.qcow2", "8M", "cluster_size=4k"), leaks(1500))
    with worked_out(image) as (repair, events, _overlay):
        found = [event for event in events if not isinstance(event.what, Notice)]
        assert [(event.what.count, event.mended) for event in found] == [(1500, False), (1500, True)]
        assert repair.counts.leaks_fixed == 1500


def test_an_undo_file_that_is_there_already_is_refused(tmp_path: Path) -> None:
    image = damaged(create(tmp_path / "image.qcow2"), leaks(1))
    before, undo = digest(image), tmp_path / "undo"
    undo.write_bytes(b"mine")
    with worked_out(image) as (repair, _, _overlay), pytest.raises(UndoError):
        repair.commit(undo=undo)
    assert (digest(image), undo.read_bytes()) == (before, b"mine")
