"""What ends a command early: errors in words a user can act on, an exit status for each, and signals.

A signal that ends the program must not tear a commit in two. Outside of commits it raises where it comes; while one
runs it waits (`Postponed`) until the commit engine asks, between two writes, and rolls back what it has written.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Self

from ..errors import Qcow2bmError
from .terminal import painted, printable

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BROKEN_BITMAP = 4
"""Exit status: data and refcounts are fine as far as was looked, but not a bitmap."""
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE

BADNESS = (0, 3, 4, 75, 63, 64, 1, 2)
"""Exit statuses from good to bad: of several images the worst one counts."""


def worst(statuses: Iterable[int]) -> int:
    """The exit status of a command that has looked at several things."""
    return max(statuses, key=BADNESS.index, default=0)


class Terminated(BaseException):
    """A signal asked the program to end. No `Exception`: nothing on the way may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_status = 128 + number


def guarded(run: Callable[[], int], *, debug: bool) -> int:
    """Run a command; whatever goes wrong becomes one line on stderr and an exit status.

    Args:
        debug: show the traceback too.
    """
    try:
        with _ending_signals_raise():
            status = run()
            _flush()
            return status
    except BaseException as error:  # noqa: BLE001 - this is where every one of them ends
        if debug and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exception(error)
        return _explained(error)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"
        raise


def _explained(error: BaseException) -> int:
    """Say what went wrong, and return the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, BrokenPipeError):  # whoever read our output has left, as `head` does
        status = BROKEN_PIPE
    else:
        text, status = _in_words(error)
        _complain(text)
    _give_up_stdout()
    return status


def _in_words(error: BaseException) -> tuple[str, int]:
    match error:
        case Qcow2bmError():
            return str(error), error.exit_status
        case KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case Terminated():
            return "terminated", error.exit_status
        case OSError():
            place = f"{error.filename}: " if error.filename is not None else ""
            return place + (error.strerror or str(error)), 1
        case MemoryError():
            what = "out of memory"
        case _:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"internal error: {what}; run with --debug for the traceback", 1


def _complain(text: str) -> None:
    name = painted("qcow2bm:", "red", sys.stderr)
    with contextlib.suppress(OSError):  # nobody is listening; the exit status still tells
        print(f"{name} {printable(text)}", file=sys.stderr)


def _give_up_stdout() -> None:
    """Close stdout if it takes no more, or the interpreter would try once more at its end, and complain itself."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            sys.stdout.close()


# Signals

_Handler = Callable[[int, FrameType | None], object] | int | None


@contextlib.contextmanager
def _ending_signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise as SIGINT does, once. What was ignored before (nohup) stays ignored."""

    def end(number: int, _: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second one must not cut short what the first one unwinds
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    before: dict[int, _Handler] = {}
    before.update(_installed(end))
    try:
        yield
    finally:
        _restore(before)


class Postponed:
    """A context manager in which ending signals are only noted.

    Attributes:
        pending: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        self._before = _installed(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _restore(self._before)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.pending = self.pending or number

    def end_if_asked(self) -> None:
        """Raise what the signal that came would have raised."""
        if self.pending is not None:
            raise KeyboardInterrupt if self.pending == signal.SIGINT else Terminated(self.pending)


def _installed(handler: Callable[[int, FrameType | None], None]) -> dict[int, _Handler]:
    """Put `handler` in place of those of the ending signals that are not ignored; the ones it replaces.

    Only the main thread can do that; in another one nothing is replaced.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = [number for number in _ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heeded}


def _restore(handlers: dict[int, _Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
