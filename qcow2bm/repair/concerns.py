"""The findings of a check as they concern one bitmap: its own, those that keep QEMU from the image, all others."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

from ..bitmap.store import StoredBitmap
from ..checks.model import Finding, InQemu, Severity
from ..checks.problems import NOT_ITS_OWN
from ..checks.view import View

_OF_CLUSTERS = frozenset({*NOT_ITS_OWN, "metadata-overlap", "refcount-too-low", "refcount-overflow"})
"""Problems of clusters, which may be this bitmap's."""
_BARRING = frozenset({"marked-corrupt"})
"""Problems that keep a VM from the image although QEMU opens it."""
REASONS = (Severity.CORRUPTION, Severity.UNKNOWN, Severity.BITMAP)
"""Severities that make a bitmap unusable."""


class Findings:
    """What a check finds, by what it is for this bitmap.

    Attributes:
        own: the first finding of each problem that concerns it, by code, and how often.
        barring: of those that do not, but keep QEMU or a VM from the image.
        elsewhere: how often all the others.
        table_is_shared: something else uses a cluster of the bitmap's table.
    """

    def __init__(self, view: View, bitmap: StoredBitmap | None, name: str) -> None:
        self.name = name
        self.own: dict[str, tuple[Finding, int]] = {}
        self.barring: dict[str, tuple[Finding, int]] = {}
        self.elsewhere: Counter[str] = Counter()
        self.table_is_shared = False
        self._damage = view.directory.damage_code if bitmap is None else None
        self._view = view
        self._clusters = _merged(view, bitmap)
        self._table = _merged(view, bitmap, data=False)

    def add_all(self, findings: Iterable[Finding]) -> None:
        """Take the findings of some passes."""
        for finding in findings:
            if self._concerns_it(finding):
                _count(self.own, finding)
                if finding.code in NOT_ITS_OWN:
                    self.table_is_shared = self.table_is_shared or self._touches(finding, self._table)
            elif self._bars(finding):
                _count(self.barring, finding)
            else:
                self.elsewhere[finding.code] += finding.count

    def _concerns_it(self, finding: Finding) -> bool:
        if finding.code == self._damage:
            return True
        if finding.code in _OF_CLUSTERS:
            return self._touches(finding, self._clusters)
        return finding.location.bitmap == self.name

    def _touches(self, finding: Finding, ranges: list[tuple[int, int]]) -> bool:
        first = finding.values.get("first")
        if first is None:
            return False
        place = bisect_right(ranges, (first + finding.count - 1, self._view.census.clusters)) - 1
        return place >= 0 and ranges[place][1] > first

    @staticmethod
    def _bars(finding: Finding) -> bool:
        return finding.code in _BARRING or (finding.qemu is InQemu.REFUSES and finding.severity in REASONS)


def _count(found: dict[str, tuple[Finding, int]], finding: Finding) -> None:
    first, count = found.get(finding.code, (finding, 0))
    found[finding.code] = first, count + finding.count


def _merged(view: View, bitmap: StoredBitmap | None, *, data: bool = True) -> list[tuple[int, int]]:
    """The clusters of a bitmap's table and data as sorted ranges (first, one after the last) that do not touch."""
    if bitmap is None:
        return []
    references = list(bitmap.references())
    if not data:
        references = [reference for reference in references if reference.offset == bitmap.entry.bitmap_table_offset][:1]
    cluster_of, ranges = view.geometry.cluster_of, list[tuple[int, int]]()
    for reference in sorted(references, key=lambda reference: reference.offset):
        first, stop = cluster_of(reference.offset), cluster_of(reference.offset + reference.length - 1) + 1
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(stop, ranges[-1][1])
        else:
            ranges.append((first, stop))
    return ranges
