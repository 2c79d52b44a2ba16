"""`qcow2bm qemu-img check -r` beside the real one: same status, same words, and images that a check finds alike.

The images are those of tests/support/damage.py, and every fixture of damage. Each is laid out twice, one copy for each
program; then the real `qemu-img check` and `qemu-img convert` look at both results. Ours runs in this process, as there
are many. Where the two are meant to differ, `EXCUSES` says why; there too ours must not fail, and must keep guest data.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

import qcow2bm
from tests.interop.test_check_differential import BESIDE, DEADLINE, WAYS, deadline
from tests.support.bases import IMAGE, ROWS, Base, lay_out, make_bases
from tests.support.damage import Damaged, Generator
from tests.support.images import corrupt_fixtures
from tests.support.raw import BITMAPS

ROUNDS = int(os.environ.get("REPAIR_ROUNDS", "3"))
"""Images for each base, repaired in one of the modes in turn; `REPAIR_ROUNDS=50 pytest -n auto` looks for more."""

MODES = ("leaks", "all")
GROWTH = (1 << 30) + (64 << 20)
"""Bytes that the real qemu-img may make a file: above that ours does not let it grow either."""
FAILED, ENDLESS = "it failed", "it did not end"


# ---- the two programs ----


@dataclass(frozen=True)
class Answer:
    """Exit status, standard output, and the lines on standard error."""

    status: int | str
    output: str
    lines: list[str]

    @classmethod
    def of(cls, status: int | str, output: str, errors: str) -> Answer:
        lines = errors.split("\n")  # a name may hold what splitlines() takes for an end
        # Overflows qemu-img notes as it counts, ours when all is counted: only there the order of lines differs.
        return cls(status, output, sorted(lines) if "ERROR: overflow cluster" in errors else lines)


@dataclass(frozen=True)
class Outcome:
    """What a repair said, what the real check says of the image then, and a digest of the disk, None if unreadable."""

    answer: Answer
    after: Answer
    disk: str | None


@dataclass(frozen=True)
class Patient:
    """An image, the files beside it, and its key."""

    data: bytes
    beside: dict[str, bytes]
    secret: str | None

    def put(self, folder: Path) -> Path:
        """Lay the image out in an empty folder of its own."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        lay_out(Base("", self.data, self.beside), self.data, folder)
        return folder


def real(folder: Path, secret: str | None, subcommand: str, *argv: str, target: str | None = None) -> Answer:
    """The real qemu-img's answer; no core files, no absurd allocation, no file above GROWTH."""
    name, opening = IMAGE, ["-f", "qcow2"]
    if secret is not None:
        name = f"driver=qcow2,file.filename={IMAGE},encrypt.key-secret=key"
        opening = ["--object", f"secret,id=key,data={secret}", "--image-opts"]
    words = ["prlimit", "--core=0", f"--as={8 << 30}", f"--fsize={GROWTH}", "qemu-img", subcommand, *opening, *argv]
    try:
        done = subprocess.run(
            [*words, name, *([target] if target else [])], capture_output=True, cwd=folder, timeout=DEADLINE,
            check=False, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C.UTF-8"},
            restore_signals=False,  # a file that is too large is then an error and not the end
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(ENDLESS, "", [])
    # An image named by options is quoted as such.
    output, errors = (text.decode(errors="surrogateescape").replace(name, IMAGE) for text in (done.stdout, done.stderr))
    return Answer.of(done.returncode, output, re.sub("^qemu-img: ", "qcow2bm: ", errors, flags=re.MULTILINE))


def ours(folder: Path, way: str, *argv: str) -> Answer:
    """The drop-in's answer."""
    from qcow2bm.cli.qemu_check import run

    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            if way == "by whole tables":
                stack.enter_context(patch("qcow2bm.checks.walk.PLAIN_ENTRIES", -1))
            stack.enter_context(patch("os.execv", side_effect=AssertionError("handed over to the real qemu-img")))
            stack.enter_context(contextlib.chdir(folder))
            for context in (contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), deadline()):
                stack.enter_context(context)
            status = run(["-f", "qcow2", *argv, IMAGE])
    except (Exception, SystemExit):  # noqa: BLE001 - whatever escapes would end the program: it is the answer
        return Answer(FAILED, "", traceback.format_exc().splitlines())
    return Answer.of(status, output.getvalue(), errors.getvalue())


def disk(folder: Path, secret: str | None) -> str | None:
    """A digest of what the guest reads, by the real qemu-img."""
    if real(folder, secret, "convert", "-O", "raw", target="disk.raw").status != 0:
        return None
    with (folder / "disk.raw").open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest, at = hashlib.sha256(str(size).encode()), 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            content = os.pread(file.fileno(), 1 << 16, at)
            if content.strip(b"\0"):
                digest.update(at.to_bytes(8, "big") + content)
            at += len(content)
    return digest.hexdigest()


# ---- one image, repaired by both ----


@dataclass
class Pair:
    """Both repairs of one image.

    Attributes:
        words: only what they say counts: QEMU writes sound bitmaps anew, so the images differ.
    """

    patient: Patient
    mode: str
    way: str
    folder: Path
    options: tuple[str, ...] = ()
    words: bool = False
    their: Outcome = field(init=False)
    our: Outcome = field(init=False)

    def __post_init__(self) -> None:
        theirs, our = self.patient.put(self.folder / "theirs"), self.patient.put(self.folder / "ours")
        secret, argv = self.patient.secret, ("-r", self.mode, *self.options)
        answers = real(theirs, secret, "check", *argv), ours(our, self.way, *argv)
        if self.words:
            lines = [line for line in answers[0].lines if not CLOSING.match(line)]
            if lines == answers[1].lines:
                answers = replace(answers[0], lines=lines), answers[1]
        self.their, self.our = (
            Outcome(answer, *self._look(where)) for answer, where in zip(answers, (theirs, our), strict=True)
        )

    def _look(self, where: Path) -> tuple[Answer, str | None]:
        if self.words:
            return Answer(0, "", []), None
        return real(where, self.patient.secret, "check", *self.options), disk(where, self.patient.secret)

    @cached_property
    def before(self) -> Path:
        """A folder with the image as it was."""
        return self.patient.put(self.folder / "before")

    @cached_property
    def disk_before(self) -> str | None:
        return disk(self.before, self.patient.secret)

    @cached_property
    def problems(self) -> set[str]:
        """What our own check finds in the image."""
        return set(qcow2bm.check(self.before / IMAGE).counts)

    @cached_property
    def our_punched(self) -> Outcome:
        """Our result if the clusters that are given back were zeroes, as QEMU leaves them."""
        image = self.folder / "ours" / IMAGE
        data, size = bytearray(image.read_bytes()), 1 << self.head.bits
        for line in self.their.answer.lines:
            match = re.fullmatch(r"Repairing cluster (\d+) refcount=\d+ reference=0", line)
            if match is not None:
                start = int(match[1]) * size
                data[start : start + size] = bytes(len(data[start : start + size]))
        image.write_bytes(data)
        return Outcome(self.our.answer, *self._look(image.parent))

    @property
    def is_checked_alike(self) -> bool:
        """False if the two programs say different things without any repair."""
        return real(self.before, self.patient.secret, "check") == ours(self.before, self.way)

    @property
    def head(self) -> Head:
        return Head(self.patient.data)


class Head:
    """Header fields of an image, as far as there is one."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.version, self.bits = self.number(4, 4), self.number(20, 4)
        self.readable = data[:4] == b"QFI\xfb" and self.version in (2, 3) and 9 <= self.bits <= 21
        self.snapshots = self.number(60, 4)
        self.features, self.autoclear = (self.number(at) if self.version == 3 else 0 for at in (72, 88))

    def number(self, at: int, length: int = 8) -> int:
        return int.from_bytes(self.data[at : at + length], "big")

    def extensions(self) -> Iterator[tuple[int, int, int]]:
        """Offset of the data, type and length of each header extension."""
        at, limit = self.number(100, 4) if self.version == 3 else 72, self.number(8) or 1 << self.bits
        while at + 8 <= min(limit, len(self.data)):
            kind, length = struct.unpack_from(">II", self.data, at)
            if not kind or length > limit - at - 8:
                return
            yield at + 8, kind, length
            at += 8 + (length + 7) // 8 * 8

    def l1_entries(self) -> Iterator[int]:
        """The entries of all L1 tables, as far as the file goes."""
        tables = [(self.number(40), self.number(36, 4))]
        at = self.number(64)
        for _ in range(min(self.snapshots, 16)):
            tables.append((self.number(at), self.number(at + 8, 4)))
            at += (40 + self.number(at + 36, 4) + self.number(at + 12, 2) + self.number(at + 14, 2) + 7) // 8 * 8
        for offset, entries in tables:
            yield from (self.number(place) for place in range(offset, min(offset + 8 * entries, len(self.data)), 8))


# ---- what QEMU writes to as it opens an image ----


class Settled(NamedTuple):
    """An image that QEMU does not write to as it opens it, and what it would have written to."""

    data: bytes
    bitmaps: bool
    header: bool


def settled(data: bytes) -> Settled:
    """The image with all its bitmaps in use, without bitmaps that do not count, and without unknown autoclear bits.

    Else QEMU writes header and bitmaps anew as it opens and closes the image, which ours leaves alone.
    """
    head, image = Head(data), bytearray(data)
    if not head.readable:
        return Settled(data, bitmaps=False, header=False)
    sound = False
    rewritten = bool(head.autoclear & ~3)
    if rewritten:
        image[88:96] = (head.autoclear & 3).to_bytes(8, "big")
    for at, kind, length in head.extensions():
        if kind == BITMAPS and not head.autoclear & 1:
            rewritten = True
            image[at - 8 : at - 4] = b"\x0b\xad\xf0\x0d"
        elif kind == BITMAPS and length == 24:
            place, end = head.number(at + 16), min(head.number(at + 16) + head.number(at + 8), len(data))
            while place + 24 <= end:
                sound = sound or not head.number(place + 12, 4) & 1
                image[place + 15] |= 1
                place += (24 + head.number(place + 18, 2) + head.number(place + 20, 4) + 7) // 8 * 8
    return Settled(bytes(image), bitmaps=sound, header=sound or rewritten)


# ---- where they may differ ----


class Excuse(NamedTuple):
    """A difference that is meant: what it is, why, and whether it applies to two repairs that differ."""

    name: str
    reason: str
    applies: Callable[[Pair], bool]


def _says(pair: Pair, text: str) -> bool:
    return any(text in line for line in pair.their.answer.lines)


def _lies_over_the_header(pair: Pair) -> bool:
    head = pair.head
    mask = 0x00FF_FFFF_FFFF_FE00
    in_header = any(entry and not entry & mask for entry in head.l1_entries())
    return in_header or not head.number(40) or bool(head.snapshots and not head.number(64))


EXCUSES = (
    Excuse(
        "a file beside the image cannot be opened, or a key is missing or cannot be read",
        "qemu-img opens the whole chain and the data file, and wants the key; a repair of metadata needs none of it",
        lambda pair: pair.their.answer.status == 1 and any(map(BESIDE_OR_KEY.search, pair.their.answer.lines)),
    ),
    Excuse(
        "qemu-img crashes, or does not end",
        "an assertion or a bad access of its own",
        lambda pair: pair.their.answer.status == ENDLESS or str(pair.their.answer.status).startswith("-"),
    ),
    Excuse(
        "tables are larger than the file",
        "our check is bounded, and without all references nothing is repaired; QEMU goes on",
        lambda pair: bool({"snapshot-l1-excessive", "bitmap-tables-excessive"} & pair.problems),
    ),
    Excuse(
        "bitmaps are said to be there and are not",
        "QEMU takes every write for one to a bitmap directory of no length at offset 0",
        lambda pair: "bitmaps-extension-missing" in pair.problems,
    ),
    Excuse(
        "a table lies over the header",
        "QEMU writes all of the header anew when it marks an image; ours writes the mark",
        _lies_over_the_header,
    ),
    Excuse(
        "a table shares its cluster",
        "QEMU mends entries in what may be guest data, an encryption header or a bitmap",
        lambda pair: bool({"metadata-overlap", "bitmap-clusters-shared"} & pair.problems),
    ),
    Excuse(
        "clusters that are given back are punched out",
        "what a damaged pointer has cut off is lost then; ours leaves the bytes where they are",
        lambda pair: pair.their == pair.our_punched,
    ),
    Excuse(
        "a snapshot table that its own damage has cut off is punched out",
        "QEMU does that in its first pass, and reads zeroes there in the second",
        lambda pair: "snapshot-table-outside" in pair.problems,
    ),
    Excuse(
        "bitmaps cannot be marked in use",
        "QEMU does not open the image then; ours leaves them alone",
        lambda pair: _says(pair, "Can't update bitmap directory: "),
    ),
    Excuse(
        "the check itself differs",
        "which is a matter of test_check_differential.py",
        lambda pair: not pair.is_checked_alike,
    ),
    Excuse(
        "the snapshot table of a dirty image cannot be read",
        "QEMU clears its place when it clears the dirty bit as it closes the image",
        lambda pair: bool(pair.head.features & 1) and pair.their.answer == pair.our.answer and _says(pair, "snapshot"),
    ),
)

CLOSING = re.compile(
    "qcow2_free_clusters failed|qcow2bm: (Lost persistent bitmaps|Failed to flush)|qcow2: Marking image as corrupt: "
    "Preventing invalid write"
)
"""What QEMU says of its writing of bitmaps as it closes an image."""
BESIDE_OR_KEY = re.compile(f"{BESIDE.pattern}|'encrypt.key-secret' is required|Request for data outside of extension")


def excuse(pair: Pair) -> Excuse | None:
    return next((excuse for excuse in EXCUSES if excuse.applies(pair)), None)


# ---- comparing ----


@dataclass
class Tally:
    """What became of some images: statuses, and excuses by name."""

    statuses: Counter[int | str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)


def difference(patient: Patient, mode: str, way: str, folder: Path, tally: Tally, *options: str) -> str:
    """Where the two programs differ and it is not excused; "" if nowhere."""
    usual = settled(patient.data)
    pairs = [Pair(replace(patient, data=usual.data), mode, way, folder, options)]
    tally.statuses[pairs[0].their.answer.status] += 1
    texts = [judged(pairs[0], tally)]
    if usual.bitmaps and not Head(patient.data).snapshots:
        texts.append(judged(Pair(patient, mode, way, folder, options, words=True), tally))
    return "\n".join(filter(None, texts))


def judged(pair: Pair, tally: Tally) -> str:
    """The difference between two repairs; "" if there is none, or it is excused."""
    if pair.our.answer.status == FAILED:
        return explained(pair)
    if pair.their == pair.our:
        return ""
    excused = excuse(pair)
    if excused is None:
        return explained(pair)
    tally.excused[excused.name] += 1
    if pair.words or pair.our.disk in (pair.disk_before, pair.their.disk) or pair.disk_before is None:
        return ""
    return "GUEST DATA CHANGED\n" + explained(pair)


def explained(pair: Pair) -> str:
    """A difference to print: of the lines those that the other lacks."""
    texts = []
    for name, mine, other in (("qemu-img", pair.their, pair.our), ("ours", pair.our, pair.their)):
        only = Counter(mine.answer.lines) - Counter(other.answer.lines)
        after = mine.after.lines[:8] if mine.after != other.after else ["(the same)"]
        texts += [
            f"--- {name}: status {mine.answer.status}, disk {mine.disk}", mine.answer.output,
            *sorted(only.elements())[:12], f"after: {mine.after.status} {mine.after.output}", *after,
        ]  # fmt: skip
    return "\n".join(texts).encode("utf-8", "backslashreplace").decode()


# ---- the tests ----


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(make_bases(tmp_path_factory.mktemp("bases")))


def of_seed(image: Damaged) -> tuple[str, str, tuple[str, ...]]:
    """Mode, way and options in which an image is repaired."""
    turn = image.seed // len(ROWS) + image.seed
    return MODES[turn % 2], WAYS[turn // 2 % 2], ("--output=json",) if turn // 4 % 2 else ()


@pytest.mark.parametrize("number", range(ROUNDS))
def test_same_repair_for_every_base(number: int, generator: Generator, tmp_path: Path) -> None:
    tally, said = Tally(), []
    for image in map(generator.damaged, range(number * len(ROWS), (number + 1) * len(ROWS))):
        patient = Patient(image.data, image.base.beside, image.base.secret)
        mode, way, options = of_seed(image)
        text = difference(patient, mode, way, tmp_path, tally, *options)
        if text:
            changes = "\n".join(f"  {name}: {', '.join(places)[:200]}" for name, places in image.applied.items())
            said.append(f"=== {image.name} (-r {mode}, {way})\n{changes}\n{text}")
    assert not said, "\n".join(said)
    assert sum(tally.excused.values()) <= len(ROWS) // 5, tally.excused
    assert {0, 1} < set(tally.statuses), tally.statuses


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", range(4))
def test_same_repair_for_every_fixture(mode: str, part: int, tmp_path: Path) -> None:
    tally, said = Tally(), []
    for number, fixture in enumerate(corrupt_fixtures()[part::4]):
        image = fixture.unpack(tmp_path / "unpacked" / fixture.path.name)
        beside = {path.name: path.read_bytes() for path in image.parent.iterdir() if path != image}
        patient = Patient(image.read_bytes(), beside, fixture.secret)
        text = difference(patient, mode, WAYS[number % 2], tmp_path, tally)
        if text:
            said.append(f"=== {fixture.path.name} (-r {mode})\n{text}")
    assert not said, "\n".join(said)
    assert {0, 1} < set(tally.statuses), tally.statuses
