"""Writing down what a command does to the files of a folder: writes, flushes, and names that come and go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.crash.calls import CHANGING
from tests.crash.disk import Folder, Op


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[list[Op]]:
    """Write down everything that this process does to the files of a folder meanwhile.

    It takes the place of the functions of `os` that write; other ways of writing would go unseen, so in the end what
    it saw is compared with what is there.
    """
    recorder = _Recorder(folder.resolve())
    before = Folder.read(folder)
    with contextlib.ExitStack() as stack:
        for name in _RECORDED:
            stack.enter_context(patch.object(os, name, getattr(recorder, name)))
        yield recorder.ops
    assert before.after(recorder.ops).key == Folder.read(folder).key, (
        "something was written in a way that the recorder does not see"
    )


_RECORDED = ("open", *CHANGING)


class _Recorder:
    """Stand-ins for functions of `os`, each doing what the real one does."""

    def __init__(self, folder: Path) -> None:
        self.ops: list[Op] = []
        self._folder = folder
        self._number = folder.stat().st_ino
        self._made: dict[int, int] = {}
        self._real = {name: getattr(os, name) for name in _RECORDED}

    def _is_here(self, path: Any) -> bool:
        return not isinstance(path, int) and _path(path).absolute().parent.resolve() == self._folder

    def _file(self, fd: int) -> int | None:
        """The number of an open file, if it lies in the folder."""
        place = Path(f"/proc/self/fd/{fd}").readlink()
        return self._number_of(os.fstat(fd).st_ino) if place.parent == self._folder else None

    def _number_of(self, inode: int) -> int:
        """A file's number: its inode's, but for a new file, which may have that of one that is gone."""
        return self._made.get(inode, inode)

    def open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        here = self._is_here(path)
        new = here and not os.path.lexists(path)
        fd: int = self._real["open"](path, flags, *args, **options)
        inode = os.fstat(fd).st_ino
        if new:
            self._made[inode] = -1 - len(self.ops)
            self.ops.append(Op("link", self._number_of(inode), _path(path).name))
        elif here and flags & os.O_TRUNC:
            self.ops.append(Op("truncate", self._number_of(inode)))
        return fd

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        written: int = self._real["pwrite"](fd, data, offset)
        file = self._file(fd)
        if file is not None:
            self.ops.append(Op("write", file, offset=offset, data=bytes(memoryview(data).cast("B")[:written])))
        return written

    def ftruncate(self, fd: int, size: int) -> None:
        self._real["ftruncate"](fd, size)
        file = self._file(fd)
        if file is not None:
            self.ops.append(Op("truncate", file, offset=size))

    def fsync(self, fd: int) -> None:
        # And no real flush: nothing cuts the power here, and that is what takes the time.
        if os.fstat(fd).st_ino == self._number:
            self.ops.append(Op("flush folder"))
            return
        file = self._file(fd)
        if file is not None:
            self.ops.append(Op("flush", file))

    fdatasync = fsync

    def link(self, source: Any, target: Any, **options: Any) -> None:
        self._real["link"](source, target, **options)
        if self._is_here(target):
            self.ops.append(Op("link", self._number_of(_path(target).stat().st_ino), _path(target).name))

    def unlink(self, path: Any, **options: Any) -> None:
        self._real["unlink"](path, **options)
        if self._is_here(path):
            self.ops.append(Op("unlink", name=_path(path).name))

    def replace(self, source: Any, target: Any, **options: Any) -> None:
        file = self._number_of(_path(source).stat().st_ino)
        self._real["replace"](source, target, **options)
        if self._is_here(target):
            self.ops.append(Op("link", file, _path(target).name))
        if self._is_here(source):
            self.ops.append(Op("unlink", name=_path(source).name))

    rename = replace


def _path(path: Any) -> Path:
    return Path(os.fsdecode(path))
