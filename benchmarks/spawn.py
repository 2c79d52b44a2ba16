"""Runs the command of its arguments, and prints what it took: wall, user and system seconds, peak RSS in bytes, status.

A small program of its own, because Linux carries the memory peak of a parent over into the child it starts: started
from a process that has crafted an image, `true` would seem to need hundreds of megabytes. Its own size (about 9 MiB)
is the least that it can tell.
"""

from __future__ import annotations

import os
import sys
import time


def main(command: list[str]) -> None:
    """Run it with its output thrown away; errors go where ours go."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    streams = [(os.POSIX_SPAWN_DUP2, nowhere, 0), (os.POSIX_SPAWN_DUP2, nowhere, 1)]
    start = time.perf_counter()
    child = os.posix_spawnp(command[0], command, _environment(), file_actions=streams)
    _, status, usage = os.wait4(child, 0)
    wall = time.perf_counter() - start
    exit_status = os.waitstatus_to_exitcode(status)
    print(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024, exit_status)


def _environment() -> dict[str, str]:
    """Ours, but for what keeps Python from caching its compiled modules, as every installation does."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


if __name__ == "__main__":
    main(sys.argv[1:])
