"""One command on one hostile image: in bounded time and memory, without a traceback, and read-only where it reads."""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

from qcow2bm import __main__
from tests.fuzz.images import hostile
from tests.support.damage import Generator

SECONDS = 10
MEMORY = 256 << 20
"""Bytes that a command may take beside twice what the image holds."""

READING = (
    "info {image}", "info {image} --output json", "list {image}", "list {image} --output json", "show {image} {name}",
    "show {image} {name} --extents --output json", "dump {image}", "dump {image} --output json", "check {image}",
    "check {image} --output json", "why {image} {name}", "repair {image} --dry-run --allow guess", "estimate {image}",
    "merge {image} {name} {other} --dry-run", "resize {image} +1M --dry-run", "resize {image} 512k --shrink --dry-run",
    "add {image} new --dry-run", "remove {image} --match * --dry-run", "export {image} {folder}/exported",
    "diff {folder}/zeroes {image}", "qemu-img check -f qcow2 {image}", "qemu-img check --output=json -f qcow2 {image}",
)  # fmt: skip
CHANGING = (
    "repair {image} --yes", "repair {image} --yes --allow lossy", "repair {image} --yes --allow guess --no-undo",
    "repair {image} --yes --only bitmaps", "repair {image} --yes --in-use all-dirty", "check {image} -r all",
    "add {image} new", "remove {image} {name}", "merge {image} {name} {other}", "clear {image} --match *",
    "resize {image} +1M", "resize {image} 512k --shrink", "resample {image} --match * -g 4k", "invert {image} {name}",
    "qemu-img check -r all -f qcow2 {image}", "qemu-img check -r leaks -f qcow2 {image}",
    "qemu-img bitmap --add -f qcow2 {image} new",
)  # fmt: skip
STATUSES = frozenset({0, 1, 2, 3, 4, 63, 64, 75})
_NAMES = ("a", "b", "daily", "full", "one", "b0", "b1", "nothing")


_HANDED_OVER = "the drop-in has left the image to the real qemu-img"


class StoppedError(BaseException):
    """A command was stopped by the test."""


def try_one(generator: Generator, number: int, folder: Path) -> str | None:
    """Run a command that the number chooses on the image that it makes; what is wrong, or None."""
    chance = random.Random(f"command {number}")
    reads = chance.random() < 0.7
    words = {"name": chance.choice(_NAMES), "other": chance.choice(_NAMES), "folder": str(folder)}
    line = chance.choice(READING if reads else CHANGING)
    image = folder / "image.qcow2"
    for file in folder.iterdir():
        file.unlink()
    data = hostile(generator, number)
    image.write_bytes(data)
    (folder / "zeroes").write_bytes(bytes(1 << 20))
    before = image.stat().st_mtime_ns
    said, status = _run([word.format(image=image, **words) for word in line.split()])
    wrong = _wrong(said, status)
    if wrong is None and reads and (image.stat().st_mtime_ns != before or image.read_bytes() != data):
        wrong = "a command that reads has written to the image"
    return None if wrong is None else f"image {number}, `{line.format(image='IMAGE', **words)}`: {wrong}"


def _run(words: list[str]) -> tuple[str, int | str]:
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


def _wrong(said: str, status: int | str) -> str | None:
    if isinstance(status, str):
        return status
    if "Traceback" in said or "qcow2bm: internal error" in said:
        return said[-600:]
    return None if status in STATUSES else f"it ended with {status}"


@contextlib.contextmanager
def _time_limit(stop: Callable[..., None]) -> Iterator[None]:
    """Call `stop` after so many seconds of work: how busy the machine is does not count."""
    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def try_many(generator: Generator, numbers: range) -> list[str]:
    """Run the commands of some numbers in this process; everything that is wrong.

    The memory that the process ever took is looked at after each, so it is meant for a process of its own.
    """
    bad: list[str] = []
    most = _peak()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as path:
        for number in numbers:
            started = time.monotonic()
            wrong = try_one(generator, number, Path(path))
            peak = _peak()
            if wrong is None and peak - most > MEMORY:
                wrong = f"image {number}: it took {peak - most >> 20} MiB more than ever before"
            if wrong is not None:
                bad.append(f"{wrong} ({time.monotonic() - started:.1f} s)")
            most = max(most, peak)
    return bad


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def quiet_core_dumps() -> None:
    """Nothing of a crash is kept."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)
