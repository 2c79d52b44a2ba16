"""The program: `qcow2bm` and `python -m qcow2bm`.

What is loaded when is part of the design. Typer costs five times the rest of a start, so the version and the
`qemu-img` drop-in, which has its own rules for switches, are served before it is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from io import StringIO, TextIOWrapper

from . import __version__


def program() -> int:
    """The program as a process of its own: `main`, after which it ends."""
    status = main()
    # All is done and said. A signal that came now would show as a traceback of the interpreter's own ending.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status and raises nothing.

    Args:
        argv: the words after the program's name; those of this process by default.
    """
    from .cli.failures import guarded

    words, debug = _without_debug(sys.argv[1:] if argv is None else argv)
    _secure_streams()
    return guarded(lambda: _run(words), debug=debug)


def _run(words: list[str]) -> int:
    if words == ["--version"]:
        sys.stdout.write(f"qcow2bm {__version__}\n")
        return 0
    if words[:1] == ["qemu-img"]:
        from .cli import qemu_img

        return qemu_img.main(words[1:])
    from .cli import app

    return app.run(words)


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out, wherever it stands: it is what one adds to the end of a line that has just failed.

    What follows `--` is names, and what follows `qemu-img` is the drop-in's.
    """
    first = next((place for place, word in enumerate(words) if word != "--debug"), len(words))
    drop_in = words[first : first + 1] == ["qemu-img"]
    end = first if drop_in else words.index("--") if "--" in words else len(words)
    rest = [word for word in words[:end] if word != "--debug"]
    return rest + words[end:], len(rest) < end


def _secure_streams() -> None:
    """Make sure of the standard streams, before any file is opened.

    A character that the terminal's encoding lacks is shown as an escape; a result is not lost over it. Where the
    caller has closed a stream its number must not go to an image: what is printed would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.pipe()  # the system gives out the lowest free numbers
    sys.stdout = sys.stdout or StringIO()
    sys.stderr = sys.stderr or StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(program())
