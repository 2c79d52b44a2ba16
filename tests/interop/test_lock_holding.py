"""The locks that a command has at every single byte it reads and writes, by the kernel's own account.

Locks that are lost on the way, by closing another descriptor of the file, would show nowhere else: the command goes on.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from contextlib import chdir
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import __main__
from qcow2bm.image import lock
from qcow2bm.image.lock import LockMode
from tests.support.holders import Kind, locked_bytes
from tests.support.qemu import StorageDaemon, qemu_img, qemu_io
from tests.support.raw import Raw

WRITER = frozenset({100, 101, 103, 200, 201, 203})
"""As QEMU's writers, and nobody may read either."""
READER = Kind.READS.value
FORCED = Kind.LOOKS_IN.value
NOTHING = Kind.UNSEEN.value


class Watch:
    """What was locked, in each image and disk of a folder, whenever this process read it or wrote to it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Of several names of one file the first counts.
        files = sorted([*folder.glob("*.qcow2"), *folder.glob("*.raw")], reverse=True)
        self._files = {path.stat().st_ino: path for path in files}
        self.read: dict[str, set[frozenset[int]]] = defaultdict(set)
        self.written: dict[str, set[frozenset[int]]] = defaultdict(set)
        for name in ("pread", "preadv"):
            self._wrap(name, self.read, monkeypatch)
        for name in ("pwrite", "ftruncate", "fdatasync"):
            self._wrap(name, self.written, monkeypatch)

    def _wrap(self, name: str, seen: dict[str, set[frozenset[int]]], monkeypatch: pytest.MonkeyPatch) -> None:
        call = getattr(os, name)

        def watched(fd: int, *words: object) -> object:
            path = self._files.get(os.fstat(fd).st_ino)
            if path is not None:
                seen[path.name].add(locked_bytes(os.getpid(), path))
            return call(fd, *words)

        monkeypatch.setattr(os, name, watched)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several kinds, disks, and what some commands want beside them."""
    path = tmp_path_factory.mktemp("pattern")
    with chdir(path):
        qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", "64M")
        for name, options in IMAGES.items():
            qemu_img("create", "-q", "-f", "qcow2", *options, f"{name}.qcow2", "64M")
            for bitmap in ("x", "y"):
                qemu_img("bitmap", "--add", f"{name}.qcow2", bitmap)
        qemu_io(path / "a.qcow2", "write 1M 64k")
        with Path("older.raw").open("wb") as older:
            older.truncate(64 << 20)
        leaky = Raw.load(path / "leaky.qcow2")
        end = len(leaky.data) // leaky.cluster_size * leaky.cluster_size
        leaky.data.extend(bytes(2 * leaky.cluster_size))
        leaky.set_refcount(end + leaky.cluster_size, 1)
        leaky.save(path / "leaky.qcow2")
        vm = StorageDaemon(path / "crashed.qcow2")
        vm.start()
        vm.kill()
        assert typed("export a.qcow2 exported") == 0
        assert typed("clear a.qcow2 y --undo undo") == 0
    return path


@pytest.fixture
def folder(pattern: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, a copy of that, with more names of one image."""
    shutil.copytree(pattern, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    os.link("a.qcow2", "hard.qcow2")
    Path("soft.qcow2").symlink_to("a.qcow2")
    return tmp_path


IMAGES = {
    "a": (),
    "b": ("-b", "base.qcow2", "-F", "qcow2"),
    "crashed": (),
    "leaky": (),
    "d": ("-o", "data_file=d.raw"),
}


def typed(line: str) -> int:
    """Run a command line."""
    return __main__.main(line.split())


CHANGES = {
    "add a.qcow2 new": {"a.qcow2"},
    "merge a.qcow2 y x --undo new-undo": {"a.qcow2"},
    "copy a.qcow2#x a.qcow2#twin": {"a.qcow2"},
    "copy hard.qcow2#x a.qcow2#twin": {"a.qcow2"},
    "copy soft.qcow2#x hard.qcow2#twin": {"a.qcow2"},
    "import a.qcow2 exported --merge": {"a.qcow2"},
    "resize a.qcow2 +1M": {"a.qcow2"},
    "undo a.qcow2 undo": {"a.qcow2"},
    "repair crashed.qcow2 --yes --in-use all-dirty": {"crashed.qcow2"},
    "repair leaky.qcow2 --yes": {"leaky.qcow2"},
    "rebuild crashed.qcow2 x --against older.raw": {"crashed.qcow2"},
    "rebuild b.qcow2 x --against a.qcow2": {"b.qcow2"},
    "resize d.qcow2 +1M --data-file d.raw": {"d.qcow2", "d.raw"},
    "copy a.qcow2#x b.qcow2#twin": {"b.qcow2"},
    "merge b.qcow2 y hard.qcow2#x a.qcow2#x": {"b.qcow2"},
    "diff a.qcow2 b.qcow2 --into b.qcow2#differs": {"b.qcow2"},
    "diff older.raw a.qcow2 --into b.qcow2#differs": {"b.qcow2"},
    "qemu-img bitmap --add -f qcow2 a.qcow2 new": {"a.qcow2"},
    "qemu-img bitmap --merge x -b a.qcow2 -F qcow2 -f qcow2 b.qcow2 y": {"b.qcow2"},
    "qemu-img check -r all -f qcow2 leaky.qcow2": {"leaky.qcow2"},
}
"""Each with the files it writes to; all others that it reads are locked as read."""

READS = (
    *("info a.qcow2", "list a.qcow2 b.qcow2", "show b.qcow2 x --extents", "check a.qcow2 b.qcow2", "dump a.qcow2"),
    *("estimate b.qcow2", "export a.qcow2 again", "why a.qcow2 x", "diff a.qcow2 b.qcow2", "diff older.raw b.qcow2"),
    *("prove b.qcow2 x --against older.raw", "prove b.qcow2 x --against hard.qcow2", "qemu-img check -f qcow2 a.qcow2"),
    *("add a.qcow2 new --dry-run", "repair leaky.qcow2 --dry-run", "undo a.qcow2 undo --list"),
    *("resize d.qcow2 +1M --data-file d.raw --dry-run", "copy a.qcow2#x b.qcow2#twin --dry-run"),
    "repair crashed.qcow2 --dry-run",
)
PEEKS = tuple(f"{line} -U" for line in ("info a.qcow2", "list a.qcow2 b.qcow2", "show a.qcow2 x", "check b.qcow2"))


@pytest.mark.parametrize("line", CHANGES)
def test_every_byte_is_written_under_the_writers_locks(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first byte read to the last one flushed, also where the file has another name."""
    watch = Watch(folder, monkeypatch)
    assert typed(line) in (0, 2)
    assert set(watch.written) == CHANGES[line]
    assert all(seen == {WRITER} for seen in watch.written.values()), watch.written
    for name, seen in watch.read.items():
        wanted = {WRITER} if name in CHANGES[line] else {READER}
        # The length of a data file is looked at before anything is written to it.
        assert seen == wanted or (name == "d.raw" and seen == {READER}), (name, seen)
    assert all(locked_bytes(os.getpid(), path) == NOTHING for path in folder.iterdir())


@pytest.mark.parametrize("line", READS)
def test_every_byte_is_read_under_the_readers_locks(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every file of a chain and every other image, and nothing is written."""
    watch = Watch(folder, monkeypatch)
    assert typed(line) in (0, 2, 3, 4)
    assert watch.read
    assert all(seen == {READER} for seen in watch.read.values()), watch.read
    assert not watch.written
    assert all(locked_bytes(os.getpid(), path) == NOTHING for path in folder.iterdir())


@pytest.mark.parametrize("line", PEEKS)
def test_by_force_only_the_reading_is_announced(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(folder, monkeypatch)
    assert typed(line) == 0
    assert watch.read
    assert all(seen == {FORCED} for seen in watch.read.values()), watch.read


@pytest.mark.parametrize("line", ["add a.qcow2 new --no-lock", "repair leaky.qcow2 --yes --no-lock"])
def test_without_locks_nothing_is_locked(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(folder, monkeypatch)
    assert typed(line) == 0
    seen = [*watch.read.values(), *watch.written.values()]
    assert seen == [{NOTHING}] * len(seen)


@pytest.mark.parametrize("mode", LockMode)
def test_closing_another_descriptor_loses_no_lock(mode: LockMode, folder: Path) -> None:
    """As it would with POSIX locks, which belong to the process."""
    image = folder / "a.qcow2"
    wanted = {LockMode.WRITER: WRITER, LockMode.READER: READER, LockMode.FORCED_READER: FORCED}[mode]
    with qcow2bm.open(image, writable=mode is LockMode.WRITER, force_share=mode is LockMode.FORCED_READER) as opened:
        assert mode.value.announced == sorted(wanted)
        assert locked_bytes(os.getpid(), image) == wanted
        for name in ("a.qcow2", "hard.qcow2", "soft.qcow2"):
            (folder / name).read_bytes()
        os.close(os.dup(opened.qcow2.file.fd))
        lock.holders(opened.qcow2.file.fd)
        assert locked_bytes(os.getpid(), image) == wanted
    assert locked_bytes(os.getpid(), image) == NOTHING


def open_files() -> int:
    """How many files this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize(
    "line",
    [
        "add a.qcow2 x",
        "remove a.qcow2 nobody",
        "copy a.qcow2#nobody b.qcow2#twin",
        "merge a.qcow2 x older.raw#x",
        "rebuild a.qcow2 x --against hard.qcow2",
        "diff older.raw missing.qcow2 --into a.qcow2#differs",
        "undo a.qcow2 exported",
        "resize a.qcow2 1",
        "add older.raw new",
        "check older.raw",
        "qemu-img bitmap --add -f qcow2 a.qcow2 x",
    ],
)
def test_an_error_leaves_no_lock(line: str, folder: Path) -> None:
    """Nor an open file: in a program that goes on, it would keep QEMU out."""
    before = open_files()
    assert typed(line) not in (0, 75)
    assert open_files() == before
    assert all(locked_bytes(os.getpid(), path) == NOTHING for path in folder.iterdir() if path.is_file())
