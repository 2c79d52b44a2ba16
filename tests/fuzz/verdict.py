"""Hostile images and QEMU's word on them: `python -m tests.fuzz.verdict --images 10000`.

Of each image QEMU is asked whether it opens it for writing, what its check says, and what the guest reads; before,
after an edit, and after a repair. What we call clean it must open and call clean; what it opens it must open
afterwards; what the guest reads stays; and an undo brings back every byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.images import hostile, struck
from tests.fuzz.running import misbehaved, quiet_core_dumps, run_here
from tests.support.bases import lay_out, make_bases
from tests.support.damage import Generator
from tests.support.figures import measured_with, write_figures
from tests.support.tools import open_arguments

EDITS = (
    "add {image} new", "resize {image} +1M", "resize {image} +512", "qemu-img bitmap --add -f qcow2 {image} new",
)  # fmt: skip
EDITS_OF_BITMAPS = (
    "set {image} {a} --range 0+64k", "unset {image} {a} --range 4k+64k", "remove {image} {a}", "clear {image} {a}",
    "disable {image} {a}", "enable {image} {a}", "rename {image} {a} new", "merge {image} {a} {b}",
    "resample {image} --match * -g 4k", "invert {image} {a}", "copy {image}#{a} {image}#new -g 4k",
    "qemu-img bitmap --clear -f qcow2 {image} {a}", "qemu-img bitmap --remove -f qcow2 {image} {a}",
    "qemu-img bitmap --merge {a} -f qcow2 {image} {b}",
)  # fmt: skip
REPAIRS = ("lossless", "lossless", "lossy", "guess")
BESIDE = re.compile(
    "backing file|Could not open '[^']*': (Could not open '|No such file)|The 'file' block driver requires a file name"
    "|Unknown driver|'data-file' is required|encrypt.key-secret|cannot unlock any keyslot|Unknown protocol"
)
"""What QEMU says where it misses something that is not in the image: another file, a driver, a key."""
_OF_BITMAPS = 0.7
"""The share of edits that concern a bitmap, where the image has one."""
_WRITTEN = 40 << 10
"""Bytes of a guest's write."""
_MOST = 16 << 20
"""Bytes of a disk that is written to."""
_TURNS = 3
"""VMs that are started one after the other."""
_STRUCK = 0.5
"""The share of images of which only the most important numbers were overwritten."""
_TOO_LONG = 20
"""Seconds for QEMU to answer; what takes longer is not compared."""
_PORTION = 20


@dataclass(frozen=True)
class Word:
    """What QEMU says of an image. It gets a copy: to look is to write for it.

    Attributes:
        refusal: why it does not open it for writing; "" if it does, None if it crashes or does not answer.
        check: status of `qemu-img check`; None if it crashes or does not answer.
        data: a digest of what the guest reads; None if it cannot read all of it.
    """

    refusal: str | None
    check: int | None
    data: bytes | None

    @classmethod
    def on(cls, image: Path, secret: str | None) -> Word:
        """Ask it."""
        raw = image.with_name("disk.raw")
        opened = _ask(image, secret, "qemu-io", "-c", "length")
        checked = _ask(image, secret, "qemu-img", "check")
        read = _ask(image, secret, "qemu-img", "convert", "-O", "raw", into=(str(raw),))
        digest = None
        if read is not None and read.returncode == 0:
            with raw.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        refusal = None if opened is None else opened.stderr.strip() if opened.returncode else ""
        return cls(refusal, None if checked is None else checked.returncode, digest)

    @property
    def misses_something(self) -> bool:
        """It has no word on the image, as what it needs beside it is not there."""
        return self.refusal is None or bool(BESIDE.search(self.refusal))

    @property
    def is_sound(self) -> bool:
        """It opens it, and finds nothing but leaks."""
        return self.refusal == "" and self.check in (0, 3, None)


def _ask(
    image: Path, secret: str | None, *tool: str, into: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str] | None:
    copy = image.with_name("copy.qcow2")
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)  # what QEMU writes may lie far out
    opening, name = open_arguments(copy, secret)
    limits = ("prlimit", "--core=0", f"--as={8 << 30}", f"--fsize={1 << 30}")
    try:
        done = subprocess.run(
            [*limits, *tool, *opening, name, *into], capture_output=True, text=True, errors="surrogateescape",
            cwd=image.parent, timeout=_TOO_LONG, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    return None if done.returncode < 0 else done


def edit_of(names: list[str], chance: random.Random) -> str:
    """An edit of an image, with a bitmap or two of it."""
    if not names or chance.random() >= _OF_BITMAPS:
        return chance.choice(EDITS)
    line = chance.choice(EDITS_OF_BITMAPS)
    return line.replace("{a}", chance.choice(names)).replace("{b}", chance.choice(names))


class Trial:
    """One image: checked, edited, repaired, and undone."""

    def __init__(self, generator: Generator, number: int, folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        anatomy = generator.anatomies[number % len(generator.anatomies)]
        self.base, self.chance = anatomy.base, random.Random(f"verdict {number}")
        names = [self.base.data[at + 24 : at + 24 + length].decode() for at, length, _ in anatomy.bitmaps]
        self.edit = edit_of(names, self.chance)
        self.data = (struck if self.chance.random() < _STRUCK else hostile)(generator, number)
        self.image = lay_out(self.base, self.data, folder)
        self.undo = folder / "undo"

    def _qemu(self) -> Word:
        return Word.on(self.image, self.base.secret)

    def _again(self) -> None:
        for name, content in self.base.beside.items():
            self.image.with_name(name).write_bytes(content)
        self.image.write_bytes(self.data)
        self.undo.unlink(missing_ok=True)

    def wrong(self) -> Iterator[str]:
        """All that is wrong, each with the command before it."""
        before = self._qemu()
        for step, judged in ((self.checked, "check"), (self.edited, self.edit), (self.repaired, "repair")):
            yield from (f"`{judged}`: {what}" for what in step(before))
            self._again()

    # ---- the steps: each yields what is wrong ----

    def checked(self, before: Word) -> Iterator[str]:
        said, status = run_here(["check", str(self.image)])
        yield from filter(None, [misbehaved(said, status)])
        if self.image.read_bytes() != self.data:
            yield "it has written"
        if status == 0 and not before.misses_something and (before.refusal or before.check):
            yield f"clean, but QEMU's check says {before.check}, and: {before.refusal}"
        if status == 3 and not before.misses_something and not before.is_sound:
            yield f"leaks only, but QEMU's check says {before.check}, and: {before.refusal}"
        if status in (0, 3, 4):
            yield from self.written_to(before, status)

    def written_to(self, before: Word, status: int) -> Iterator[str]:
        """A VM that starts on an image not called corrupt loses nothing, as often as it is shut down in between."""
        raw = self.image.with_name("disk.raw")
        size = raw.stat().st_size if before.data is not None and before.refusal == "" else 0
        if not _WRITTEN < size <= _MOST:
            return
        expected = bytearray(raw.read_bytes())
        for turn in range(_TURNS):
            words: list[str] = []
            for _ in range(3):
                at = self.chance.randrange(0, size - _WRITTEN) // 512 * 512
                words += ["-c", f"write -P {turn + 101} {at} {_WRITTEN}"]
                expected[at : at + _WRITTEN] = bytes([turn + 101]) * _WRITTEN
            opening, name = open_arguments(self.image, self.base.secret)
            done = subprocess.run(
                ["prlimit", "--core=0", "qemu-io", *words, *opening, name], capture_output=True, text=True,
                errors="surrogateescape", cwd=self.image.parent, timeout=60, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if done.returncode:
                yield f"it ended with {status}, and a write of the guest failed: {done.stdout[-300:]}{done.stderr}"
                return
        after = self._qemu()
        if after.data is None or after.data != hashlib.sha256(expected).digest():
            yield f"it ended with {status}, and the guest has lost data by writing"
        if before.is_sound and not after.is_sound:
            yield f"it ended with {status}, and after some writes QEMU's check says {after.check}"

    def edited(self, before: Word) -> Iterator[str]:
        words = [word.format(image=self.image) for word in self.edit.split()]
        if words[0] == "resize" and "data-file" in self.base.name:
            words += ["--data-file", str(self.image.with_name("data.raw"))]
        keeps = words[0] != "qemu-img"
        said, status = run_here([*words, "--undo", str(self.undo)] if keeps else words)
        yield from filter(None, [misbehaved(said, status)])
        if status or self.image.read_bytes() == self.data:
            if keeps and self.image.read_bytes() != self.data:  # to open an image is to mend it for QEMU's commands
                yield f"it failed ({status}) and has written: {said}"
            return
        after = self._qemu()
        yield from self._no_worse(before, after)
        if after.refusal and not after.misses_something and "warning" not in said:
            yield f"QEMU refuses the image, and nothing was said: {after.refusal}"
        if before.is_sound and after.check not in (0, 3, None):
            yield f"QEMU's check said {before.check}, and {after.check} now"
        if words[0] != "resize" and None not in (before.data, after.data) and before.data != after.data:
            yield "the guest reads something else"
        if keeps:
            yield from self._undone()

    def repaired(self, before: Word) -> Iterator[str]:
        allowed = self.chance.choice(REPAIRS)
        said, status = run_here(["repair", str(self.image), "--yes", "--allow", allowed, "--undo", str(self.undo)])
        yield from filter(None, [misbehaved(said, status)])
        if self.image.read_bytes() == self.data:
            return
        after = self._qemu()
        yield from self._no_worse(before, after)
        if status == 0 and not after.misses_something and (after.refusal or after.check):
            yield f"done, but QEMU's check says {after.check}, and: {after.refusal}\n{said}"
        if allowed == "lossless" and None not in (before.data, after.data) and before.data != after.data:
            yield f"lossless, but the guest reads something else\n{said}"
        again, once_more = run_here(["check", str(self.image)])
        if once_more != status:
            yield f"it ended with {status}, and a check of what it left with {once_more}\n{again}"
        yield from self._undone()

    def _no_worse(self, before: Word, after: Word) -> Iterator[str]:
        if before.refusal == "" and after.refusal:
            yield f"QEMU opened it before, and not now: {after.refusal}"
        if before.data is not None and after.data is None:
            yield "QEMU could read all of it before, and not now"

    def _undone(self) -> Iterator[str]:
        said, status = run_here(["undo", str(self.image), str(self.undo)])
        if status == 1 and "nothing tells whether the image was used" in said:  # it has, or says it has, a data file
            said, status = run_here(["undo", str(self.image), str(self.undo), "--force"])
        if status or self.image.read_bytes() != self.data:
            yield f"undone ({status}), and not what it was: {said}"


_generator: Generator | None = None


def _set_up(generator: Generator) -> None:
    global _generator  # noqa: PLW0603 - one for each worker process
    _generator = generator
    quiet_core_dumps()


def try_many(generator: Generator, numbers: range) -> list[str]:
    """Everything that is wrong with the images of some numbers."""
    with tempfile.TemporaryDirectory(prefix="verdict-") as path:
        return [
            f"image {number} ({trial.base.name}) {wrong}"
            for number in numbers
            for trial in [Trial(generator, number, Path(path))]
            for wrong in trial.wrong()
        ]


def _portion(first: int, stop: int) -> list[str]:
    assert _generator is not None
    return try_many(_generator, range(first, stop))


def main() -> int:
    """Try them; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    wanted = parser.parse_args()
    starts = range(wanted.first, wanted.first + wanted.images, _PORTION)
    ends = [min(at + _PORTION, wanted.first + wanted.images) for at in starts]
    bad, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        generator = Generator(make_bases(Path(folder)))
        with ProcessPoolExecutor(wanted.workers, initializer=_set_up, initargs=(generator,)) as pool:
            for start, found in zip(starts, pool.map(_portion, starts, ends), strict=True):
                bad += len(found)
                print(*found, sep="\n", end="\n" * bool(found), flush=True)
                if (start // _PORTION) % 50 == 0:
                    print(f"... {start} after {time.monotonic() - started:.0f} s", flush=True)
    print(f"{wanted.images} images, {bad} bad")
    if wanted.images >= 2_000:
        text = f"Measured: {wanted.images:,} images, {bad} times QEMU thought otherwise."
        write_figures("verdict", f"{text} {measured_with()}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
