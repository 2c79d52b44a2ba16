"""The entries of a table that a folded finding stands for: there are so many that a check tells of them as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checks.model import Finding
from ..checks.view import View

if TYPE_CHECKING:
    from ..checks.wrong import Mask
    from ..format.vectors import Words


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

    start = table_start(finding)
    root = next(root for root in view.roots if root.offset == start and root.name == finding.location.snapshot)
    entries = words(view.read_l1(root)).copy()
    return start, entries, l1_faults(entries, view.geometry, view.file_size)[finding.code]


def table_start(finding: Finding) -> int:
    """Host offset of the table of 64-bit entries that it is about."""
    return (finding.location.host_offset or 0) - 8 * (finding.location.index or 0)
