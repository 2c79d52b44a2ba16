"""What the drop-in's subcommands share: qemu-img's way of reading options, of refusing, and of opening images."""

from __future__ import annotations

import contextlib
import getopt
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .real_qemu_img import complain, hand_over

T = TypeVar("T")


class RefusedError(Exception):
    """The request cannot be met; the arguments are the message and, below it, further lines for standard error."""


class ForeignError(Exception):
    """The request is one for the real qemu-img."""


def answered(subcommand: str, argv: list[str], carry_out: Callable[[], int]) -> int:
    """Run a subcommand: its status, or that of a refusal; what it leaves to the real qemu-img is handed over."""
    from .real_qemu_img import FAILED

    try:
        return carry_out()
    except ForeignError:
        hand_over([subcommand, *argv])
    except RefusedError as refusal:
        message, *more = refusal.args
        complain(message, *more)
        return FAILED


@dataclass(frozen=True, slots=True)
class CommandLine:
    """Options as (name, value) and operands; of a line that is wrong somewhere, the options before that.

    They take effect in order: a request for help, or an option for the real qemu-img, counts before the error.
    """

    options: list[tuple[str, str]]
    operands: list[str]
    error: tuple[str, str] | None = None

    def require_understood(self) -> None:
        """Raise RefusedError, in qemu-img's words, if the line is wrong somewhere."""
        if self.error is not None:
            raise RefusedError(*self.error)


def read_options(argv: list[str], short: str, long: list[str]) -> CommandLine:
    """Read a line by getopt_long's rules: options anywhere, abbreviated, joined."""
    try:
        return CommandLine(*getopt.gnu_getopt(argv, short, long))
    except getopt.GetoptError as error:
        problem = _option_error(argv, error)
    for end in range(len(argv) - 1, -1, -1):
        with contextlib.suppress(getopt.GetoptError):
            return CommandLine(*getopt.gnu_getopt(argv[:end], short, long), problem)
    return CommandLine([], [], problem)


def _option_error(argv: list[str], error: getopt.GetoptError) -> tuple[str, str]:
    """The complaint with the argument as the user wrote it."""
    option = error.opt or ""
    written = None
    if error.msg.startswith("option --"):
        written = next((word for word in argv if word.split("=")[0] == f"--{option}"), None)
    if written is None:
        written = next((word for word in argv if re.match(rf"-[^-]*{re.escape(option)}", word)), f"-{option}")
    missing = "requires argument" in error.msg
    problem = f"missing argument for option '{written}'" if missing else f"unrecognized option '{written}'"
    return problem, USAGE


USAGE = "Try 'qemu-img --help' for more information"
_WITHOUT_LOCKS = "qcow2bm's own commands read it all the same, and with --no-lock write: make sure that no VM runs"


def require_ours(name: str, given_format: str | None) -> None:
    """Leave to the real qemu-img other formats and `nbd:...`, `json:{...}`: a colon before the first slash."""
    if given_format not in (None, "qcow2") or ":" in name.split("/", 1)[0]:
        raise ForeignError


def require_locked(*, locked: bool) -> None:
    """Refuse, as QEMU does, to read unprotected what a VM may be writing to."""
    from ..image.lock import unavailable

    if not locked:
        raise unavailable()


@contextlib.contextmanager
def refusing(name: str, given_format: str | None, *, writable: bool) -> Iterator[None]:
    """Say what goes wrong in opening an image as qemu-img does.

    Raises:
        ForeignError: it is of another format, which the real qemu-img can tell.
        RefusedError: it cannot be opened.
    """
    from ..errors import (
        ImageIOError,
        InterruptedChangeError,
        InUseError,
        LockingUnavailableError,
        NotQcow2Error,
        UndoError,
    )

    failed = f"Could not open '{name}': "
    try:
        yield
    except InUseError:
        lock = '"write"' if writable else 'shared "write"'
        raise RefusedError(
            f"{failed}Failed to get {lock} lock", f"Is another process using the image [{name}]?"
        ) from None
    except ImageIOError as error:
        raise RefusedError(f"{failed}{failed}{error.message}") from None
    except LockingUnavailableError as error:
        raise RefusedError(f"{failed}{error.message}", _WITHOUT_LOCKS) from None
    except (InterruptedChangeError, UndoError) as error:
        # A change that a crash cut short is ours to settle: QEMU must not write over it.
        advice = f"; {error.hint}" if error.hint else ""
        raise RefusedError(f"{failed}{error.message}{advice}") from None
    except NotQcow2Error:
        if given_format is None:
            raise ForeignError from None
        path = Path(name)
        if not (path.is_file() or path.is_block_device()):
            raise RefusedError(f"{failed}'file' driver requires '{name}' to be a regular file") from None
        raise RefusedError(f"{failed}Image is not in qcow2 format") from None
