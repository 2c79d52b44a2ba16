"""`qcow2bm qemu-img ...`: the drop-in for qemu-img.

What qcow2bm does better it does itself, with qemu-img's flags, output and exit status; everything else is handed to the
real qemu-img by exec, so that `alias qemu-img='qcow2bm qemu-img'` takes nothing away. Never imports Typer: scripts call
this in loops.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper

from .real_qemu_img import hand_over


def main(argv: list[str]) -> int:
    """Run `qemu-img` with these arguments; returns the exit status unless the real one takes over."""
    if argv[:1] not in (["bitmap"], ["check"]):
        hand_over(argv)
    if isinstance(sys.stderr, TextIOWrapper):
        sys.stderr.reconfigure(errors="surrogateescape")  # names in messages byte for byte, as qemu-img has them
    if argv[0] == "check":
        from . import qemu_check

        return qemu_check.run(argv[1:])
    from . import qemu_bitmap

    return qemu_bitmap.run(argv[1:])
