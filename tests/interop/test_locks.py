"""Locks in both directions: QEMU keeps us out where it must, we keep QEMU out, and afterwards nothing is left behind.

The rows are the table of QEMU's own locks (`block/file-posix.c`): what each tool claims, and so whom it meets.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.bitmap.store import State
from qcow2bm.errors import (
    BitmapInconsistentError,
    ImageIOError,
    InUseError,
    LockingUnavailableError,
    UsageError,
)
from qcow2bm.image import lock
from qcow2bm.image.file import ImageFile
from tests.support.daemon import connect, spawn
from tests.support.qemu import QemuError, StorageDaemon, bitmap_info, check, qemu_img, qemu_io, read_bitmaps, run

KIB, MIB = 1 << 10, 1 << 20
ROUNDS = 60


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with a recording bitmap `daily` that has one dirty range."""
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_img("bitmap", "--add", path, "daily")
    qemu_io(path, "write 1M 64k")
    return path


# ---- QEMU's programs as rows: each runs on an image and raises QemuError when it is refused ----

Tool = Callable[[Path], object]


def daemon(image: Path, *, writable: bool) -> None:
    """A storage daemon that starts and ends."""
    with StorageDaemon(image, writable=writable):
        pass


def loses_no_bitmap(image: Path) -> None:
    """A VM that starts, writes and ends."""
    with StorageDaemon(image) as vm:
        vm.write(0, 512)


@contextmanager
def nbd_reader(image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `qemu-nbd -r` that has the image open, as for reading a backup."""
    link, log = image.with_name("nbd"), image.with_name("log")
    argv = ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", str(link), str(image)]
    with spawn(argv, cwd=image.parent, log=log) as nbd:
        try:
            try:
                # It listens before it opens the image, so only an answer means that it has it open.
                connect(link, nbd, log).close()
                run("nbdinfo", "--size", f"nbd+unix:///?socket={link}")
            except QemuError as error:
                nbd.wait(10)
                raise QemuError(argv, nbd.returncode, log.read_text()) from error
            yield nbd
        finally:
            nbd.kill()


def start_nbd_reader(image: Path) -> None:
    """One that ends at once."""
    with nbd_reader(image):
        pass


def merge_from(image: Path) -> None:
    """Read a bitmap of the image for a merge into another image."""
    target = image.with_name("target.qcow2")
    if not target.exists():
        qemu_img("create", "-q", "-f", "qcow2", target, "64M")
        qemu_img("bitmap", "--add", target, "all")
    qemu_img("bitmap", "--merge", "daily", "-b", image, "-F", "qcow2", "-f", "qcow2", target, "all")


READERS: dict[str, Tool] = {
    "info": lambda image: qemu_img("info", "-f", "qcow2", image),
    "check": lambda image: qemu_img("check", "-f", "qcow2", image),
    "check -U": lambda image: qemu_img("check", "-U", "-f", "qcow2", image),
    "map": lambda image: qemu_img("map", "-f", "qcow2", image),
    "convert": lambda image: qemu_img("convert", "-f", "qcow2", "-O", "raw", image, image.with_name("raw")),
    "io -r": lambda image: qemu_io(image, "read 0 512", options=("-r",)),
    "daemon ro": lambda image: daemon(image, writable=False),
    "nbd -r": start_nbd_reader,
    "bitmap -b": merge_from,
}

WRITERS: dict[str, Tool] = {
    "check -r": lambda image: qemu_img("check", "-r", "all", "-f", "qcow2", image),
    "bitmap --add": lambda image: qemu_img("bitmap", "--add", "-f", "qcow2", image, "another"),
    "bitmap --disable": lambda image: qemu_img("bitmap", "--disable", "-f", "qcow2", image, "daily"),
    "resize": lambda image: qemu_img("resize", "-f", "qcow2", image, "64M"),
    "snapshot": lambda image: qemu_img("snapshot", "-c", "now", image),
    "io": lambda image: qemu_io(image, "write 0 512"),
    "daemon rw": lambda image: daemon(image, writable=True),
}

UNLOCKED: dict[str, Tool] = {"info -U": lambda image: qemu_img("info", "-U", "-f", "qcow2", image)}


def require_refused(tool: Tool, image: Path) -> None:
    """It fails, and for the lock: not for a wrong argument."""
    with pytest.raises(QemuError) as refusal:
        tool(image)
    assert 'Failed to get "' in refusal.value.stderr or 'Failed to get shared "' in refusal.value.stderr


# ---- while we have the image ----


@pytest.mark.parametrize("name", [*READERS, *WRITERS])
def test_while_we_write_qemu_is_kept_out(name: str, image: Path) -> None:
    tool = (READERS | WRITERS)[name]
    with qcow2bm.open(image, writable=True) as ours:
        require_refused(tool, image)
        with ours.edit() as edit:
            edit.add("ours")
            require_refused(tool, image)
        require_refused(tool, image)
    tool(image)
    assert {"daily", "ours"} <= {entry["name"] for entry in bitmap_info(image)}


def test_while_we_write_info_looks_in_when_forced(image: Path) -> None:
    with qcow2bm.open(image, writable=True):
        UNLOCKED["info -U"](image)


@pytest.mark.parametrize("name", [*READERS, *UNLOCKED])
def test_while_we_read_qemu_reads_too(name: str, image: Path) -> None:
    with qcow2bm.open(image) as ours:
        (READERS | UNLOCKED)[name](image)
        assert ours.bitmaps["daily"].dirty_bytes == 64 * KIB


@pytest.mark.parametrize("name", WRITERS)
def test_while_we_read_qemu_does_not_write(name: str, image: Path) -> None:
    with qcow2bm.open(image) as ours:
        require_refused(WRITERS[name], image)
        assert ours.bitmaps["daily"].dirty_bytes == 64 * KIB
    WRITERS[name](image)


@pytest.mark.parametrize("name", [*READERS, *WRITERS])
def test_while_we_look_in_by_force_nobody_minds(name: str, image: Path) -> None:
    """-U must never be the reason that a VM does not start."""
    with qcow2bm.open(image, force_share=True):
        (READERS | WRITERS)[name](image)


@pytest.mark.parametrize("name", [*READERS, *WRITERS])
def test_without_locks_nobody_is_kept_out(name: str, image: Path) -> None:
    with qcow2bm.open(image, writable=True, use_locks=False):
        (READERS | WRITERS)[name](image)


def test_a_refused_open_leaves_no_lock(image: Path) -> None:
    with nbd_reader(image):
        for _ in range(3):
            with pytest.raises(InUseError):
                qcow2bm.open(image, writable=True)
        READERS["check"](image)
        READERS["daemon ro"](image)
    WRITERS["daemon rw"](image)


def test_a_program_we_start_holds_no_lock_of_ours(image: Path) -> None:
    """Locks belong to the open file; a child that inherited it would keep QEMU out for as long as it lives."""
    with qcow2bm.open(image, writable=True):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        WRITERS["daemon rw"](image)
    finally:
        child.kill()
        child.wait()


# ---- while QEMU has the image ----


def test_a_vm_keeps_us_out(image: Path) -> None:
    """The error names the process, and means "try again later" (75, EX_TEMPFAIL)."""
    with StorageDaemon(image) as vm:
        for writable in (True, False):
            with pytest.raises(InUseError, match="open for writing") as refusal:
                qcow2bm.open(image, writable=writable)
            assert f"pid {vm.pid} (qemu-storage-da" in str(refusal.value)
            assert str(image) in str(refusal.value)
            assert refusal.value.exit_status == 75
        vm.write(8 * MIB, 512)
    with qcow2bm.open(image, writable=True) as ours:
        assert ours.bitmaps["daily"].dirty_bytes == 128 * KIB


def test_a_vm_can_be_looked_at_by_force(image: Path) -> None:
    """Its bitmaps are active: listed, but their bits are those of the last clean close."""
    with StorageDaemon(image) as vm:
        vm.write(8 * MIB, 512)
        with qcow2bm.open(image, force_share=True) as ours:
            daily = ours.bitmaps["daily"]
            assert (daily.state, daily.recording, daily.granularity) == (State.ACTIVE, True, 64 * KIB)
            assert not ours.qcow2.locked
            with pytest.raises(BitmapInconsistentError, match="running VM"):
                list(daily.extents())
            assert [(extent.offset, extent.length) for extent in daily.extents(stale=True)] == [(MIB, 64 * KIB)]
        assert qcow2bm.who_holds(image) == [f"pid {vm.pid} (qemu-storage-da)"]
        vm.write(9 * MIB, 512)
        vm.kill()
    with qcow2bm.open(image) as ours:
        assert ours.bitmaps["daily"].state is State.INCONSISTENT
    assert qcow2bm.who_holds(image) == []


def test_by_force_is_for_reading_only(image: Path) -> None:
    """A writer beside a VM would destroy the image; QEMU refuses the two together as well, with or without a VM."""
    with StorageDaemon(image), pytest.raises(UsageError, match="read-only"):
        qcow2bm.open(image, writable=True, force_share=True)
    with pytest.raises(UsageError, match="read-only"):
        qcow2bm.open(image, writable=True, force_share=True)


@pytest.mark.parametrize("reader", ["nbd", "daemon"])
def test_a_reader_keeps_our_writer_out_and_our_reader_not(reader: str, image: Path) -> None:
    """A backup that reads through qemu-nbd must not see a change half done; the message says that it only reads."""
    running = nbd_reader(image) if reader == "nbd" else StorageDaemon(image, writable=False)
    with running as process:
        assert process is not None
        with pytest.raises(InUseError, match=rf"pid {process.pid} \(qemu-.*\) is reading it"):
            qcow2bm.open(image, writable=True)
        with qcow2bm.open(image) as ours:
            assert ours.bitmaps["daily"].state is State.READY
            assert ours.qcow2.locked
    with qcow2bm.open(image, writable=True) as ours, ours.edit() as edit:
        edit.clear("daily")
    assert read_bitmaps(image) == {"daily": []}


# ---- two of us ----

RIVAL = """
import os, sys, time
import qcow2bm
from qcow2bm.errors import InUseError

image, rounds = sys.argv[1], int(sys.argv[2])
won = lost = 0
print("ready", flush=True)
sys.stdin.readline()
while won < rounds:
    try:
        with qcow2bm.open(image, writable=True) as ours:
            # Nobody else can be here: an exclusive file says so if that is wrong.
            os.close(os.open(image + ".alone", os.O_CREAT | os.O_EXCL))
            with ours.edit() as edit:
                edit.add(f"{os.getpid()}-{won}")
                edit.merge(f"{os.getpid()}-{won}", ["daily"])
            os.unlink(image + ".alone")
            won += 1
    except InUseError:
        lost += 1
    time.sleep(0.001)
print(lost, flush=True)
"""


def start_rival(image: Path, rounds: int) -> subprocess.Popen[str]:
    """A process of ours that is ready to edit in a loop until it has won `rounds` times."""
    argv = [sys.executable, "-c", RIVAL, str(image), str(rounds)]
    rival = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert rival.stdout is not None
    assert rival.stdout.readline() == "ready\n"
    return rival


def go(*rivals: subprocess.Popen[str]) -> None:
    """Let them begin."""
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("\n")
        rival.stdin.flush()


def lost_rounds(rival: subprocess.Popen[str]) -> int:
    """How often it was refused, once it has won all its rounds; anything but a refusal ends it with a traceback."""
    lost = int(rival.communicate(timeout=120)[0] or -1)
    assert rival.returncode == 0
    return lost


def test_two_writers_never_both_win(image: Path) -> None:
    """Many rounds of two processes on one image: both may lose a round, but every bitmap that was added is there."""
    rivals = [start_rival(image, ROUNDS) for _ in range(2)]
    go(*rivals)
    assert sum(lost_rounds(rival) for rival in rivals), "they never met"
    assert len(bitmap_info(image)) == 1 + 2 * ROUNDS
    assert all(ranges == [(MIB, 64 * KIB)] for ranges in read_bitmaps(image).values())
    qemu_img("check", image)


def test_what_a_writer_has_done_before_the_next_one_has_its_locks_is_seen(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is longer than it was when it was opened: a change would be cut off again, if the next one failed."""
    acquire, size = lock.acquire, image.stat().st_size

    def come_second(fd: int, mode: lock.LockMode) -> None:
        monkeypatch.undo()
        qemu_img("bitmap", "--add", "-g", "512", image, "first")
        qemu_io(image, "write -P 9 32M 1M")
        acquire(fd, mode)

    monkeypatch.setattr(lock, "acquire", come_second)
    with qcow2bm.open(image, writable=True) as opened:
        assert opened.qcow2.file.size == image.stat().st_size > size
        with opened.edit() as edit:
            edit.add("second")
    assert {"first", "second"} <= {bitmap["name"] for bitmap in bitmap_info(image)}
    assert check(image)["returncode"] == 0
    qemu_io(image, "read -P 9 32M 1M")


def test_two_of_us_in_one_process(image: Path) -> None:
    """Locks of an open file, not of a process: a second open of ours is somebody else."""
    with qcow2bm.open(image) as first, qcow2bm.open(image) as second:
        assert first.bitmaps.names == second.bitmaps.names
        with pytest.raises(InUseError):
            qcow2bm.open(image, writable=True)
    with qcow2bm.open(image, writable=True):
        for writable in (True, False):
            with pytest.raises(InUseError):
                qcow2bm.open(image, writable=writable)
        # A change half done is nothing to look at, and soon over: as `check -U`, -U is refused, and not told to use -U.
        with pytest.raises(InUseError, match="try again") as refusal:
            qcow2bm.open(image, force_share=True)
        assert "-U" not in str(refusal.value)


def test_a_vm_and_us_at_once(image: Path) -> None:
    """Starting VMs against our commits: whoever is second is refused, and no bitmap is lost on either side."""
    rival = start_rival(image, ROUNDS)
    go(rival)
    started, end = 0, time.monotonic() + 10
    while started < 5 and time.monotonic() < end:
        with suppress(QemuError):
            loses_no_bitmap(image)
            started += 1
    lost_rounds(rival)
    assert started
    entries = bitmap_info(image)
    assert len(entries) == 1 + ROUNDS
    assert not any("in-use" in entry["flags"] for entry in entries)
    qemu_img("check", image)


# ---- names of the file, and who is named ----


@pytest.mark.parametrize("name", ["soft.qcow2", "hard.qcow2", "folder/image.qcow2", "proc"])
def test_another_name_of_the_file_is_the_same_file(name: str, image: Path) -> None:
    """Links to it, to its folder, or to the open file of another process."""
    image.with_name("soft.qcow2").symlink_to(image.name)
    os.link(image, image.with_name("hard.qcow2"))
    image.with_name("folder").symlink_to(".")
    with StorageDaemon(image) as vm:
        opened = Path(f"/proc/{vm.pid}/fd").iterdir()
        proc = next(link for link in opened if link.readlink() == image)
        other = proc if name == "proc" else image.parent / name
        for writable in (True, False):
            with pytest.raises(InUseError, match=rf"pid {vm.pid} \(qemu-storage-da\) has it open for writing"):
                qcow2bm.open(other, writable=writable)
    with qcow2bm.open(image.with_name("hard.qcow2"), writable=True):
        for tool in (*READERS.values(), *WRITERS.values()):
            require_refused(tool, image)


def test_a_file_put_in_its_place_is_another_one(image: Path) -> None:
    """What was opened is what is locked, read and written, whatever has its name by now; a VM may have the new file."""
    new = image.with_name("new.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", new, "64M")
    content = new.read_bytes()

    def replaced(path: Path, *, writable: bool) -> ImageFile:
        file = ImageFile.open(path, writable=writable)
        os.link(path, image.with_name("old.qcow2"))
        new.rename(path)
        return file

    with qcow2bm.open(image, writable=True, open_file=replaced) as ours:
        READERS["daemon ro"](image)
        require_refused(WRITERS["daemon rw"], image.with_name("old.qcow2"))
        with ours.edit() as edit:
            edit.add("late")
    assert image.read_bytes() == content
    assert {entry["name"] for entry in bitmap_info(image.with_name("old.qcow2"))} == {"daily", "late"}


def test_only_who_is_in_the_way_is_named(image: Path) -> None:
    """Beside a VM others may read by force; shutting them down would not help."""
    with StorageDaemon(image) as vm, StorageDaemon(image, writable=False, force_share=True) as reader:
        for writable in (True, False):
            with pytest.raises(InUseError) as refusal:
                qcow2bm.open(image, writable=writable)
            assert refusal.value.message == f"in use: pid {vm.pid} (qemu-storage-da) has it open for writing"
        assert set(qcow2bm.who_holds(image)) == {f"pid {pid} (qemu-storage-da)" for pid in (vm.pid, reader.pid)}
    readers = StorageDaemon(image, writable=False), StorageDaemon(image, writable=False)
    with readers[0], readers[1], pytest.raises(InUseError, match=r"^\S+: in use: pid .*, pid .* are reading it; "):
        qcow2bm.open(image, writable=True)


@contextmanager
def stranger(image: Path, code: str) -> Iterator[int]:
    """A process with a lock that no QEMU takes: `code` takes it on `fd`."""
    program = f"import fcntl, sys\nfd = open(sys.argv[1], 'rb+')\n{code}\nprint(flush=True)\nsys.stdin.read()"
    argv = [sys.executable, "-c", program, str(image)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid


@pytest.mark.parametrize("place", ["", ", 1, 100"])
def test_an_exclusive_lock_is_in_the_way(place: str, image: Path) -> None:
    """Of a program that locks whole files, or of `flock` on NFS: in use, as QEMU has it, and no failure of ours."""
    with stranger(image, f"fcntl.lockf(fd, fcntl.LOCK_EX{place})") as pid:
        for writable, force_share in ((True, False), (False, False), (False, True)):
            with pytest.raises(InUseError, match=rf"pid {pid} \(python"):
                qcow2bm.open(image, writable=writable, force_share=force_share)
        with pytest.raises(QemuError, match="lock"):
            qemu_img("check", "-f", "qcow2", image)
    with qcow2bm.open(image, writable=True):
        pass


def test_a_process_may_have_any_name(image: Path) -> None:
    """The kernel takes any bytes for it; the message is still a message."""
    name = "open('/proc/self/comm', 'wb').write(b'vm\\xff')"
    with stranger(image, f"fcntl.lockf(fd, fcntl.LOCK_EX)\n{name}") as pid:
        assert qcow2bm.who_holds(image) == [f"pid {pid} (vm\\xff)"]
        with pytest.raises(InUseError, match=f"pid {pid}"):
            qcow2bm.open(image)


def test_who_is_refused_has_announced_nothing(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that is bound to fail must not, for a moment, be what keeps a third one out."""
    taken = []
    real = fcntl.fcntl

    def watched(fd: int, command: int, words: bytes) -> object:
        taken.append(command == fcntl.F_OFD_SETLK)
        return real(fd, command, words)

    with nbd_reader(image):
        monkeypatch.setattr(fcntl, "fcntl", watched)
        with pytest.raises(InUseError):
            qcow2bm.open(image, writable=True)
    assert taken
    assert not any(taken)


# ---- no locks ----


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(code: int, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing is refused, never done without locks unasked; reading works and says that nothing protects it."""

    def refuse(*_: object) -> None:
        raise OSError(code, "injected")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(LockingUnavailableError) as refusal:
        qcow2bm.open(image, writable=True)
    assert refusal.value.exit_status == 1
    assert str(image) in str(refusal.value)
    with qcow2bm.open(image) as ours:
        assert not ours.qcow2.locked
        assert ours.bitmaps["daily"].state is State.READY
        assert ours.bitmaps["daily"].dirty_bytes == 64 * KIB
    with qcow2bm.open(image, writable=True, use_locks=False) as ours, ours.edit() as edit:
        edit.clear("daily")
    monkeypatch.undo()
    assert read_bitmaps(image) == {"daily": []}


def test_another_error_of_locking_is_no_lack_of_locks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO from a network file system is a failure, and no reason to read without locks."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(ImageIOError):
        qcow2bm.open(image)
