"""A progress bar of one line on stderr, for commits long enough to wonder about."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Self

from .sizes import human_size
from .terminal import is_terminal

_PATIENCE = 0.5
"""Seconds before the bar appears: what is done by then needs none."""
_INTERVAL = 0.1
_CELLS = 30


class ProgressBar:
    """Called with bytes written and bytes to write, by the commit engine; a context manager that clears itself."""

    def __init__(self, *, wanted: bool | None) -> None:
        """Show it if `wanted`, or, if that is None, on a terminal."""
        self._shown = is_terminal(sys.stderr) if wanted is None else wanted
        self._start = time.monotonic()
        self._next = self._start + (_PATIENCE if wanted is None else 0)
        self._drawn = False

    def __call__(self, written: int, total: int) -> None:
        """Draw, if it is time to."""
        now = time.monotonic()
        complete = self._drawn and written >= total
        if not self._shown or (now < self._next and not complete):
            return
        self._next = now + _INTERVAL
        share = written / total if total else 1.0
        passed = max(now - self._start, 1e-3)
        rate = written / passed
        left = (total - written) / rate if rate else 0.0
        bar = ("#" * round(share * _CELLS)).ljust(_CELLS)
        self._put(
            f"[{bar}] {share:4.0%}  {human_size(written)} of {human_size(total)}"
            f"  {human_size(int(rate))}/s  {left:.0f} s left"
        )
        self._drawn = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._put("")

    def _put(self, text: str) -> None:
        # A bar that nobody can read any more must not fail the commit.
        with contextlib.suppress(OSError):
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
