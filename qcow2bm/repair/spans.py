"""Ranges of clusters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class Spans:
    """Ranges of clusters."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._spans = list(spans)

    def add(self, start: int, stop: int) -> None:
        """Add a range; neighbours that come in order are one."""
        if self._spans and self._spans[-1][1] == start:
            start = self._spans.pop()[0]
        self._spans.append((start, stop))

    def sorted(self) -> Spans:
        """In order, without overlaps."""
        joined: list[tuple[int, int]] = []
        for start, stop in sorted(self._spans):
            if joined and start <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(stop, joined[-1][1])
            else:
                joined.append((start, stop))
        return Spans(joined)

    def stop_of(self, cluster: int) -> int | None:
        """Where the range ends that holds a cluster, None if none does; of sorted ranges."""
        return self.first_stop(cluster, cluster + 1)

    def first_stop(self, start: int, stop: int) -> int | None:
        """Where the first range ends that overlaps this one; of sorted ranges."""
        place = bisect_right(self._spans, (start, 1 << 64))
        for first, end in self._spans[max(0, place - 1) : place + 1]:
            if first < stop and start < end:
                return end
        return None
