"""Counting all references, with what QEMU mends meanwhile: unaligned zero clusters, and blocks outside the file.

Source: `calculate_refcounts`, `fix_l2_entry_by_zero`, `check_refblocks`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace

from ...checks.census import Use
from ...checks.model import Finding, InQemu
from ...checks.passes import bitmaps, mapping, refcounts
from ...checks.runner import CHECKING, OPENING, Inspection, inspect
from ...checks.view import View
from ...format.entries import ZERO
from ...format.geometry import SUBCLUSTERS
from .model import Counts, Event, GivenUpError, Mode, Notice
from .node import Node, Structure
from .shared import Shared

_MOST_GROWTH = 1 << 30
"""Bytes by which the file grows at most for the sake of a refcount block that lies outside."""
_REBUILDS = ("refcount-block-reserved", "refcount-block-unaligned", "refcount-block-shared")
_MAX_END = (1 << 63) - 1


class Counting:
    """One count of all references.

    Attributes:
        inspection: what the count has gone over.
        rebuild: True if the refcount structures are beyond mending.
    """

    def __init__(self, node: Node, counts: Counts, mode: Mode | None, inspection: Inspection | None = None) -> None:
        """`mode` None mends nothing; `inspection` is a look at the image as it is now, if there has been one."""
        self._node = node
        self._counts = counts
        self._mends = mode is Mode.ALL
        self._shared: Shared | None = None
        self._zeroed: set[int] = set()
        self.rebuild = False
        self.inspection = inspection or look(node)

    @property
    def view(self) -> View:
        """What the count has gone over."""
        return view_of(self.inspection)

    def run(self, failure: Finding | None) -> Iterator[Event]:
        """Count; `failure` is what opening has seen that ends the check at the bitmaps.

        Raises:
            GivenUpError: it cannot be done.
        """
        yield from self._mapping()
        yield from self._plain(self.inspection.findings((mapping.structures, bitmaps.clusters)))
        if failure is not None:
            yield Event(failure)
            raise GivenUpError
        if self._node.dead and self.view.bitmaps and self.view.directory.attached:
            raise GivenUpError(errno.EINVAL)  # QEMU no longer knows the size of the disk, and so not that of bitmaps
        if not self.view.complete:
            yield Event(Notice.NOT_COUNTED)
            raise GivenUpError(errno.EFBIG, keeps=False)
        for finding in self.inspection.findings((refcounts.refcount_blocks,)):
            outside = finding.code == "refcount-block-outside" and "size" not in finding.values
            self.rebuild = self.rebuild or finding.code in _REBUILDS
            if outside and self._mends:
                yield from self._grow(finding)
            else:
                yield from self._plain(iter((finding,)))

    def _plain(self, findings: Iterator[Finding]) -> Iterator[Event]:
        for finding in findings:
            if finding.qemu is InQemu.CORRUPTION:
                self._counts.corruptions += finding.count
            yield Event(finding)
            if finding.qemu is InQemu.FAILS:
                raise GivenUpError

    # Zero clusters

    def _mapping(self) -> Iterator[Event]:
        for finding in self.inspection.findings((mapping.mapping,)):
            place = finding.location.host_offset if finding.location.structure == "L2 table" else None
            if place is not None and place in self._zeroed:
                continue  # it is mended, and so has no other faults
            if finding.code == "zero-unaligned" and self._mends and place is not None:
                yield from self._zero(finding, place)
            else:
                yield from self._plain(iter((finding,)))
        if self._zeroed:
            self.inspection = look(self._node)
            exhaust(self.inspection.findings((mapping.mapping,)))

    def _zero(self, finding: Finding, place: int) -> Iterator[Event]:
        """Make an entry one of plain zeroes."""
        node, active = self._node, finding.location.snapshot is None
        ignored = (Structure.ACTIVE_L2,) if active else ()
        structure = node.overlapped(place, node.geometry.l2_entry_size, *ignored)
        table = place - (finding.location.index or 0) * node.geometry.l2_entry_size
        if structure is None and self._spares(table):
            yield from self._plain(iter((finding,)))
            return
        yield Event(replace(finding, count=1), mended=True)
        if structure is not None:
            self._counts.corruptions += 1
            self._counts.errors += 1
            yield from node.signal(Notice.CORRUPT_OVERLAP, structure=structure.value)
            yield Event(Notice.OVERLAP_AT_ENTRY)
            raise GivenUpError(errno.EIO)
        if node.geometry.extended_l2:
            bitmap = int.from_bytes(node.file.read_padded(place + 8, 8), "big") >> SUBCLUSTERS << SUBCLUSTERS
            node.write(place, bytes(8) + bitmap.to_bytes(8, "big"))
        else:
            node.write(place, ZERO.to_bytes(8, "big"))
        self._zeroed.add(place)
        self._counts.corruptions_fixed += 1

    def _spares(self, table: int) -> bool:
        """True if nothing is to be written to an L2 table."""
        if self._shared is None:
            self._shared, inspection = Shared(self._node.geometry), look(self._node)
            for finding in inspection.findings(CHECKING[1:]):
                self._shared.note(finding)
        return self._shared.spares_l2(self.view, table)

    # Refcount blocks

    def _grow(self, finding: Finding) -> Iterator[Event]:
        """Make the file so long that it holds a refcount block, of zeroes then."""
        node, size, offset = self._node, self._node.geometry.cluster_size, finding.values["offset"]
        yield Event(finding, mended=True)
        words, reason = "", 0
        if offset > _MAX_END - size:
            reason = errno.EINVAL
        elif node.file.is_device:
            words, reason = "Cannot grow device files", errno.EINVAL
        elif offset + size - node.file.base.size > max(node.file.base.size, _MOST_GROWTH):
            words, reason = "Could not resize file", errno.EFBIG
        if reason:
            yield Event(Notice.RESIZE_FAILED, values={"words": words, "reason": reason})
            self._counts.corruptions += 1
            self.rebuild = True
            return
        node.file.truncate(offset + size)
        census, cluster = self.view.census, node.geometry.cluster_of(offset)
        self.view.file_size = census.file_size = node.file.size
        census.clusters = cluster + 1
        census.count(Use.STRUCTURE, cluster, cluster + 1, 1)
        self._counts.corruptions_fixed += 1


def look(node: Node, *, snapshots: bool = True) -> Inspection:
    """Look at the image as it is now, up to where references are counted.

    Args:
        snapshots: with the snapshots that the node has; else only the active disk.
    """
    inspection = inspect(node.file, locked=True, as_qemu=True)
    exhaust(inspection.findings(OPENING))
    view = view_of(inspection)
    if snapshots:
        view.snapshots = node.view.snapshots
        view.snapshots_length = node.view.snapshots_length
    return inspection


def view_of(inspection: Inspection) -> View:
    """The view of an image that could be opened."""
    assert inspection.view is not None, "an image without a readable header is refused"
    return inspection.view


def exhaust(findings: Iterator[Finding]) -> None:
    """Run passes for what they leave in the view."""
    for _ in findings:
        pass
