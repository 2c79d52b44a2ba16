"""QEMU's programs as holders of an image: each keeps it open, with the locks that go with it, as long as a test wants.

Programs that end by themselves are held by a promise: they wait for an NBD server that never says a word, as their
target, their source or the image's backing file, and by then they have opened all else.
"""

import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.support.daemon import StorageDaemon, connect, spawn
from tests.support.monitor import POLL, START_DEADLINE
from tests.support.tools import DEADLINE, qemu_img, run

_PROMPT = b"qemu-io> "


class Kind(Enum):
    """What a holder does, with the bytes it has locked: 100+n for a permission it uses, 200+n for one it lets nobody
    use (n: 0 read, 1 write, 3 resize)."""

    WRITES = frozenset({100, 101, 103, 201, 203})
    READS = frozenset({100, 201, 203})
    LOOKS_IN = frozenset({100})
    """By force (-U): whatever others do."""
    UNSEEN = frozenset[int]()


@dataclass(frozen=True)
class Holder:
    """A program that has an image open.

    Attributes:
        has: opens it and gives the process id; the image is free again afterwards.
        waits_for_backing: the image gets a backing file that never answers.
    """

    name: str
    kind: Kind
    has: Callable[[Path], AbstractContextManager[int]]
    waits_for_backing: bool = False

    def __str__(self) -> str:
        return self.name


def locked_bytes(pid: int, image: Path) -> frozenset[int]:
    """The bytes of a file that a process has locked, by the kernel's own account."""
    found: set[int] = set()
    inode = image.stat().st_ino
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            lines = info.read_text().splitlines()
        except FileNotFoundError:  # closed meanwhile
            continue
        for words in map(str.split, lines):
            if words[:1] == ["lock:"] and words[-3].endswith(f":{inode}"):
                found.update(range(int(words[-2]), int(words[-1]) + 1))
    return frozenset(found)


def wait_for_locks(pid: int, image: Path, wanted: frozenset[int]) -> None:
    """Wait until a process has locked exactly these bytes."""
    end = time.monotonic() + START_DEADLINE
    while (found := locked_bytes(pid, image)) != wanted:
        assert time.monotonic() < end, f"locked are {sorted(found)}, and not {sorted(wanted)}"
        time.sleep(POLL)


class UnlockedDaemon(StorageDaemon):
    """A daemon that takes no locks at all, as QEMU can be told to."""

    def _arguments(self) -> list[str]:
        return [
            word.replace('{"driver": "file", ', '{"driver": "file", "locking": "off", ')
            for word in super()._arguments()
        ]


@contextmanager
def _running(image: Path, *argv: str) -> Iterator[int]:
    with spawn(list(argv), cwd=image.parent, log=image.with_name("holder.log")) as process:
        try:
            yield process.pid
        finally:
            process.kill()
            process.wait(DEADLINE)


def _daemon(*, writable: bool, force_share: bool = False) -> Callable[[Path], AbstractContextManager[int]]:
    @contextmanager
    def has(image: Path) -> Iterator[int]:
        with StorageDaemon(image, writable=writable, force_share=force_share) as daemon:
            yield daemon.pid

    return has


@contextmanager
def unlocked_daemon(image: Path) -> Iterator[int]:
    """A writer that nobody can see."""
    with UnlockedDaemon(image) as daemon:
        yield daemon.pid


def _nbd(*options: str) -> Callable[[Path], AbstractContextManager[int]]:
    @contextmanager
    def has(image: Path) -> Iterator[int]:
        log = image.with_name("nbd.log")
        with tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder:
            link = Path(folder, "n")
            argv = ["qemu-nbd", *options, "-t", "-f", "qcow2", "-k", str(link), str(image)]
            with spawn(argv, cwd=image.parent, log=log) as process:
                try:
                    # It listens before it opens the image, so only an answer means that it has it open.
                    connect(link, process, log).close()
                    run("nbdinfo", "--size", f"nbd+unix:///?socket={link}")
                    yield process.pid
                finally:
                    process.kill()
                    process.wait(DEADLINE)

    return has


def _io(*options: str) -> Callable[[Path], AbstractContextManager[int]]:
    @contextmanager
    def has(image: Path) -> Iterator[int]:
        argv = ["setpriv", "--pdeathsig", "KILL", "qemu-io", *options, "-f", "qcow2", str(image)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=image.parent) as process:
            assert process.stdout is not None
            assert process.stdout.read(len(_PROMPT)) == _PROMPT
            yield process.pid
            process.communicate(b"quit\n", timeout=DEADLINE)

    return has


def _held_up(line: str, *, backing: bool = False) -> Callable[[Path], AbstractContextManager[int]]:
    """A command line of qemu-img, `{image}` and `{nbd}` in it, that never gets its answer."""

    @contextmanager
    def has(image: Path) -> Iterator[int]:
        with tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{folder}/n")
            server.listen()
            server.settimeout(START_DEADLINE)
            nbd = f"nbd+unix:///?socket={folder}/n"
            if backing:
                qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", nbd, image)
            words = [word.format(image=image, nbd=nbd) for word in line.split()]
            with _running(image, "qemu-img", *words) as pid, server.accept()[0]:
                yield pid

    return has


HOLDERS = (
    Holder("daemon", Kind.WRITES, _daemon(writable=True)),
    Holder("nbd", Kind.WRITES, _nbd()),
    Holder("io", Kind.WRITES, _io()),
    Holder("bitmap", Kind.WRITES, _held_up("bitmap --merge x -b {nbd} -F raw -f qcow2 {image} daily")),
    Holder("rebase", Kind.WRITES, _held_up("rebase -f qcow2 -F raw -b {nbd} {image}")),
    Holder("check -r", Kind.WRITES, _held_up("check -r all -f qcow2 {image}", backing=True), True),
    Holder("commit", Kind.WRITES, _held_up("commit -f qcow2 {image}", backing=True), True),
    Holder("daemon read-only", Kind.READS, _daemon(writable=False)),
    Holder("nbd -r", Kind.READS, _nbd("-r")),
    Holder("io -r", Kind.READS, _io("-r")),
    Holder("convert", Kind.READS, _held_up("convert -n -f qcow2 -O raw {image} {nbd}")),
    Holder("compare", Kind.READS, _held_up("compare -f qcow2 -F raw {image} {nbd}")),
    Holder("map", Kind.READS, _held_up("map -f qcow2 {image}", backing=True), True),
    Holder("check", Kind.READS, _held_up("check -f qcow2 {image}", backing=True), True),
    Holder("daemon force-share", Kind.LOOKS_IN, _daemon(writable=False, force_share=True)),
    Holder("io -U", Kind.LOOKS_IN, _io("-r", "-U")),
    Holder("check -U", Kind.LOOKS_IN, _held_up("check -U -f qcow2 {image}", backing=True), True),
)
"""All but the one that nobody can see."""
