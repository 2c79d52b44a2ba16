"""A file as it would be: writes go to memory beside the open image, reads see both.

A repair is worked out on one of these. Every rule that reads an image judges the repaired one before its first byte is
written, and the plan is what differs in the end, whatever steps led there.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from .disk_refcounts import DiskRefcounts
from .file import ImageFile
from .image import Qcow2Image
from .mark import FEATURES, bracketed, with_mark
from .plan import SECTOR, Kept, Plan, Stage, Write, fits_a_sector
from .spill import Spill

_PAGE = 4096
_IN_MEMORY = 32 << 20
"""Bytes of changed pages that are held in memory; the rest goes to a temporary file."""


class _Below(NamedTuple):
    """A page that is a copy of one of the base."""

    page: int


class Savepoint(NamedTuple):
    """A state of an overlay."""

    size: int
    changed: tuple[int, ...]
    pages: dict[int, bytes | int | _Below]


class OverlayFile(ImageFile):
    """An image file with changes that nobody else sees. Its descriptor, and so its locks, are the base's.

    Attributes:
        base: the file below, which is only read.
    """

    def __init__(self, base: ImageFile) -> None:
        super().__init__(base.fd, base.path, writable=True, size=base.size, is_device=base.is_device)
        self.base = base
        self.slack = base.slack
        self._changed: list[int] = []
        self._pages: dict[int, bytes | int | _Below] = {}
        self._spill = Spill()

    @property
    def is_changed(self) -> bool:
        """True once anything has been written to it."""
        return bool(self._pages) or self.size != self.base.size

    @property
    def present(self) -> int:
        """Bytes that the file would take."""
        return self.base.present + len(self._pages) * _PAGE

    def close(self) -> None:
        """Forget the changes; the base stays open."""
        self._spill.close()
        self._pages.clear()

    def read_at(self, offset: int, length: int) -> bytes:
        """As `ImageFile.read_at`, with the changes."""
        if not self._pages and offset + length <= self.base.size:
            return self.base.read_at(offset, length)
        if not length:
            return b""
        present = self._require_present(offset, length)
        data = bytearray(self._base_bytes(offset, present))
        for page in self._pages_in(offset, present):
            start, content = page * _PAGE, self._page(page)
            low, high = max(start, offset), min(start + _PAGE, offset + present)
            data[low - offset : high - offset] = content[low - start : high - start]
        return bytes(data) + bytes(length - present)

    def read_pieces(self, pieces: Iterable[tuple[int, int]], buffer: memoryview) -> None:
        """As `ImageFile.read_pieces`, with the changes."""
        at = 0
        for offset, length in pieces:
            buffer[at : at + length] = self.read_padded(offset, length)
            at += length

    def next_data(self, offset: int) -> int:
        """As `ImageFile.next_data`: a changed page is data."""
        found = min(self.base.next_data(offset), self.size) if offset < self.base.size else self.size
        place = bisect_left(self._changed, offset // _PAGE)
        if place < len(self._changed):
            found = min(found, max(offset, self._changed[place] * _PAGE))
        return found

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Change bytes of the overlay."""
        view = memoryview(data).cast("B")
        self.size = max(self.size, offset + len(view))
        while view:
            page, within = divmod(offset, _PAGE)
            part = view[: _PAGE - within]
            if len(part) == _PAGE:
                self._store(page, bytes(part))
            else:
                content = bytearray(self._page(page) if page in self._pages else self._base_page(page))
                content[within : within + len(part)] = part
                self._store(page, bytes(content))
            view, offset = view[len(part) :], offset + len(part)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy a range of the file to another place; whole pages that nobody has changed are only noted, not read."""
        self.size = max(self.size, target + length)
        if (source | target | length) % _PAGE or next(self._pages_in(source, length), None) is not None:
            self.write_at(target, self.read_padded(source, length))
            return
        for at in range(0, length, _PAGE):
            page = (target + at) // _PAGE
            if page not in self._pages:
                insort(self._changed, page)
            self._pages[page] = _Below((source + at) // _PAGE)

    def barrier(self) -> None:
        """Nothing to flush."""

    def truncate(self, size: int) -> None:
        """Extend the file; an overlay never shrinks."""
        self.size = max(self.size, size)

    def savepoint(self) -> Savepoint:
        """The state as it is now, for `rewind`."""
        return Savepoint(self.size, tuple(self._changed), dict(self._pages))

    def rewind(self, point: Savepoint) -> None:
        """Forget what has been written since then."""
        self.size, self._changed, self._pages = point.size, list(point.changed), dict(point.pages)

    # The plan

    def plan(
        self,
        image: Qcow2Image,
        fresh: Collection[int],
        summary: tuple[str, ...],
        kept: tuple[Kept, ...] = (),
        *,
        freed: Iterable[int] = (),
        journaled: bool = True,
    ) -> Plan:
        """What differs from the base, as one change that a journal keeps whole.

        The first cluster is written last. Unless one sector holds it all, the mark (`mark.py`) keeps everybody
        from an image that a crash has caught half-way.

        Args:
            image: the image as it is in the base.
            fresh: numbers of the clusters that were free and have been filled, before anything refers to them. One that
                is counted in the base is none that was free on the disk: whoever finds the change cut short must be
                able to tell by its count that somebody else has taken a cluster. So its old bytes are kept, too.
            kept: ranges of the base that the undo file is to keep.
            freed: numbers of the clusters that the base refers to, and that are used no more.
            journaled: False where a change that is torn does no harm and there is no place for a journal.
        """
        size = image.geometry.cluster_size
        header: list[Write] = []
        filled: list[Write] = []
        reused: list[Write] = []
        rewritten: list[Write] = []
        counts = DiskRefcounts(self.base)
        for offset, length in self._differing(size):
            new = partial(self.read_at, offset, length)
            if offset < size:
                header.append(Write.replace(offset, self._base_bytes(offset, length), new(), "the header"))
            elif offset // size not in fresh:
                rewritten.append(Write(offset, length, new, "rewritten in place", self._base_bytes(offset, length)))
            elif offset < self.base.size and counts.get(offset // size):
                reused.append(Write(offset, length, new, "new clusters", self._base_bytes(offset, length)))
            else:
                filled.append(Write(offset, length, new, "new clusters"))
        end = max((write.end for write in (*filled, *reused, *rewritten)), default=0)
        if max(end, self.base.size) < self.size:  # new clusters at the end that are all zeroes: the file must have them
            filled.append(Write.fresh(self.size - 1, b"\0", "the end of the file"))
        stages = [
            Stage("fill free clusters", tuple(filled), journaled=True),
            Stage("fill clusters that nothing refers to", tuple(reused), journaled=True),
            Stage("rewrite in place", tuple(rewritten), journaled=True),
            Stage("write the header", tuple(header), journaled=True),
        ]
        stages = [stage for stage in stages if stage.writes]
        if not journaled or fits_a_sector(write for stage in stages for write in stage.writes):
            stages = [replace(stage, journaled=False) for stage in stages]
        else:
            stages = _marked(image, stages)
        written = {write.offset // size for stage in stages for write in stage.writes}
        return Plan(
            size, self.base.size, self.size, tuple(stages), max(0, len(stages) - 1), summary=summary, kept=kept,
            # Of what is written to as well the undo file has the bytes themselves.
            freed=tuple(cluster for cluster in freed if cluster not in written),
        )  # fmt: skip

    def _differing(self, cluster_size: int) -> Iterator[tuple[int, int]]:
        """Ranges of whole sectors that differ, none across the end of a cluster that is larger than a sector."""
        start = end = 0
        for sector in self._differing_sectors():
            offset = sector * SECTOR
            stop = min(offset + SECTOR, self.size)
            if offset == end and offset % max(cluster_size, SECTOR) and end > start:
                end = stop
                continue
            if end > start:
                yield start, end - start
            start, end = offset, stop
        if end > start:
            yield start, end - start

    def _differing_sectors(self) -> Iterator[int]:
        for page in self._changed:
            new, old = self._page(page), self._base_page(page)
            if new == old:
                continue
            for at in range(0, _PAGE, SECTOR):
                if new[at : at + SECTOR] != old[at : at + SECTOR]:
                    yield (page * _PAGE + at) // SECTOR

    # Pages

    def _require_present(self, offset: int, length: int) -> int:
        """How much of a range lies within the file; raises as `read_at` for what is not there at all."""
        self._require_inside(offset, length)
        return min(length, self.size - offset)

    def _base_bytes(self, offset: int, length: int) -> bytes:
        return self.base.read_padded(offset, length)

    def _base_page(self, page: int) -> bytes:
        return self._base_bytes(page * _PAGE, _PAGE)

    def _pages_in(self, offset: int, length: int) -> Iterator[int]:
        """The changed pages that a range touches."""
        place = bisect_left(self._changed, offset // _PAGE)
        while place < len(self._changed) and self._changed[place] * _PAGE < offset + length:
            yield self._changed[place]
            place += 1

    def _page(self, page: int) -> bytes:
        content = self._pages[page]
        if isinstance(content, bytes):
            return content
        if isinstance(content, _Below):
            return self._base_page(content.page)
        return self._spill.get(content, _PAGE)

    def _store(self, page: int, content: bytes) -> None:
        if page not in self._pages:
            insort(self._changed, page)
        if len(self._pages) * _PAGE > _IN_MEMORY:
            self._pages[page] = self._spill.put(content)  # a savepoint may still need what is there
        else:
            self._pages[page] = content


def _marked(image: Qcow2Image, stages: list[Stage]) -> list[Stage]:
    """The stages with the mark, by which whoever finds the journal knows that nobody has used the image since."""
    if image.header.version < 3:
        return stages
    before = after = image.head[FEATURES]
    *others, last = stages
    write, *more = last.writes
    if write.offset == 0:  # the header itself changes as well, and has the mark meanwhile
        old, new = bytearray(write.old or b""), bytearray(write.read())
        after = bytes(new[FEATURES])
        old[FEATURES], new[FEATURES] = with_mark(before), with_mark(after)
        changed = [Write.replace(0, bytes(old), bytes(new), write.purpose)] if old != new else []
        last = replace(last, writes=(*changed, *more))
    return bracketed(before, after, [*others, *([last] if last.writes else [])])
