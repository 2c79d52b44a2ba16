"""QEMU's image locks: who uses an image, and how QEMU is kept out while we do.

QEMU describes what it does with an image in byte-range locks on the image file itself (`block/file-posix.c`): a
shared lock on byte 100+n says "I use permission n", one on byte 200+n says "nobody else may use n". Only shared
locks are ever held; a conflict is seen by asking whether an exclusive one would be granted. All are
open-file-description locks, so they belong to our one descriptor and not to the process. Byte 0 is libvirt's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..errors import InUseError, LockingUnavailableError

READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)
"""QEMU's permission bits (BLK_PERM_CONSISTENT_READ, …) that matter for an image."""

_USES = 100
_UNSHARED = 200
_FLOCK = struct.Struct("@hhqqi4x")
_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_ATTEMPTS = 6
_PAUSE = 0.008
"""Seconds, times the number of the attempt, of which a random part is waited: two that met are not to meet again."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a lock announces: the permissions used, and those nobody else may use."""

    uses: tuple[int, ...]
    unshared: tuple[int, ...]

    @property
    def announced(self) -> list[int]:
        """The bytes that are locked."""
        return [_USES + permission for permission in self.uses] + [_UNSHARED + n for n in self.unshared]

    @property
    def rivals(self) -> list[int]:
        """The bytes that nobody else may have locked."""
        return [_UNSHARED + permission for permission in self.uses] + [_USES + n for n in self.unshared]


class LockMode(Enum):
    """The claims qcow2bm makes."""

    READER = Claim(uses=(READ,), unshared=(WRITE, RESIZE))
    """As `qemu-img check`: other readers are welcome, a writer is not."""
    FORCED_READER = Claim(uses=(READ,), unshared=())
    """As `-U`: only announces itself; a writer that unshares reading still wins."""
    WRITER = Claim(uses=(READ, WRITE, RESIZE), unshared=(READ, WRITE, RESIZE))
    """Nobody else at all: a reader would see a change half done."""


_WRITING = [_USES + permission for permission in (WRITE, RESIZE)]
_ALL = [base + permission for base in (_USES, _UNSHARED) for permission in (READ, WRITE, WRITE_UNCHANGED, RESIZE)]


def _lock(fd: int, byte: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_others(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def acquire(fd: int, mode: LockMode) -> None:
    """Take the locks of `mode` on `fd`, or none.

    Raises:
        InUseError: another process holds the image in a conflicting way; the message names it where /proc tells.
        LockingUnavailableError: this file system has no such locks.
    """
    try:
        met = _contend(fd, mode.value)
    except OSError as error:
        with contextlib.suppress(OSError):
            release(fd)
        if error.errno in _NO_LOCKS:
            raise unavailable() from error
        if error.errno != errno.EAGAIN:  # somebody has an exclusive lock, as no QEMU takes
            raise
        met = mode.value.announced
    if met:
        raise InUseError(_describe(fd, mode, met), hint=_advice(mode))


def _contend(fd: int, claim: Claim) -> list[int]:
    """Announce a claim; the bytes that others hold against it, and then nothing is announced any more.

    Everything is announced first and tested afterwards, so of two that start at once both may back out but never both
    win. Whoever has it already is seen before anything is announced: a claim that is bound to fail must not be what
    keeps a third one out. So those who meet after that have come in the same moment, and are parted by chance.
    """
    met: list[int] = []
    for attempt in range(_ATTEMPTS):
        met = [byte for byte in claim.rivals if _held_by_others(fd, byte)]
        if met:
            return met
        for byte in claim.announced:
            _lock(fd, byte, fcntl.F_RDLCK)
        met = [byte for byte in claim.rivals if _held_by_others(fd, byte)]
        if not met:
            return []
        release(fd)
        # Not from `random`: two processes that were forked may have the same state of it, and it is slow to load.
        time.sleep(_PAUSE * (attempt + 1) * int.from_bytes(os.urandom(2), "big") / (1 << 16))
    return met


def unavailable() -> LockingUnavailableError:
    """The error that says so."""
    return LockingUnavailableError(
        "this file system has no locks that QEMU respects", hint="make sure that no VM runs and use --no-lock"
    )


def release(fd: int) -> None:
    """Drop every lock of ours on `fd`."""
    for byte in _ALL:
        _lock(fd, byte, fcntl.F_UNLCK)


def has_writer(fd: int) -> bool:
    """True if another process has the image open for writing: a running VM, or a tool at work. Takes no lock."""
    try:
        return any(_held_by_others(fd, byte) for byte in _WRITING)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise


def holders(fd: int, places: Iterable[int] = _ALL) -> list[str]:
    """The processes that have one of these bytes of the file locked, each as "pid 123 (qemu-system-x86)".

    Those that /proc shows to us, without the locks of `fd` itself.
    """
    status = os.fstat(fd)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    wanted, own = frozenset(places), Path(f"/proc/{os.getpid()}/fdinfo/{fd}")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            infos = (info for info in (process / "fdinfo").iterdir() if info != own)
            if any(_locks(info.read_text(), file, wanted) for info in infos):
                found.append(f"pid {process.name} ({_name(process)})")
        except OSError:  # gone meanwhile, or not ours to look at
            continue
    return sorted(found)


def _name(process: Path) -> str:
    """What a process calls itself: any bytes but a zero."""
    return (process / "comm").read_text(errors="backslashreplace").removesuffix("\n")


def _locks(fdinfo: str, file: str, wanted: frozenset[int]) -> bool:
    """True if one of the locks that the kernel lists is on this file and covers a wanted byte.

    A line is "lock: 1: OFDLCK ADVISORY READ -1 fe:01:1234 100 100", the last two words the first byte and the last.
    """
    for line in fdinfo.splitlines():
        words = line.split()
        if words[:1] == ["lock:"] and words[2] in ("OFDLCK", "POSIX") and words[-3] == file:
            first, last = words[-2:]
            if any(int(first) <= byte and (last == "EOF" or byte <= int(last)) for byte in wanted):
                return True
    return False


def _describe(fd: int, mode: LockMode, met: list[int]) -> str:
    """Who is in the way: where somebody writes the writers, without the readers that bear with them."""
    writing = [byte for byte in met if byte in _WRITING]
    who = holders(fd, writing or met)
    is_read = mode is LockMode.WRITER and not writing
    one, several = ("is reading it", "are reading it") if is_read else ("has it", "have it")
    doing = (several if len(who) > 1 else one) + ("" if is_read else " open for writing")
    return f"in use: {', '.join(who) or 'another process'} {doing}"


def _advice(mode: LockMode) -> str:
    if mode is LockMode.WRITER:
        return "shut the VM down or wait for the other tool, then try again"
    if mode is LockMode.FORCED_READER:
        return "a change is under way: wait for it to end, then try again"
    return "shut the VM down first; commands that only look also read a possibly stale state with -U"
