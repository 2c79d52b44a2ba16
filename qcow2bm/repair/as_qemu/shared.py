"""Clusters with uses that must not share one: what is written for one use may destroy the other.

QEMU mends flags in whatever an L1 entry names, be it a cluster full of guest data. Here nothing is written to a cluster
with another use unless what stands there makes sense as a table: then the other use is the mistake, and the flags keep
the next guest write from going there.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator

from ...checks.model import Finding
from ...checks.view import View
from ...format.entries import L1_RESERVED, L2Entry, l1_offset, table_entries
from ...format.geometry import Geometry


class Shared:
    """Such clusters, as the comparison of the refcounts finds them."""

    def __init__(self, geometry: Geometry) -> None:
        self._bitmaps = _Runs(geometry)
        self._metadata = _Runs(geometry)

    def note(self, finding: Finding) -> None:
        """Remember the clusters of a finding, if it is one of these. Findings come in the order of clusters."""
        if finding.code == "bitmap-clusters-shared":
            self._bitmaps.add(finding.values["first"], finding.count)
        elif finding.code == "metadata-overlap":
            self._metadata.add(finding.values["first"], finding.count)

    def spares_l1(self, view: View, offset: int) -> bool:
        """True if nothing is to be written to the entry of the active L1 table at `offset`."""
        if self._metadata.touches(offset, 8):
            entries = [entry for entry in view.read_l1(view.roots[0]) if entry]
            return _is_garbage(len(entries), sum(_is_odd_l1(view, entry) for entry in entries))
        return self._bitmaps.touches(offset, 8)

    def spares_l2(self, view: View, offset: int) -> bool:
        """True if nothing is to be written to the L2 table at `offset`."""
        size = view.geometry.cluster_size
        if self._bitmaps.touches(offset, size):
            return True
        if not self._metadata.touches(offset, size):
            return False
        entries = list(_entries(view, offset))
        return _is_garbage(len(entries), sum(_is_odd_l2(view, entry) for entry in entries))


def _is_garbage(entries: int, odd: int) -> bool:
    return 2 * odd > entries


def _is_odd_l1(view: View, entry: int) -> bool:
    offset = l1_offset(entry)
    outside = view.census.reaches_outside(offset, view.geometry.cluster_size)
    return bool(entry & L1_RESERVED) or outside or not view.geometry.is_aligned(offset)


def _is_odd_l2(view: View, entry: L2Entry) -> bool:
    version, data_file = view.header.version, view.header.has_data_file
    if next(entry.faults(view.geometry, version=version, data_file=data_file), None) is not None:
        return True
    return view.census.outside_of(entry) is not None


def _entries(view: View, offset: int) -> Iterator[L2Entry]:
    """The entries of an L2 table that are not zero."""
    stride = view.geometry.l2_entry_words
    values = table_entries(view.file.read_padded(offset, view.geometry.cluster_size))
    for index in range(0, len(values), stride):
        entry = L2Entry(values[index], values[index + 1] if stride == 2 else 0)
        if entry.value or entry.bitmap:
            yield entry


class _Runs:
    """Runs of clusters, in order."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._firsts, self._stops = array("Q"), array("Q")

    def add(self, first: int, count: int) -> None:
        self._firsts.append(first)
        self._stops.append(first + count)

    def touches(self, offset: int, length: int) -> bool:
        place = bisect_right(self._firsts, self._geometry.cluster_of(offset + length - 1)) - 1
        return place >= 0 and self._stops[place] > self._geometry.cluster_of(offset)
