"""What entries name behind the end of the file. It reads as zeroes, so nothing else may come to lie there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..checks.model import Finding
from ..checks.view import View
from .folded import l1_masked, l2_masked, table_start
from .spans import Spans

if TYPE_CHECKING:
    from ..format.vectors import Clusters

_FOLDED = ("l2-outside", "data-outside", "compressed-outside", "bitmap-data-outside")
"""The problems of which a check folds very many."""
MOST_FOLDED = 1 << 16
"""Entries of folded findings up to which it is worked out what they name: at every look, and each for itself."""


class Outside:
    """The clusters that findings of one look are about.

    Attributes:
        too_many: True if more folded entries name some than are looked at.
    """

    def __init__(self) -> None:
        self.too_many = False
        self._spans = Spans()
        self._folded = 0

    def add(self, finding: Finding, view: View) -> None:
        """Take in what a finding says."""
        if finding.folded and finding.code in _FOLDED:
            self._folded += finding.count
            self.too_many = self._folded > MOST_FOLDED
            for span in () if self.too_many else _named_clusters(view, finding):
                self._spans.add(*span)
        elif finding.code.endswith("-outside") and not finding.folded and "offset" in finding.values:
            start, size = finding.values["offset"], view.geometry.cluster_size
            self._spans.add(start // size, (start + finding.values.get("size", size) - 1) // size + 1)

    def sorted(self) -> Spans:
        """The clusters."""
        return self._spans.sorted()


def _named_clusters(view: View, finding: Finding) -> Iterator[tuple[int, int]]:
    """The clusters behind the end of the file that the entries name, as (first, last + 1); in any order."""
    first, last = _named(view, finding)
    yield from set(zip(first.tolist(), (last + 1).tolist(), strict=True))


def _named(view: View, finding: Finding) -> tuple[Clusters, Clusters]:
    """The first and the last cluster that each entry names."""
    import numpy as np

    from ..checks.wrong import bitmap_faults, words
    from ..format.entries import OFFSET_MASK
    from ..format.vectors import clusters_at, compressed_clusters

    structure = finding.location.structure
    if structure == "L2 table":
        values, _, mask = l2_masked(view, finding)
        if finding.code == "compressed-outside":
            return compressed_clusters(values[mask], view.geometry)[:2]
    elif structure == "bitmap table":
        owner = next(bitmap for bitmap in view.bitmaps if bitmap.entry.bitmap_table_offset == table_start(finding))
        values = words(view.read_table(owner.entry))
        mask = bitmap_faults(values, view.geometry, view.file_size)[finding.code]
    else:
        _, values, mask = l1_masked(view, finding)
    offsets = values[mask] & np.uint64(OFFSET_MASK)
    reach = np.uint64(view.geometry.cluster_size - 1)
    return clusters_at(offsets, view.geometry), clusters_at(offsets + reach, view.geometry)
