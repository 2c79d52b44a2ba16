"""Bits that outlive the image they come from: in memory as long as they are few, in a temporary file beyond that."""

from __future__ import annotations

import weakref

from bitarray import bitarray

from ..bitmap.bits import BitVector
from ..bitmap.chunks import Chunk, Constant
from ..errors import ImageIOError, from_os_error
from ..image.spill import Spill
from .marks import Held

_IN_MEMORY = 32 << 20
"""Bytes."""


class _Store:
    """What is kept of one vector. Its temporary file goes with the last chunk of it."""

    def __init__(self) -> None:
        self._left = _IN_MEMORY
        self._spill = Spill()
        weakref.finalize(self, self._spill.close)

    def keep(self, bits: bitarray) -> Chunk:
        """A chunk of these bits. Raises ImageIOError."""
        self._left -= len(bits) // 8
        if self._left >= 0:
            return Held(bits.copy())
        try:
            return _Spilled(self, self._spill.put(bits.tobytes()))
        except OSError as error:
            from tempfile import gettempdir  # rarely needed, and slow to load

            text = f"the result cannot be kept in {gettempdir()}: {from_os_error(error).message}"
            raise ImageIOError(text, hint="TMPDIR can name another folder for temporary files") from error

    def get(self, place: int, length: int) -> bytes:
        """Bytes that were put there. Raises OSError."""
        return self._spill.get(place, length)


class _Spilled:
    """A chunk in the temporary file."""

    __slots__ = ("_place", "_store")

    def __init__(self, store: _Store, place: int) -> None:
        self._store = store
        self._place = place

    def read(self, start: int, length: int) -> bitarray:
        """`length` bytes of the chunk from byte `start` on."""
        return bitarray(buffer=self._store.get(self._place + start, length), endian="little")


def held(bits: BitVector) -> BitVector:
    """The same bits, of which nothing is read from elsewhere any more.

    Raises:
        ImageIOError: there is no room for them, or they cannot be read.
    """
    store, chunks = _Store(), list[Chunk]()
    for index in range(len(bits.chunks)):
        chunk = bits.settle(index, None)
        chunks.append(chunk if isinstance(chunk, Constant) else store.keep(bits.read(index)))
    return BitVector(bits.length, bits.chunk_bytes, chunks)
