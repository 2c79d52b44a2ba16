"""The entries of a table that a folded finding stands for: there are so many that a check tells of them as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..checks.model import Finding
from ..checks.view import View

if TYPE_CHECKING:
    from ..checks.wrong import Mask
    from ..format.vectors import Clusters, Words


def l2_table(view: View, finding: Finding) -> int:
    """Host offset of the L2 table that it is about."""
    where = finding.location
    return (where.host_offset or 0) - (where.index or 0) * view.geometry.l2_entry_size


def l2_masked(view: View, finding: Finding) -> tuple[Words, Words, Mask]:
    """The entries of that table as they are now, their subcluster bitmaps, and which of them have the problem."""
    from ..checks.wrong import l2_faults, l2_words

    geometry, version, data_file = view.geometry, view.header.version, view.header.has_data_file
    values, bitmaps = l2_words(view.file.read_padded(l2_table(view, finding), geometry.cluster_size), geometry)
    faults = l2_faults(values, bitmaps, geometry, view.file_size, version=version, data_file=data_file)
    return values, bitmaps, faults[finding.code]


def l1_masked(view: View, finding: Finding) -> tuple[int, Words, Mask]:
    """The same of the L1 table, with its host offset."""
    from ..checks.wrong import l1_faults, words

    start = _start(finding)
    root = next(root for root in view.roots if root.offset == start and root.name == finding.location.snapshot)
    entries = words(view.read_l1(root)).copy()
    return start, entries, l1_faults(entries, view.geometry, view.file_size)[finding.code]


def named_outside(view: View, finding: Finding) -> Iterator[tuple[int, int]]:
    """The clusters behind the end of the file that the entries name, as (first, last + 1); in any order."""
    first, last = _named(view, finding)
    yield from set(zip(first.tolist(), (last + 1).tolist(), strict=True))


def _named(view: View, finding: Finding) -> tuple[Clusters, Clusters]:
    """The first and the last cluster that each entry names."""
    import numpy as np

    from ..checks.wrong import bitmap_faults, words
    from ..format.entries import OFFSET_MASK
    from ..format.vectors import compressed_clusters

    structure = finding.location.structure
    if structure == "L2 table":
        values, _, mask = l2_masked(view, finding)
        if finding.code == "compressed-outside":
            return compressed_clusters(values[mask], view.geometry)[:2]
    elif structure == "bitmap table":
        owner = next(bitmap for bitmap in view.bitmaps if bitmap.entry.bitmap_table_offset == _start(finding))
        values = words(view.read_table(owner.entry))
        mask = bitmap_faults(values, view.geometry, view.file_size)[finding.code]
    else:
        _, values, mask = l1_masked(view, finding)
    offsets = values[mask] & np.uint64(OFFSET_MASK)
    reach, shift = np.uint64(view.geometry.cluster_size - 1), np.uint64(view.geometry.cluster_bits)
    return (offsets >> shift).view(np.int64), (offsets + reach >> shift).view(np.int64)


def _start(finding: Finding) -> int:
    """Host offset of the table of 64-bit entries."""
    return (finding.location.host_offset or 0) - 8 * (finding.location.index or 0)
