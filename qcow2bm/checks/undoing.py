"""What an undo by force would take away from whoever has used the image since: judged before it is done.

Force means that no time stamp speaks for the image. What the change has rewritten is compared byte for byte, and what
it has filled by checksum; but where a crash cut the change short nobody can tell by a refcount whose a cluster is, and
a guest that has written zeroes there leaves what was there before. So all that refers to clusters is looked at, in the
image as it would be.
"""

from __future__ import annotations

import contextlib

from ..errors import CorruptImageError, UndoError
from ..format.entries import ClusterKind
from ..format.geometry import round_up
from ..image.file import ImageFile
from ..image.image import Qcow2Image
from ..image.mapping import Run, runs
from ..image.undo_reader import UndoReader
from ..image.undo_standing import standing
from .earlier import as_before
from .runner import COUNTING, OPENING, Inspection, inspect

_HINT = "nothing was put back; guest data would be lost by it"


def require_harmless(undo: UndoReader, file: ImageFile) -> None:
    """Refuse to undo a change whose clusters somebody has taken, or that made room for what a guest has written.

    Raises:
        UndoError: it is so, or the undo file is damaged.
    """
    present = inspect(file, locked=True)
    with contextlib.closing(as_before(undo, file)) as earlier:
        earlier.size = file.size
        before = inspect(earlier, locked=True)
        _require_room(present, before)
        if not standing(undo, file).finished:  # else what was filled is there, counted, and compared
            _require_not_taken(undo, before)


def _require_room(present: Inspection, before: Inspection) -> None:
    """A guest may have written behind the end that the disk would have. Zeroes are nothing that could be lost."""
    if present.view is None or before.view is None:
        return
    end, image = before.view.geometry.virtual_size, present.view.image
    if end >= image.geometry.virtual_size:
        return
    try:
        written = next((at for run in runs(image) if (at := _written(image, run, end)) is not None), None)
    except CorruptImageError:
        return  # what cannot be read has no data either
    if written is not None:
        raise UndoError(f"the disk would end at {end} bytes again, and there is data at {written:#x}", hint=_HINT)


def _written(image: Qcow2Image, run: Run, end: int) -> int | None:
    """Where a run holds data behind the end; None if it does not.

    The cluster in which the disk would end was there before: what lies behind the end in it must be looked at. Where
    that cannot be done, since it is encrypted, compressed or in another file, it passes for what it was.
    """
    stop, border = run.guest_offset + run.length, round_up(end, image.geometry.cluster_size)
    if run.kind not in (ClusterKind.DATA, ClusterKind.COMPRESSED) or stop <= end:
        return None
    if stop > border:
        return max(run.guest_offset, border)
    if run.kind is ClusterKind.COMPRESSED:
        return None
    start = max(run.guest_offset, end)
    if run.host_offset is None or image.header.has_data_file or image.header.crypt_method:
        return None
    tail = image.file.read_padded(run.host_offset + start - run.guest_offset, stop - start)
    return start if any(tail) else None


def _require_not_taken(undo: UndoReader, before: Inspection) -> None:
    """In the image as it would be nothing may refer to a cluster that the change found free, or to a new one."""
    if before.view is None:
        return
    for _ in before.findings((*OPENING, *COUNTING)):
        pass
    census, geometry = before.view.census, before.view.geometry
    fresh = [(record.offset, record.offset + record.filled) for record in undo.records if record.filled]
    fresh.append((undo.size_before + geometry.cluster_size - 1, geometry.offset_of(census.clusters)))
    for start, end in fresh:
        for cluster in range(geometry.cluster_of(start), min(geometry.clusters(end), census.clusters)):
            if census.references(cluster):
                where = geometry.offset_of(cluster)
                text = f"the image has been used since a crash cut the change short: something refers to {where:#x}"
                raise UndoError(text, hint=_HINT)
