"""`qcow2bm qemu-img check` beside the real `qemu-img check`, on damaged images: same status, same counts, same lines.

The images are those of tests/support/damage.py. Each test is a round: one image of every base. Ours runs in this
process, as there are many. Where the two are meant to differ, `EXCUSES` says why.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple
from unittest.mock import patch

import pytest

import qcow2bm
from qcow2bm.checks.model import Severity
from tests.support.bases import ROWS, Base, lay_out, make_bases
from tests.support.damage import DAMAGES, Damaged, Generator
from tests.support.qemu import check, qemu_img, qemu_io
from tests.support.raw import Raw

ROUNDS = int(os.environ.get("DAMAGE_ROUNDS", "20"))
"""Images for each base. The ordinary run has 20; to look for more, `DAMAGE_ROUNDS=1000 pytest -n auto` on this file."""

SEEDS = range(ROUNDS * len(ROWS))

DEADLINE = 20
"""Seconds for one check of a small image, by either program."""

COUNTS = (
    "corruptions", "leaks", "check-errors", "allocated-clusters", "total-clusters", "fragmented-clusters",
    "compressed-clusters", "image-end-offset",
)  # fmt: skip

WAYS = ("as it chooses", "by whole tables")
"""How qcow2bm counts references: small images entry by entry, and the way of large images must find the same there."""


NO_STATUS, NO_END = "it failed", "it did not end"


@dataclass(frozen=True)
class Answer:
    """What a check said: exit status, the counts of its JSON (None without JSON), its lines on stderr."""

    status: int | str
    counts: dict[str, int] | None
    lines: list[str]

    @classmethod
    def of(cls, status: int | str, output: str, errors: str) -> Answer:
        said = json.loads(output) if output.strip() else None
        counts = said and {key: said.get(key, 0) for key in COUNTS}
        lines = errors.split("\n")  # a name may hold what splitlines() takes for an end
        # Overflows qemu-img notes as it counts, ours when all is counted: only there the order of lines differs.
        return cls(status, counts, sorted(lines) if "ERROR: overflow cluster" in errors else lines)


# ---- the two programs ----


def theirs(image: Path, secret: str | None) -> Answer:
    """The real qemu-img's answer."""
    name, opening = str(image), ["-f", "qcow2"]
    if secret is not None:
        name = f"driver=qcow2,file.filename={image},encrypt.key-secret=key"
        opening = ["--object", f"secret,id=key,data={secret}", "--image-opts"]
    try:
        done = subprocess.run(
            # No core files, and an allocation by a bad number fails at once.
            ["prlimit", "--core=0", f"--as={8 << 30}", "qemu-img", "check", "--output=json", *opening, name],
            capture_output=True, cwd=image.parent, timeout=DEADLINE, check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(NO_END, None, [])
    # An image named by options is quoted as such.
    errors = done.stderr.decode(errors="surrogateescape").replace(f"'{name}'", f"'{image}'")
    return Answer.of(
        done.returncode, done.stdout.decode(), re.sub("^qemu-img: ", "qcow2bm: ", errors, flags=re.MULTILINE)
    )


def ours(image: Path, way: str) -> Answer:
    """The drop-in's answer."""
    from qcow2bm.cli.qemu_check import run

    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            if way == "by whole tables":
                stack.enter_context(patch("qcow2bm.checks.walk.PLAIN_ENTRIES", -1))
            stack.enter_context(patch("os.execv", side_effect=AssertionError("handed over to the real qemu-img")))
            for context in (contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), deadline()):
                stack.enter_context(context)
            status = run(["--output=json", "-f", "qcow2", str(image)])
    except (Exception, SystemExit):  # noqa: BLE001 - whatever escapes would end the program: it is the answer
        return Answer(NO_STATUS, None, traceback.format_exc().splitlines())
    return Answer.of(status, output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """Interrupt what takes too long."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {DEADLINE} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(DEADLINE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- where they may differ ----


class Excuse(NamedTuple):
    """A difference that is meant: what it is, why, and whether it applies to the real qemu-img's answer."""

    name: str
    reason: str
    applies: Callable[[Answer], bool]


EXCUSES = (
    Excuse(
        "a file beside the image cannot be opened",
        "qemu-img opens the whole chain and the data file; a check of the image's own structures needs neither",
        lambda answer: answer.status == 1 and any(map(BESIDE.search, answer.lines)),
    ),
    Excuse(
        "qemu-img crashes",
        "an assertion or a bad access of its own",
        lambda answer: isinstance(answer.status, int) and answer.status < 0,
    ),
    Excuse(
        "a key is missing",
        "qemu-img wants the key, though a check reads metadata only, which is not encrypted; ours does without",
        lambda answer: any("Parameter 'encrypt.key-secret' is required" in line for line in answer.lines),
    ),
    Excuse("qemu-img does not end", "nobody can wait for it", lambda answer: answer.status == NO_END),
)
BESIDE = re.compile(
    "Could not open backing file|Could not open '[^']*': Could not open '|The 'file' block driver requires a file name"
)


def excuse(answer: Answer) -> Excuse | None:
    """The excuse for another answer than this one of the real qemu-img's."""
    return next((excuse for excuse in EXCUSES if excuse.applies(answer)), None)


# ---- the tests ----


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """The healthy images, made once in this process."""
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def generator(bases: list[Base]) -> Generator:
    return Generator(bases)


def short(answer: Answer) -> str:
    """An answer to print: of many lines the first ones."""
    more = [f"... {len(answer.lines)} lines"] if len(answer.lines) > 12 else []
    return "\n".join([f"status {answer.status}, {answer.counts}", *answer.lines[:12], *more])


def differences(images: Iterable[Damaged], folder: Path) -> str:
    """Where the two programs differ, in either of the ways in which ours reads an image, and it is not excused."""
    found = []
    for image in images:
        path = lay_out(image.base, image.data, folder)
        their = theirs(path, image.base.secret)
        for way in WAYS:
            our = ours(path, way)
            if their != our and (our.status == NO_STATUS or not excuse(their)):
                found.append(explained(f"{image.name} ({way})", image, their, our))
        path.unlink()
    return "\n".join(found)


def explained(title: str, image: Damaged, their: Answer, our: Answer) -> str:
    """A difference to print: the damage, both answers, and of their lines those that the other lacks."""
    only = Counter(their.lines) - Counter(our.lines), Counter(our.lines) - Counter(their.lines)
    texts = (short(Answer(a.status, a.counts, sorted(o.elements()))) for a, o in zip((their, our), only, strict=True))
    changes = "\n".join(f"  {name}: {', '.join(places)}" for name, places in image.applied.items())
    said = "{}\n{}\n--- qemu-img ---\n{}\n--- ours ---\n{}\n".format(title, changes, *texts)
    return said.encode("utf-8", "backslashreplace").decode()  # a name's surrogates do not reach pytest's report


@pytest.mark.parametrize("number", range(ROUNDS))
def test_same_answer_for_every_base(number: int, generator: Generator, tmp_path: Path) -> None:
    seeds = SEEDS[number * len(ROWS) : (number + 1) * len(ROWS)]
    said = differences(map(generator.damaged, seeds), tmp_path)
    assert not said, said


def test_healthy_images_answer_the_same(bases: list[Base], tmp_path: Path) -> None:
    said = differences((Damaged(-1, base, {}, base.data) for base in bases), tmp_path)
    assert not said, said


def test_every_damage_is_done(generator: Generator) -> None:
    """None is left out by chance, or undone by the next: each comes a few times, and every image differs."""
    done: Counter[str] = Counter()
    for image in map(generator.damaged, range(100 * len(ROWS))):
        assert image.data != image.base.data, image.name
        assert all(image.applied.values()), image.name
        done.update(image.applied.keys())
    rare = {damage.name: done[damage.name] for damage in DAMAGES if done[damage.name] < 2}
    assert not rare
    assert set(done) == {damage.name for damage in DAMAGES}
    assert len(done) == len(DAMAGES)  # no name twice


def test_all_outcomes_occur(generator: Generator, tmp_path: Path) -> None:
    """An image that does not even open tests little, and so does one on which damage does not show."""
    seen: Counter[int | str] = Counter()
    excused = 0
    for seed in SEEDS[: len(SEEDS) // 2]:
        image = generator.damaged(seed)
        path = lay_out(image.base, image.data, tmp_path)
        answer = theirs(path, image.base.secret)
        path.unlink()
        seen[answer.status] += 1
        excused += excuse(answer) is not None
    assert all(seen[status] >= seen.total() * 0.05 for status in (0, 1, 2, 3)), seen
    assert excused < seen.total() * 0.03, excused


@pytest.mark.parametrize("flags", [0, 1 << 63], ids=["no flag", "copied"])
def test_the_second_cluster_of_the_file_does_not_continue_an_entry_that_names_none(tmp_path: Path, flags: int) -> None:
    """As where the bit of a data file is lost: the guest's first cluster lay at 0 of that."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "4M")
    qemu_io(image, "write -P 1 0 1M")
    raw = Raw.load(image)
    for number in range(16):
        raw.put(raw.l2_entry(number), (flags if not number else 1 << 63) | number * raw.cluster_size)
    raw.save(image)
    theirs = check(image)
    ours = qcow2bm.check(image)
    assert theirs["corruptions"] > 4
    assert ours.allocation.allocated == theirs["allocated-clusters"] == 15
    assert {"metadata-overlap", "leak-unproven"} & set(ours.counts), ours.counts
    assert ours.worst is Severity.CORRUPTION
