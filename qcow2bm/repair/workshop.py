"""Where a repair is worked out: the image as it would be, looked at anew after every change.

A step reads the image through the overlay and writes into it. What the next step sees is what it would find on the
disk, so no step needs to know what another did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from ..checks.model import Finding, RepairClass, Report, Tally
from ..checks.problems import NOT_ITS_OWN, SHARED
from ..checks.runner import DEFAULT_LIMIT, Inspection, inspect, report_on
from ..checks.view import Progress, View
from ..errors import NoSpaceError, ProofError
from ..format.header import UNKNOWN_INCOMPATIBLE
from ..image.disk_refcounts import DiskRefcounts
from ..image.image import Qcow2Image
from ..image.overlay import OverlayFile, Savepoint
from ..image.plan import Kept, Plan
from .model import Patch, RepairPolicy, Step
from .outside import MOST_FOLDED, Outside
from .salvage import Salvaged
from .spans import Spans

_SEARCHED = 1 << 12
"""Clusters of the file that are looked at for free ones before new ones are taken behind its end."""
L1_DAMAGE = ("l1-outside", "l1-offset", "l1-size", "l1-too-small")
_ODD = ("l1-entry-reserved", "l2-unaligned", "l2-outside", "l2-entry-reserved", "data-unaligned")
_SPARE = 1 << 12
"""Clusters beside twice the disk's that a file may grow to: damage that asks for more is no reason to fill a disk."""
_MOST_FINDINGS = 1 << 18
"""Findings of a problem that one round of steps mends; there may be more rounds."""
_SHOWN = 32
"""Bytes of an edit that are kept to be shown."""
_EDITS = 1000
"""Edits of one step that are kept to be shown."""


class _Before(NamedTuple):
    """What a step may change, as it was when the step began; `kept` by how many there were."""

    file: Savepoint
    taken: frozenset[int]
    given_up: frozenset[int]
    freed: frozenset[int]
    uncounted: frozenset[int]
    kept: int


class Workshop:
    """The image under repair.

    Attributes:
        file: the image as it would be.
        policy: what the repair may do.
        progress: called with bytes read, and to read.
        blind: True if part of the image cannot be followed, or could not at some time: what nothing refers to may
            then be what the damage has cut off.
        doubtful: True if leaks may be none for another reason, or could at some time.
        taken: clusters that steps have filled; they were free.
        given_up: clusters that nothing but what steps have taken out of the image used.
        freed: clusters that steps have given back, and that the image as it was may refer to.
        uncounted: refcount blocks that steps have dropped.
        salvages: bits that were worked out for bitmaps, by name.
        kept: ranges of the image as it was before that the undo file is to keep.
    """

    def __init__(
        self, file: OverlayFile, policy: RepairPolicy, progress: Progress = lambda _done, _total: None
    ) -> None:
        self.file = file
        self.policy = policy
        self.blind = False
        self.doubtful = False
        self.taken: set[int] = set()
        self.given_up: set[int] = set()
        self.freed: set[int] = set()
        self.uncounted: set[int] = set()
        self.kept: list[Kept] = []
        self.salvages: dict[str, Salvaged] = {}
        self.progress = progress
        self._counts = DiskRefcounts(file.base)
        self._step: Step | None = None
        self._mark: _Before | None = None
        self._first: Qcow2Image | None = None
        self._inspection: Inspection | None = None
        self._tally = Tally(DEFAULT_LIMIT)
        self._is_stale = True
        self._wrote = False
        self._findings: dict[str, list[Finding]] = {}
        self._shared = self._outside = Spans()
        self._too_many = False
        self._searched = 0
        self._end = 0

    # Looking

    def look(self) -> dict[str, list[Finding]]:
        """All findings of a check of the image as it is now, by code; there is only one check of each state."""
        if not self._is_stale:
            return self._findings
        self.forget()
        inspection = inspect(self.file, locked=True, progress=self.progress)
        tally, outside = Tally(DEFAULT_LIMIT), Outside()
        found: dict[str, list[Finding]] = defaultdict(list)
        for finding in inspection.everything():
            tally.add(finding)
            if inspection.view is not None:
                outside.add(finding, inspection.view)
            if len(found[finding.code]) < _MOST_FINDINGS:
                found[finding.code].append(finding)
        if inspection.view is not None and UNKNOWN_INCOMPATIBLE not in found:
            self._outside, self._shared = outside.sorted(), _shared(found)
            self._too_many = outside.too_many
            self.blind = self.blind or inspection.view.blind
            self.doubtful = self.doubtful or inspection.view.leak_doubt is not None
            self._first = self._first or inspection.view.image
        self._inspection, self._tally = inspection, tally
        self._findings, self._is_stale = dict(found), False
        return self._findings

    def report(self) -> Report:
        """What a check says of the image as it is now."""
        self.look()
        assert self._inspection is not None
        return report_on(self._inspection, self._tally)

    def forget(self) -> None:
        """Let go of what was seen, which can be large, until somebody looks again."""
        self._inspection, self._findings, self._is_stale = None, {}, True

    def found(self, *codes: str) -> list[Finding]:
        """The findings of these problems, in the order of the check for each."""
        findings = self.look()
        return [finding for code in codes for finding in findings.get(code, ())]

    @property
    def is_readable(self) -> bool:
        """False if the header is beyond reading, or says that nobody here knows the format."""
        return UNKNOWN_INCOMPATIBLE not in self.look() and self._view is not None

    @property
    def view(self) -> View:
        """What a check of the image as it is now sees. Only for an image whose header can be read."""
        self.look()
        return self.seen

    @property
    def seen(self) -> View:
        """What the last look saw, which what has been written since does not change."""
        assert self._view is not None, "nothing is repaired in an image without a readable header"
        return self._view

    @property
    def _view(self) -> View | None:
        return None if self._inspection is None else self._inspection.view

    def owns(self, offset: int) -> bool:
        """False if the last look saw two uses of this cluster that must not share one: nobody may write there."""
        cluster = self.seen.geometry.cluster_of(offset)
        return cluster in self.taken or self._shared.stop_of(cluster) is None

    @property
    def image(self) -> Qcow2Image:
        """The image as it is now."""
        return self.view.image

    @property
    def mapping_doubt(self) -> str | None:
        """Why nothing may be built upon the mapping, or None.

        An L1 table whose place or length is wrong, or that is not alone where it is, and tables that contradict the
        header, are what a damaged field of the header looks like: whatever is written then may be written over what is
        sound.
        """
        lost = self.found(*L1_DAMAGE)
        if lost:
            return f"the active L1 table is damaged ({lost[0].code}), so nobody knows what is mapped where"
        if self.policy.allows(RepairClass.GUESS):
            return None
        if not self.owns(self.view.header.l1_table_offset) and (odd := self.found(*_ODD)):
            return f"the active L1 table is in a cluster of something else, and wrong ({odd[0].code}): is it there?"
        return self.view.doubt

    @property
    def as_found(self) -> Qcow2Image | None:
        """The image before the repair; None as long as nothing of it has been changed."""
        first = self._first
        if first is None or not self.file.is_changed:
            return None
        return Qcow2Image(self.file.base, first.head, first.header, first.extensions, locked=True)

    # Changing

    def begin(self, step: Step) -> None:
        """What is written from now on belongs to this step."""
        self._step = step
        self._mark = _Before(
            self.file.savepoint(),
            frozenset(self.taken),
            frozenset(self.given_up),
            frozenset(self.freed),
            frozenset(self.uncounted),
            len(self.kept),
        )
        self._wrote = False

    def take_back(self) -> None:
        """Forget all that the step has done."""
        before, step = self._mark, self._step
        assert before is not None
        assert step is not None
        self.file.rewind(before.file)
        self.taken, self.given_up = set(before.taken), set(before.given_up)
        self.freed, self.uncounted = set(before.freed), set(before.uncounted)
        del self.kept[before.kept :]
        step.edits.clear()
        step.edits_left_out = 0
        self._is_stale = self._is_stale or self._wrote

    def write(self, offset: int, new: bytes, purpose: str, *, owned: bool = False) -> None:
        """Change bytes; what is the same already is left out.

        Args:
            owned: the caller sees to it that the cluster has no second use, although the last look saw one.

        Raises:
            ProofError: the cluster has a second use.
        """
        old = self.file.read_padded(offset, len(new))
        if old == new:
            return
        if not (owned or self.owns(offset)):
            text = f"the cluster at {offset:#x} has a second use, which writing to it would destroy"
            raise ProofError(text, hint="the two must be told apart first")
        self._note(Patch(offset, len(new), old[:_SHOWN], new[:_SHOWN], purpose))
        self.file.write_at(offset, new)
        self._is_stale = self._wrote = True

    def _note(self, edit: Patch) -> None:
        assert self._step is not None
        if len(self._step.edits) < _EDITS:
            self._step.edits.append(edit)
        else:
            self._step.edits_left_out += 1

    def put(self, data: bytes, purpose: str) -> int:
        """Write data into free clusters, the last filled up with zeroes; returns their offset, in bytes.

        Raises:
            NoSpaceError: a block device is full.
        """
        geometry = self.seen.geometry
        offset = self.take(geometry.clusters(len(data)))
        length = geometry.clusters(len(data)) * geometry.cluster_size
        self.write(offset, data.ljust(length, b"\0"), purpose)
        self.file.truncate(offset + length)
        self._is_stale = self._wrote = True
        return offset

    def copy(self, offset: int) -> int:
        """Copy a cluster into a free one; returns its offset. Raises as `put`."""
        size = self.seen.geometry.cluster_size
        place = self.take()
        self._note(Patch(place, size, b"", self.file.read_padded(offset, min(size, _SHOWN)), f"copy from {offset:#x}"))
        self.file.copy(offset, place, size)
        self._is_stale = self._wrote = True
        return place

    def take(self, count: int = 1) -> int:
        """Host offset of `count` clusters in a row that nothing uses or counts; they are now taken.

        By the last look: whatever has been freed since then is left alone, and what has been taken is remembered.

        Raises:
            NoSpaceError: a block device is full.
        """
        geometry = self.seen.geometry
        first = self._free_inside(self.seen, count)
        if first is None:
            first = self._behind_the_end(self.seen, count)
        end = geometry.offset_of(first + count)
        if self.file.is_device and end > self.file.size:
            text = f"the device has {self.file.size} bytes, the repair needs {end}"
            raise NoSpaceError(text, hint="extend the device")
        self.taken.update(range(first, first + count))
        self._end = max(self._end, first + count)
        return geometry.offset_of(first)

    def _free_inside(self, view: View, count: int) -> int | None:
        """The lowest clusters of the file that are free beyond doubt: counted 0, without any reference."""
        if self.blind or self.doubtful:
            return None
        start, stop = self._searched, min(self._searched + _SEARCHED, view.geometry.clusters(self.file.base.size))
        length = 0
        for cluster in range(start, stop):
            length = length + 1 if self._is_free(view, cluster) else 0
            if length == count:
                self._searched = cluster + 1 - count
                return self._searched
        self._searched = stop if count == 1 else start
        return None

    def _is_free(self, view: View, cluster: int) -> bool:
        """What the image itself counts is not used again by the same repair: until it is done the old state has it."""
        if cluster in self.taken or view.stored.get(cluster) or view.census.references(cluster):
            return False
        return not self._counts.get(cluster)

    def _behind_the_end(self, view: View, count: int) -> int:
        """The first of `count` clusters behind all that is used or counted, and behind the end of a regular file.

        Raises:
            NoSpaceError: it would lie far away.
        """
        geometry = view.geometry
        used = max(geometry.clusters(view.allocation.image_end_offset), self._end)
        first = used if self.file.is_device else max(used, geometry.clusters(self.file.size))
        if self._too_many:
            text = f"more than {MOST_FOLDED} damaged entries name something behind the end of the file"
            raise NoSpaceError(text, hint="allow to give them up")
        while (stop := self._outside.first_stop(first, first + count)) is not None:
            first = stop
        # By the file as it was: measured by what it has become, there would be no end.
        most = 2 * geometry.clusters(geometry.virtual_size) + geometry.clusters(self.file.base.size) + _SPARE
        if first + count > most:
            raise NoSpaceError(
                "damaged entries name or want more room behind the end of the file than the disk takes twice",
                hint="allow to give them up",
            )
        return first

    def replay(self, plan: Plan) -> None:
        """Take over what a plan for the image as it is now would write."""
        size = self.view.geometry.cluster_size
        for write in plan.writes():
            if write.old is None:
                self.taken.update(range(write.offset // size, -(-write.end // size)))
                self._end = max(self._end, -(-write.end // size))
            self.write(write.offset, bytes(write.read()), write.purpose)
        self.freed.update(plan.freed)
        self.file.truncate(plan.size_after)
        self._is_stale = self._wrote = True

    def plan(self, summary: Sequence[str]) -> Plan:
        """All that has been changed, as one plan for the file below."""
        assert self._first is not None
        freed = (cluster for cluster in chain(self.given_up, self.freed) if cluster not in self.taken)
        return self.file.plan(self._first, self.taken, tuple(summary), tuple(self.kept), freed=freed)


def _shared(found: dict[str, list[Finding]]) -> Spans:
    findings = (finding for code in (*SHARED, *NOT_ITS_OWN) for finding in found.get(code, ()))
    return Spans((f.values["first"], f.values["first"] + f.count) for f in findings).sorted()
