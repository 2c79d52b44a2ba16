"""Commands in processes of their own: what one said, took and left, with limits that the kernel keeps.

A warm process forks for each command, so that a thousand of them take no thousand starts of Python. Memory is what the
forked process took beyond what it began with, at its peak. Work is limited by RLIMIT_CPU and waiting by an alarm, both
of which end a process that will not listen: a hang in C, or in a call that never comes back.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
WORK = 10
"""Seconds of the processor."""
WAIT = 60
"""Seconds on the clock, or four times the work allowed: how busy a machine is must not count before that."""
_NOBODY = 65534
_TOLD = 1 << 21
"""Bytes of the beginning, and of the end, of what a command says."""
HANDED_OVER = 79
"""Status for a drop-in that has left the image to the real qemu-img."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. `status` is minus the signal where one ended it; `memory` in bytes beyond its beginning."""

    status: int
    said: str
    memory: int
    seconds: float


class Alone:
    """Runs commands, each in a process of its own. A context manager."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.alone"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "TERM": "xterm"},
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(WAIT)
        self._server.stdout.close()

    def run(self, *words: str | Path, work: int = WORK) -> Ended:
        """Run one command line; as nobody in particular if `work` is negative: root may read everything."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps([work, *map(os.fspath, words)]), file=self._server.stdin, flush=True)
        return Ended(**json.loads(self._server.stdout.readline()))


def _serve() -> None:
    from qcow2bm import __main__  # noqa: F401 - warm: what is loaded here no command has to load
    from qcow2bm.checks import bulk  # noqa: F401
    from qcow2bm.cli import app

    app.application()
    for line in sys.stdin:
        work, *words = json.loads(line)
        print(json.dumps(_in_a_process(words, work)), flush=True)


def _in_a_process(words: Sequence[str], work: int) -> dict[str, object]:
    with tempfile.TemporaryFile() as out:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_the_command(words, work, out.fileno())
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - started
        end = out.seek(0, os.SEEK_END)
        out.seek(0)
        told = out.read(_TOLD)
        out.seek(max(len(told), end - _TOLD))
        said = (told + out.read()).decode("utf-8", "surrogateescape")
    first, _, said = said.partition("\n")
    return {
        "status": os.waitstatus_to_exitcode(status),
        "said": said,
        "memory": usage.ru_maxrss * 1024 - int(first),
        "seconds": seconds,
    }


def _be_the_command(words: Sequence[str], work: int, out: int) -> None:
    """In the new process: run the command and end."""
    from qcow2bm import __main__

    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.write(1, b"%d\n" % _resident())
        os.execv = lambda *_: os._exit(HANDED_OVER)  # type: ignore[assignment,return-value]
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (abs(work), abs(work)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 62, 1 << 62))
        signal.alarm(max(WAIT, 4 * abs(work)))
        if work < 0 and os.geteuid() == 0:
            os.seteuid(_NOBODY)
        status = __main__.main(list(words))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    _serve()
