"""What would the next incremental backup copy, and which granularity would pay? Told without reading guest data.

A backup by a bitmap copies the dirty granules. What of them costs something is what the image holds as data; ranges
that it knows to be zero go over as such, and where it has nothing itself a guest finds what the backing file has, or
zeroes. A host cluster counts as data whatever is in it, be it a hole of the file.

At a coarser granularity the dirty bytes are known exactly: those of every larger granule that holds a dirty one. At a
finer one nobody knows which part of a dirty granule was written. All of it at most; at least one finer granule of
each. Of these at least so many are data as dirty granules are data throughout.

Works on encrypted images too: the mapping is not encrypted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bitmap.bits import BitVector
from ..bitmap.store import BitmapDirectory, State, StoredBitmap
from ..errors import naming
from ..format.geometry import Geometry, round_up
from ..format.limits import MAX_BITMAP_BYTES
from ..image.image import Qcow2Image
from .compare import Progress
from .diff import range_bytes
from .tables import DATA, SLICE, STREAM, ZEROES, Kinds, Mask, Tables, require_readable, units
from .usable import usable_bits

GRANULARITIES = tuple(1 << bits for bits in range(12, 22))
"""Bytes: 4 KiB to 2 MiB, what is worth thinking about."""

Lengths = npt.NDArray[np.int64]

_TOLERANCE = 0.05
"""A coarser granularity pays if it copies no larger share more than this."""
_SHORT_RUN = 4
"""Dirty runs of fewer granules on average: then most of what is copied may be the edges of what was written."""
_FINER = 8
"""How much finer a granularity is worth a measurement."""


@dataclass(frozen=True, slots=True)
class AtGranularity:
    """The next incremental at one granularity. All in bytes.

    Attributes:
        dirty: bytes of the dirty granules; the most there can be, if the granularity is finer than the bitmap's.
        data: of these, what the image holds as data, compressed or not.
        zero: what it holds as zeroes.
        unallocated: what it holds nothing of: the backing file's, or zeroes.
        least_dirty: `dirty`, but for a finer granularity the least there can be.
        least_data: the same for `data`.
        bitmap_bytes: of the bits of a bitmap at this granularity, in memory and, if all are mixed, on the disk.
    """

    granularity: int
    dirty: int
    data: int
    zero: int
    unallocated: int
    least_dirty: int
    least_data: int
    bitmap_bytes: int

    @property
    def is_exact(self) -> bool:
        """True unless the bitmap is too coarse to tell."""
        return (self.dirty, self.data) == (self.least_dirty, self.least_data)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the next incremental by one bitmap would copy.

    Attributes:
        has_backing: the image has a backing file, so what it holds nothing of may be data below.
        runs: dirty ranges, as long as they come.
        rows: from the finest granularity to the coarsest; the bitmap's own is among them.
        coarser: the coarsest granularity that would copy hardly more, with a smaller bitmap, or None.
        finer: one that may copy much less, and is worth a measurement, or None.
        is_scattered: the dirty ranges are short, so most of what is copied may be the edges of what was written.
    """

    image: Path
    bitmap: str
    virtual_size: int
    granularity: int
    has_backing: bool
    runs: int
    rows: tuple[AtGranularity, ...]
    coarser: int | None
    finer: int | None
    is_scattered: bool

    @property
    def current(self) -> AtGranularity:
        """The row of the bitmap's own granularity."""
        return self.at(self.granularity)

    def at(self, granularity: int) -> AtGranularity:
        """The row of a granularity."""
        return next(row for row in self.rows if row.granularity == granularity)


def estimate(
    image: str | os.PathLike[str],
    *bitmaps: str,
    force_share: bool = False,
    use_locks: bool = True,
    progress: Progress = lambda _done, _total: None,
) -> tuple[Estimate, ...]:
    """An estimate for each of the bitmaps named, or for each that is ready. No guest data and no other file is read.

    Args:
        force_share: read an image that a VM writes to; what is told may be stale.
        progress: called with bytes of the disk looked at, and in all.

    Raises:
        BitmapNotFoundError, BitmapInconsistentError, BitmapBrokenError: a bitmap has no bits to be relied on.
        InUseError: a running VM has its bits in memory.
        CorruptImageError: a mapping table cannot be read.
        Qcow2bmError: as `qcow2bm.open`.
    """
    with Qcow2Image.open(image, force_share=force_share, use_locks=use_locks) as opened, naming(opened.file.path):
        return estimates(opened, *bitmaps, progress=progress)


def estimates(
    image: Qcow2Image, *bitmaps: str, progress: Progress = lambda _done, _total: None
) -> tuple[Estimate, ...]:
    """The same for an open image. Raises as `estimate`."""
    directory = BitmapDirectory(image)
    if not bitmaps:
        directory.require_undamaged()
    stored = [directory.find(name) for name in bitmaps] or [
        bitmap for bitmap in directory.bitmaps if bitmap.state is State.READY
    ]
    counts = [_Count(image.geometry, bitmap.granularity, usable_bits(bitmap)) for bitmap in stored]
    size = image.geometry.virtual_size
    if counts:
        for start, kinds in _mapped(image):
            for count in counts:
                count.add(start, kinds)
            progress(min(start + len(kinds) * image.geometry.subcluster_size, size), size)
        progress(size, size)
    return tuple(_estimate(image, bitmap, count) for bitmap, count in zip(stored, counts, strict=True))


def _mapped(image: Qcow2Image) -> Iterator[tuple[int, Kinds]]:
    """The units of every slice of an L2 table that there is, each slice with its guest offset."""
    geometry = image.geometry
    tables = Tables.active(image)
    for index, offset in zip(tables.indices.tolist(), tables.offsets.tolist(), strict=True):
        start = index * geometry.l2_span
        entries = min(geometry.l2_entries, geometry.clusters(geometry.virtual_size - start))
        for first in range(0, entries, SLICE):
            words = tables.words(offset, first, min(SLICE, entries - first))
            if words is not None:
                guest = start + first * geometry.cluster_size
                require_readable(words, image, guest)
                yield guest, units(words, geometry, data_file=image.header.has_data_file).kinds


class _Count:
    """What of a bitmap's dirty bytes is data and what is zeroes, at its granularity and all coarser ones."""

    def __init__(self, geometry: Geometry, granularity: int, bits: BitVector) -> None:
        self.bits = bits
        self.granularity = granularity
        self.known = [granularity, *(one for one in GRANULARITIES if one > granularity)]
        self.data = dict.fromkeys(self.known, 0)
        self.zero = dict.fromkeys(self.known, 0)
        self.whole = 0  # dirty granules of the bitmap that are data throughout
        self._unit = geometry.subcluster_size
        self._size = geometry.virtual_size

    def add(self, start: int, kinds: Kinds) -> None:
        """Count the dirty bytes of some units, from guest offset `start` on."""
        end = min(start + len(kinds) * self._unit, self._size)
        widest = self.known[-1]
        base = start // widest * widest
        # Every bit that a granule of any size needs, so that coarser ones come of finer ones.
        dirty = _bools(self.bits, base // self.granularity, round_up(end, widest) // self.granularity)
        if not dirty.any():
            return
        is_data: Mask = (kinds == DATA) | (kinds == STREAM)
        is_zero: Mask = kinds == ZEROES
        self._add_whole(dirty[(start - base) // self.granularity :], start, is_data)
        for place, granularity in enumerate(self.known):
            if place:
                dirty = dirty.reshape(-1, granularity // self.known[place - 1]).max(axis=1)
            copied = self._dirty_bytes(dirty, base, start, len(kinds), granularity)
            self.data[granularity] += int(copied[is_data].sum())
            self.zero[granularity] += int(copied[is_zero].sum())

    def _dirty_bytes(self, dirty: Mask, base: int, start: int, count: int, granularity: int) -> Lengths:
        """How many bytes are dirty of each of `count` units from `start` on; the bits begin at `base`."""
        each = min(granularity, self._unit)
        places = start + np.arange(count * (self._unit // each)) * each
        # The last granule may reach past the end of the disk, and the last units may lie there.
        lengths = np.clip(self._size - places, 0, each)
        found: Lengths = np.where(dirty[(places - base) // granularity], lengths, 0).reshape(count, -1).sum(axis=1)
        return found

    def _add_whole(self, dirty: Mask, start: int, is_data: Mask) -> None:
        """Count the dirty granules within the units that are data throughout, leaving out those cut at either end."""
        if self.granularity <= self._unit:
            data: Mask = np.repeat(is_data, self._unit // self.granularity)
            end = min(data.size, (self._size - start) // self.granularity)
        else:
            ratio = self.granularity // self._unit
            if start % self.granularity:
                return
            data = is_data[: len(is_data) // ratio * ratio].reshape(-1, ratio).min(axis=1)
            end = min(data.size, (self._size - start) // self.granularity)
        self.whole += int((data[:end] & dirty[:end]).sum())


def _bools(bits: BitVector, first: int, stop: int) -> Mask:
    """The bits between two places, with zeroes past the end of the vector."""
    found = bits.slice(first, stop)
    raw = np.frombuffer(found.tobytes(), np.uint8)
    result: Mask = np.zeros(stop - first, np.bool_)
    result[: len(found)] = np.unpackbits(raw, count=len(found), bitorder="little")
    return result


# The result


def _estimate(image: Qcow2Image, bitmap: StoredBitmap, count: _Count) -> Estimate:
    geometry, own = image.geometry, bitmap.granularity
    finer = [
        one for one in GRANULARITIES if one < own and geometry.bitmap_bytes(one) <= MAX_BITMAP_BYTES
    ]  # QEMU takes no larger ones
    exact = [_exact(geometry, count, granularity) for granularity in count.known]
    rows = (*(_bounded(geometry, count, granularity, exact[0]) for granularity in finer), *exact)
    has_backing = image.backing_file is not None
    runs = count.bits.count_runs()
    coarser = _coarser(exact, has_backing=has_backing)
    is_scattered = exact[0].dirty < _SHORT_RUN * runs * own
    wanted = _finer(exact[0], rows) if finer and coarser is None and is_scattered else None
    return Estimate(
        image.file.path, bitmap.name, geometry.virtual_size, own, has_backing, runs, rows, coarser, wanted,
        is_scattered,
    )  # fmt: skip


def _exact(geometry: Geometry, count: _Count, granularity: int) -> AtGranularity:
    """The row of the bitmap's own granularity or a coarser one."""
    ratio = granularity // count.granularity
    bits = count.bits.resampled(geometry.bitmap_bits(granularity), geometry.cluster_size, 1, ratio)
    dirty = range_bytes(bits, granularity, geometry.virtual_size)
    data, zero = count.data[granularity], count.zero[granularity]
    rest = dirty - data - zero
    return AtGranularity(granularity, dirty, data, zero, rest, dirty, data, geometry.bitmap_bytes(granularity))


def _bounded(geometry: Geometry, count: _Count, granularity: int, own: AtGranularity) -> AtGranularity:
    """The row of a finer granularity, between its bounds."""
    bits = count.bits
    least = bits.count() * granularity
    if bits.slice(bits.length - 1, bits.length).any():  # the finer granule in it may be the last, which may be short
        least -= -geometry.virtual_size % granularity
    size = geometry.bitmap_bytes(granularity)
    return AtGranularity(
        granularity, own.dirty, own.data, own.zero, own.unallocated, least, count.whole * granularity, size
    )


def _coarser(exact: list[AtGranularity], *, has_backing: bool) -> int | None:
    """The coarsest granularity that copies hardly more than the bitmap's own; none if the bitmap gets no smaller."""
    own = copied(exact[0], has_backing=has_backing)
    if not own:
        return None
    best = exact[0]
    for row in exact[1:]:
        fits = copied(row, has_backing=has_backing) <= own * (1 + _TOLERANCE)
        best = row if fits and row.bitmap_bytes < best.bitmap_bytes else best
    return best.granularity if best is not exact[0] else None


def _finer(own: AtGranularity, rows: tuple[AtGranularity, ...]) -> int | None:
    """A finer granularity that is worth a measurement of scattered bits: if there is more to save than it takes."""
    wanted = max(own.granularity // _FINER, rows[0].granularity)
    row = [row for row in rows if row.granularity <= wanted][-1]
    saved, grown = own.data - row.least_data, row.bitmap_bytes - own.bitmap_bytes
    return row.granularity if saved > grown else None


def copied(row: AtGranularity, *, has_backing: bool) -> int:
    """Bytes that have to be read and stored: data, and what a backing file may have."""
    return row.data + (row.unallocated if has_backing else 0)
