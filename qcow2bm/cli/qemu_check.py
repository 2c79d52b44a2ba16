"""The drop-in for `qemu-img check`: its options, its output on each stream, its exit status.

A repair (`-r`) is left to the real qemu-img. What the image names, its backing file and its data file, is not opened,
and no secret is needed for an encrypted image: only metadata is read.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .qemu_options import USAGE, ForeignError, RefusedError, answered, read_options, refusing, require_ours
from .real_qemu_img import complain

if TYPE_CHECKING:
    from ..checks.model import Finding
    from ..checks.runner import Inspection
    from ..checks.view import View

_SHORT = "hf:r:T:qU"
_LONG = ["help", "format=", "repair=", "output=", "object=", "image-opts", "force-share"]
_CACHE_MODES = {"none", "off", "directsync", "writeback", "unsafe", "writethrough"}
_CORRUPT, _LEAKS = 2, 3
_AT_ONCE = 1 << 12


@dataclass(slots=True)
class Request:
    """A parsed command line."""

    image: str = ""
    format: str | None = None
    output: str = "human"
    quiet: bool = False
    force_share: bool = False


@dataclass(slots=True)
class Totals:
    """What qemu-img counts, and why it gave up, if it did."""

    corruptions: int = 0
    leaks: int = 0
    errors: int = 0
    failure: str | None = None
    corruption_signaled: bool = False
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


def run(argv: list[str]) -> int:
    """Carry out `qemu-img check ARGV`; returns its exit status, or hands over to the real qemu-img."""
    return answered("check", argv, lambda: _carry_out(parse(argv)))


def parse(argv: list[str]) -> Request:
    """Read the arguments by getopt_long's rules."""
    line = read_options(argv, _SHORT, _LONG)
    request, cache = Request(), "writeback"
    for name, value in line.options:
        match name.lstrip("-"):
            case "h" | "help" | "object" | "image-opts" | "r" | "repair":
                raise ForeignError
            case "f" | "format":
                request.format = value
            case "output":
                request.output = value
            case "T":
                cache = value
            case "q":
                request.quiet = True
            case _:
                request.force_share = True
    line.require_understood()
    operands = line.operands
    if len(operands) != 1:
        raise RefusedError("Expecting one image file name", USAGE)
    if request.output not in ("human", "json"):
        raise RefusedError("--output must be used with human or json as argument.")
    if cache not in _CACHE_MODES:
        raise RefusedError(f"Invalid source cache option: {cache}")
    request.image = operands[0]
    require_ours(request.image, request.format)
    return request


def _carry_out(request: Request) -> int:
    from ..checks.runner import inspecting
    from ..errors import UnsupportedVersionError

    totals = Totals()
    try:
        with (
            refusing(request.image, request.format, writable=False),
            inspecting(request.image, force_share=request.force_share, as_qemu=True) as inspection,
        ):
            _open(inspection, request, totals)
            view = _check(inspection, totals)
    except UnsupportedVersionError as error:
        raise RefusedError(f"Could not open '{request.image}': Unsupported qcow2 version {error.version}") from None
    finally:
        totals.flush()
    if totals.failure is not None:
        raise RefusedError(f"Check failed: {totals.failure}")
    if not request.quiet:
        print(_json(request, totals, view) if request.output == "json" else _human(totals, view))
    if totals.errors:
        raise RefusedError("Check failed")
    return _CORRUPT if totals.corruptions else _LEAKS if totals.leaks else 0


def _open(inspection: Inspection, request: Request, totals: Totals) -> None:
    """What QEMU does before the check: it refuses some images altogether."""
    from ..checks.model import InQemu
    from ..checks.runner import OPENING
    from .qemu_check_text import REFUSALS, refusal_order

    found = [*inspection.early, *inspection.findings(OPENING)]
    if inspection.view is not None:
        _warn_of_detached(inspection.view)
    refused = [finding for finding in found if finding.qemu is InQemu.REFUSES]
    if refused:
        first = min(refused, key=lambda finding: refusal_order(finding, inspection))
        raise RefusedError(f"Could not open '{request.image}': {REFUSALS[first.code](first, inspection)}")
    for finding in found:
        _count(finding, inspection, totals)


def _warn_of_detached(view: View) -> None:
    directory = view.directory
    if directory.attached or directory.extension is None or directory.damage_code == "bitmaps-extension-length":
        return
    if view.header.version == 2:
        modified = (
            "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent "
            "bitmap support; so now they must all be considered inconsistent"
        )
    else:
        modified = "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
    complain(f"warning: {modified}")
    # QEMU ends this sentence with no line break, so scripts see what follows on the same line.
    sys.stderr.write("Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.")


def _check(inspection: Inspection, totals: Totals) -> View:
    """Run the check; stops where qemu-img gives up."""
    from ..checks.runner import CHECKING

    assert inspection.view is not None
    for finding in inspection.findings(CHECKING) if totals.failure is None else ():
        _count(finding, inspection, totals)
        if totals.failure is not None:
            break
    return inspection.view


def _count(finding: Finding, inspection: Inspection, totals: Totals) -> None:
    from ..checks.model import InQemu
    from .qemu_check_text import FAILED as INVALID
    from .qemu_check_text import FAILURES, lines, unreadable_block

    match finding.qemu:
        case InQemu.CORRUPTION:
            totals.corruptions += finding.count
        case InQemu.LEAK:
            totals.leaks += finding.count
        case InQemu.ERROR:
            if not totals.corruption_signaled and not inspection.header.geometry.is_aligned(finding.values["offset"]):
                totals.say([unreadable_block(finding)])
                totals.corruption_signaled = True
            totals.errors += finding.count
        case InQemu.FAILS:
            explain = FAILURES.get(finding.code)
            said, totals.failure = explain(finding, inspection) if explain is not None else ((), INVALID)
            totals.say(said)
            return
        case _:
            return
    totals.say(lines(finding))


def _json(request: Request, totals: Totals, view: View) -> str:
    allocation = view.allocation
    fields = {
        "image-end-offset": allocation.image_end_offset,
        "compressed-clusters": allocation.compressed,
        "total-clusters": _total(view),
        "corruptions": totals.corruptions,
        "check-errors": totals.errors,
        "leaks": totals.leaks,
        "allocated-clusters": allocation.allocated,
        "filename": request.image,
        "format": "qcow2",
        "fragmented-clusters": allocation.fragmented,
    }
    always = ("filename", "format", "check-errors")
    chosen = {key: value for key, value in fields.items() if value or key in always}
    members = (f'    "{key}": {_quoted(value) if isinstance(value, str) else value}' for key, value in chosen.items())
    return "{\n" + ",\n".join(members) + "\n}"


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _quoted(text: str) -> str:
    """A JSON string as QEMU writes it: ASCII only, and what is not UTF-8 as the replacement character."""
    units = []
    for character in text:
        if character in _ESCAPES:
            units.append(_ESCAPES[character])
        elif " " <= character <= "~":
            units.append(character)
        else:
            wide = character.encode("utf-16-be", "surrogatepass")
            if 0xD800 <= ord(character) < 0xE000:
                wide = b"\xff\xfd"
            units += [f"\\u{wide[at]:02X}{wide[at + 1]:02X}" for at in range(0, len(wide), 2)]
    return f'"{"".join(units)}"'


def _human(totals: Totals, view: View) -> str:
    text = []
    if totals.corruptions:
        text += [
            f"\n{totals.corruptions} errors were found on the image.",
            "Data may be corrupted, or further writes to the image may corrupt it.",
        ]
    if totals.leaks:
        text += [
            f"\n{totals.leaks} leaked clusters were found on the image.",
            "This means waste of disk space, but no harm to data.",
        ]
    if totals.errors:
        text.append(f"\n{totals.errors} internal errors have occurred during the check.")
    if not text:
        text.append("No errors were found on the image.")
    allocation, total = view.allocation, _total(view)
    if total and allocation.allocated:
        used = allocation.allocated
        text.append(
            f"{used}/{total} = {used * 100 / total:.2f}% allocated, "
            f"{allocation.fragmented * 100 / used:.2f}% fragmented, "
            f"{allocation.compressed * 100 / used:.2f}% compressed clusters"
        )
    if allocation.image_end_offset:
        text.append(f"Image end offset: {allocation.image_end_offset}")
    return "\n".join(text)


def _total(view: View) -> int:
    """Clusters of the virtual disk, in whole sectors as QEMU sees it."""
    return view.geometry.clusters(view.geometry.virtual_size & -512)
