"""The copied flags of the active L1 and L2 entries, made what the refcounts say.

Source: `check_oflag_copied`, which writes L1 entries one by one and L2 tables as a whole.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace

from ...checks.model import Finding
from ...checks.passes.copied import copied
from ...checks.view import View
from ...format.entries import COPIED
from .model import Counts, Event, GivenUpError, Notice
from .node import Node, Structure
from .shared import Shared


class CopiedFlags:
    """The flags of one image.

    Args:
        view: sees the refcounts as they are after their repair.
        shared: clusters with more uses than one, where nothing is written.
    """

    def __init__(self, node: Node, view: View, shared: Shared, counts: Counts) -> None:
        self._node = node
        self._view = view
        self._shared = shared
        self._counts = counts
        self._table: tuple[int, int] | None = None
        self._structure: Structure | None = None
        self._may_write = False

    def run(self, *, mends: bool) -> Iterator[Event]:
        """All findings; mended if `mends` says so.

        Raises:
            GivenUpError: QEMU would not write an entry because that is part of something else.
        """
        for finding in copied(self._view):
            if not mends:
                self._counts.corruptions += finding.count
                yield Event(finding)
            elif finding.code == "copied-l1":
                yield from self._end_table()
                yield from self._mend_l1(finding)
            else:
                yield from self._mend_l2(finding)
        yield from self._end_table()

    def _mend_l1(self, finding: Finding) -> Iterator[Event]:
        offset = _place(finding)
        structure = self._node.overlapped(offset, 8, Structure.ACTIVE_L1)
        may_write = structure is not None or not self._shared.spares_l1(self._view, offset)
        yield Event(finding, mended=may_write)
        if structure is not None:
            self._counts.corruptions += 1
            yield from self._give_up(structure)
        self._flip(finding, mended=may_write)

    def _mend_l2(self, finding: Finding) -> Iterator[Event]:
        geometry = self._node.geometry
        offset = _place(finding) - (finding.location.index or 0) * geometry.l2_entry_size
        table = offset, (finding.location.guest_offset or 0) // geometry.l2_span
        if table != self._table:
            yield from self._end_table()
            self._table = table
            self._structure = self._node.overlapped(table[0], geometry.cluster_size, Structure.ACTIVE_L2)
            self._may_write = not self._shared.spares_l2(self._view, table[0])
        mended = self._structure is not None or self._may_write
        yield Event(replace(finding, count=1), mended=mended)
        self._flip(finding, mended=mended and self._structure is None)

    def _flip(self, finding: Finding, *, mended: bool) -> None:
        """Write one flag, where a table's others follow, so that who reads the table again sees all."""
        self._counts.count(1, mended=mended)
        if mended:
            value = finding.values["entry"] ^ COPIED
            self._node.write(_place(finding), value.to_bytes(8, "big"))

    def _end_table(self) -> Iterator[Event]:
        """Come to the end of an L2 table, where QEMU writes it."""
        if self._table is None:
            return
        (offset, _), self._table = self._table, None
        if self._structure is not None:
            yield from self._give_up(self._structure, Notice.OVERLAP_AT_TABLE)
        if self._may_write:
            # A table that the file cuts short is whole then.
            self._node.file.truncate(offset + self._node.geometry.cluster_size)

    def _give_up(self, structure: Structure, *more: Notice) -> Iterator[Event]:
        yield from self._node.signal(Notice.CORRUPT_OVERLAP, structure=structure.value)
        for notice in more:
            yield Event(notice)
        self._counts.errors += 1
        raise GivenUpError(errno.EIO)


def _place(finding: Finding) -> int:
    assert finding.location.host_offset is not None
    return finding.location.host_offset
