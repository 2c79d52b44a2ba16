"""What `qemu-img check` counts and prints as it goes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..checks.model import Allocation

_AT_ONCE = 1 << 12


@dataclass(slots=True)
class Totals:
    """What qemu-img counts, and why it gave up, if it did.

    Attributes:
        clusters: of the virtual disk.
        changed: the image was written to.
        allocation: other statistics of the image; None as long as nothing has been checked to the end.
        repeats: how often a line may still be printed that is the one before it. Tables that name each other by the
            million make QEMU print for days.
    """

    corruptions: int = 0
    leaks: int = 0
    errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    clusters: int = 0
    changed: bool = False
    allocation: Allocation | None = None
    failure: str | None = None
    corruption_signaled: bool = False
    repeats: int = 1 << 20
    pending: list[str] = field(default_factory=list)

    def say(self, lines: Iterable[str]) -> None:
        """Lines for standard error, many at a time."""
        for line in lines:
            self.pending.append(line)
            if len(self.pending) >= _AT_ONCE:
                self.flush()

    def flush(self) -> None:
        """Print what is pending."""
        if self.pending:
            with contextlib.suppress(OSError):  # nobody listens; the result counts all the same
                sys.stderr.write("\n".join(self.pending) + "\n")
            self.pending.clear()
