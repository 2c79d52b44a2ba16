"""The drop-in for `qemu-img check`: its options, its output on each stream, its exit status.

What the image names, its backing file and its data file, is not opened, and no secret is needed for an encrypted image:
only metadata is read, and with `-r` written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .committing import reporting
from .qemu_options import (
    USAGE,
    ForeignError,
    RefusedError,
    answered,
    read_options,
    refusing,
    require_locked,
    require_ours,
)
from .qemu_totals import Totals

_SHORT = "hf:r:T:qU"
_LONG = ["help", "format=", "repair=", "output=", "object=", "image-opts", "force-share"]
_CACHE_MODES = {"none", "off", "directsync", "writeback", "unsafe", "writethrough"}
_CORRUPT, _LEAKS = 2, 3


@dataclass(slots=True)
class Request:
    """A parsed command line."""

    image: str = ""
    format: str | None = None
    output: str = "human"
    quiet: bool = False
    force_share: bool = False
    repair: str | None = None


def run(argv: list[str]) -> int:
    """Carry out `qemu-img check ARGV`; returns its exit status, or hands over to the real qemu-img."""
    return answered("check", argv, lambda: _carry_out(parse(argv)))


def parse(argv: list[str]) -> Request:
    """Read the arguments by getopt_long's rules."""
    line = read_options(argv, _SHORT, _LONG)
    request, cache = Request(), "writeback"
    for name, value in line.options:
        match name.lstrip("-"):
            case "h" | "help" | "object" | "image-opts":
                raise ForeignError
            case "r" | "repair":
                if value not in ("leaks", "all"):
                    raise RefusedError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {value}", USAGE)
                request.repair = value
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
    totals = Totals()
    try:
        if request.repair is not None:
            _repair(request, totals)
        else:
            _look(request, totals)
    finally:
        totals.flush()
    with reporting(Path(request.image)) if totals.changed else contextlib.nullcontext():
        return _report(request, totals)


def _report(request: Request, totals: Totals) -> int:
    """Print what came of it; the exit status.

    Raises:
        RefusedError: the check has failed.
    """
    if request.output == "human" and not request.quiet and (totals.corruptions_fixed or totals.leaks_fixed):
        print(_fixed(totals))
    if totals.failure is not None:
        raise RefusedError(f"Check failed: {totals.failure}")
    if not request.quiet:
        print(_json(request, totals) if request.output == "json" else _human(totals))
    if totals.errors:
        raise RefusedError("Check failed")
    return _CORRUPT if totals.corruptions else _LEAKS if totals.leaks else 0


def _look(request: Request, totals: Totals) -> None:
    from ..checks.runner import inspecting
    from .qemu_checking import check, opened_as_qemu

    with (
        _opening(request),
        inspecting(request.image, force_share=request.force_share, as_qemu=True) as inspection,
    ):
        require_locked(locked=inspection.locked or request.force_share)
        check(inspection, opened_as_qemu(inspection, request.image), totals)


def _repair(request: Request, totals: Totals) -> None:
    from ..checks.view import opened
    from ..repair.as_qemu.model import Mode
    from .qemu_repair import repair

    if request.force_share:
        raise RefusedError(f"Could not open '{request.image}': force-share=on can only be used with read-only images")
    with _opening(request), opened(request.image, writable=True) as (file, locked):
        repair(file, request.image, Mode(request.repair), totals, locked=locked)


@contextlib.contextmanager
def _opening(request: Request) -> Iterator[None]:
    """Say in qemu-img's words why an image cannot be opened."""
    from ..errors import UnsupportedVersionError

    try:
        with refusing(request.image, request.format, writable=request.repair is not None):
            yield
    except UnsupportedVersionError as error:
        raise RefusedError(f"Could not open '{request.image}': Unsupported qcow2 version {error.version}") from None


def _json(request: Request, totals: Totals) -> str:
    allocation = totals.allocation
    assert allocation is not None
    fields = {
        "image-end-offset": allocation.image_end_offset,
        "compressed-clusters": allocation.compressed,
        "total-clusters": totals.clusters,
        "corruptions": totals.corruptions,
        "corruptions-fixed": totals.corruptions_fixed,
        "check-errors": totals.errors,
        "leaks": totals.leaks,
        "leaks-fixed": totals.leaks_fixed,
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


def _fixed(totals: Totals) -> str:
    return (
        "The following inconsistencies were found and repaired:\n\n"
        f"    {totals.leaks_fixed} leaked clusters\n"
        f"    {totals.corruptions_fixed} corruptions\n\n"
        "Double checking the fixed image now..."
    )


def _human(totals: Totals) -> str:
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
    allocation, total = totals.allocation, totals.clusters
    assert allocation is not None
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
