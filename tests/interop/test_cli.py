"""The commands against real QEMU: it reads back what they did, and they keep out while it works.

The second half is about refusals: each has its own words and exit status, and leaves the image as it was to the byte.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.images import FIXTURES, unpack
from tests.support.qemu import StorageDaemon, check, guest_digest, qemu_img, read_bitmaps, run

ROOT = FIXTURES.parent
Preparation = Callable[[], None]


def qcow2bm(*words: str | Path, before: Preparation | None = None) -> subprocess.CompletedProcess[str]:
    """The program, as users start it. `before` runs in the new process first."""
    argv = [sys.executable, "-m", "qcow2bm", *map(str, words)]
    return subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, preexec_fn=before
    )


def done(*words: str | Path) -> str:
    """The output of a command that must succeed, silently on stderr."""
    finished = qcow2bm(*words)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack("office-week", tmp_path)


def union(*ranges: list[tuple[int, int]]) -> set[int]:
    """The 64 KiB blocks that ranges touch."""
    return {block for some in ranges for start, length in some for block in range(start >> 16, (start + length) >> 16)}


# ---- QEMU reads what we did ----


def test_a_week_of_commands(image: Path) -> None:
    guest = guest_digest(image)
    days = read_bitmaps(image)
    done("merge", image, "week", "mon", "tue", "wed", "thu", "fri", "--create")
    done("remove", image, "--match", "t*", "wed")
    done("rename", image, "fri", "friday")
    done("clear", image, "sat")
    done("add", image, "next", "-g", "1M", "--all-dirty", "--disabled")
    done("unset", image, "next", "--range", "0+1023M")
    done("set", image, "next", "--range", "5M+1")
    done("enable", image, "mon")
    done("copy", f"{image}#week", f"{image}#fine", "-g", "4k")
    found = read_bitmaps(image)
    assert set(found) == {"mon", "friday", "sat", "week", "next", "fine"}
    assert found["mon"] == days["mon"]
    assert found["friday"] == days["fri"]
    assert found["sat"] == []
    assert union(found["week"]) == union(*(days[day] for day in ("mon", "tue", "wed", "thu", "fri")))
    assert found["next"] == [(5 << 20, 1 << 20), (1023 << 20, 1 << 20)]
    assert found["fine"] == found["week"]
    assert check(image)["returncode"] == 0
    assert guest_digest(image) == guest


def test_bitmaps_of_several_images_become_one(image: Path, tmp_path: Path) -> None:
    other = unpack("office-week", tmp_path / "other")
    days = read_bitmaps(image)
    before = other.read_bytes()
    done("remove", image, "--match", "*")
    done("merge", image, "all", f"{other}#mon", f"{other}#sat", "--create")
    done("copy", f"{other}#tue", image)
    found = read_bitmaps(image)
    assert union(found["all"]) == union(days["mon"], days["sat"])
    assert found["tue"] == days["tue"]
    assert other.read_bytes() == before
    assert check(image)["returncode"] == 0


def test_qemu_records_in_what_we_added_and_not_in_what_we_disabled(image: Path) -> None:
    done("add", image, "new")
    done("disable", image, "sat")
    before = read_bitmaps(image)
    with StorageDaemon(image) as daemon:
        daemon.write(0, 65536)
    after = read_bitmaps(image)
    assert after["new"] == [(0, 65536)]
    assert after["sat"] == before["sat"]


def test_list_and_show_say_what_qemu_says(image: Path) -> None:
    found = read_bitmaps(image)
    [listed] = json.loads(done("list", image, "--output", "json"))["images"]
    assert {bitmap["name"] for bitmap in listed["bitmaps"]} == set(found)
    for name, ranges in found.items():
        rows = done("show", image, name, "--extents", "--dirty-only", "--output", "csv").splitlines()[1:]
        assert [tuple(map(int, row.split(",")[:2])) for row in rows] == ranges


# ---- while a VM runs ----


def test_an_image_in_use_is_left_alone_and_its_user_named(image: Path) -> None:
    with StorageDaemon(image) as daemon:
        for words in (["list", image], ["info", image], ["dump", image], ["show", image, "mon"]):
            finished = qcow2bm(*words)
            assert (finished.returncode, finished.stdout) == (75, "")
            assert f"in use: pid {daemon.pid} (qemu-storage-da) has it open for writing" in finished.stderr
        for words in (["add", image, "x"], ["clear", image, "mon"], ["undo", image, image]):
            finished = qcow2bm(*words)
            assert (finished.returncode, finished.stdout) == (75, "")
            assert str(daemon.pid) in finished.stderr


def test_force_share_reads_an_image_in_use_and_says_so(image: Path) -> None:
    with StorageDaemon(image):
        finished = qcow2bm("list", image, "-U", "--output", "json")
        assert finished.returncode == 0
        assert "what is shown may be stale" in finished.stderr
        [listed] = json.loads(finished.stdout)["images"]
        # QEMU marks in use what it loaded to write: here all of them.
        assert {bitmap["state"] for bitmap in listed["bitmaps"]} == {"active"}
        assert {bitmap["dirty-bytes"] for bitmap in listed["bitmaps"]} == {None}
        assert qcow2bm("show", image, "mon", "-U").returncode == 0
        refused = qcow2bm("show", image, "mon", "-U", "--extents")
        assert (refused.returncode, refused.stdout) == (4, "")


def test_after_a_crash_of_qemu_bitmaps_are_inconsistent_and_can_be_removed(image: Path) -> None:
    daemon = StorageDaemon(image)
    daemon.start()
    daemon.write(0, 65536)
    daemon.kill()
    assert "inconsistent" in done("list", image)
    for words in (["merge", image, "mon", "tue"], ["clear", image, "mon"], ["rename", image, "mon", "x"]):
        finished = qcow2bm(*words)
        assert finished.returncode == 4
        assert "is inconsistent" in finished.stderr
    done("remove", image, "--match", "*")
    assert check(image)["returncode"] == 0


def test_a_reader_does_not_keep_readers_out_but_a_writer(image: Path) -> None:
    with StorageDaemon(image, writable=False) as daemon:
        done("list", image)
        done("add", image, "x", "-n")
        finished = qcow2bm("add", image, "x")
        assert finished.returncode == 75
        assert f"pid {daemon.pid} (qemu-storage-da) is reading it" in finished.stderr


# ---- refusals: words, status, and not a byte changed ----


@contextmanager
def untouched(*paths: Path) -> Iterator[None]:
    """The files are the same afterwards, and no others lie beside them."""
    folders = {path.parent for path in paths}
    before = [path.read_bytes() for path in paths], [sorted(folder.iterdir()) for folder in folders]
    yield
    assert before == ([path.read_bytes() for path in paths], [sorted(folder.iterdir()) for folder in folders])


def refused(status: int, message: str, *words: str | Path, before: Preparation | None = None) -> None:
    """The command fails in this way, in one line on stderr and with nothing on stdout."""
    finished = qcow2bm(*words, before=before)
    assert (finished.returncode, finished.stdout) == (status, ""), finished.stderr
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1


REFUSALS = {
    "duplicate name": (1, "there is a bitmap called 'mon' already", ["add", "{}", "mon"]),
    "rename to a duplicate": (1, "there is a bitmap called 'tue' already", ["rename", "{}", "mon", "tue"]),
    "granularity no power of two": (64, "granularity 65535 is not", ["add", "{}", "x", "-g", "65535"]),
    "granularity too small": (64, "granularity 256 is not", ["add", "{}", "x", "-g", "256"]),
    "granularity too large": (64, "granularity 4294967296 is not", ["add", "{}", "x", "-g", "4G"]),
    "granularity 0": (64, "granularity 0 is not", ["add", "{}", "x", "-g", "0"]),
    "no size": (64, "'big' is not a size", ["add", "{}", "x", "-g", "big"]),
    "name of 1024 bytes": (64, "this one has 1024", ["add", "{}", "n" * 1024]),
    "name of 1024 bytes in 512 characters": (64, "this one has 1024", ["add", "{}", "ü" * 512]),
    "empty name": (64, "this one has 0", ["add", "{}", ""]),
    "missing bitmap": (1, "no bitmap is called 'sun'", ["clear", "{}", "sun"]),
    "missing source": (1, "no bitmap is called 'sun'", ["merge", "{}", "mon", "sun"]),
    "range past the end": (1, "is not within the disk", ["set", "{}", "mon", "--range", "1G+1"]),
    "empty range": (64, "is empty or begins before the disk", ["set", "{}", "mon", "--range", "0+0"]),
    "no bitmap matches": (1, "no bitmap matches 'x*'", ["remove", "{}", "--match", "x*"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str, image: Path) -> None:
    status, message, words = REFUSALS[case]
    with untouched(image):
        refused(status, message, *(word.replace("{}", str(image)) for word in words))


def test_refused_version_2(tmp_path: Path) -> None:
    old = unpack("v2", tmp_path)
    with untouched(old):
        refused(1, "a version 2 image cannot hold bitmaps; `qemu-img amend -o compat=1.1`", "add", old, "x")


def test_refused_size_mismatch(image: Path, tmp_path: Path) -> None:
    other = unpack("internal-snapshots", tmp_path / "other")
    with untouched(image, other):
        refused(1, "only bitmaps of disks of the same size can be combined", "merge", image, "mon", f"{other}#full")
        refused(1, "only bitmaps of disks of the same size can be combined", "copy", f"{image}#mon", f"{other}#mon")


def test_refused_in_use_bitmap(tmp_path: Path) -> None:
    crashed = unpack("in-use", tmp_path)
    with untouched(crashed):
        refused(4, "bitmap 'kept' is inconsistent", "enable", crashed, "kept")
        refused(4, "bitmap 'kept' is inconsistent", "merge", crashed, "new", "kept", "--create")


def test_refused_detached(tmp_path: Path) -> None:
    detached = unpack("detached", tmp_path)
    with untouched(detached):
        refused(4, "is detached: a program that knows no bitmaps wrote", "clear", detached, "full")
        refused(4, "detached", "add", detached, "x")


def test_refused_marked_corrupt_and_marked_dirty(image: Path) -> None:
    for bit, message in ((1, "it is marked corrupt"), (0, "it is marked dirty")):
        with image.open("r+b") as file:
            file.seek(72)
            file.write((1 << bit).to_bytes(8, "big"))
        with untouched(image):
            refused(1, message, "add", image, "x")
            refused(1, message, "add", image, "x", "-n")


def test_refused_unknown_incompatible_feature(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(72)
        file.write((1 << 40).to_bytes(8, "big"))
    with untouched(image):
        refused(1, "unknown incompatible features 0x10000000000; a newer QEMU wrote it", "add", image, "x")
        refused(1, "unknown incompatible features", "list", image)


def test_refused_truncated(image: Path) -> None:
    os.truncate(image, 100_000)
    with untouched(image):
        refused(4, "the bitmap directory is damaged", "add", image, "x")
    os.truncate(image, 50)
    with untouched(image):
        refused(2, "the file ends within the qcow2 header", "add", image, "x")
        refused(2, "the file ends within the qcow2 header", "list", image)


@pytest.mark.parametrize("words", [["list", "{}"], ["add", "{}", "x"], ["dump", "{}"], ["info", "{}"]])
def test_refused_what_is_no_image(words: list[str], tmp_path: Path) -> None:
    raw, empty, fifo = tmp_path / "raw", tmp_path / "empty", tmp_path / "fifo"
    raw.write_bytes(b"\xeb\x3c\x90" * 1000)
    empty.touch()
    os.mkfifo(fifo)
    cases = {
        raw: (63, "not a qcow2 image"),
        empty: (63, "not a qcow2 image"),
        fifo: (63, "is neither a regular file nor a block device"),
        tmp_path: (63, "is "),
        Path("/dev/null"): (63, "is neither a regular file nor a block device"),
        tmp_path / "missing": (1, "No such file or directory"),
        Path('json:{"driver":"qcow2"}'): (1, "No such file or directory"),
        Path("nbd://127.0.0.1:9/x"): (1, "No such file or directory"),
    }
    for path, (status, message) in cases.items():
        refused(status, message, *(word.replace("{}", str(path)) for word in words))


@contextmanager
def immutable(path: Path) -> Iterator[str]:
    """A file that nobody can open for writing, root included; yields what the system will say.

    Read-only permission bits for an ordinary user, a read-only bind mount for root.
    """
    if os.geteuid() != 0:
        path.chmod(0o444)
        yield "Permission denied"
        path.chmod(0o644)
        return
    run("mount", "--bind", path, path)
    try:
        run("mount", "-o", "remount,bind,ro", path)
        yield "Read-only file system"
    finally:
        run("umount", path)


def test_refused_read_only(image: Path) -> None:
    with untouched(image), immutable(image) as message:
        refused(1, message, "add", image, "x")
        done("list", image)
        done("add", image, "x", "-n")


def test_refused_file_size_limit(tmp_path: Path) -> None:
    """Writing fails in the middle, when some of it has reached the file: everything is put back."""
    target = tmp_path / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", target, "1G")
    size = target.stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, size + 1000))

    with untouched(target):
        refused(1, f"{target}: ", "add", target, "x", before=limit)
    assert check(target)["returncode"] == 0


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount; the file size limit is tested for everybody")
def test_refused_full_disk(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "full", "1M") as folder:
        target = folder / "vm.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", target, "1G")
        filler = folder / "filler"
        with filler.open("wb") as file:
            while True:
                try:
                    os.write(file.fileno(), bytes(4096))
                except OSError:
                    break
        with untouched(target):
            refused(1, f"{target}: the change needs", "add", target, "x")
        filler.unlink()
        done("add", target, "x")
        assert check(target)["returncode"] == 0
