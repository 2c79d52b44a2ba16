"""The real qemu-img, for what the drop-in leaves to it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

FAILED = 1
"""qemu-img's exit status for every failure."""


def hand_over(argv: list[str]) -> NoReturn:
    """Become the real qemu-img.

    Raises:
        SystemExit: there is none on PATH.
    """
    real = real_qemu_img()
    if real is None:
        complain("there is no qemu-img on PATH, and this needs the real one")
        raise SystemExit(FAILED)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(real, ["qemu-img", *argv])  # noqa: S606 - no shell: the arguments are the user's own, one by one


def real_qemu_img() -> str | None:
    """The first qemu-img on PATH that is not this program under another name."""
    here = Path(sys.argv[0]).resolve()
    for directory in os.get_exec_path():
        found = shutil.which("qemu-img", path=directory)
        if found is not None and Path(found).resolve() != here:
            return found
    return None


def complain(message: str, *more: str) -> None:
    """A line on standard error, as qemu-img's own but with our name, and what comes below it."""
    print(f"qcow2bm: {message}", *more, sep="\n", file=sys.stderr)
