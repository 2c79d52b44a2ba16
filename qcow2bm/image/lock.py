"""QEMU's image locks: who uses an image, and how QEMU is kept out while we do.

QEMU describes what it does with an image in byte-range locks on the image file itself (`block/file-posix.c`): a
shared lock on byte 100+n says "I use permission n", one on byte 200+n says "nobody else may use n". Only shared
locks are ever held; a conflict is seen by asking whether an exclusive one would be granted. All are
open-file-description locks, so they belong to our one descriptor and not to the process. Byte 0 is libvirt's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
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


@dataclass(frozen=True, slots=True)
class Claim:
    """What a lock announces: the permissions used, and those nobody else may use."""

    uses: tuple[int, ...]
    unshared: tuple[int, ...]


class LockMode(Enum):
    """The claims qcow2bm makes."""

    READER = Claim(uses=(READ,), unshared=(WRITE, RESIZE))
    """As `qemu-img check`: other readers are welcome, a writer is not."""
    FORCED_READER = Claim(uses=(READ,), unshared=())
    """As `-U`: only announces itself; a writer that unshares reading still wins."""
    WRITER = Claim(uses=(READ, WRITE, RESIZE), unshared=(READ, WRITE, RESIZE))
    """Nobody else at all: a reader would see a change half done."""


def _lock(fd: int, byte: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_others(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def acquire(fd: int, mode: LockMode) -> None:
    """Take the locks of `mode` on `fd`, or none.

    Everything is announced first and tested afterwards, so of two that start at once both may fail but never both win.

    Raises:
        InUseError: another process holds the image in a conflicting way; the message names it where /proc tells.
        LockingUnavailableError: this file system has no such locks.
    """
    claim = mode.value
    try:
        for permission in claim.uses:
            _lock(fd, _USES + permission, fcntl.F_RDLCK)
        for permission in claim.unshared:
            _lock(fd, _UNSHARED + permission, fcntl.F_RDLCK)
        rivals = [_UNSHARED + permission for permission in claim.uses] + [
            _USES + permission for permission in claim.unshared
        ]
        conflict = any(_held_by_others(fd, byte) for byte in rivals)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise LockingUnavailableError(
                "this file system has no locks that QEMU respects",
                hint="make sure that no VM runs and use --no-lock",
            ) from error
        raise
    if conflict:
        release(fd)
        raise InUseError(_describe(fd, mode), hint=_advice(mode))


def release(fd: int) -> None:
    """Drop every lock of ours on `fd`."""
    for base in (_USES, _UNSHARED):
        for permission in (READ, WRITE, WRITE_UNCHANGED, RESIZE):
            _lock(fd, base + permission, fcntl.F_UNLCK)


def has_writer(fd: int) -> bool:
    """True if another process has the image open for writing: a running VM, or a tool at work. Takes no lock."""
    try:
        return any(_held_by_others(fd, _USES + permission) for permission in (WRITE, RESIZE))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise


def holders(fd: int) -> list[str]:
    """The processes that hold QEMU's locks on the file, each as "pid 123 (qemu-system-x86)".

    Those that /proc shows to us, without this one.
    """
    status = os.fstat(fd)
    place = f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            held = any(_names_lock(info.read_text(), place) for info in (process / "fdinfo").iterdir())
            if held:
                found.append(f"pid {process.name} ({(process / 'comm').read_text().strip()})")
        except OSError:  # gone meanwhile, or not ours to look at
            continue
    return sorted(found)


def _names_lock(fdinfo: str, place: str) -> bool:
    return any("OFDLCK" in line and place in line for line in fdinfo.splitlines() if line.startswith("lock:"))


def _describe(fd: int, mode: LockMode) -> str:
    who = ", ".join(holders(fd)) or "another process"
    if mode is LockMode.WRITER and not has_writer(fd):
        return f"in use: {who} is reading it"
    return f"in use: {who} has it open for writing"


def _advice(mode: LockMode) -> str:
    if mode is LockMode.WRITER:
        return "shut the VM down or wait for the other tool, then try again"
    if mode is LockMode.FORCED_READER:
        return "a change is under way: wait for it to end, then try again"
    return "shut the VM down first; commands that only look also read a possibly stale state with -U"
