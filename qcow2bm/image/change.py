"""A change in the making: what is put into free clusters, what is given back, and at the end the plan of it.

The order of the stages is what keeps an image whole, and stands here once. First everything that nothing refers to yet,
refcounts included; then new refcount blocks are linked; then the switch that makes the new state valid; last the old
clusters are given back. A crash at any moment leaves the old state or the new one, and at worst leaked clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from .allocator import Allocator
from .header_draft import HeaderDraft, clear_unknown_autoclear
from .image import Qcow2Image
from .plan import Data, Plan, Stage, Switch, Write
from .proof import prove
from .refcounts import Refcounts
from .references import Reference

if TYPE_CHECKING:
    from .lowering import Lowering  # with numpy


class Change:
    """One change of one image. Nothing is written; `plan` says what would be."""

    def __init__(self, image: Qcow2Image) -> None:
        self.image = image
        self._refcounts = Refcounts(image)
        self._allocator = Allocator(image, self._refcounts)
        self._fresh: list[Write] = []
        self._relied: set[int] = set()

    def put(self, data: bytes, purpose: str) -> int:
        """Write `data` into free clusters, the last filled up with zeroes; returns their offset.

        Raises:
            NoSpaceError: there is no room for it in one piece.
        """
        geometry = self.image.geometry
        clusters = geometry.clusters(len(data))
        offset = self._allocator.take(clusters)
        self._fresh.append(Write.fresh(offset, data.ljust(clusters * geometry.cluster_size, b"\0"), purpose))
        return offset

    def put_run(self, clusters: int, make: Data, purpose: str) -> int:
        """Fill that many free clusters in a row with bytes that are made when they are written; returns their offset.

        Raises:
            NoSpaceError: there is no room for it in one piece.
        """
        offset = self._allocator.take(clusters)
        self._fresh.append(Write(offset, clusters * self.image.geometry.cluster_size, make, purpose))
        return offset

    def free(self, offset: int, length: int) -> None:
        """Give back the clusters that hold `length` bytes at `offset`; raises ProofError unless each has refcount 1."""
        self._allocator.free(offset, length)

    def rely_on(self, offset: int, length: int) -> None:
        """Let the proof look also at clusters that the change leaves alone: they must have one owner."""
        geometry = self.image.geometry
        self._relied.update(range(geometry.cluster_of(offset), geometry.cluster_of(offset + length - 1) + 1))

    def refcount(self, offset: int) -> int:
        """The refcount of the cluster at `offset`, as it is on disk."""
        return self._refcounts.get(self.image.geometry.cluster_of(offset))

    def lower(self, lowering: Lowering) -> None:
        """Give up references, at the end: only if every refcount is known to be at least what refers to its cluster."""
        self._allocator.lowering = lowering

    def plan(
        self, switch: Callable[[HeaderDraft], Switch], others: Iterable[Reference], summary: tuple[str, ...]
    ) -> Plan:
        """The whole change, proved against the image's mapping.

        Args:
            switch: makes the new state valid, given the header as the earlier stages leave it.
            others: what refers to clusters apart from header, mapping, snapshots and refcounts: the bitmaps.

        Raises:
            ProofError, CorruptImageError: the image is not what the plan would rely on.
            NoSpaceError: a block device, the refcount table or the first cluster is too small.
        """
        self._allocator.finish()
        autoclear = clear_unknown_autoclear(self.image)
        links = self._allocator.link()
        switching = switch(HeaderDraft(self.image, [*autoclear, *(write for writes in links for write in writes)]))
        stages = [
            Stage("prepare what nothing refers to yet", (*autoclear, *self._fresh, *self._allocator.prepare())),
            *(Stage("link the new refcount blocks", tuple(writes)) for writes in links),
            *switching.stages,
            Stage("give the old clusters back", tuple(self._allocator.release())),
        ]
        stages = [stage for stage in stages if stage.writes]
        plan = Plan(
            cluster_size=self.image.geometry.cluster_size,
            size_before=self.image.file.size,
            size_after=self._allocator.size_after(),
            stages=tuple(stages),
            commit_stage=stages.index(switching.stages[switching.commit]),
            freed=frozenset(self._allocator.freed),
            summary=summary,
        )
        prove(self.image, plan, others, self._refcounts, self._relied)
        return plan

    def trimmed(self, plan: Plan) -> Plan:
        """A plan of this change that drops refcount blocks which count nothing any more, and cuts the file's end off.

        Each stage leaves leaks at most: a block that nothing counts in is unlinked, then its cluster is given back.
        """
        names = ("unlink empty refcount blocks", "give their clusters back")
        stages = (Stage(name, tuple(writes)) for name, writes in zip(names, self._allocator.unlink(), strict=True))
        end = self._allocator.end()
        return replace(
            plan,
            stages=(*plan.stages, *(stage for stage in stages if stage.writes)),
            cut_to=end if end < plan.size_after and not self.image.file.is_device else None,
        )


def no_change(image: Qcow2Image, summary: tuple[str, ...]) -> Plan:
    """The plan of a change that comes to nothing."""
    return Plan(image.geometry.cluster_size, image.file.size, image.file.size, summary=summary)
