"""How an image stands to the change that an undo file belongs to: before it, after it, half-way, or somewhere else.

Every place that was rewritten is looked at, with all writes that touched it in their order: the first one knows what
was there before, the last one what is there when all is done. In between, byte by byte, any of them may have reached
the disk.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from ..format.header import Incompatible
from .disk_refcounts import DiskRefcounts
from .file import ImageFile
from .mark import FEATURES, features_of, has_mark
from .undo_layout import PIECE, crc
from .undo_reader import Record, UndoReader

_WINDOW = 64 << 10
"""Bytes of the image that are compared at a time."""


class Since(Enum):
    """What has happened to an image since a change was done, as far as its undo file can tell."""

    NOTHING = "nothing"
    TOUCHED = "touched"
    """It was written to; what the change wrote is still there."""
    CHANGED = "changed"
    """What the change wrote is no longer there."""
    UNKNOWN = "unknown"
    """What the change wrote is still there; no time stamp tells of other writes, as of a device or to a data file."""


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
    return Since.NOTHING if os.fstat(image.fd).st_mtime_ns == undo.mtime_ns else Since.TOUCHED


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
    end = undo.size_before + counts.cluster_size - 1
    inside, behind = set[int](), set(counts.clusters(end, image.size))
    for record in undo.records:
        clusters = counts.clusters(record.offset, record.offset + record.filled)
        if record.filled and (record.stage <= reached or _is_as_filled(image, record)):
            behind.difference_update(clusters)
        elif record.offset < undo.size_before:
            inside.update(clusters if record.filled else ())
    size = counts.cluster_size
    return any(map(counts.get, inside - behind)) or any(
        counts.get(cluster) and any(image.read_padded(cluster * size, size)) for cluster in behind
    )


def _has_what_was_given_up(undo: UndoReader, image: ImageFile) -> bool:
    """True if nobody has put anything else there: the old state refers to it, and nothing but a checksum was kept."""
    return all(
        offset + length <= image.size
        and (_is_zero(image, offset, length) if expected is None else crc(image.read_at(offset, length)) == expected)
        for offset, length, expected in undo.given_up()
    )


def _is_zero(image: ImageFile, offset: int, length: int) -> bool:
    if image.is_hole(offset, length):
        return True
    return not any(any(image.read_at(start, stop - start)) for start, stop in pieces(offset, offset + length))


def _is_as_filled(image: ImageFile, record: Record) -> bool:
    value = 0
    for start, stop in pieces(record.offset, record.offset + record.filled):
        value = crc(image.read_padded(start, stop - start), value)
    return value == record.filled_crc


def _is_as_before(undo: UndoReader, image: ImageFile, record: Record) -> bool:
    """What the file did not reach is zeroes, and so is what it has lost again."""
    end = record.offset + record.filled
    old = (undo.old(record, start, stop) for start, stop in pieces(record.offset, record.end))
    now = (image.read_padded(start, stop - start) for start, stop in pieces(record.offset, record.end))
    beyond = (image.read_padded(start, stop - start) for start, stop in pieces(record.end, end))
    return all(map(bytes.__eq__, old, now)) and not any(map(any, beyond))


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
