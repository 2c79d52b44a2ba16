"""Carrying out a plan from the command line: a signal ends it between two writes, and what was written is put back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ImageIOError
from .failures import Postponed

if TYPE_CHECKING:
    from ..api import Image
    from ..image.commit import Progress
    from ..image.plan import Plan


@contextlib.contextmanager
def committing(plan: Plan, progress: Progress | None) -> Iterator[Progress]:
    """While a plan is carried out an ending signal counts as long as the old state can still be put back.

    Yields what the commit engine is to be given for progress; there a signal raises KeyboardInterrupt or Terminated.
    """
    reversible = sum(write.length for stage in plan.stages[: plan.commit_stage + 1] for write in stage.writes)

    def written(done: int, total: int) -> None:
        if done < reversible:
            signals.end_if_asked()
        if progress is not None:
            progress(done, total)

    with Postponed() as signals:
        yield written


@contextlib.contextmanager
def reporting(*images: Path) -> Iterator[None]:
    """While a change of these images that is done is reported: what fails then says so.

    Raises:
        ImageIOError: nothing can be printed.
    """
    named = ", ".join(map(str, images)) or None
    with _printing(lambda why: ImageIOError(f"the change is done, but it could not be reported: {why}", image=named)):
        yield


@contextlib.contextmanager
def proposing() -> Iterator[None]:
    """While it is printed what a command is about to do: what cannot be shown is not done.

    Raises:
        ImageIOError: nothing can be printed.
    """
    with _printing(lambda why: ImageIOError(f"standard output: {why}", hint="nothing was written")):
        yield


@contextlib.contextmanager
def _printing(failed: Callable[[str | None], ImageIOError]) -> Iterator[None]:
    """Print all of it; if that cannot be done, `failed` says what it means. A closed pipe is for others to see to."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise failed(error.strerror) from error


def commit(image: Image, plan: Plan, *, undo: Path | None = None, progress: Progress | None = None) -> None:
    """Commit a plan; an ending signal counts as long as the old state can still be put back, and is ignored after that.

    Raises:
        Qcow2bmError: see `qcow2bm.image.commit.commit`.
        KeyboardInterrupt, Terminated: a signal came, and everything was put back.
    """
    with committing(plan, progress) as written:
        image.commit(plan, undo=undo, progress=written)
