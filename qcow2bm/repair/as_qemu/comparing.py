"""The refcounts on disk against the references, and those that are wrong mended.

Source: `compare_refcounts`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...checks.model import Finding, InQemu
from ...checks.passes import refcounts
from ...checks.runner import Inspection
from .blocks import RefcountBlocks
from .model import Counts, Event, Mode, Notice
from .node import Node
from .shared import Shared

_OF_COUNTS = ("refcount-too-low", "leak")


class Comparison:
    """One comparison.

    Attributes:
        counts: what it comes to.
        overflows: references above what a refcount can hold, which QEMU finds as it counts them.
        rebuild: True if clusters in use have a refcount of 0.
        shared: left by it: clusters with uses that must not share one.
    """

    def __init__(self, node: Node, blocks: RefcountBlocks, mode: Mode | None = None) -> None:
        """`mode` None mends nothing."""
        self._node = node
        self._blocks = blocks
        self._mode = mode
        self.counts = Counts()
        self.overflows = 0
        self.rebuild = False
        self.shared = Shared(node.geometry)

    def run(self, inspection: Inspection, *, again: bool = False) -> Iterator[Event]:
        """Compare what an inspection has counted; `again` if that has been done before."""
        for finding in inspection.findings((refcounts.refcounts,)):
            self.shared.note(finding)
            if finding.code in _OF_COUNTS:
                yield from self._judge(finding)
            elif finding.code == "refcount-overflow" and not again:
                self.overflows += finding.count
                yield Event(finding)
            elif finding.qemu is InQemu.ERROR:
                yield from self._unreadable(finding)
        self._blocks.settle()

    def _unreadable(self, finding: Finding) -> Iterator[Event]:
        self.counts.errors += finding.count
        offset, index = finding.values["offset"], finding.values["index"]
        if not self._node.geometry.is_aligned(offset):
            yield from self._node.signal(Notice.CORRUPT_BLOCK, offset=offset, index=index)
        yield Event(finding)

    def _judge(self, finding: Finding) -> Iterator[Event]:
        stored, references = finding.values["refcount"], finding.values["references"]
        is_leak = stored > references
        mends = self._mode is not None and stored > 0 and (is_leak or self._mode is Mode.ALL)
        self.rebuild = self.rebuild or not stored
        if mends:
            self._blocks.set_run(finding.values["first"], finding.count, references)
        yield Event(finding, mended=mends)
        if is_leak and mends:
            self.counts.leaks_fixed += finding.count
        elif is_leak:
            self.counts.leaks += finding.count
        else:
            self.counts.count(finding.count, mended=mends)
