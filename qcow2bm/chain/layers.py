"""The layers of a disk: each a raw file or one qcow2 image, as extents of data, of zeroes, or of nothing.

An extent says where its bytes are stored, so that whoever compares two disks sees without reading that both mean the
same bytes of the same file.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import CorruptImageError, naming
from ..format.entries import CompressedDescriptor
from ..format.geometry import SUBCLUSTERS, round_up
from ..image.file import ImageFile
from ..image.image import Qcow2Image
from ..image.overlay import OverlayFile
from ..image.plan import SECTOR
from .streams import decompress
from .tables import DATA, SLICE, STREAM, UNALLOCATED, Tables, Units, require_readable, units

_SLICES = 8
"""Slices of L2 tables that a layer keeps."""


class Kind(Enum):
    """What a guest finds in a range."""

    DATA = "data"
    ZERO = "zero"
    UNALLOCATED = "unallocated"
    """What the layer below has there; only layers say so, never a disk."""


class Store(Protocol):
    """Where bytes of guest data are stored.

    Attributes:
        path: the file.
        identity: equal for two stores whose bytes at one place are the same.
        contiguous: True if bytes at neighbouring places are neighbours for the guest.
    """

    path: Path
    identity: Hashable
    contiguous: bool

    def read_into(self, place: int, skip: int, buffer: memoryview) -> None:
        """Fill `buffer` with what begins `skip` bytes after `place`."""


class Extent(NamedTuple):  # and no dataclass: there may be millions, and these are made in a third of the time
    """A range of the guest's disk, in bytes, of one kind.

    Attributes:
        store: where its data is; None for anything but data.
        place: host offset in the store, or the descriptor of a compressed cluster.
        skip: bytes from there to the extent's first byte.
    """

    offset: int
    length: int
    kind: Kind
    store: Store | None = None
    place: int = 0
    skip: int = 0

    @property
    def end(self) -> int:
        """Offset of what follows."""
        return self.offset + self.length

    def part(self, start: int, stop: int) -> Extent:
        """What of the extent lies between two guest offsets."""
        start, stop = max(start, self.offset), min(stop, self.end)
        if (start, stop) == (self.offset, self.end):
            return self
        skip = self.skip + start - self.offset if self.store is not None else 0
        return Extent(start, stop - start, self.kind, self.store, self.place, skip)

    def is_stored_as(self, other: Extent) -> bool:
        """True if both are the same bytes of one file, or zeroes; neither needs to be read to know that."""
        if self.kind is not other.kind:
            return False
        if self.store is None or other.store is None:
            return self.store is other.store
        if self.store.identity != other.store.identity:
            return False
        mine, theirs = (self.place, self.skip), (other.place, other.skip)
        return sum(mine) == sum(theirs) if self.store.contiguous else mine == theirs

    def goes_on_with(self, other: Extent) -> bool:
        """True if `other`, which follows, is of the same kind and stored right behind."""
        if self.kind is not other.kind or self.end != other.offset or self.store is not other.store:
            return False
        if self.store is None:
            return True
        return self.store.contiguous and self.place + self.skip + self.length == other.place + other.skip


class FileStore:
    """Bytes as a file has them. `has_holes` is False if the file certainly has none."""

    contiguous = True

    def __init__(self, file: ImageFile) -> None:
        self.file = file
        self.has_holes = file.present < file.size
        self.path = file.path
        self.identity: Hashable = file_identity(file)

    def read_into(self, place: int, skip: int, buffer: memoryview) -> None:
        """What lies past the end of the file is zeroes, as QEMU reads it."""
        with naming(self.path):
            self.file.read_pieces([(place + skip, len(buffer))], buffer)


class StreamStore:
    """Compressed clusters of an image; each thread keeps the last one it has read."""

    contiguous = False

    def __init__(self, image: Qcow2Image) -> None:
        self._image = image
        self.path = image.file.path
        self.identity: Hashable = (
            file_identity(image.file),
            image.header.compression_type,
            image.geometry.cluster_bits,
        )
        self._own = threading.local()

    def read_into(self, place: int, skip: int, buffer: memoryview) -> None:
        """`place` is the descriptor; raises CorruptImageError for a stream that cannot be read."""
        last: tuple[int, bytes] | None = getattr(self._own, "last", None)
        if last is None or last[0] != place:
            with naming(self.path):
                last = self._own.last = place, self._decompress(place)
        buffer[:] = last[1][skip : skip + len(buffer)]

    def _decompress(self, value: int) -> bytes:
        geometry, file = self._image.geometry, self._image.file
        descriptor = CompressedDescriptor.parse(value, geometry)
        if descriptor.offset >= file.size:
            raise CorruptImageError(f"a compressed cluster at {descriptor.offset:#x} lies outside the file")
        data = file.read_padded(descriptor.offset, descriptor.length)
        return decompress(data, self._image.header.compression_type, geometry.cluster_size)


class Layer(Protocol):
    """One file of a chain.

    Attributes:
        size: in bytes, in whole sectors.
        is_shareable: several threads may read what its extents name. Of a file with changes over it one may.
        files: what it is stored in: the file itself, and the external data file of an image that has one.
    """

    size: int
    path: Path
    is_shareable: bool
    files: tuple[ImageFile, ...]

    def pieces(self, start: int, stop: int) -> Iterator[Extent]:
        """The extents between two offsets within the layer, in order and without gaps.

        Raises:
            CorruptImageError: the mapping cannot be read there.
        """


class RawLayer:
    """A raw file: its holes are zeroes."""

    def __init__(self, file: ImageFile) -> None:
        self._store = FileStore(file)
        self.files: tuple[ImageFile, ...] = (file,)
        self.path = file.path
        self.is_shareable = not isinstance(file, OverlayFile)
        self.size = round_up(file.size, SECTOR)

    def pieces(self, start: int, stop: int) -> Iterator[Extent]:
        """Data and holes, as the file system tells them."""
        yield from _stored(Extent(start, stop - start, Kind.DATA, self._store, start))


class Qcow2Layer:
    """The active disk of a qcow2 image.

    Args:
        data_file: the external data file, if the image has one.
    """

    def __init__(self, image: Qcow2Image, data_file: ImageFile | None = None) -> None:
        self.image = image
        self.path = image.file.path
        self.is_shareable = not isinstance(image.file, OverlayFile)
        self.size = image.geometry.virtual_size
        self.files: tuple[ImageFile, ...] = (image.file,) if data_file is None else (image.file, data_file)
        self._host = FileStore(self.files[-1])
        self._streams = StreamStore(image)
        self._tables = Tables.active(image)
        self._slices: OrderedDict[tuple[int, int], Units | None] = OrderedDict()

    def pieces(self, start: int, stop: int) -> Iterator[Extent]:
        """What the L2 tables say; ranges without a table are not looked up one by one."""
        span = self.image.geometry.l2_span
        while start < stop:
            index = start // span
            present = self._tables.next_index(index)
            if present is None or present > index:
                end = stop if present is None else min(stop, present * span)
                yield Extent(start, end - start, Kind.UNALLOCATED)
            else:
                end = min(stop, (index + 1) * span)
                with naming(self.path):
                    yield from self._in_table(index, start, end)
            start = end

    def _in_table(self, index: int, start: int, stop: int) -> Iterator[Extent]:
        geometry = self.image.geometry
        room = SLICE * geometry.cluster_size
        base = index * geometry.l2_span
        while start < stop:
            number = (start - base) // room
            end = min(stop, base + (number + 1) * room)
            found = self._slice(index, number)
            if found is None:
                yield Extent(start, end - start, Kind.UNALLOCATED)
            else:
                yield from self._runs(found, base + number * room, start, end)
            start = end

    def _slice(self, index: int, number: int) -> Units | None:
        """Slice `number` of the table of an L1 entry; None where the file has a hole."""
        key = index, number
        if key in self._slices:
            self._slices.move_to_end(key)
            return self._slices[key]
        geometry = self.image.geometry
        offset, _ = self._tables.find(index)
        first = number * SLICE
        last = min(geometry.l2_entries, geometry.clusters(geometry.virtual_size) - index * geometry.l2_entries)
        words = self._tables.words(offset, first, min(SLICE, last - first))
        found = None
        if words is not None:
            require_readable(words, self.image, index * geometry.l2_span + first * geometry.cluster_size)
            found = units(words, geometry, data_file=self.image.header.has_data_file)
        self._slices[key] = found
        if len(self._slices) > _SLICES:
            self._slices.popitem(last=False)
        return found

    def _runs(self, found: Units, base: int, start: int, stop: int) -> Iterator[Extent]:
        """The runs of a slice that begins at guest offset `base`, cut to a range."""
        size = self.image.geometry.subcluster_size
        first, end = (start - base) // size, -(-(stop - base) // size)
        kinds, places = found.kinds[first:end], found.places[first:end]
        cut = kinds[1:] != kinds[:-1]
        cut |= (kinds[1:] == DATA) & (places[1:] - places[:-1] != size)
        each = SUBCLUSTERS if self.image.geometry.extended_l2 else 1
        cut |= (kinds[1:] == STREAM) & (np.arange(first + 1, end) % each == 0)
        edges = np.concatenate([[0], np.flatnonzero(cut) + 1, [kinds.size]])
        firsts = edges[:-1]
        offsets = (base + (first + firsts) * size).tolist()
        lengths = (np.diff(edges) * size).tolist()
        rows = zip(offsets, lengths, kinds[firsts].tolist(), places[firsts].tolist(), strict=True)
        for offset, length, kind, place in rows:
            run = self._extent(offset, length, kind, place)
            if offset < start or offset + length > stop:
                run = run.part(start, stop)
            if kind == DATA and self._host.has_holes:
                yield from _stored(run)
            else:
                yield run

    def _extent(self, offset: int, length: int, kind: int, place: int) -> Extent:
        if kind == DATA:
            return Extent(offset, length, Kind.DATA, self._host, place)
        if kind == STREAM:
            skip = offset % self.image.geometry.cluster_size
            return Extent(offset, length, Kind.DATA, self._streams, place, skip)
        return Extent(offset, length, Kind.UNALLOCATED if kind == UNALLOCATED else Kind.ZERO)


def file_identity(file: ImageFile) -> Hashable:
    """Equal for two open files whose bytes are the same: an overlay's are its own."""
    if isinstance(file, OverlayFile):
        return "overlay", id(file)
    status = os.fstat(file.fd)
    return ("device", status.st_rdev) if file.is_device else (status.st_dev, status.st_ino)


def _stored(run: Extent) -> Iterator[Extent]:
    """An extent of a file's bytes, with the holes in it as zeroes: nobody reads a hole."""
    store = run.store
    assert isinstance(store, FileStore)
    shift = run.place + run.skip - run.offset
    at, end = run.offset, run.end
    while at < end:
        data = _next_data(store.file, at + shift, end + shift) - shift
        if data > at:
            yield Extent(at, data - at, Kind.ZERO)
        if data < end:
            at = _next_hole(store.file, data + shift, end + shift) - shift
            yield run.part(data, at)
        else:
            at = end


def _next_data(file: ImageFile, start: int, stop: int) -> int:
    """Where there is data from `start` on, in whole sectors; `stop` if nowhere before."""
    found = file.next_data(start)
    return min(max(found // SECTOR * SECTOR, start), stop) if start <= found < file.size else stop


def _next_hole(file: ImageFile, start: int, stop: int) -> int:
    """Where data that begins at `start` ends, in whole sectors, `stop` at the latest."""
    if isinstance(file, OverlayFile):
        return stop
    try:
        hole = os.lseek(file.fd, start, os.SEEK_HOLE)
    except OSError:  # no holes on this kind of file, or none left
        return stop
    return min(max(round_up(hole, SECTOR), start + SECTOR), stop)
