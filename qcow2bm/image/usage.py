"""How much of the file each kind of cluster takes, without reading a single L2 table."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from ..format.entries import used_clusters
from .image import Qcow2Image
from .mapping_tables import MappingTables
from .refcounts import Refcounts
from .references import Kind, Reference, single_structures


def usage(image: Qcow2Image, others: Iterable[Reference]) -> dict[Kind, int]:
    """Bytes per kind, in whole clusters.

    Guest data, of the disk and its snapshots, compressed or not, is what the refcounts count beyond the structures
    that are known.

    Args:
        others: what refers to clusters apart from header, mapping, snapshots and refcounts: the bitmaps.

    Raises:
        CorruptImageError: a table cannot be read.
    """
    geometry = image.geometry
    refcounts, mapping = Refcounts(image), MappingTables(image)
    blocks = {refcounts.block_offset(index): index for index, entry in enumerate(refcounts.table) if entry}
    blocks.pop(0, None)
    seen: set[tuple[Kind, int]] = set()
    taken = dict.fromkeys(Kind, 0)
    taken[Kind.REFCOUNTS], taken[Kind.L2_TABLES] = len(blocks), mapping.count()
    for reference in chain(single_structures(image, image.crypto_header), mapping.roots, others):
        if reference.length > 0 and (reference.kind, reference.offset) not in seen:
            seen.add((reference.kind, reference.offset))
            taken[reference.kind] += geometry.clusters(reference.length)
    used = 0
    for offset, index in blocks.items():  # each block once, however many entries name it
        if image.file.is_hole(offset, geometry.cluster_size):
            continue
        block = refcounts.read_block(index)
        if block is not None:
            used += used_clusters(block, geometry.refcount_order).count()
    taken[Kind.GUEST_DATA] = max(0, used - sum(taken.values()))
    return {kind: clusters * geometry.cluster_size for kind, clusters in taken.items()}
