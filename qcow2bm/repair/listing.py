"""The entries of a bitmap directory that may be damaged: which of them QEMU would take, and why not the others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..bitmap.store import StoredBitmap
from ..checks.view import View
from ..errors import CorruptImageError
from ..format.bitmap_directory import DIRTY_TRACKING, FIXED_LENGTH, BitmapEntry, parse_entry
from ..format.extensions import BitmapsExtension
from ..format.faults import Weight
from ..format.limits import MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAP_NAME, MAX_BITMAPS, MIN_GRANULARITY_BITS

_ALIGNMENT = 8
_WINDOW = 1 << 20
"""Bytes of a damaged directory that are searched at once."""
SHARED_CLUSTERS = "something else uses its clusters too, or may"
"""Why a bitmap is broken that breaks no rule of the format by itself."""


@dataclass(slots=True)
class Listing:
    """What a directory holds.

    Attributes:
        sound: the bitmaps that may stay, in order; names may still be missing, or there twice.
        broken: those that may not, each with the reason.
        size: bytes of the directory: what the extension says, or where that is nonsense what its entries take.
        is_damaged: True if the directory as a whole is not what the extension says.
    """

    sound: list[StoredBitmap] = field(default_factory=list)
    broken: list[tuple[StoredBitmap, str]] = field(default_factory=list)
    size: int = 0
    is_damaged: bool = False

    @property
    def total(self) -> int:
        """Entries that could be read."""
        return len(self.sound) + len(self.broken)


def list_entries(
    view: View,
    pointer: BitmapsExtension,
    *,
    attached: bool,
    damaged: bool,
    shared: Sequence[tuple[int, int]] = (),
) -> Listing:
    """Read the directory that the extension names, as far as any of it makes sense.

    Args:
        damaged: entries are known not to follow each other as they should; look for those that are sound.
        shared: host ranges that have another use beside the bitmaps.
    """
    found = Listing(size=_size(view, pointer))
    data = view.file.read_padded(pointer.bitmap_directory_offset, found.size) if found.size else b""
    at_once = found.size == pointer.bitmap_directory_size
    wanted = pointer.nb_bitmaps if 0 < pointer.nb_bitmaps <= MAX_BITMAPS else MAX_BITMAPS
    tables: set[int] = set()
    end = 0
    for at, entry in _entries(view, data, None if at_once else wanted, damaged=damaged):
        found.is_damaged = found.is_damaged or at != end
        end = at + entry.size
        place = pointer.bitmap_directory_offset + at
        bitmap = StoredBitmap(view.image, entry, place, attached=attached, conflict=None)
        why = _why_broken(view, bitmap, tables, shared, damaged=damaged)
        if why is None:
            found.sound.append(bitmap)
            tables.add(entry.bitmap_table_offset)
        else:
            found.broken.append((bitmap, why))
    found.is_damaged = found.is_damaged or not at_once or end != len(data) or found.total != wanted
    if not at_once:
        found.size = end  # what was read may reach into anything that lies behind
    return found


def _size(view: View, pointer: BitmapsExtension) -> int:
    """Bytes to read: what the extension says, or up to the largest directory where that is nonsense."""
    offset, size = pointer.bitmap_directory_offset, pointer.bitmap_directory_size
    room = view.file.size - offset
    if not offset or not view.geometry.is_aligned(offset) or room < FIXED_LENGTH:
        return 0
    if FIXED_LENGTH <= size <= min(MAX_BITMAP_DIRECTORY_BYTES, room):
        return size
    return min(MAX_BITMAP_DIRECTORY_BYTES, room)


def _entries(view: View, data: bytes, count: int | None, *, damaged: bool) -> Iterator[tuple[int, BitmapEntry]]:
    """Entries with their place.

    In a damaged directory the length of an entry that is not sound says nothing, so the next sound one is looked for.

    Args:
        count: how many there are, where only that is known; None if they are to fill the data.
    """
    at, number, lost, in_vain = 0, 0, False, 0
    likely = _Likely(data)
    while at + FIXED_LENGTH <= len(data) and number != count and number < MAX_BITMAPS:
        if lost:
            following = likely.first(at)
            if following is None or in_vain == MAX_BITMAPS:
                return  # so many places that only look like entries are not what damage leaves
            at = following
        try:
            entry = parse_entry(data, at)
        except CorruptImageError:
            entry = None
        sound = entry is not None and (not damaged or (_first_fault(view, entry) is None and b"\0" not in entry.name))
        if entry is not None and (sound or not lost):
            yield at, entry
            number += 1
        if not sound and count is not None:
            return  # behind the end of a directory whose length is unknown there may be older ones
        in_vain += lost and not sound
        lost = not sound
        at += entry.size if entry is not None and sound else _ALIGNMENT


class _Likely:
    """Places where an entry may begin, by a quick look at flags, type and granularity: there may be millions."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._end = 0
        self._places: list[int] = []

    def first(self, at: int) -> int | None:
        """The first from `at` on, which lies behind where the last search began; None if there is none."""
        while not self._places or self._places[-1] < at:
            start = max(self._end, at)
            if start + FIXED_LENGTH > len(self._data):
                return None
            self._places, self._end = self._look(start), start + _WINDOW
        return self._places[bisect_left(self._places, at)]

    def _look(self, start: int) -> list[int]:
        """The places from `start` on, in one window."""
        import numpy as np  # rarely needed, and slow to load

        piece = memoryview(self._data)[start : start + _WINDOW + FIXED_LENGTH - _ALIGNMENT]
        words = np.frombuffer(piece[: len(piece) // _ALIGNMENT * _ALIGNMENT], np.uint8).reshape(-1, _ALIGNMENT)
        flags, kind = words[1:-1, 4:7], words[2:]
        likely = (flags == 0).all(axis=1) & (kind[:, 0] == DIRTY_TRACKING) & (kind[:, 1] >= MIN_GRANULARITY_BITS)
        places: list[int] = (start + np.flatnonzero(likely) * _ALIGNMENT).tolist()
        return places


def _first_fault(view: View, entry: BitmapEntry) -> str | None:
    """What keeps QEMU from taking an entry; a name that is missing or has a zero byte does not."""
    for fault in entry.faults(view.geometry):
        if fault.weight is not Weight.MINOR and (fault.code != "bitmap-name" or len(entry.name) > MAX_BITMAP_NAME):
            return fault.message
    return None


def _why_broken(
    view: View, bitmap: StoredBitmap, tables: set[int], shared: Sequence[tuple[int, int]], *, damaged: bool
) -> str | None:
    fault = _first_fault(view, bitmap.entry) or bitmap.table_fault
    if fault is None and damaged and b"\0" in bitmap.entry.name:
        fault = "its name runs into what follows"
    if fault is not None:
        return fault
    if bitmap.entry.bitmap_table_offset in tables:
        return "its table is another bitmap's"
    for reference in bitmap.references() if shared else ():
        if any(start < reference.offset + reference.length and reference.offset < end for start, end in shared):
            return SHARED_CLUSTERS
    return None
