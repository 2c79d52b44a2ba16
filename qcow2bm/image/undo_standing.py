"""How an image stands to the change that an undo file belongs to: before it, after it, half-way, or somewhere else.

Every place that was rewritten is looked at, with all writes that touched it in their order: the first one knows what
was there before, the last one what is there when all is done. In between, byte by byte, any of them may have reached
the disk.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from ..format.header import Incompatible
from .disk_refcounts import DiskRefcounts
from .file import ImageFile
from .mark import FEATURES, features_of, has_mark
from .undo_layout import PIECE, crc, zeroes_crc
from .undo_reader import Record, UndoReader

_WINDOW = 64 << 10
"""Bytes of the image that are compared at a time."""


_LOOKED_AT = 1 << 16
"""Clusters behind the old end that somebody else counts, and that are looked at; more of them are his, whatever."""


class Since(Enum):
    """What has happened to an image since a change was done, as far as its undo file can tell."""

    NOTHING = "nothing"
    TOUCHED = "touched"
    """It was written to; what the change wrote is still there."""
    CHANGED = "changed"
    """What the change wrote is no longer there."""
    UNKNOWN = "unknown"
    """What the change wrote is still there; no time stamp tells of other writes, as of a device or to a data file."""
    RESTARTED = "restarted"
    """What the change wrote is still there, and so is its time stamp; but a crash may have lost a later one."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What an image has of a change.

    Attributes:
        untouched: every place that was to be rewritten is as it was before. Free clusters may have been filled.
        finished: everything is as the change left it.
        familiar: every byte of a rewrite is an old or a new one, the length is one of the change, and what it gave up
            is what it was: anything else is another image, or a later state.
    """

    untouched: bool
    finished: bool
    familiar: bool


def standing(undo: UndoReader, image: ImageFile) -> Standing:
    """Compare an image with an undo file; raises UndoError if that is damaged."""
    untouched = finished = familiar = True
    for window in _windows(undo, image):
        untouched = untouched and window.is_old
        finished = finished and window.is_new
        familiar = familiar and (window.is_old or window.is_new or window.is_known())
    # A file that is too short reads as zeroes, which may be what it was filled with.
    finished = finished and image.size >= undo.size_after
    finished = finished and all(_is_as_filled(image, record) for record in undo.records if record.filled)
    familiar = familiar and undo.size_before <= image.size <= undo.size_after
    return Standing(untouched, finished, familiar and _has_what_was_given_up(undo, image))


def since(undo: UndoReader, image: ImageFile, found: Standing | None = None) -> Since:
    """What has happened to an image since the change was done; raises UndoError if the undo file is damaged.

    Args:
        found: how the image stands to the change, if that is known: it takes reading all that the undo file knows of.
    """
    if undo.mtime_ns and not undo.is_seen(image):
        return Since.CHANGED
    found = found or standing(undo, image)
    if not (found.finished and found.familiar):
        return Since.CHANGED
    if image.is_device or not undo.mtime_ns:
        return Since.UNKNOWN
    if int.from_bytes(features_of(image), "big") & Incompatible.EXTERNAL_DATA_FILE and undo.data_file is None:
        return Since.UNKNOWN  # the guest writes to another file
    if os.fstat(image.fd).st_mtime_ns != undo.mtime_ns:
        return Since.TOUCHED
    return Since.NOTHING if undo.is_of_this_boot else Since.RESTARTED


def sets_mark(undo: UndoReader) -> bool:
    """True if the mark is there while the change is under way, and not before it or after."""
    start, stop = FEATURES.start, FEATURES.stop
    over = (
        record for record in undo.records if record.new_at is not None and record.offset <= start and stop <= record.end
    )
    return any(has_mark(undo.old(record, start, stop)) != has_mark(undo.new(record, start, stop)) for record in over)


def fills(undo: UndoReader, image: ImageFile) -> tuple[bool, bool]:
    """Of the clusters that were free: is any of them, or the file's length, not as before; and if so, is it as filled?

    A cluster that is neither belongs to somebody else by now, or was filled in part.
    """
    changed, ours = image.size != undo.size_before, undo.size_before <= image.size <= undo.size_after
    for record in undo.records:
        if record.filled and not _is_as_before(undo, image, record):
            changed, ours = True, ours and _is_as_filled(image, record)
    return changed, ours


def is_own_work(undo: UndoReader, image: ImageFile) -> bool:
    """False if the image holds what the change cannot have left there: somebody has used it since.

    A barrier follows every stage. As far as a later one has begun, those before it are complete; the clusters of the
    stage itself are as before or filled. The same refcount may have been written by somebody else. What later stages
    fill may be torn, and the file longer than it was; but nothing counts that yet.
    """
    reached = max((window.reached() for window in _windows(undo, image)), default=-1)
    if not all(window.is_rewritten_before(reached) for window in _windows(undo, image)):
        return False
    fresh = [record for record in undo.records if record.filled]
    begun = (record for record in fresh if record.stage <= reached)
    if not all(
        _is_as_filled(image, record) or (record.stage == reached and _is_as_before(undo, image, record))
        for record in begun
    ):
        return False
    return not _is_taken(undo, image, reached)


def _is_taken(undo: UndoReader, image: ImageFile, reached: int) -> bool:
    """True if somebody else has taken a cluster that the change has not counted: one to be filled, or a new one.

    What is counted behind the end of a file that was cut off is zeroes.
    """
    counts = DiskRefcounts(image)
    if counts.is_dirty and not any(record.offset <= FEATURES.start < record.end for record in undo.records):
        return True  # whoever writes so counts nothing before he closes the image
    ours: list[range] = []
    new = counts.clusters(undo.size_before + counts.cluster_size - 1, image.size)
    for record in undo.records:
        clusters = counts.clusters(record.offset, record.offset + record.filled)
        if record.filled and (record.stage <= reached or _is_as_filled(image, record)):
            ours.append(clusters)
        elif record.filled and any(counts.counted(clusters.start, min(clusters.stop, new.start))):
            return True
    ours.sort(key=lambda clusters: clusters.start)
    size, seen = counts.cluster_size, 0
    for cluster in counts.counted(new.start, new.stop):
        place = bisect_right(ours, cluster, key=lambda clusters: clusters.start) - 1
        if place >= 0 and cluster in ours[place]:
            continue
        seen += 1
        if seen > _LOOKED_AT or any(image.read_padded(cluster * size, size)):
            return True
    return False


def _has_what_was_given_up(undo: UndoReader, image: ImageFile) -> bool:
    """True if nobody has put anything else there: the old state refers to it, and nothing but a checksum was kept."""
    return all(
        offset + length <= image.size
        and (_is_zero(image, offset, length) if expected is None else crc(image.read_at(offset, length)) == expected)
        for offset, length, expected in undo.given_up
    )


def _is_zero(image: ImageFile, offset: int, length: int) -> bool:
    return all(data is None or not any(data) for _, _, data in image.stretches(offset, offset + length, PIECE))


def _is_as_filled(image: ImageFile, record: Record) -> bool:
    value = 0
    for _, length, data in image.stretches(record.offset, record.offset + record.filled, PIECE):
        value = zeroes_crc(length, value) if data is None else crc(data, value)
    return value == record.filled_crc


def _is_as_before(undo: UndoReader, image: ImageFile, record: Record) -> bool:
    """What the file did not reach is zeroes, and so is what it has lost again."""
    if not _is_zero(image, record.end, record.filled - record.length):
        return False
    if record.old_at is None:
        return _is_zero(image, record.offset, record.length)
    return all(
        undo.old(record, start, stop) == image.read_padded(start, stop - start)
        for start, stop in pieces(record.offset, record.end)
    )


def to_put_back(record: Record, image: ImageFile, end: int) -> Iterator[tuple[int, int]]:
    """The places (start, stop) of a record up to `end` that may not hold what they held, each small enough for memory.

    Where there were zeroes, which may be of any length, a hole is as it was.
    """
    if record.old_at is not None:
        yield from pieces(record.offset, end)
        return
    for start, length, data in image.stretches(record.offset, end, PIECE):
        if data is not None:
            yield start, start + length


def pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """A range in parts (start, stop) small enough to be held in memory."""
    for at in range(start, stop, PIECE):
        yield at, min(at + PIECE, stop)


# ---- windows ----


@dataclass(frozen=True, slots=True)
class _Part:
    """A rewrite as far as it lies in a window: `place` is where."""

    stage: int
    place: slice
    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class _Window:
    """A part of the image, and the rewrites in it in the order of the plan."""

    now: bytes
    parts: tuple[_Part, ...]

    @property
    def is_old(self) -> bool:
        """True if it is as it was before all of them."""
        before = bytearray(self.now)
        for part in reversed(self.parts):
            before[part.place] = part.old
        return before == self.now

    @property
    def is_new(self) -> bool:
        """True if it is as it is after all of them."""
        after = bytearray(self.now)
        for part in self.parts:
            after[part.place] = part.new
        return after == self.now

    def is_known(self) -> bool:
        """True if each byte is one that any of them found or left there."""
        import numpy as np  # rarely needed, and slow to load

        now = np.frombuffer(self.now, np.uint8)
        rewritten, known = np.zeros((2, len(now)), bool)
        for part in self.parts:
            rewritten[part.place] = True
            for content in (part.old, part.new):
                known[part.place] |= now[part.place] == np.frombuffer(content, np.uint8)
        return bool(known[rewritten].all())

    def reached(self) -> int:
        """The last stage of which a byte is seen that nothing before it can have left there; -1 if there is none."""
        import numpy as np  # rarely needed, and slow to load

        now, reached = np.frombuffer(self.now, np.uint8), -1
        earlier, touched = np.zeros((2, len(now)), bool)
        for part in self.parts:
            at = part.place
            earlier[at] |= (now[at] == np.frombuffer(part.old, np.uint8)) & ~touched[at]
            touched[at] = True
            new = now[at] == np.frombuffer(part.new, np.uint8)
            if (new & ~earlier[at]).any():
                reached = max(reached, part.stage)
            earlier[at] |= new
        return reached

    def is_rewritten_before(self, stage: int) -> bool:
        """True if all that stages before this one rewrite is as the last of them leaves it, or as this one does.

        More than one may rewrite a byte: refcounts share them.
        """
        import numpy as np  # rarely needed, and slow to load

        now = np.frombuffer(self.now, np.uint8)
        expected, right = now.copy(), np.zeros(len(now), bool)
        for part in self.parts:
            new = np.frombuffer(part.new, np.uint8)
            if part.stage < stage:
                expected[part.place] = new
            elif part.stage == stage:
                right[part.place] |= now[part.place] == new
        return bool((right | (now == expected)).all())


def _windows(undo: UndoReader, image: ImageFile) -> Iterator[_Window]:
    """The windows of the image that rewrites touch."""
    touching: dict[int, list[Record]] = defaultdict(list)
    for record in undo.records:
        if record.new_at is not None:
            for number in range(record.offset // _WINDOW, -(-record.end // _WINDOW)):
                touching[number].append(record)
    for number in sorted(touching):
        yield _window(undo, image, number * _WINDOW, touching[number])


def _window(undo: UndoReader, image: ImageFile, first: int, records: Sequence[Record]) -> _Window:
    start = max(first, min(record.offset for record in records))
    stop = min(first + _WINDOW, max(record.end for record in records))
    parts = []
    for record in records:
        low, high = max(start, record.offset), min(stop, record.end)
        place = slice(low - start, high - start)
        parts.append(_Part(record.stage, place, undo.old(record, low, high), undo.new(record, low, high)))
    return _Window(image.read_padded(start, stop - start), tuple(parts))
