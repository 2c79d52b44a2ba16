"""The first pass of `qemu-img check -r`: what is wrong is said and mended, on an overlay.

Source: `qcow2_co_check_locked` and `qcow2_check_refcounts`, stage by stage.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

from ...checks.model import Allocation, Finding, InQemu
from ...checks.passes import mapping
from ...checks.runner import Inspection
from ...image.commit import carry_out
from ...image.overlay import OverlayFile
from ...image.plan import Plan
from .blocks import RefcountBlocks
from .comparing import Comparison
from .copied import CopiedFlags
from .counting import Counting, exhaust, look, view_of
from .device import require_harmless
from .model import Counts, Event, GivenUpError, Mode, Notice
from .node import Node
from .opening import update_header
from .rebuild import Rebuilding
from .shared import Shared
from .snapshots import read, rewrite

Progress = Callable[[int, int], None]


class Repair:
    """A repair of an image that QEMU would open.

    Attributes:
        counts: what the first pass came to.
        reason: the error number with which it was given up; None if it was not, or a finding says why.
        given_up: True if it was.
        allocation: statistics of the image as the first pass saw it.
    """

    def __init__(self, file: OverlayFile, inspection: Inspection, found: list[Finding], mode: Mode) -> None:
        """Prepare a repair.

        Args:
            file: where it is worked out.
            inspection: a look at that file with which the passes of `OPENING` have been run as QEMU runs them.
            found: what they have found.
        """
        self._file = file
        self._mode = mode
        self._inspection = inspection
        self._image = view_of(inspection).image
        self._node = Node(file, view_of(inspection))
        self._blocks = RefcountBlocks(self._node)
        self._failures = [finding for finding in found if finding.qemu is InQemu.FAILS]
        self._snapshots = Counts()
        self._has_new_table = False
        self._keeps = True
        self.counts = Counts()
        self.reason: int | None = None
        self.given_up = False
        self.allocation = Allocation()

    @property
    def is_dead(self) -> bool:
        """True if QEMU would not go on after the first pass: it has marked the image corrupt."""
        return self._node.dead

    def first_pass(self) -> Iterator[Event]:
        """Say and mend what is wrong. The overlay is then the image as it is to be."""
        update_header(self._node)
        try:
            yield from read(self._node, self._mode, self._snapshots, self._failure(of_snapshots=True))
            yield from self._refcounts()
            if self._snapshots.corruptions and self._mode is Mode.ALL:
                self._has_new_table = True
                yield from rewrite(self._node, self._blocks, self._snapshots)
            self.counts.add(self._snapshots)
            yield from self._unmark()
        except GivenUpError as error:
            self.given_up, self.reason, self._keeps = True, error.reason, error.keeps

    def _failure(self, *, of_snapshots: bool) -> Finding | None:
        """What opening has seen that will end the check: of the snapshot table, or of the bitmaps."""
        failures = (each for each in self._failures if each.code.startswith("snapshot-") is of_snapshots)
        return next(failures, None)

    def _refcounts(self) -> Iterator[Event]:
        counting = Counting(self._node, self.counts, self._mode, self._inspection)
        yield from counting.run(self._failure(of_snapshots=False))
        comparison = Comparison(self._node, self._blocks)
        yield from comparison.run(counting.inspection)
        self.allocation = counting.view.allocation
        shared = comparison.shared
        self.counts.corruptions += comparison.overflows
        if counting.rebuild or comparison.rebuild:
            shared = yield from self._rebuild(counting, comparison)
        elif comparison.counts.leaks or comparison.counts.corruptions or self.counts.corruptions:
            mending = Comparison(self._node, self._blocks, self._mode)
            yield from mending.run(counting.inspection, again=True)
            self.counts.add(mending.counts)
        else:
            self.counts.add(comparison.counts)
        yield from self._copied_flags(counting, shared)

    def _rebuild(self, counting: Counting, comparison: Comparison) -> Generator[Event, None, Shared]:
        counts, found = self.counts, comparison.counts
        counts.errors += found.errors
        if self._mode is not Mode.ALL:
            yield Event(Notice.REBUILD_NEEDED)
            counts.errors += 1
            raise GivenUpError(errno.EIO)
        yield Event(Notice.REBUILDING)
        rebuilding = Rebuilding(self._node, counting.view)
        yield from rebuilding.run()
        left = Counts()
        again = Counting(self._node, left, None)
        yield from again.run(None)
        census = again.view.census
        census.clusters = max(census.clusters, rebuilding.clusters)
        # What the old structures took is given back; that counts as nothing.
        freeing = Comparison(self._node, self._blocks, Mode.LEAKS)
        yield from freeing.run(again.inspection)
        if again.rebuild or freeing.rebuild:
            yield Event(Notice.STILL_BROKEN)
        left.corruptions += freeing.overflows
        counts.corruptions_fixed += max(0, counts.corruptions + found.corruptions - left.corruptions)
        counts.leaks_fixed += found.leaks
        counts.corruptions, counts.leaks = left.corruptions, freeing.counts.leaks
        self.allocation = _counted_twice(self.allocation, again.view.allocation)
        return freeing.shared

    def _copied_flags(self, counting: Counting, shared: Shared) -> Iterator[Event]:
        counts, view = self.counts, counting.view
        mends = self._mode is Mode.ALL or (counts.is_sound and not counts.leaks)
        if counts.corruptions_fixed or counts.leaks_fixed:
            # The flags follow the refcounts as they are now.
            inspection = look(self._node, snapshots=False)
            exhaust(inspection.findings((mapping.mapping,)))
            view = view_of(inspection)
        yield from CopiedFlags(self._node, view, shared, counts).run(mends=mends)

    def _unmark(self) -> Iterator[Event]:
        """Clear the dirty and the corrupt bit, if nothing is left that is worse than a leak."""
        if not (self.counts.is_sound and self._node.is_marked):
            return
        if not self._blocks.may_be_written:
            yield from self._blocks.close()
            raise GivenUpError(errno.EIO)
        self._node.unmark()

    def close(self) -> Iterator[Event]:
        """What is left to say when the image is closed; to be called after the second pass."""
        # Of an image that is marked dirty QEMU writes refcount blocks only at the very end, and says if that fails.
        failed = self._node.is_dirty and not (self._blocks.may_be_written or self._node.dead)
        yield from self._blocks.close()
        if failed:
            yield Event(Notice.FLUSH_FAILED)

    def plan(self, *, journaled: bool = True) -> Plan:
        """What the repair writes."""
        summary = f"repair as `qemu-img check -r {self._mode.value}`"
        return self._file.plan(self._image, self._node.filled, (summary,), journaled=journaled)

    def commit(self, *, undo: Path | None = None, progress: Progress | None = None) -> bool:
        """Write it, unless it was given up for want of all references; True if there was something to write.

        Args:
            undo: keep what is replaced in this file, which must not exist yet.

        Raises:
            Qcow2bmError: as `qcow2bm.image.commit.commit`.
        """
        if not self._keeps:
            return False
        base = self._file.base
        plan = self.plan(journaled=undo is not None or not base.is_device)
        if plan and base.is_device and undo is None:
            require_harmless(plan, has_new_table=self._has_new_table)
        if plan:
            carry_out(base, plan, undo=undo, progress=progress)
        return bool(plan)


def _counted_twice(first: Allocation, second: Allocation) -> Allocation:
    """The statistics as QEMU has them after a rebuild, in which it counts all clusters again."""
    return replace(
        second,
        allocated=first.allocated + second.allocated,
        fragmented=first.fragmented + second.fragmented,
        compressed=first.compressed + second.compressed,
    )
