"""The program as a whole: every way to end has its words on stderr and its exit status, and never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import __main__, api
from qcow2bm.bitmap.structures import STRUCTURES, raw_image
from qcow2bm.cli import list as list_command
from qcow2bm.cli.failures import Terminated
from qcow2bm.image.file import ImageFile
from tests.support.images import FIXTURES, unpack

ROOT = FIXTURES.parent


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack("office-week", tmp_path)


def run(*words: str | Path) -> int:
    return __main__.main([str(word) for word in words])


def spawn(*words: str | Path, **options) -> subprocess.CompletedProcess[bytes]:
    """The program as a process of its own, buffered as users have it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    argv = [sys.executable, "-m", "qcow2bm", *map(str, words)]
    return subprocess.run(argv, cwd=ROOT, env=environment, check=False, **options)


# Ordinary ends


def test_version(capsys) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"qcow2bm {qcow2bm.__version__}\n"


def test_help_is_no_error(capsys) -> None:
    assert run("--help") == 0
    assert run("list", "-h") == 0
    assert "IMAGE..." in capsys.readouterr().out


def test_the_drop_in_gets_its_words_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcow2bm.cli import qemu_img

    got: list[list[str]] = []

    def drop_in(argv: list[str]) -> int:
        got.append(argv)
        return 63

    monkeypatch.setattr(qemu_img, "main", drop_in)
    assert run("qemu-img", "check", "--debug", "x") == 63
    assert got == [["check", "--debug", "x"]]


@pytest.mark.parametrize(
    "words",
    [
        ["ad"],
        ["list"],
        ["list", "--outputt", "json", "x"],
        ["list", "--output", "yaml", "x"],
        ["add", "x"],
        ["add", "x", "b", "-g", "5x"],
        ["set", "x", "b"],
        ["set", "x", "b", "--range", "5"],
        ["copy", "x", "y"],
        ["copy", "#b", "y"],
        ["merge", "x", "b", "c", "-g", "64k"],
        ["show", "x", "b", "--output", "csv"],
        ["show", "x", "b", "--stale"],
        ["dump", "x", "--structure", "l3"],
        ["rename", "x", "a", "b", "c"],
    ],
)
def test_usage_errors_end_with_64(words: list[str], capsys) -> None:
    assert run(*words) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err


def test_no_words_at_all_get_the_help_and_64(capsys) -> None:
    assert run() == 64
    assert "Usage: qcow2bm" in capsys.readouterr().out


def test_a_usage_error_says_what_is_missing_and_where_help_is(capsys) -> None:
    assert run("add", "x") == 64
    err = capsys.readouterr().err
    assert "Usage: qcow2bm add [OPTIONS] IMAGE BITMAP" in err
    assert "qcow2bm: missing argument 'BITMAP'; `qcow2bm add --help` explains" in err


def test_an_error_names_the_image_and_what_to_do(tmp_path: Path, capsys) -> None:
    other = tmp_path / "disk.raw"
    other.write_bytes(bytes(4096))
    assert run("show", other, "b") == 63
    assert capsys.readouterr().err == (f"qcow2bm: {other}: not a qcow2 image; qcow2bm reads qcow2 and nothing else\n")


def test_a_name_in_an_error_cannot_drive_the_terminal(image: Path, capsys) -> None:
    assert run("show", image, "\x1b[2Jx\udcff\n") == 1
    assert "'\\x1b[2Jx\\xff\\n'" in capsys.readouterr().err


# Unexpected ends


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), (130, "qcow2bm: interrupted\n")),
        (Terminated(signal.SIGTERM), (143, "qcow2bm: terminated\n")),
        (MemoryError(), (1, "qcow2bm: internal error: out of memory; run with --debug for the traceback\n")),
        (RecursionError("deep"), (1, "qcow2bm: internal error: RecursionError: deep; run with --debug")),
        (ZeroDivisionError(), (1, "qcow2bm: internal error: ZeroDivisionError; run with --debug")),
        (OSError(5, "Input/output error", "x"), (1, "qcow2bm: x: Input/output error\n")),
        (BrokenPipeError(), (141, "")),
        (SystemExit(7), (7, "")),
        (SystemExit(), (0, "")),
    ],
)
def test_every_exception_has_words_and_a_status(error, expected, image, capsys, monkeypatch) -> None:
    def fail(*_, **__) -> None:
        raise error

    monkeypatch.setattr(list_command, "_read", fail)
    status, text = expected
    assert run("list", image) == status
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert "Traceback" not in err
    assert err.count("\n") <= 1


@pytest.mark.parametrize("words", [["--debug", "list"], ["list", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(words, image, capsys, monkeypatch) -> None:
    def fail(*_, **__) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(list_command, "_read", fail)
    assert run(*words, image) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bitmap_may_be_called_debug(image: Path) -> None:
    assert run("add", image, "--", "--debug") == 0
    with api.open(image) as opened:
        assert "--debug" in opened.bitmaps.names


def test_a_full_disk_under_stdout_is_an_error(image: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = spawn("list", image, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"qcow2bm: standard output: No space left on device\n")


def test_a_reader_that_left_is_no_error_to_talk_about(image: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = spawn("dump", image, stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_streams_do_not_end_up_in_the_image(image: Path) -> None:
    """The image would get number 0, 1 or 2, and a message would be written into it."""

    def close_all() -> None:
        for number in range(3):
            os.close(number)

    before = image.read_bytes()
    assert spawn("show", image, "no such bitmap", preexec_fn=close_all).returncode == 1
    assert image.read_bytes() == before
    assert spawn("add", image, "new", preexec_fn=close_all).returncode == 0
    with api.open(image) as opened:
        assert "new" in opened.bitmaps.names


# Signals


def signal_at_write(number: int, at: int) -> Callable[[ImageFile, int, bytes], None]:
    """A `write_at` that sends this process a signal at its n-th call, twice, as an impatient user does."""
    original, calls = ImageFile.write_at, count(1)

    def write_at(file: ImageFile, offset: int, data: bytes) -> None:
        if next(calls) == at:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        original(file, offset, data)

    return write_at


def all_that_counts(image: Path) -> tuple[object, ...]:
    """Every structure, every bit, what is in use, and the file's length; what free clusters hold means nothing."""
    with raw_image(image) as raw:
        structures = [raw.read(name) for name in STRUCTURES]
    with api.open(image) as opened:
        bits = [list(bitmap.extents()) for bitmap in opened.bitmaps]
        return image.stat().st_size, structures, bits, opened.usage()


@pytest.fixture
def heeded() -> Iterator[None]:
    """Signals as a shell in the foreground leaves them: one in the background, or nohup, has some of them ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_rolls_a_commit_back(number, at, image, capsys, monkeypatch) -> None:
    before = all_that_counts(image)
    monkeypatch.setattr(ImageFile, "write_at", signal_at_write(number, at))
    assert run("add", image, "new", "--undo", image.with_name("undo")) == 128 + number
    assert all_that_counts(image) == before
    assert not image.with_name("undo").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_signal_that_comes_too_late_leaves_the_new_state_whole(image: Path, monkeypatch) -> None:
    with api.open(image) as opened:
        draft = opened.draft()
        draft.add("new")
        total = len(list(draft.plan().writes()))
    monkeypatch.setattr(ImageFile, "write_at", signal_at_write(signal.SIGTERM, at=total))
    assert run("add", image, "new") == 0
    with api.open(image) as opened:
        assert "new" in opened.bitmaps.names


def test_the_callers_signal_handlers_are_back_afterwards(image: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    run("add", image, "new")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_it_runs_in_a_thread_too(image: Path) -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(run("add", image, "new")))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_a_signal_that_comes_when_all_is_done_shows_nothing() -> None:
    """The interpreter takes its time to end, and would print a traceback of that."""
    script = (
        "import atexit, os, signal, sys\n"
        "from qcow2bm.__main__ import program\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['qcow2bm', '--version']\n"
        "sys.exit(program())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
