"""A check from beginning to end: open, run the passes in order, report."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from ..format.faults import Weight
from ..format.header import UNKNOWN_INCOMPATIBLE, Header
from ..image.file import ImageFile
from ..image.references import Kind, single_structures
from .earlier import earlier_states
from .model import Allocation, Finding, Report, Tally
from .owners import OwnerSearch
from .passes import bitmaps, bits, copied, header, leaks, mapping, refcounts, snapshots, storage
from .problems import HELD_BACK, SHARED
from .telling import TOLD, Telling
from .view import Progress, View, damaged_image, opened, read_header

DEFAULT_LIMIT = 100
"""Findings of each problem that are kept."""

_OF_CLUSTERS = {*SHARED, "refcount-too-low", "leak", "leak-doubtful", "leak-unproven", "copied-l1", "copied-l2"}
_NONSENSE = frozenset({"l1-entry-reserved", "l2-unaligned", "l2-entry-reserved", "data-unaligned", "zero-unaligned"})
"""What entries come to that are read in the wrong way."""

Passes = tuple[Callable[[View], Iterator[Finding]], ...]

OPENING: Passes = (
    header.header,
    header.extensions,
    storage.refusals,
    storage.data_file,
    bitmaps.directory,
)
"""What QEMU looks at when it opens an image, and may refuse it for."""

COUNTING: Passes = (
    snapshots.snapshot_table,
    mapping.mapping,
    mapping.structures,
    bitmaps.clusters,
    refcounts.refcount_blocks,
)
"""Those that count what refers to each cluster."""

CHECKING: Passes = (*COUNTING, refcounts.refcounts, copied.copied)
"""What `qemu-img check` looks at, in the order of `qcow2_co_check_locked`: so the findings come in its order."""

BEYOND: Passes = (
    leaks.leaks,
    mapping.past_end,
    mapping.raw_data_file,
    bits.bitmap_data,
    bits.nesting,
    bits.overlay,
)
"""What it does not ask."""


def check(
    path: str | os.PathLike[str],
    *,
    force_share: bool = False,
    use_locks: bool = True,
    owners: bool = False,
    limit: int | None = DEFAULT_LIMIT,
    progress: Progress = lambda _done, _total: None,
) -> Report:
    """Check an image and its bitmaps. Reads metadata and bitmaps, never guest data; never writes.

    Args:
        force_share: check an image that a VM writes to; what is found may be stale.
        use_locks: False takes no locks at all.
        owners: find out who refers to each wrong cluster; for shared clusters that is always done.
        limit: findings of each problem to keep; all are counted. None keeps all.
        progress: called with bytes of L2 tables read, and to read.

    Raises:
        NotQcow2Error: no qcow2 image.
        UnsupportedImageError: a version that is not known.
        InUseError: another process writes to it, and `force_share` is off.
        InterruptedChangeError: a change was cut short and must be settled first.
        ImageIOError: the operating system refused.
    """
    with opened(path, force_share=force_share, use_locks=use_locks) as (file, locked):
        return check_file(file, locked=locked, owners=owners, limit=limit, progress=progress)


def check_file(
    file: ImageFile,
    *,
    locked: bool = True,
    owners: bool = False,
    limit: int | None = DEFAULT_LIMIT,
    progress: Progress = lambda _done, _total: None,
) -> Report:
    """As `check`, of a file that is open, or of one as it would be."""
    tally = Tally(limit)
    inspection = inspect(file, locked=locked, told=None if limit is None else max(limit, TOLD), progress=progress)
    for finding in inspection.everything():
        tally.add(finding)
    return report_on(inspection, tally, owners=owners)


def report_on(inspection: Inspection, tally: Tally, *, owners: bool = False) -> Report:
    """What a check says that has come to its end, and whose findings are all in `tally`."""
    view, locked = inspection.view, inspection.locked
    if view is None or UNKNOWN_INCOMPATIBLE in tally.counts:
        return _report(tally, complete=False, locked=locked, allocation=Allocation())
    _name_owners(view, tally, everything=owners)
    return _report(tally, complete=view.complete, locked=locked, allocation=_allocation(view))


@dataclass(slots=True)
class Inspection:
    """An image under check.

    Attributes:
        header: the header's fields, not judged.
        early: what was found before there was anything to run passes on.
        view: what the passes saw; None if the header is beyond reading.
    """

    path: Path
    locked: bool
    header: Header
    early: tuple[Finding, ...] = ()
    view: View | None = None

    def everything(self) -> Iterator[Finding]:
        """All findings of a check."""
        known = True
        for finding in chain(self.early, self.findings(OPENING)):
            known = known and finding.code != UNKNOWN_INCOMPATIBLE
            yield finding
        if known:  # else nobody here knows what the rest means
            yield from self.findings(CHECKING + BEYOND)

    def findings(self, passes: Passes) -> Iterator[Finding]:
        """Run passes, one after the other, as their findings are asked for."""
        if self.view is None:
            return
        for run in passes:
            for finding in run(self.view):
                self.view.hidden = self.view.hidden or finding.problem.hides
                self.view.nonsense += finding.count if finding.code in _NONSENSE else 0
                yield finding


@contextlib.contextmanager
def inspecting(
    path: str | os.PathLike[str],
    *,
    force_share: bool = False,
    use_locks: bool = True,
    as_qemu: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Iterator[Inspection]:
    """Open an image for a check, however damaged it is.

    Args:
        as_qemu: count as qemu-img does even where that makes no sense.

    Raises:
        Qcow2bmError: as `check`.
    """
    with opened(path, force_share=force_share, use_locks=use_locks) as (file, locked):
        yield inspect(file, locked=locked, as_qemu=as_qemu, progress=progress)


def inspect(
    file: ImageFile,
    *,
    locked: bool,
    as_qemu: bool = False,
    told: int | None = TOLD,
    progress: Progress = lambda _done, _total: None,
) -> Inspection:
    """Look at an open file, however damaged the image in it is.

    Args:
        as_qemu: as `inspecting`; everything is told one by one then.
        told: findings of each problem that are told one by one, before those of a table are one; None for all.

    Raises:
        NotQcow2Error: it does not begin as a qcow2 image.
        UnsupportedVersionError: a version that is not known.
    """
    fields, data = read_header(file)
    faults = tuple(fields.faults())
    if any(fault.weight is Weight.FATAL for fault in faults):
        return Inspection(file.path, locked, fields, early=tuple(header.header_faults(faults)))
    image = damaged_image(file, fields, data, locked=locked)
    view = View(image, faults, as_qemu=as_qemu, telling=Telling(None if as_qemu else told), progress=progress)
    view.held_before = partial(_held_before, file)
    return Inspection(file.path, locked, fields, view=view)


def _held_before(file: ImageFile, leaked: Container[int]) -> bool:
    """True if a repair of ours has held back some of the clusters that are leaked: the damage it mended was the reason.

    That is read from the image as it was before, which an undo file beside it tells.
    """
    for earlier in earlier_states(file):
        with contextlib.closing(earlier):
            for finding in inspect(earlier, locked=True).findings((*OPENING, *CHECKING, leaks.leaks)):
                if finding.code in HELD_BACK:
                    first = finding.values["first"]
                    if any(cluster in leaked for cluster in range(first, first + finding.count)):
                        return True
    return False


def _name_owners(view: View, tally: Tally, *, everything: bool) -> None:
    """Say of the kept findings about clusters who refers to them."""
    wanted = _OF_CLUSTERS if everything else SHARED
    chosen = [
        index
        for index, finding in enumerate(tally.kept)
        if finding.code in wanted and finding.values.get("references") != 0
    ]
    if not chosen or not view.roots:
        return
    owners = OwnerSearch(view).find([tally.kept[index] for index in chosen])
    for number, index in enumerate(chosen):
        tally.kept[index] = replace(tally.kept[index], owners=owners.get(number))


def _report(tally: Tally, *, complete: bool, locked: bool, allocation: Allocation) -> Report:
    return Report(tuple(tally.kept), dict(tally.counts), dict(tally.severities), allocation, complete, locked)


def _allocation(view: View) -> Allocation:
    """The statistics, with the bytes of each kind of cluster and of each bitmap."""
    size = view.geometry.cluster_size
    bitmaps_used = tuple((bitmap.name, bitmap.bytes_on_disk) for bitmap in view.bitmaps)
    taken = dict.fromkeys(Kind, 0) | {
        Kind.REFCOUNTS: view.stored.distinct,
        Kind.L2_TABLES: view.l2_tables,
        Kind.GUEST_DATA: view.census.guest,
        Kind.BITMAPS: sum(taken for _, taken in bitmaps_used) // size,
    }
    for reference in chain(single_structures(view.image, view.crypto_header), view.root_tables()):
        taken[reference.kind] += view.geometry.clusters(reference.length)
    pointer = view.directory.pointer
    if pointer is not None:
        taken[Kind.BITMAPS] += view.geometry.clusters(pointer.bitmap_directory_size)
    return replace(
        view.allocation,
        total=view.geometry.clusters(view.geometry.virtual_size),
        kinds={kind: taken[kind] * size for kind in Kind},
        bitmaps=bitmaps_used,
    )
