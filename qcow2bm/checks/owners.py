"""Who refers to a cluster: the second look at an image, at the few clusters that the first one found wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from ..format.entries import L2Entry, l1_offset, table_entries
from ..format.text import decode_name
from .model import Finding
from .plain import PlainCensus
from .view import Root, View

if TYPE_CHECKING:
    from ..format.vectors import ClusterFilter

_MOST_OWNERS = 8
"""Owners that are named of a cluster."""
_CLUSTERS_OF_ONE = 8
"""Clusters of one finding whose owners are named."""
_MANY = 1 << 16
"""L2 tables whose visits are counted."""
_MOST_CLUSTERS = 1 << 12
"""Clusters whose owners are looked for, over all findings."""


class OwnerSearch:
    """Looks for the owners of the clusters of findings, all at once."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._geometry = view.geometry
        self._owners: dict[int, list[str]] = {}
        self._walked: set[int] = set()
        self._kept_hits: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        self._filter: ClusterFilter | None = None

    def find(self, findings: list[Finding]) -> dict[int, tuple[str, ...]]:
        """Index in `findings` to the owners of its clusters, the first few of each.

        Of what is beyond `_MOST_CLUSTERS` there is nothing.
        """
        clusters = {index: self._clusters(finding) for index, finding in enumerate(findings)}
        for wanted in clusters.values():
            for cluster in wanted:
                if len(self._owners) < _MOST_CLUSTERS:
                    self._owners.setdefault(cluster, [])
        if not self._owners:
            return {}
        view = self._view
        for reference in chain(view.structures(), view.directory.references(view.bitmaps)):
            self._note(reference.offset, reference.length, reference.owner)
        for root in view.roots:
            self._note_mapping(root)
        return {
            index: tuple(dict.fromkeys(owner for cluster in wanted for owner in self._owners[cluster]))
            for index, wanted in clusters.items()
            if all(cluster in self._owners for cluster in wanted)
        }

    def _clusters(self, finding: Finding) -> range:
        """The clusters that a finding is about; none if it is not about clusters."""
        first = finding.values.get("first")
        if first is None:
            return range(0)
        count = 1 if finding.code.startswith("copied-") else finding.count  # of those it counts visits
        return range(first, first + min(count, _CLUSTERS_OF_ONE))

    def _note(self, offset: int, length: int, owner: str) -> None:
        if length <= 0 or self._view.census.reaches_outside(offset, length):
            return
        first, last = self._geometry.cluster_of(offset), self._geometry.cluster_of(offset + length - 1)
        if last - first < len(self._owners):
            touched = [cluster for cluster in range(first, last + 1) if cluster in self._owners]
        else:
            touched = [cluster for cluster in self._owners if first <= cluster <= last]
        for cluster in touched:
            if len(self._owners[cluster]) < _MOST_OWNERS:
                self._owners[cluster].append(owner)

    def _note_mapping(self, root: Root) -> None:
        """The L2 tables of an L1 table and what their entries refer to."""
        view, size = self._view, self._geometry.cluster_size
        suffix = "" if root.snapshot is None else f" of snapshot {decode_name(root.snapshot.id)}"
        visits: Counter[int] = Counter()
        for index, entry in enumerate(view.read_l1(root)):
            # A table that has been met so often has named all the owners that are told of a cluster.
            if not entry or visits[entry] >= _MOST_OWNERS:
                continue
            if len(visits) < _MANY:
                visits[entry] += 1
            offset = l1_offset(entry)
            if not offset:
                continue
            start = index * self._geometry.l2_span
            self._note(offset, size, f"the L2 table of guest offset {start:#x}{suffix}")
            if view.header.has_data_file or offset >= view.file.size or not self._geometry.is_aligned(offset):
                continue  # any number of unaligned tables may lie in the same few bytes
            for place, reach in self._hits(offset):
                guest = start + place * size
                self._note(*reach, f"guest data at {guest:#x}{suffix}")

    def _hits(self, offset: int) -> list[tuple[int, tuple[int, int]]]:
        """Entries of an L2 table that refer to a wanted cluster: index, and what they refer to. Read once."""
        if offset in self._walked:
            return self._kept_hits.get(offset, [])
        self._walked.add(offset)
        if self._view.file.is_hole(offset, self._geometry.cluster_size):
            return []
        table = self._view.file.read_padded(offset, self._geometry.cluster_size)
        values = table_entries(table)
        hits = []
        for index in self._candidates(table):
            entry = L2Entry.of(values, index, self._geometry)
            reach = entry.host_range(self._geometry)
            if reach is not None and self._is_wanted(*reach) and self._view.census.outside_of(entry) is None:
                hits.append((index, reach))
        if hits:
            self._kept_hits[offset] = hits
        return hits

    def _is_wanted(self, offset: int, length: int) -> bool:
        first, last = self._geometry.cluster_of(offset), self._geometry.cluster_of(offset + length - 1)
        return any(cluster in self._owners for cluster in range(first, last + 1))

    def _candidates(self, table: bytes) -> Iterator[int]:
        """Indices of the entries to look at: in a large image those that numpy picks out."""
        if isinstance(self._view.census, PlainCensus):
            return iter(range(self._geometry.l2_entries))
        from ..format.vectors import ClusterFilter, host_clusters

        if self._filter is None:
            self._filter = ClusterFilter(self._owners)
        hits = self._filter.range_hits(*host_clusters(table, self._geometry))
        return iter(sorted({index for index, _ in hits}))  # one may reach into two of the clusters
