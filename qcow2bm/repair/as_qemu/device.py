"""A repair without a journal, for block devices, where there is no place beside the image that outlives a crash.

Why no crash does harm: new refcount structures are filled before the one sector of the header that makes them valid;
apart from that every sector that is rewritten says something truer than before, whatever has become of the others. A
refcount that is raised, or lowered to what refers to the cluster, contradicts nothing, nor does a copied flag that
is cleared. One that is set names a cluster with one reference, whose refcount may still be too high. So a crash leaves
an image that is at most as wrong as it was, and the same repair finishes it. A new snapshot table, or a header in more
than one sector, is another matter: that needs the journal.
"""

from __future__ import annotations

from ...errors import UndoError
from ...image.plan import Plan


def require_harmless(plan: Plan, *, has_new_table: bool) -> None:
    """Refuse a repair that could do harm if a crash tears it.

    Raises:
        UndoError: the header changes in more than one sector, or the snapshot table is new.
    """
    in_header = [stage for stage in plan.stages if stage.writes[0].offset < plan.cluster_size]
    if has_new_table or not all(stage.fits_a_sector for stage in in_header):
        hint = "copy the device to a file and repair that, or use `qcow2bm repair` with an undo file on another disk"
        raise UndoError("this repair needs a journal, and a device has no place for one", hint=hint)
