"""What leaked clusters hold: bitmap directories that nothing refers to, and L2 tables.

When a program that knows no bitmaps has written to an image, QEMU's next writer drops the bitmaps extension; an
`amend` to version 2 does so at once. When an L1 entry is lost, an L2 table and its data stay behind. What is there
still says what it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from ..errors import CorruptImageError
from ..format.bitmap_directory import FIXED_LENGTH, MAX_ENTRY_LENGTH, BitmapEntry, parse_entry
from ..format.entries import BitmapTableEntry, L2Entry, table_entries
from ..format.limits import MAX_BITMAP_DIRECTORY_BYTES
from ..image.plan import SECTOR
from .census import Mismatch
from .view import View

_LOOKED_AT = 1 << 16
"""Leaked clusters that are read to see what they are."""
_DIRECTORY_PIECE = 64 << 10


@dataclass(frozen=True, slots=True)
class LostDirectory:
    """A bitmap directory in a leaked cluster: its host offset, and its entries, each with its place in it."""

    offset: int
    entries: tuple[tuple[int, BitmapEntry], ...]

    @property
    def size(self) -> int:
        """Bytes of the directory."""
        at, entry = self.entries[-1]
        return at + entry.size


class Leaked:
    """Leaked clusters, in order."""

    def __init__(self, runs: list[Mismatch]) -> None:
        self._runs = runs
        self._firsts = [run.first for run in runs]

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(range(run.first, run.first + run.count) for run in self._runs)

    def __contains__(self, cluster: int) -> bool:
        place = bisect_right(self._firsts, cluster) - 1
        return place >= 0 and cluster < self._runs[place].first + self._runs[place].count


def lost_directories(view: View, leaked: Leaked) -> Iterator[LostDirectory]:
    """The bitmap directories among the leaked clusters, up to 65,536 of which are looked at."""
    end = 0
    for cluster in islice(leaked, _LOOKED_AT):
        if cluster < end:
            continue
        entries = _lost_entries(view, cluster, leaked)
        if entries:
            found = LostDirectory(view.geometry.offset_of(cluster), tuple(entries))
            end = view.geometry.clusters(found.offset + found.size)
            yield found


def _lost_entries(view: View, cluster: int, leaked: Leaked) -> list[tuple[int, BitmapEntry]]:
    """The entries of a bitmap directory that begins with a leaked cluster, each with its place in it.

    None unless all of the first one fits; as far as the clusters are leaked.
    """
    found: list[tuple[int, BitmapEntry]] = []
    start = view.geometry.offset_of(cluster)
    if not view.file.read_padded(start, FIXED_LENGTH).strip(b"\0"):
        return found
    data, at = b"", 0
    while at < MAX_BITMAP_DIRECTORY_BYTES and view.geometry.cluster_of(start + at) in leaked:
        if len(data) - at < MAX_ENTRY_LENGTH:
            data += view.file.read_padded(start + len(data), _DIRECTORY_PIECE if found else MAX_ENTRY_LENGTH)
        try:
            entry = parse_entry(data, at)
        except CorruptImageError:
            break
        if not _is_sound(view, entry, leaked):
            break
        found.append((at, entry))
        at += entry.size
    return found


def _is_sound(view: View, entry: BitmapEntry, leaked: Leaked) -> bool:
    """True if nobody would write such bytes by chance.

    Sizes, flags, padding and name all fit, and table and data lie in clusters that are leaked too.
    """
    if any(entry.padding) or entry.extra_data or not entry.name or b"\0" in entry.name:
        return False
    if next(entry.faults(view.geometry), None) is not None:
        return False
    if view.geometry.cluster_of(entry.bitmap_table_offset) not in leaked:
        return False
    for value in view.read_table(entry):
        data = BitmapTableEntry(value)
        if data.fault(view.geometry) is not None:
            return False
        if data.offset and view.geometry.cluster_of(data.offset) not in leaked:
            return False
    return True


def bitmap_places(view: View, entry: BitmapEntry) -> Iterator[tuple[int, int]]:
    """The host ranges of a bitmap's table and data."""
    length = 8 * entry.bitmap_table_size
    if not view.geometry.may_start(entry.bitmap_table_offset, length):
        return
    yield entry.bitmap_table_offset, length
    if not view.file.is_hole(entry.bitmap_table_offset, length):
        for value in view.read_table(entry):
            offset = BitmapTableEntry(value).offset
            if offset:
                yield offset, view.geometry.cluster_size


def lost_tables(view: View, leaked: Leaked) -> Iterator[tuple[int, list[int]]]:
    """The L2 tables among the leaked clusters, each with the leaked clusters that it refers to."""
    for cluster in islice(leaked, _LOOKED_AT):
        if data := _lost_table(view, cluster, leaked):
            yield cluster, data


def _lost_table(view: View, cluster: int, leaked: Leaked) -> list[int]:
    """The leaked clusters that a leaked one refers to, if it is an L2 table beyond doubt; none if it is not.

    All its entries are sound, what they refer to is counted and most of it leaked, and one has a flag that no other
    table has.
    """
    start, size = view.geometry.offset_of(cluster), view.geometry.cluster_size
    found: list[int] = []
    foreign, is_mapping = 0, False
    for at in range(0, size, SECTOR):
        if view.file.is_hole(start + at, size - at):
            break
        values = table_entries(view.file.read_padded(start + at, SECTOR))
        for index in range(len(values) // view.geometry.l2_entry_words):
            entry = L2Entry.of(values, index, view.geometry)
            if not entry.value:
                continue
            place = entry.host_range(view.geometry)
            if next(entry.faults(view.geometry, version=view.header.version), None) is not None:
                return []
            if place is None or not view.stored.get(other := view.geometry.cluster_of(place[0])):
                return []
            if other in leaked:
                found.append(other)
            else:
                foreign += 1
            is_mapping = is_mapping or entry.copied or entry.is_compressed
    return found if is_mapping and len(found) > foreign else []
