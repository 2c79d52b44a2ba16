"""A folder on a disk that loses power: what was done to its files, and what of that may have reached the disk.

The model is that of docs/how-it-writes.md. Between two flushes of a file any subset of its sectors, of 512 bytes or of
4096, may reach the disk, in any order; a sector reaches it whole or not at all. A change of a file's length is one more
such operation. Names come and go in the order in which they were made and removed, as on every journaling file system,
and are certain only once the folder has been flushed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.crash.choosing import Choose


@dataclass(frozen=True)
class Op:
    """One thing done: `file` is the number of a file, its inode's or that of a new one, `name` a name in the folder."""

    kind: Literal["write", "truncate", "flush", "link", "unlink", "flush folder"]
    file: int = 0
    name: str = ""
    offset: int = 0
    data: bytes = b""

    @property
    def end(self) -> int:
        """Offset after the last byte of a write."""
        return self.offset + len(self.data)

    def sectors(self, size: int) -> Iterator[Op]:
        """A write as the disk sees it: a sector at a time."""
        at = self.offset
        while at < self.end:
            stop = min(self.end, (at // size + 1) * size)
            yield Op("write", self.file, offset=at, data=self.data[at - self.offset : stop - self.offset])
            at = stop


@dataclass
class Folder:
    """Files by number, the names that lead to them, and the time stamps of those that were read."""

    files: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    stamps: dict[int, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Folder:
        """What is in a folder now."""
        found = cls()
        for entry in sorted(path.iterdir()):
            if entry.is_file():
                status = entry.stat()
                number = status.st_ino
                found.names[entry.name], found.stamps[number] = number, status.st_mtime_ns
                found.files[number] = entry.read_bytes()
        return found

    def write(self, path: Path) -> None:
        """Make a folder like this, hard links included; files that are as they should be stay."""
        for entry in path.iterdir():
            if entry.name not in self.names:
                entry.unlink()
        first: dict[int, str] = {}
        for name, number in self.names.items():
            target = path / name
            if number in first:
                target.unlink(missing_ok=True)
                os.link(path / first[number], target)
            elif not target.exists() or target.stat().st_nlink > 1 or target.read_bytes() != self.files[number]:
                target.unlink(missing_ok=True)
                target.write_bytes(self.files[number])
            first.setdefault(number, name)
            if number in self.stamps:
                os.utime(target, ns=(self.stamps[number], self.stamps[number]))

    def after(self, ops: Iterable[Op]) -> Folder:
        """The folder once these operations have reached the disk."""
        names, changed = dict(self.names), dict[int, bytearray]()
        for op in ops:
            if op.kind == "link":
                names[op.name] = op.file
            elif op.kind == "unlink":
                names.pop(op.name, None)
            if op.kind in ("write", "truncate", "link") and op.file not in changed:
                changed[op.file] = bytearray(self.files.get(op.file, b""))
            if op.kind == "write":
                data = changed[op.file]
                data.extend(bytes(max(0, op.end - len(data))))
                data[op.offset : op.end] = op.data
            elif op.kind == "truncate":
                changed[op.file] = changed[op.file][: op.offset].ljust(op.offset, b"\0")
        files = self.files | {number: bytes(data) for number, data in changed.items()}
        return Folder(files, names, self.stamps)

    def changes(self, op: Op) -> bool:
        """False for a write of what is there already."""
        if op.kind != "write":
            return True
        return self.files.get(op.file, b"")[op.offset : op.end] != op.data

    @property
    def key(self) -> frozenset[tuple[str, bytes]]:
        """Equal for folders that look alike."""
        return frozenset((name, self.files[number]) for name, number in self.names.items())


# ---- what a power cut leaves ----


@dataclass(frozen=True)
class State:
    """A folder as it may be found: what was certain, and which of the rest has reached the disk."""

    name: str
    certain: Folder
    reached: tuple[Op, ...] = ()

    @property
    def folder(self) -> Folder:
        """The folder itself; made when it is asked for, as there are many states of it."""
        return self.certain.after(self.reached)


def states(before: Folder, ops: list[Op], sector: int, choose: Choose) -> Iterator[State]:
    """Every state that a power cut may leave, of those that `choose` picks.

    At each flush, and at the end, everything that was done since the last flush of its file may have reached the disk
    or not. What is there before the flush includes what is there at any earlier moment.

    Args:
        sector: bytes that reach the disk together.
        choose: given a number of pending sectors, which sets of them to try.
    """
    certain = before
    pending: list[Op] = []
    for number, op in enumerate([*ops, Op("flush folder")]):
        if not op.kind.startswith("flush"):
            pending.append(op)
            continue
        yield from _torn(f"before flush {number}", certain, pending, sector, choose)
        certain = certain.after(other for other in pending if _is_flushed(other, op))
        pending = [other for other in pending if not _is_flushed(other, op)]
    yield State("done", certain, tuple(pending))


def _is_flushed(op: Op, by: Op) -> bool:
    if by.kind == "flush folder":
        return op.kind in ("link", "unlink")
    return op.kind in ("write", "truncate") and op.file == by.file


def _torn(where: str, certain: Folder, pending: list[Op], sector: int, choose: Choose) -> Iterator[State]:
    names = [op for op in pending if op.kind in ("link", "unlink")]
    parts = [part for op in pending if op not in names for part in (op.sectors(sector) if op.kind == "write" else [op])]
    changing = [part for part in parts if certain.changes(part)]
    for reached in range(len(names) + 1):
        for chosen in choose(len(changing)):
            yield State(
                f"{where}: {reached} of {len(names)} names, {len(chosen)} of {len(changing)} sectors",
                certain,
                (*names[:reached], *(changing[place] for place in chosen)),
            )


def by_number(files: Mapping[str, bytes]) -> Folder:
    """A folder from contents by name; for tests of this module."""
    numbers = {name: number for number, name in enumerate(files, 1)}
    return Folder({numbers[name]: data for name, data in files.items()}, numbers)
