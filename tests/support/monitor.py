"""The QMP monitor of a daemon, synchronously, with a deadline on everything.

The daemon connects to us, not we to it. QEMU 7.2 has a race in the other direction: while a monitor with server=on is
set up, both the main loop and the monitor's own thread watch the listening socket. If a client is quick, one of them
takes the connection and the other blocks in accept() for ever, or the negotiation goes wrong. Once in about a thousand
starts, that was a test run that hung.
"""

import asyncio
import socket
import subprocess
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from tests.support.tools import DEADLINE, QemuError

START_DEADLINE = 20.0
POLL = 0.005


def listen(path: Path) -> socket.socket:
    """A listening Unix socket, made before the daemon so that there is nothing to wait for."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(POLL)
    return listener


class Monitor:
    """A QMP session on a connected socket. qemu.qmp has a synchronous wrapper, but its connect() can't time out."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("tests")

    @classmethod
    def accept(cls, listener: socket.socket, process: "subprocess.Popen[bytes]", log: Path) -> "Monitor":
        """The session of a daemon that was told to connect. If it ends or hangs instead, its own words are raised."""
        end = time.monotonic() + START_DEADLINE
        while True:
            with suppress(TimeoutError):
                link, _ = listener.accept()
                break
            if process.poll() is not None or time.monotonic() > end:
                raise failure(process, log)
        monitor = cls(link)
        try:
            monitor._run(monitor._client.connect(link), START_DEADLINE)
        except (QMPError, TimeoutError) as error:
            monitor.close()
            raise failure(process, log) from error
        return monitor

    def execute(self, command: str, arguments: dict[str, object]) -> Any:
        """Execute a command and return what it returns."""
        return self._run(self._client.execute(command, arguments), DEADLINE)

    def close(self) -> None:
        """End the session, also one whose other end is gone."""
        with suppress(QMPError, EOFError, OSError):
            self._run(self._client.disconnect(), START_DEADLINE)
        self._link.close()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, object], deadline: float) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, deadline))


def failure(process: "subprocess.Popen[bytes]", log: Path) -> QemuError:
    """Why a server did not start: its command, its exit status if it has one, and what it printed."""
    words = [str(word) for word in process.args] if isinstance(process.args, list) else []
    return QemuError(words, process.returncode, log.read_text(errors="replace"))
