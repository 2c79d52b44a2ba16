"""One command on one hostile image: in bounded time and memory, without a traceback, and read-only where it reads."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from qcow2bm import __main__
from tests.fuzz.images import hostile
from tests.fuzz.side import JOURNAL, Side, hostile_side, make_sides
from tests.support.bases import make_bases
from tests.support.damage import Generator

SECONDS = 10
"""Of work, by the processor's clock: how busy the machine is does not count."""
WAITING = 60
"""Seconds on the clock, for what waits without working: for the other end of a pipe, for a lock."""
MEMORY = 256 << 20
"""Bytes that a command may take beside twice the metadata that is there."""

READING = (
    "info {image}", "info {image} --output json", "list {image}", "list {image} --output json", "show {image} {name}",
    "show {image} {name} --extents --output json", "dump {image}", "dump {image} --output json", "check {image}",
    "check {image} --output json", "why {image} {name}", "repair {image} --dry-run --allow guess", "estimate {image}",
    "merge {image} {name} {other} --dry-run", "resize {image} +1M --dry-run", "resize {image} 512k --shrink --dry-run",
    "add {image} new --dry-run", "remove {image} --match * --dry-run", "export {image} {folder}/exported",
    "diff {folder}/zeroes {image}", "prove {image} {name} --against {folder}/zeroes",
    "copy {image}#{name} {image}#new --dry-run", "qemu-img check -f qcow2 {image}",
    "qemu-img check --output=json -f qcow2 {image}",
)  # fmt: skip
CHANGING = (
    "repair {image} --yes", "repair {image} --yes --allow lossy", "repair {image} --yes --allow guess --no-undo",
    "repair {image} --yes --only bitmaps", "repair {image} --yes --in-use all-dirty", "check {image} -r all",
    "rename {image} {name} new",
    "enable {image} {name}", "disable {image} {name}", "set {image} {name} --range 0+64k",
    "unset {image} {name} --range 4k+64k", "set {image} {name} --from-allocation",
    "copy {image}#{name} {image}#new -g 4k",
    "rebuild {image} {name} --against {folder}/zeroes", "diff {folder}/zeroes {image} --into {image}#new",
    "add {image} new", "remove {image} {name}", "merge {image} {name} {other}", "clear {image} --match *",
    "resize {image} +1M", "resize {image} 512k --shrink", "resample {image} --match * -g 4k", "invert {image} {name}",
    "qemu-img check -r all -f qcow2 {image}", "qemu-img check -r leaks -f qcow2 {image}",
    "qemu-img bitmap --add -f qcow2 {image} new",
)  # fmt: skip
STATUSES = frozenset({0, 1, 2, 3, 4, 63, 64, 75})
_NAMES = ("a", "b", "daily", "full", "one", "b0", "b1", "nothing")


_WITH_A_FILE = 0.15
"""The share of commands that are given a hostile file beside a sound image."""
_MAY_WRITE_ALL_THE_SAME = ("repair", "check", "qemu-img")
"""Commands that may have done something although their status is not 0: what could not be repaired is told by it."""

_HANDED_OVER = "the drop-in has left the image to the real qemu-img"


class StoppedError(BaseException):
    """A command was stopped by the test."""


@dataclass(frozen=True)
class Material:
    """What hostile images and files are made from."""

    generator: Generator
    sides: list[Side]

    @classmethod
    def make(cls, folder: Path) -> Material:
        """All of it, made in an empty folder."""
        (folder / "bases").mkdir()
        return cls(Generator(make_bases(folder / "bases")), make_sides(folder / "sides"))


@dataclass(frozen=True)
class Case:
    """A command line, whether it only reads, and what lies in the folder; by whom it was chosen does not matter."""

    line: str
    reads: bool
    image: bytes
    side: bytes | None = None
    name: str = "side"


def case(material: Material, number: int) -> Case:
    """The case of a number; always the same."""
    chance = random.Random(f"command {number}")
    if chance.random() >= _WITH_A_FILE:
        reads = chance.random() < 0.7
        line = chance.choice(READING if reads else CHANGING)
        words = {"name": chance.choice(_NAMES), "other": chance.choice(_NAMES)}
        line = line.replace("{name}", words["name"]).replace("{other}", words["other"])
        return Case(line, reads, hostile(material.generator, number))
    side, data = hostile_side(material.sides, chance)
    line = chance.choice((*side.reading, *side.changing))
    return Case(line, line in side.reading, side.image, data, side.name)


def try_one(material: Material, number: int, folder: Path) -> str | None:
    """Run the command of a number on what it makes; what is wrong, or None."""
    chosen = case(material, number)
    image, side = folder / "image.qcow2", folder / chosen.name
    for file in folder.iterdir():
        file.unlink()
    image.write_bytes(chosen.image)
    (folder / "zeroes").write_bytes(bytes(1 << 20))
    if chosen.side is not None:
        side.write_bytes(chosen.side)
    before = image.stat().st_mtime_ns
    said, status = run_here([word.format(image=image, folder=folder, side=side) for word in chosen.line.split()])
    wrong = misbehaved(said, status)
    refused = status not in (0, 3) and chosen.line.split()[0] not in _MAY_WRITE_ALL_THE_SAME and chosen.name != JOURNAL
    if wrong is None and chosen.reads and (image.stat().st_mtime_ns != before or image.read_bytes() != chosen.image):
        wrong = "a command that reads has written to the image"
    if wrong is None and refused and image.read_bytes() != chosen.image:
        wrong = f"a command that failed ({status}) has written to the image"
    return None if wrong is None else f"image {number}, `{chosen.line}`: {wrong}"


def run_here(words: list[str]) -> tuple[str, int | str]:
    """Run a command in this process: what it says, and its status, or why it had to be stopped."""
    out = io.StringIO()
    stopped: list[str] = []

    def stop(why: str) -> Callable[..., None]:
        def call(*_: object) -> None:
            stopped.append(why)
            raise StoppedError(why)

        return call

    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        patch("os.execv", stop(_HANDED_OVER)),
        _time_limit(stop(f"it was not done after {SECONDS} s of work")),
    ):
        status: int | str = __main__.main(words)
    if stopped:
        return "", 0 if stopped == [_HANDED_OVER] else stopped[0]
    return out.getvalue(), status


def misbehaved(said: str, status: int | str) -> str | None:
    """What no command may do, on whatever image; None if it did not."""
    if isinstance(status, str):
        return status
    if "Traceback" in said or "qcow2bm: internal error" in said:
        return said[-600:]
    return None if status in STATUSES else f"it ended with {status}"


@contextlib.contextmanager
def _time_limit(stop: Callable[..., None]) -> Iterator[None]:
    """Call `stop` after so many seconds of work, or so many on the clock.

    Python calls it between two steps of its own. What hangs inside one, in C, ends the whole process a little later.
    """
    old = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(number, handler)


def try_many(material: Material, numbers: range) -> list[str]:
    """Run the commands of some numbers in this process; everything that is wrong.

    Memory is what the process takes at a command's peak beyond what it had before the first one, so it is meant for a
    process of its own.
    """
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as path:
        for number in numbers:
            started = time.monotonic()
            faulthandler.dump_traceback_later(2 * WAITING, exit=True)
            forget_peak()
            wrong = try_one(material, number, Path(path))
            taken = peak() - _at_first
            if wrong is None and taken > MEMORY + 2 * _metadata(material, number, taken):
                wrong = f"image {number}: it took {taken >> 20} MiB"
            if wrong is not None:
                bad.append(f"{wrong} ({time.monotonic() - started:.1f} s)")
    faulthandler.cancel_dump_traceback_later()
    return bad


def forget_peak() -> None:
    """The process's peak of memory is what it has now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """Bytes of memory that the process has had at most since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024


def _metadata(material: Material, number: int, taken: int) -> int:
    """Bytes of an image that may be metadata: of all that is there, what is not zero. Counted where it matters."""
    if taken <= MEMORY:
        return 0
    data = case(material, number).image
    return sum(_BLOCK for at in range(0, len(data), _BLOCK) if any(data[at : at + _BLOCK]))


_BLOCK = 4096
_at_first = peak()


def remember_memory() -> None:
    """What the process has now is not a command's: what the material takes."""
    global _at_first  # noqa: PLW0603 - one for each worker process
    forget_peak()
    _at_first = peak()


def quiet_core_dumps() -> None:
    """Nothing of a crash is kept."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)
