"""Quarantined bitmaps: taken out of a damaged image by a repair, and kept in its undo file.

What is kept of a bitmap is what the image had of it: its directory entry, its table, its data clusters, and the header
that says how large clusters and disk were. Nothing of that is believed when it is read again, as nothing was before.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from bitarray import bitarray

from ..errors import BitmapBrokenError, CorruptImageError, Qcow2bmError
from ..format.bitmap_directory import BitmapEntry, parse_entry
from ..format.entries import BitmapTableEntry, bits_of_no_data, table_entries
from ..format.geometry import Geometry
from ..format.header import Autoclear, Header
from ..format.limits import MAX_BITMAP_BYTES, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS
from ..format.text import decode_name
from ..image.plan import Kept
from ..image.undo_reader import KeptBytes
from .bits import BitVector
from .chunks import ONES, ZEROES, Chunk
from .store import StoredBitmap

HEADER, ENTRY, TABLE, DATA = "image header", "bitmap directory entry", "bitmap table", "bitmap data"
"""Labels of what is kept. An entry's goes on with why the bitmap was quarantined."""
_DOUBTFUL = "doubtful "
_MAX_ENTRY = 1 << 16
"""Bytes of a directory entry that are read: with more it holds what nobody knows."""
_MAX_WHY = 500
"""Characters of a reason that are kept."""

_UNREADABLE = frozenset(
    {"bitmap-table-offset", "bitmap-table-size", "bitmap-type", "bitmap-granularity", "bitmap-extra-data"}
)
"""Faults of a directory entry with which nobody can say what the bits are."""
_UNCERTAIN = frozenset({"bitmap-flags"})
"""Faults with which nobody can say whether the bits are the last ones."""


# ---- keeping ----


def keep(stored: StoredBitmap, *, why: str = "", doubtful: bool = False, with_table: bool = True) -> tuple[Kept, ...]:
    """What the undo file must keep of a bitmap: entry, table and data, as far as they lie in the file.

    The bitmap is to be one of the image on the disk: those bytes are kept, not what a repair has made of them.

    Args:
        why: what is wrong with it, for whoever lists the undo file.
        doubtful: that may have changed its bits, as where another structure lies in its clusters.
        with_table: False where table and data are kept already, as another bitmap's.
    """
    image, entry = stored._image, stored.entry  # noqa: SLF001 - the two modules are halves of one
    geometry, size = image.geometry, image.file.size
    label = f"{_DOUBTFUL if doubtful else ''}{ENTRY}: {why[:_MAX_WHY]}"
    head = Kept(HEADER, 0, min(image.header.header_length, geometry.cluster_size))
    ranges = [head, Kept(label, stored.place, entry.size)]
    offset, length = entry.bitmap_table_offset, 8 * min(entry.bitmap_table_size, geometry.max_bitmap_table_entries)
    if with_table and 0 < offset < size and length:
        ranges.append(Kept(TABLE, offset, min(length, size - offset)))
        # What begins within a cluster is no table: its numbers could name half of the image.
        if geometry.is_aligned(offset) and not image.file.is_hole(offset, length):
            ranges += (Kept(DATA, at, bytes_there) for at, bytes_there in _data(stored, geometry, size))
    return tuple(ranges)


def doubted(kept: Kept) -> Kept:
    """The same of a bitmap that the repair has made stale: it changes what the guest reads, and no bit says so."""
    return replace(kept, label=_DOUBTFUL + kept.label) if kept.label.startswith(ENTRY) else kept


def _data(stored: StoredBitmap, geometry: Geometry, size: int) -> Iterator[tuple[int, int]]:
    """The data clusters that begin in the file, each once and neighbours as one, cut at its end."""
    odd = bits_of_no_data(geometry)
    try:
        sound = sorted({value for value in stored.table if value and not value & odd})
    except CorruptImageError:
        return
    start = end = 0
    for offset in sound:
        if offset >= size:
            break
        if offset != end:
            if end > start:
                yield start, end - start
            start = offset
        end = min(offset + geometry.cluster_size, size)
    if end > start:
        yield start, end - start


# ---- reading ----


@dataclass(frozen=True, slots=True)
class KeptChunk:
    """A data cluster that an undo file has kept. Bits are read each time they are asked for."""

    kept: KeptBytes
    offset: int

    def read(self, start: int, length: int) -> bitarray:
        """The bytes just read, as bits."""
        data = self.kept.read(self.offset + start, length)
        assert data is not None, "a bitmap's bits are read only if all its data was kept"
        return bitarray(buffer=data, endian="little")


@dataclass(frozen=True)
class Quarantined:
    """A bitmap that an undo file keeps.

    Attributes:
        number: its place among those of the undo file, from 1: names may be equal, or empty.
        why: what was wrong with it, as the repair said.
        virtual_size: bytes of the disk then.
        fault: why nobody can say what its bits are, so that it cannot be brought back; None if it can.
        doubt: why its bits may be stale or wrong although they can be read; None if nothing speaks against them.
    """

    number: int
    name: str
    granularity: int
    recording: bool
    virtual_size: int
    why: str
    fault: str | None
    doubt: str | None
    _geometry: Geometry | None = field(default=None, repr=False)
    _table: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    _table_offset: int = 0
    _kept: KeptBytes | None = field(default=None, repr=False)

    @property
    def clusters(self) -> Iterator[int]:
        """Where its table and its data were in the file, each as often as it is named; nothing if it has a fault."""
        if self.fault is None:
            yield self._table_offset
            yield from (offset for value in self._table if (offset := BitmapTableEntry(value).offset))

    @cached_property
    def bits(self) -> BitVector:
        """Its bits, read from the undo file when they are looked at: that must still be open.

        Raises:
            BitmapBrokenError: they cannot be read.
        """
        geometry, kept = self._geometry, self._kept
        if self.fault is not None or geometry is None or kept is None:
            raise BitmapBrokenError(f"bitmap '{self.name}' cannot be brought back: {self.fault}")
        chunks: list[Chunk] = []
        for entry in map(BitmapTableEntry, self._table):
            constant = ONES if entry.all_ones else ZEROES
            chunks.append(KeptChunk(kept, entry.offset) if entry.offset else constant)
        needed = geometry.bitmap_table_entries(self.granularity)
        chunks += [ZEROES] * (needed - len(chunks))  # the table of one that was in use may be of another size
        return BitVector(geometry.bitmap_bits(self.granularity), geometry.cluster_size, chunks[:needed])

    @property
    def dirty_bytes(self) -> int:
        """Guest bytes marked dirty; raises as `bits`."""
        return min(self.bits.count() * self.granularity, self.virtual_size)


def quarantined(kept: KeptBytes) -> tuple[Quarantined, ...]:
    """The bitmaps of an undo file, in the order in which they were kept."""
    header = _header(kept)
    found: list[Quarantined] = []
    for wanted in kept.ranges:
        label, _, why = wanted.label.partition(": ")
        if label.removeprefix(_DOUBTFUL) == ENTRY:
            doubt = (why or "the repair did not trust its bits") if label != ENTRY else None
            bare = Quarantined(len(found) + 1, "", 0, recording=False, virtual_size=0, why=why, fault=None, doubt=doubt)
            found.append(_read(kept, header, wanted, bare))
    uses = Counter(offset for bitmap in found for offset in bitmap.clusters)
    return tuple(_judged_by(uses, bitmap) for bitmap in found)


def _judged_by(uses: Counter[int], bitmap: Quarantined) -> Quarantined:
    twice = next((offset for offset in bitmap.clusters if uses[offset] > 1), None)
    if bitmap.doubt is not None or twice is None:
        return bitmap
    return replace(bitmap, doubt=f"its cluster at {twice:#x} had another use in it or in another bitmap")


def _header(kept: KeptBytes) -> Header | None:
    """The image's header then."""
    for wanted in kept.ranges:
        length = min(wanted.length, 1 << MAX_CLUSTER_BITS)
        data = kept.read(wanted.offset, length) if wanted.label == HEADER else None
        if data is not None:
            try:
                header = Header.parse(data)
            except Qcow2bmError:
                return None
            return header if MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS else None
    return None


def _read(kept: KeptBytes, header: Header | None, wanted: Kept, bare: Quarantined) -> Quarantined:
    """One bitmap, judged."""
    try:
        entry = parse_entry(kept.read(wanted.offset, min(wanted.length, _MAX_ENTRY)) or b"")
    except CorruptImageError as error:
        return replace(bare, fault=f"its directory entry: {error.message}")
    known = replace(
        bare,
        name=decode_name(entry.name),
        granularity=entry.granularity,
        recording=entry.recording,
    )
    if header is None:
        return replace(known, fault="the header of its image, which says how large clusters were, cannot be read")
    geometry = header.geometry
    known = replace(known, virtual_size=geometry.virtual_size, doubt=known.doubt or _doubt(entry, header))
    table, fault = _table(kept, entry, geometry)
    if fault is not None:
        return replace(known, fault=fault)
    return replace(known, _geometry=geometry, _table=table, _table_offset=entry.bitmap_table_offset, _kept=kept)


def _doubt(entry: BitmapEntry, header: Header) -> str | None:
    """Why the bits may be stale: they were then already."""
    if entry.in_use:
        return "it was in use: its last writer did not close the image"
    if not header.autoclear_features & Autoclear.BITMAPS:
        return "it was detached: a program that knows no bitmaps had written to the image"
    fault = next((fault for fault in entry.faults(header.geometry) if fault.code in _UNCERTAIN), None)
    return None if fault is None else fault.message


def _table(kept: KeptBytes, entry: BitmapEntry, geometry: Geometry) -> tuple[array[int], str | None]:
    """The bitmap table, and why it or what it names cannot be read."""
    nothing: array[int] = array("Q")
    fault = next((fault for fault in entry.faults(geometry) if fault.code in _UNREADABLE), None)
    if fault is not None:
        return nothing, f"its directory entry: {fault.message}"
    if geometry.bitmap_bytes(entry.granularity) > MAX_BITMAP_BYTES:
        return nothing, f"its directory entry: its granularity is too small for a disk of {geometry.virtual_size} bytes"
    offset, length, size = entry.bitmap_table_offset, 8 * entry.bitmap_table_size, kept.undo.size_before
    if geometry.is_outside(offset, length, size):
        return nothing, f"its table at {offset:#x} lies outside the file of {size} bytes"
    data = kept.read(offset, length)
    if data is None:
        return nothing, f"its table at {offset:#x} was not kept"
    table = table_entries(data)
    return table, _data_fault(kept, table, geometry)


def _data_fault(kept: KeptBytes, table: array[int], geometry: Geometry) -> str | None:
    for index, value in enumerate(table):
        if not value:
            continue
        entry = BitmapTableEntry(value)
        fault = entry.fault(geometry)
        if fault is not None:
            return f"its table: {fault.message} (index {index})"
        if entry.offset >= kept.undo.size_before:
            return f"its data: the cluster at {entry.offset:#x} (index {index}) lies outside the file"
        if entry.offset and not kept.holds(entry.offset, geometry.cluster_size):
            return f"its data: the cluster at {entry.offset:#x} (index {index}) was not kept"
    return None
