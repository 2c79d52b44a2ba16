"""After a shrink: tables that had to go behind all else come to the front, so that the file's end can be cut off.

While the old disk was still valid its clusters could not be used again, so in a full image the tables of the new one
went to the end of the file. Now there is room. This is a change of its own, as safe as any; the disk is not touched.
"""

from __future__ import annotations

from dataclasses import replace

from ..bitmap.bits import BitVector
from ..bitmap.store import BitmapDirectory, State
from ..bitmap.write import replace_directory
from ..format.entries import used_clusters
from ..image.change import Change, no_change
from ..image.image import Qcow2Image
from ..image.plan import Plan
from ..image.refcounts import Refcounts
from .bitmaps import Sized
from .header import switch
from .mapping import NewMapping


def plan_tidying(image: Qcow2Image) -> Plan:
    """The plan that moves tables and bitmaps from behind where the file could end.

    Empty if nothing lies there, or if the file would not become shorter: what moves may need more room in front than
    there is, or new refcount blocks.

    Raises:
        CorruptImageError, ProofError: the image is not what the plan would rely on.
        NoSpaceError: no room in one piece.
    """
    directory, change = BitmapDirectory(image), Change(image)
    limit = _used(image)
    clusters = image.geometry.clusters(image.geometry.virtual_size)
    l1_table = NewMapping(change, clusters, clusters, limit=limit).put()
    pointer = None
    if directory.pointer is not None and all(stored.state is State.READY for stored in directory.bitmaps):
        bitmaps = [
            Sized(entry.name, entry.granularity_bits, entry.flags, _same(stored.bits), stored)
            for stored in directory.bitmaps
            for entry in [stored.entry]
        ]
        pointer = replace_directory(change, directory, bitmaps, limit=limit)
    if pointer is None and l1_table == (image.header.l1_size, image.header.l1_table_offset):
        return no_change(image, ())
    plan = change.plan(
        lambda head: switch(head, "switch to the tables in front", pointer, None, l1_table), directory.references(), ()
    )
    plan = change.trimmed(plan)
    if plan.cut_to is None or plan.cut_to >= image.file.size:
        return no_change(image, ())
    return replace(plan, summary=("move tables to the front",))


def _same(bits: BitVector) -> BitVector:
    """The same bits as a vector of its own: each of its clusters is looked at, and kept where it may stay."""
    return BitVector(bits.length, bits.chunk_bytes, bits.chunks)


def _used(image: Qcow2Image) -> int:
    """Bytes that all used clusters take: where the file would end if they lay without gaps."""
    refcounts, used = Refcounts(image), 0
    for index in range(len(refcounts.table)):
        block = refcounts.read_block(index)
        if block is not None:
            used += used_clusters(block, image.geometry.refcount_order).count()
    return image.geometry.offset_of(used)
