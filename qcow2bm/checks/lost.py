"""What leaked clusters hold: bitmap directories that nothing refers to, and tables of the mapping.

When a program that knows no bitmaps has written to an image, QEMU's next writer drops the bitmaps extension; an
`amend` to version 2 does so at once. When an L1 entry is lost, an L2 table and its data stay behind. What is there
still says what it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import attrgetter

from ..errors import CorruptImageError
from ..format.bitmap_directory import FIXED_LENGTH, MAX_ENTRY_LENGTH, BitmapEntry, parse_entry
from ..format.entries import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
    BitmapTableEntry,
    CompressedDescriptor,
    table_entries,
)
from ..format.limits import MAX_BITMAP_DIRECTORY_BYTES
from ..image.plan import SECTOR
from .census import Mismatch
from .view import View

LOOKED_AT = 1 << 16
"""Leaked clusters that are read to see what they are."""
_DIRECTORY_PIECE = 64 << 10
_TABLE_PIECE = 4 << 10
_ENTRIES = 5 << 20
"""Entries of leaked clusters that are looked at, to see whether they are tables."""
_READING = 8
"""Entries that could be looked at in the time that it takes to read a piece."""
_TOLERATED = SECTOR // 8
"""Unsound entries more than sound ones in what may still be a table: one sector that is not the table's own."""


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

    def __contains__(self, cluster: object) -> bool:
        if not isinstance(cluster, int):
            return False
        place = bisect_right(self._firsts, cluster) - 1
        return place >= 0 and cluster < self._runs[place].first + self._runs[place].count

    def __len__(self) -> int:
        return sum(run.count for run in self._runs)

    def within(self, first: int, stop: int) -> list[int]:
        """Those from `first` up to `stop`."""
        return [cluster for cluster in range(first, stop) if cluster in self]


def counted_too_often(view: View) -> Leaked:
    """All clusters with a refcount above the number of their references, those without any reference among them."""
    return Leaked(sorted((*view.leaks, *view.overcounted), key=attrgetter("first")))


def lost_directories(view: View, leaked: Leaked) -> Iterator[LostDirectory]:
    """The bitmap directories among the leaked clusters, up to 65,536 of which are looked at."""
    end = 0
    for cluster in islice(leaked, LOOKED_AT):
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


def holds_bitmap_table(view: View, leaked: Leaked, entries: int) -> bool:
    """True if a leaked cluster may be where a bitmap table of so many entries begins: all sound, and not all zero."""
    size = min(8 * entries, _TABLE_PIECE)
    for cluster in islice(leaked, LOOKED_AT):
        values = [
            value for value in table_entries(view.file.read_padded(view.geometry.offset_of(cluster), size)) if value
        ]
        if values and all(_may_be_entry(view, leaked, BitmapTableEntry(value)) for value in values):
            return True
    return False


def _may_be_entry(view: View, leaked: Leaked, entry: BitmapTableEntry) -> bool:
    if entry.fault(view.geometry) is not None:
        return False
    return not entry.offset or view.geometry.cluster_of(entry.offset) in leaked


def lost_tables(view: View, leaked: Leaked) -> Iterator[tuple[int, list[int]]]:
    """The L1 and L2 tables among the leaked clusters, each with the leaked clusters that it refers to.

    Leaves `unseen` in the view if there was more to look at than is looked at.
    """
    search = _TableSearch(view, leaked)
    tables: set[int] = set()
    named: set[int] = set()
    for cluster in islice(leaked, LOOKED_AT):
        pending = [cluster]
        while pending and search.budget > 0:  # what an L1 table names is a table whose entries may have no copied flag
            place = pending.pop()
            if place in tables or (targets := search.table_at(place, is_named=place in named)) is None:
                continue
            tables.add(place)
            new = [target for target in targets if target not in named and target not in tables]
            named.update(new)
            pending += new
            yield place, targets
    view.unseen = search.budget <= 0 or len(leaked) > LOOKED_AT


class _TableSearch:
    """Tells tables from data.

    That is a guess, and it errs towards tables: what is kept for nothing costs room, what is freed wrongly is lost.
    Damage seldom stops at one place, so unsound entries among sound ones prove nothing.

    Attributes:
        budget: entries that may still be looked at.
    """

    def __init__(self, view: View, leaked: Leaked) -> None:
        self.budget = _ENTRIES
        self._view = view
        self._geometry = view.geometry
        self._leaked = leaked
        self._data_file = view.header.has_data_file
        self._stream_mask = (1 << view.geometry.compressed_offset_bits) - 1

    def table_at(self, cluster: int, *, is_named: bool) -> list[int] | None:
        """The leaked clusters that a leaked one refers to, if it looks like a table; None if it does not.

        One entry has to be sound, with a flag that no other table has, and name a leaked cluster; beside a data file
        entries name none in this file.

        Args:
            is_named: another lost table names it, and its entries need no flag.
        """
        found: dict[int, None] = {}
        sound = unsound = 0
        is_table = False
        for value in self._values(cluster):
            self.budget -= 1
            targets = self._targets(value)
            if targets is None:
                unsound += 1
                if unsound > sound + _TOLERATED:
                    break
                continue
            sound += 1
            has_flag = is_named or bool(value & (COPIED | COMPRESSED))
            is_table = is_table or (has_flag and (bool(targets) or self._data_file))
            found.update(dict.fromkeys(targets))
        found.pop(cluster, None)
        return list(found) if is_table and (found or self._data_file) else None

    def _values(self, cluster: int) -> Iterator[int]:
        """The entries of what may be a table, without those that are zero and without subcluster bitmaps."""
        start, size = self._geometry.offset_of(cluster), self._geometry.cluster_size
        piece = min(_TABLE_PIECE, size)
        for at in range(0, size, piece):
            if self._view.file.is_hole(start + at, size - at):
                return
            self.budget -= _READING
            data = self._view.file.read_padded(start + at, piece)
            if data.strip(b"\0"):
                yield from filter(None, table_entries(data)[:: self._geometry.l2_entry_words])

    def _targets(self, value: int) -> Sequence[int] | None:
        """The leaked clusters that an entry names; None if it is unsound."""
        geometry = self._geometry
        if value & COMPRESSED:
            return self._stream_targets(value)
        offset = value & OFFSET_MASK
        if value & L2_RESERVED or not geometry.is_aligned(offset):
            return None
        if self._data_file or not offset:  # how long the data file is nobody here knows
            return () if value & (COPIED if self._data_file else ZERO) else None
        if offset >= self._view.file_size:
            return None
        cluster = geometry.cluster_of(offset)
        return (cluster,) if cluster in self._leaked else ()

    def _stream_targets(self, value: int) -> Sequence[int] | None:
        """The same of a compressed cluster. Its stream may go on in clusters after the one where it begins."""
        offset = value & self._stream_mask  # before all else: with most of what is no table that is enough
        if offset >= self._view.file_size or value & COPIED or self._data_file:
            return None
        length = CompressedDescriptor.parse(value, self._geometry).length
        first, last = (self._geometry.cluster_of(place) for place in (offset, offset + length - 1))
        return self._leaked.within(first, last + 1)
