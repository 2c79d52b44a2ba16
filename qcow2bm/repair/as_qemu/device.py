"""A repair without a journal, for block devices, where there is no place beside the image that outlives a crash.

Why no crash does harm: new refcount structures are filled before the one sector of the header that makes them valid;
apart from that every sector that is rewritten says something truer than before, whatever has become of the others. A
refcount that is raised, or lowered to what refers to the cluster, contradicts nothing, nor does a copied flag that
is cleared. One that is set names a cluster with one reference, whose refcount may still be too high. So a crash leaves
an image that is at most as wrong as it was, and the same repair finishes it. A new snapshot table, or a header in more
than one sector, is another matter: that needs the journal.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import UndoError
from ...format.header import INCOMPATIBLE_FIELD
from ...image.file import ImageFile
from ...image.plan import Plan, Stage, fits_a_sector


def without_journal(plan: Plan, file: ImageFile) -> Plan:
    """The plan of an overlay over `file`, without the corrupt bit that marks it unfinished.

    Raises:
        UndoError: the header changes in more than one sector.
    """
    stages = []
    for stage in plan.stages:
        if _is_mark(stage):
            continue
        if stage.writes[0].offset < plan.cluster_size and not fits_a_sector(stage.writes):
            raise needs_journal()
        writes = tuple(
            write if write.old is None else replace(write, old=file.read_padded(write.offset, write.length))
            for write in stage.writes
        )
        stages.append(replace(stage, writes=writes, journaled=False))
    return replace(plan, stages=tuple(stages), commit_stage=max(0, len(stages) - 1))


def needs_journal() -> UndoError:
    """The error for a repair that cannot do without one."""
    hint = "copy the device to a file and repair that, or use `qcow2bm repair` with an undo file on another disk"
    return UndoError("this repair needs a journal, and a device has no place for one", hint=hint)


def _is_mark(stage: Stage) -> bool:
    """True if a stage does nothing but set or clear the corrupt bit."""
    return [(write.offset, write.length) for write in stage.writes] == [(INCOMPATIBLE_FIELD, 8)]
