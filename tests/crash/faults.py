"""Calls that fail: the n-th read, write, flush or other call on a file of a folder, once or from then on."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qcow2bm.image.plan import SECTOR
from tests.crash.calls import FLUSHES, LENGTHS, NAMES, OTHERS, READS, WRITES


@dataclass(frozen=True)
class Fault:
    """What fails, and how.

    Attributes:
        calls: functions of `os`.
        code: the error; None for a call that does only half of what it was asked for.
        sticky: every later call fails too.
        full: as on a full disk only writes fail that need room, where the file has a hole or is to become longer; the
            first of them goes half-way.
        few: in an ordinary run only every so many of these calls fails, as there are many.
    """

    name: str
    calls: tuple[str, ...]
    code: int | None
    sticky: bool = False
    full: bool = False
    few: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def must_be_told(self) -> bool:
        """True if no command may say that all is well: something was not written, or may not last."""
        return self.code is not None and not self.full and set(self.calls) <= {*WRITES, *FLUSHES}


_REST = (*LENGTHS, *NAMES, *OTHERS)

FAULTS = (
    Fault("read error", READS, errno.EIO, few=20),
    Fault("read errors", READS, errno.EIO, sticky=True, few=20),
    Fault("short read", READS, None, few=20),
    Fault("short reads", READS, None, sticky=True, few=20),
    Fault("write error", WRITES, errno.EIO, few=6),
    Fault("write errors", WRITES, errno.EIO, sticky=True, few=6),
    Fault("no space", WRITES, errno.ENOSPC, few=6),
    Fault("no space from then on", WRITES, errno.ENOSPC, sticky=True, few=6),
    Fault("short write", WRITES, None, few=6),
    Fault("short writes", WRITES, None, sticky=True, few=6),
    Fault("disk fills up", WRITES, errno.ENOSPC, sticky=True, full=True, few=3),
    Fault("flush error", FLUSHES, errno.EIO),
    Fault("flush errors", FLUSHES, errno.EIO, sticky=True),
    Fault("other error", _REST, errno.EIO, few=10),
    Fault("other errors", _REST, errno.EIO, sticky=True, few=10),
    Fault("open error", ("open",), errno.EACCES, few=2),
)


def _needs_room(fd: int, offset: int, length: int) -> bool:
    """True if part of a range is a hole, or past the end of the file."""
    return offset >= os.fstat(fd).st_size or os.lseek(fd, offset, os.SEEK_HOLE) < offset + length


@contextlib.contextmanager
def failing(folder: Path, fault: Fault, number: int) -> Iterator[Failing]:
    """Let call `number`, from 0, of those that a fault is about fail on the files of a folder."""
    stand_in = Failing(folder.resolve(), fault, number)
    with contextlib.ExitStack() as stack:
        for name in fault.calls:
            stack.enter_context(patch.object(os, name, stand_in.of(name)))
        yield stand_in


class Failing:
    """Counts calls, and lets one of them fail.

    Attributes:
        happened: the fault has occurred.
    """

    def __init__(self, folder: Path, fault: Fault, number: int) -> None:
        self.happened = False
        self._folder = folder
        self._fault = fault
        self._left = number

    def of(self, name: str) -> Any:
        """A stand-in for a function of `os`."""
        real = getattr(os, name)

        def call(what: Any, *args: Any, **options: Any) -> Any:
            if not self._concerns(what) or not self._is_due():
                return real(what, *args, **options)
            if self._fault.full:
                return self._as_far_as_there_is_room(real, what, *args)
            if self._fault.code is not None:
                if name == "close":
                    real(what)  # Linux closes it whatever it says, and another file may have got its number meanwhile
                raise OSError(self._fault.code, os.strerror(self._fault.code))
            return self._half(name, real, what, args)

        return call

    def _concerns(self, what: Any) -> bool:
        if isinstance(what, int):
            with contextlib.suppress(OSError):
                place = Path(f"/proc/self/fd/{what}").readlink()
                return self._folder in (place, place.parent)
            return False
        return Path(os.fsdecode(what)).absolute().parent.resolve() == self._folder

    def _is_due(self) -> bool:
        self._left -= 1
        due = self._left == -1 or (self._fault.sticky and self._left < -1)
        self.happened = self.happened or due
        return due

    def _as_far_as_there_is_room(self, real: Any, fd: int, data: Any, offset: int) -> Any:
        view = memoryview(data).cast("B")
        if not _needs_room(fd, offset, len(view)):
            return real(fd, view, offset)
        half = (offset + len(view) // 2) // SECTOR * SECTOR - offset  # a file system gives out nothing smaller
        if self._left != -1 or half <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, view[:half], offset)

    @staticmethod
    def _half(name: str, real: Any, fd: int, args: tuple[Any, ...]) -> Any:
        if name == "pread":
            length, offset = args
            return real(fd, max(1, length // 2), offset)
        if name == "preadv":
            (buffer, *_), offset = args
            view = memoryview(buffer).cast("B")
            return real(fd, [view[: max(1, len(view) // 2)]], offset)
        data, offset = args
        view = memoryview(data).cast("B")
        return real(fd, view[: max(1, len(view) // 2)], offset)
