"""Several of us at the same moment: exactly one gets the image, and nothing that anybody was told is done gets lost."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from qcow2bm.errors import InUseError
from qcow2bm.image.lock import LockMode, acquire
from tests.support.holders import locked_bytes
from tests.support.qemu import bitmap_info, qemu_img

ROUNDS = 80
"""Of locks alone."""
COMMANDS = 25
"""Of whole commands."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    return path


def contend(image: Path, modes: tuple[LockMode, ...], barrier: Barrier, log: Path) -> None:
    """One of several, each round with the next mode; the log gets a "+" for each round that it wins, else a "-"."""
    marks = ""
    for number in range(ROUNDS):
        fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        barrier.wait(60)
        try:
            acquire(fd, modes[number % len(modes)])
            marks += "+"
        except InUseError:
            marks += "-"
        barrier.wait(60)  # until here nobody lets go
        os.close(fd)
    log.write_text(marks)


def results(image: Path, *contenders: tuple[LockMode, ...]) -> list[str]:
    """Who won each round: a "+" or "-" of each contender, in rounds that all begin at once."""
    server = multiprocessing.get_context("forkserver")  # a fork of the test run itself would take its threads along
    barrier = server.Barrier(len(contenders))
    logs = [image.with_name(f"won-{number}") for number in range(len(contenders))]
    started = [
        server.Process(target=contend, args=(image, modes, barrier, log), daemon=True)
        for log, modes in zip(logs, contenders, strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    return ["".join(marks) for marks in zip(*(log.read_text() for log in logs), strict=True)]


@pytest.mark.parametrize("count", [2, 4])
def test_of_several_writers_exactly_one_wins(count: int, image: Path) -> None:
    """Never two, and never none, although each announces itself before it looks who else is there."""
    rounds = results(image, *[(LockMode.WRITER,)] * count)
    assert {marks.count("+") for marks in rounds} == {1}
    assert len(set(rounds)) > 1, "always the same one was first: they never met"


def test_of_a_writer_and_a_reader_exactly_one_wins(image: Path) -> None:
    rounds = results(image, (LockMode.WRITER, LockMode.READER), (LockMode.READER, LockMode.WRITER))
    assert {marks.count("+") for marks in rounds} == {1}


def test_of_a_writer_and_readers_either_side_wins(image: Path) -> None:
    """All readers or the writer, and never nobody."""
    rounds = results(image, (LockMode.WRITER,), (LockMode.READER,), (LockMode.FORCED_READER,))
    assert all(marks == "+--" or (marks[0] == "-" and "+" in marks) for marks in rounds), set(rounds)


def test_readers_never_meet(image: Path) -> None:
    assert set(results(image, (LockMode.READER,), (LockMode.READER, LockMode.FORCED_READER))) == {"++"}


# ---- whole commands ----

COMMAND = """
import contextlib, io, os, sys, time
from qcow2bm import __main__

image, flush = sys.argv[1], os.fdatasync

def slowly(fd):
    # Long enough for the other to come in between. Whoever else is here finds this file.
    os.close(os.open(image + ".alone", os.O_CREAT | os.O_EXCL))
    time.sleep(0.002)
    os.unlink(image + ".alone")
    return flush(fd)

os.fdatasync = slowly
print("ready", flush=True)
for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = __main__.main(line.split())
    print(status, said.getvalue().replace("\\n", " "), flush=True)
"""


class Worker:
    """A process of its own that runs the command lines it is given, with everything loaded."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        assert self._read() == "ready"

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> tuple[int, str]:
        """Status, and what was said on stderr."""
        status, _, said = self._read().partition(" ")
        return int(status), said.strip()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")


@contextmanager
def worker(image: Path) -> Iterator[Worker]:
    argv = [sys.executable, "-c", COMMAND, str(image)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


def test_of_two_commands_at_once_one_wins_and_the_other_says_so(image: Path) -> None:
    """The loser is refused with status 75, names the winner, and gets through when it tries again."""
    refused = 0
    with worker(image) as one, worker(image) as other:
        rivals = (one, other)
        for number in range(COMMANDS):
            for rival in rivals:
                rival.tell(f"add {image} {rival.pid}-{number}")
            answers = {rival: rival.answer() for rival in rivals}
            losers = [rival for rival in rivals if answers[rival][0]]
            assert len(losers) < len(rivals), answers
            for loser in losers:
                status, said = answers[loser]
                winner = next(rival for rival in rivals if rival is not loser)
                assert status == 75
                assert said.startswith(f"qcow2bm: {image}: in use: ")
                assert f"pid {winner.pid} (" in said or "another process" in said  # which has gone meanwhile
                assert said.endswith("then try again")
                loser.tell(f"add {image} {loser.pid}-{number}")
                assert loser.answer() == (0, "")
                refused += 1
    assert refused, "they never met"
    assert len(bitmap_info(image)) == 2 * COMMANDS
    qemu_img("check", image)
    assert locked_bytes(os.getpid(), image) == frozenset()


def test_a_command_and_the_drop_in_at_once(image: Path) -> None:
    """The drop-in refuses in QEMU's words, and waits as little."""
    refused = 0
    with worker(image) as one, worker(image) as other:
        for number in range(COMMANDS):
            one.tell(f"add {image} ours-{number}")
            other.tell(f"qemu-img bitmap --add -f qcow2 {image} theirs-{number}")
            statuses = one.answer()[0], other.answer()[0]
            assert statuses in ((0, 0), (75, 0), (0, 1))
            refused += statuses != (0, 0)
    assert refused, "they never met"
    assert len(bitmap_info(image)) == 2 * COMMANDS - refused
    qemu_img("check", image)
