"""Why a bitmap is not usable, or that it is; who wrote last as far as the image shows; and the ways out.

The whole image is checked for it: a bitmap that is stored cleanly is of no use in an image that QEMU refuses, and its
clusters may have other owners. Reads only, however damaged the image is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path

from ..bitmap.store import State, StoredBitmap, not_found
from ..checks.model import Finding, Severity
from ..checks.runner import BEYOND, CHECKING, OPENING, Inspection, inspect
from ..checks.view import Progress, View
from ..errors import (
    BitmapBrokenError,
    BitmapNotFoundError,
    CorruptImageError,
    InterruptedChangeError,
    InUseError,
    UnsupportedImageError,
    naming,
)
from ..format.header import UNKNOWN_INCOMPATIBLE
from ..format.text import decode_name
from ..image import lock
from ..image.file import ImageFile
from ..image.image import take_locks
from .concerns import REASONS, Findings
from .signs import Sign, last_modified, quarantined, signs, undo_files
from .ways_out import Case, LeftOut, Snapshot, WayOut, ways_out

_REMARKS = (Severity.WARNING, Severity.HINT)


@dataclass(frozen=True, slots=True)
class Reason:
    """What is wrong.

    Attributes:
        code: the problem's, for `qcow2bm explain`; None if it has none.
        message: what was found, at the first place of `count`.
        meaning: what that means.
    """

    code: str | None
    message: str
    meaning: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What there is to say about a bitmap.

    Attributes:
        state: as it is stored; None if nobody knows whether there is such a bitmap.
        is_usable: its bits are to be relied on, and QEMU opens the image.
        is_running: somebody has the image open for writing.
        recording: whether QEMU records writes in it; None if nobody knows.
        reasons: why it is not usable.
        remarks: what is worth knowing about it all the same.
        signs: who wrote last, who has the image open, what lies beside it.
        modified: when the file was last written to; None of a device.
        holders: the processes that have the image open.
        snapshots: the internal ones that can be read.
        ways: the commands that lead out.
        left_out: those that do not here, and why.
        elsewhere: other problems of the image by code, which do not concern this bitmap.
        complete: False if part of the image was not checked.
    """

    name: str
    state: State | None
    is_usable: bool
    is_running: bool
    recording: bool | None
    reasons: tuple[Reason, ...]
    remarks: tuple[Reason, ...]
    signs: tuple[Sign, ...]
    modified: datetime | None
    holders: tuple[str, ...]
    snapshots: tuple[Snapshot, ...]
    ways: tuple[WayOut, ...]
    left_out: tuple[LeftOut, ...]
    elsewhere: dict[str, int]
    complete: bool


def why(path: str | os.PathLike[str], name: str, *, progress: Progress = lambda _done, _total: None) -> Diagnosis:
    """Find out why a bitmap is not usable, also while a VM runs and in images that do not open normally.

    Args:
        progress: called with bytes of L2 tables read, and to read.

    Raises:
        BitmapNotFoundError: the image has no such bitmap; the hint says where it may have gone.
        NotQcow2Error: no qcow2 image.
        CorruptImageError: the header is beyond reading.
        InterruptedChangeError: it is, because a change was cut short.
        UnsupportedImageError: a version or features that are not known.
        InUseError: a change by another qcow2bm is under way.
        ImageIOError: the operating system refused.
    """
    with _opened(path) as (file, locked):
        inspection = inspect(file, locked=locked, progress=progress)
        view = _viewed(file, inspection)
        bitmap = _find(view, name)
        findings = Findings(view, bitmap, name)
        findings.add_all(inspection.findings(OPENING))
        if UNKNOWN_INCOMPATIBLE in findings.barring:
            raise UnsupportedImageError("it has features that are not known here", hint=_explain(UNKNOWN_INCOMPATIBLE))
        # What a VM has changed since is in its memory: a check of the rest would find what is not there.
        is_running = lock.has_writer(file.fd)
        if not is_running:
            findings.add_all(inspection.findings(CHECKING + BEYOND))
        if bitmap is None and view.directory.damage is None:
            raise _not_found(view, findings, name)
        return _diagnosis(view, bitmap, findings, locked=locked, is_running=is_running)


# Opening


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[ImageFile, bool]]:
    """The file, read-only, and whether no writer can be at work: also while one is, and with a journal beside it."""
    file = ImageFile.open(path)
    try:
        with naming(Path(path)):
            try:
                locked = take_locks(file, writable=False, force_share=False)
            except InUseError:
                take_locks(file, writable=False, force_share=True)
                locked = False
            yield file, locked
    finally:
        file.close()


def _viewed(file: ImageFile, inspection: Inspection) -> View:
    """What there is to look at; raises if the header does not say where anything is."""
    if inspection.view is not None:
        return inspection.view
    if file.journal.exists():
        raise InterruptedChangeError(
            f"a change was cut short by a crash: there is a journal {file.journal}",
            hint="the next command that opens the image for writing settles it",
        )
    first = inspection.early[0]
    raise CorruptImageError(first.message, code=first.code, hint=_explain(first.code))


def _explain(code: str) -> str:
    return f"`qcow2bm explain {code}` says what that means and what to do"


def _find(view: View, name: str) -> StoredBitmap | None:
    """The bitmap of that name; None if there is none, or if the directory is too damaged to tell."""
    try:
        return view.directory.find(name)
    except (BitmapNotFoundError, BitmapBrokenError):
        return None


def _not_found(view: View, findings: Findings, name: str) -> BitmapNotFoundError:
    """The error for a name that no bitmap has, saying where one of that name may have gone."""
    error = not_found(name)
    kept = next((path for path in undo_files(view.file) if name in quarantined(path)), None)
    near = get_close_matches(name, [bitmap.name for bitmap in view.directory.bitmaps])
    barring = next(iter(findings.barring), None)
    if "leak-lost-bitmap" in findings.own:
        error.hint = f"there was one: it is lost, only its clusters are left; {_explain('leak-lost-bitmap')}"
    elif kept is not None:
        error.hint = f"a repair has taken it out: `qcow2bm undo IMAGE {kept} --bitmap NAME` brings it back"
    elif barring is not None:
        error.hint = f"but the image is damaged, and one may be out of reach; {_explain(barring)}"
    elif near:
        names = " and ".join(f"'{other}'" for other in near)
        error.hint = f"there {'is' if len(near) == 1 else 'are'} {names}"
    return error


# Judging


def _diagnosis(
    view: View, bitmap: StoredBitmap | None, findings: Findings, *, locked: bool, is_running: bool
) -> Diagnosis:
    state = bitmap.state if bitmap is not None else None
    if is_running and state is State.READY:
        state = State.ACTIVE  # QEMU has not marked it, but may be about to
    reasons = tuple(_reasons(view, bitmap, findings, is_running=is_running))
    snapshots = () if is_running else tuple(_snapshots(view))
    case = _case(view, bitmap, state, findings, snapshots)
    ways, left_out = ways_out(case) if not is_running else ([], [])
    return Diagnosis(
        name=findings.name,
        state=state,
        is_usable=state is State.READY and not reasons,
        is_running=is_running,
        recording=bitmap.recording if bitmap is not None else None,
        reasons=reasons,
        remarks=tuple(_remarks(bitmap, state, findings)),
        signs=tuple(signs(view.file, view.header, view.directory, locked=locked)),
        modified=last_modified(view.file),
        holders=tuple(lock.holders(view.file.fd)),
        snapshots=snapshots,
        ways=tuple(ways),
        left_out=tuple(left_out),
        elsewhere=dict(findings.elsewhere),
        complete=view.complete and not is_running,
    )


def _reasons(view: View, bitmap: StoredBitmap | None, findings: Findings, *, is_running: bool) -> Iterator[Reason]:
    if is_running:
        yield Reason("bitmap-active", "the image is open for writing", "the bits are in the memory of whoever writes")
    own = [pair for pair in findings.own.values() if pair[0].severity in REASONS]
    yield from (_reason(*pair) for pair in own)
    if not own and bitmap is not None and bitmap.fault is not None:
        yield Reason(None, f"bitmap '{bitmap.name}' is broken: {bitmap.fault}", "its bits cannot be read")
    yield from (_reason(*pair) for pair in findings.barring.values())
    if view.file.journal.exists():
        text = "a change by qcow2bm was cut short, and its journal is not settled"
        yield Reason(None, text, "what is read now may be neither the old state nor the new one")


def _remarks(bitmap: StoredBitmap | None, state: State | None, findings: Findings) -> Iterator[Reason]:
    if state is State.INCONSISTENT and bitmap is not None and not bitmap.recording:
        yield Reason(
            None,
            "it did not record when it was last stored",
            "its bits are as they were unless something was merged into it, or it was enabled, in the run that died",
        )
    own = (pair for code, pair in findings.own.items() if code != "bitmap-active")
    yield from (_reason(*pair) for pair in own if pair[0].severity in _REMARKS)


def _reason(finding: Finding, count: int) -> Reason:
    return Reason(finding.code, finding.message, finding.problem.meaning, count)


def _snapshots(view: View) -> Iterator[Snapshot]:
    for root in view.roots:
        entry = root.snapshot
        if entry is None or root.fault is not None or view.census.reaches_outside(root.offset, 8 * root.entries):
            continue
        yield Snapshot(decode_name(entry.id), decode_name(entry.name), entry.date_sec)


def _case(
    view: View, bitmap: StoredBitmap | None, state: State | None, findings: Findings, snapshots: tuple[Snapshot, ...]
) -> Case:
    return Case(
        image=str(view.file.path),
        name=findings.name,
        state=state,
        version=view.header.version,
        has_backing=view.image.backing_file is not None,
        is_encrypted=bool(view.header.crypt_method),
        snapshots=snapshots,
        recording=bitmap is not None and bitmap.recording,
        is_attached=view.directory.attached,
        siblings=sum(1 for bitmap in view.directory.bitmaps if bitmap.state is state),
        own=frozenset(code for code, (finding, _) in findings.own.items() if finding.severity in REASONS),
        others=frozenset(findings.barring),
        table_is_shared=findings.table_is_shared,
        interrupted=view.file.journal.exists(),
    )
