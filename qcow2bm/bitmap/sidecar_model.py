"""Exported bitmaps that were read: what is known of them, and their bits, which are read again when they are asked for.

Of the bits only where they lie in the file is kept, so that a file of many large bitmaps takes no memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from bitarray import bitarray

from ..errors import BitmapNotFoundError, ExportFileError
from ..format.sidecar import (
    CHUNK_BYTES,
    Encoding,
    chunk_count,
    chunk_size,
    crc,
    unpack_chunk,
)
from ..image.export_file import Input
from .bits import BitVector
from .chunks import ONES, ZEROES, Chunk
from .draft import Source
from .sidecar_lineage import Lineage


@dataclass(frozen=True, slots=True)
class ExportedBitmap:
    """A bitmap outside of any image. Sizes in bytes.

    Attributes:
        recording: whether QEMU tracked writes in it.
        stale: its bits may lack writes.
        dirty_bytes: bytes of the disk that it marks.
        digest: SHA-256 of its bits; see `sidecar_digest.py`.
        label: its name with that of the file, for messages.
        read_bits: gives its bits; they are read from the file, which must stay open as long as they are used.
    """

    name: str
    virtual_size: int
    granularity: int
    recording: bool
    stale: bool
    dirty_bytes: int
    digest: bytes
    label: str
    read_bits: Callable[[], BitVector]

    @property
    def source(self) -> Source:
        """This bitmap as a source for `Edit.merge` and `Edit.copy`. Its lineage is the caller's to look at."""
        return Source(self.label, self.virtual_size, self.granularity, self.read_bits(), self.recording)


class Export:
    """Exported bitmaps and where they come from. A context manager, to be left when a plan with their bits is done.

    Attributes:
        name: of the file, for messages.
        lineage: what is known of their image; None if the file does not say.
        bitmaps: in the order of the file.
    """

    def __init__(self, source: Input, lineage: Lineage | None, bitmaps: tuple[ExportedBitmap, ...]) -> None:
        self._source = source
        self.name = source.name
        self.lineage = lineage
        self.bitmaps = bitmaps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def find(self, name: str) -> ExportedBitmap:
        """The bitmap of a name; raises BitmapNotFoundError if there is none."""
        for bitmap in self.bitmaps:
            if bitmap.name == name:
                return bitmap
        raise BitmapNotFoundError(f"{self.name} holds no bitmap called '{name}'", hint="--list shows those it holds")


class StoredRuns:
    """Where the chunks of a bitmap are: which runs are alike, and of the others where their bytes lie in a file.

    Args:
        bits: how many the bitmap has.
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._first = array("Q")
        self._encoding = array("B")
        self._at = array("Q")
        self._length = array("I")
        self._crc = array("I")

    def add(self, first: int, encoding: Encoding, at: int, stored: bytes) -> None:
        """Take the chunks that come next, whose stored bytes lie at `at`; they must be the same when read again."""
        self._first.append(first)
        self._encoding.append(encoding)
        self._at.append(at)
        self._length.append(len(stored))
        self._crc.append(crc(stored))

    def bits(self, source: Input) -> BitVector:
        """The bits, read when they are asked for."""
        chunks: list[Chunk] = []
        ends = [*self._first[1:], chunk_count(self._bits)]
        cache = _Last(self, source)
        for place, (first, end, encoding) in enumerate(zip(self._first, ends, self._encoding, strict=True)):
            if encoding in (Encoding.ZEROES, Encoding.ONES):
                chunks += [ONES if encoding == Encoding.ONES else ZEROES] * (end - first)
            else:
                chunks.append(_StoredChunk(cache, place))
        return BitVector(self._bits, CHUNK_BYTES, chunks)

    def read(self, source: Input, place: int) -> bytes:
        """The bytes of the chunk at a place in this list, with zeroes to the end of the chunk.

        Raises:
            ExportFileError: the file has changed since it was read first.
        """
        stored = source.read_at(self._at[place], self._length[place])
        if crc(stored) != self._crc[place]:
            raise ExportFileError(f"{source.name} has changed since it was read", hint="nothing was imported")
        size = chunk_size(self._bits, self._first[place])
        return unpack_chunk(self._encoding[place], stored, size).ljust(CHUNK_BYTES, b"\0")


class _Last:
    """Reads chunks, and remembers the last one: an image with small clusters asks for it many times."""

    def __init__(self, runs: StoredRuns, source: Input) -> None:
        self._runs, self._source = runs, source
        self._known: tuple[int, bytes] = -1, b""

    def read(self, place: int) -> bytes:
        if self._known[0] != place:
            self._known = place, self._runs.read(self._source, place)
        return self._known[1]


class _StoredChunk:
    """A chunk in the file."""

    __slots__ = ("_place", "_reader")

    def __init__(self, reader: _Last, place: int) -> None:
        self._reader, self._place = reader, place

    def read(self, start: int, length: int) -> bitarray:
        """A read-only view."""
        data = self._reader.read(self._place)
        return bitarray(buffer=memoryview(data)[start : start + length], endian="little")
