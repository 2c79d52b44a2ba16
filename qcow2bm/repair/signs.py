"""Who wrote to an image last, as far as the image shows, and who uses it now.

Nothing in a qcow2 image names a program. But each kind of writer leaves its marks: the flags it sets while it works,
those it has to clear because it does not know them, and those that only its kind ever sets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from glob import escape
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..bitmap.bring_back import Quarantine
from ..bitmap.store import BitmapDirectory
from ..errors import UndoError
from ..format.header import CUT_SHORT, KNOWN_AUTOCLEAR, Header, Incompatible
from ..image import lock
from ..image.file import UNDO_SUFFIX, ImageFile
from ..image.undo_layout import State
from ..image.undo_reader import UndoReader

_NAMED = 5
"""Bitmaps in an undo file that are named."""
_UNDO_FILES = 8
"""Undo files beside the image that are looked at."""


class Sign(NamedTuple):
    """Something that the image or its surroundings show.

    Attributes:
        kind: a word for programs.
        text: a sentence.
    """

    kind: str
    text: str


def signs(file: ImageFile, header: Header, directory: BitmapDirectory, *, locked: bool) -> Iterator[Sign]:
    """What speaks of the last writers and of those of today, the bitmaps' own marks first.

    Args:
        locked: False if a writer may be at work.
    """
    yield from _marks_of_bitmaps(header, directory, is_running=lock.has_writer(file.fd))
    yield from _marks_of_the_image(header)
    yield from _users(file, locked=locked)
    modified = last_modified(file)
    if modified is not None:
        yield Sign("modified", f"the file was last written to at {modified:%Y-%m-%d %H:%M:%S} UTC")
    if file.journal.exists():
        text = f"a change by qcow2bm was cut short: its journal {file.journal} is there, and is not settled"
        yield Sign("journal", text)
    for path in undo_files(file):
        yield Sign("undo-file", _of_undo_file(path, file))


def last_modified(file: ImageFile) -> datetime | None:
    """When a regular file was last written to; nobody keeps that of a device."""
    return None if file.is_device else datetime.fromtimestamp(int(os.fstat(file.fd).st_mtime), UTC)


def undo_files(file: ImageFile) -> list[Path]:
    """Undo files beside an image whose names say that they are its own."""
    real = file.path.resolve()
    return sorted(islice(real.parent.glob(escape(real.name) + UNDO_SUFFIX + "*"), _UNDO_FILES))


def quarantined(path: Path) -> list[str]:
    """Names of the bitmaps that an undo file keeps because a repair took them out; none if it cannot be read."""
    try:
        with Quarantine(path) as kept:
            return [bitmap.name for bitmap in kept.bitmaps]
    except UndoError:
        return []


def _marks_of_bitmaps(header: Header, directory: BitmapDirectory, *, is_running: bool) -> Iterator[Sign]:
    if directory.extension is None:
        return
    if not directory.attached:
        yield _detached(header)
        return
    bitmaps = directory.bitmaps
    in_use = sum(1 for bitmap in bitmaps if bitmap.entry.in_use)
    if is_running and in_use:
        yield Sign("in-use", f"{in_use} of {len(bitmaps)} bitmaps are marked in use, as they are while a VM runs")
    elif in_use and in_use == len(bitmaps):
        which = "the bitmap is" if in_use == 1 else f"all {in_use} bitmaps are"
        yield Sign(
            "in-use",
            f"{which} marked in use: a program that knows bitmaps, as QEMU and its tools do, opened the image for "
            "writing and never closed it: it was killed, or the host went down",
        )
    elif in_use:
        yield Sign(
            "in-use",
            f"{in_use} of {len(bitmaps)} bitmaps are marked in use and the others are not: the writer that died is not "
            "the last one; later ones closed the image well",
        )
    elif bitmaps:
        yield Sign("closed", "no bitmap is marked in use: the last program that knows bitmaps closed the image well")


def _detached(header: Header) -> Sign:
    if header.version < 3:
        return Sign(
            "version-2",
            "the image has version 2 of the format, which has no bitmaps: somebody brought it down, as "
            "`qemu-img amend -o compat=0.10` does",
        )
    return Sign(
        "autoclear-off",
        "the autoclear bit of the bitmaps is off: a program that knows no bitmaps wrote to the image, or QEMU was cut "
        "off in the moment in which it marks them; no QEMU of today has written since: it would have dropped them",
    )


def _marks_of_the_image(header: Header) -> Iterator[Sign]:
    if header.incompatible_features & Incompatible.DIRTY:
        text = "the image is marked dirty: a writer with lazy refcounts has not closed it"
        yield Sign("dirty", text)
    if header.incompatible_features & CUT_SHORT:
        yield Sign("cut-short", "a change of qcow2bm was cut short by a crash: its journal leads back")
    if header.incompatible_features & Incompatible.CORRUPT:
        text = "the image is marked corrupt: QEMU met damage in it and has written nothing since"
        yield Sign("corrupt", text)
    unknown = int(header.autoclear_features) & ~int(KNOWN_AUTOCLEAR)
    if unknown:
        text = (
            f"autoclear bits {unknown:#x} are set: whoever wrote last knows them, so it was a newer program than this"
        )
        yield Sign("unknown-autoclear", text)


def _users(file: ImageFile, *, locked: bool) -> Iterator[Sign]:
    holders = lock.holders(file.fd)
    if holders:
        doing = "has it open for writing" if lock.has_writer(file.fd) else "has it open"
        yield Sign("holder", f"{', '.join(holders)} {doing} now")
    elif lock.has_writer(file.fd):
        yield Sign("holder", "another process has it open for writing now, which one /proc does not show")
    elif locked:
        yield Sign("nobody", "nobody has it open now")
    else:
        yield Sign("no-locks", "whether somebody has it open now cannot be told: this file system has no locks")


def _of_undo_file(path: Path, file: ImageFile) -> str:
    try:
        with UndoReader(path) as undo:
            state, left_ns = undo.state, undo.mtime_ns
    except UndoError as error:
        return f"an undo file of qcow2bm is there, but cannot be used: {error.message}"
    if state is State.UNDONE:
        return f"qcow2bm has changed the image once and put it back: {path} is used up"
    if state is State.IN_PROGRESS:
        return f"a change by qcow2bm was cut short: {path} has what it replaced"
    unchanged = not file.is_device and os.fstat(file.fd).st_mtime_ns == left_ns
    since = ", and nothing has written to it since" if unchanged else ""
    names = quarantined(path)
    more = f", and bitmaps that were taken out: {_listed(names)}" if names else ""
    return f"qcow2bm has changed the image{since}: {path} has what was there before{more}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
