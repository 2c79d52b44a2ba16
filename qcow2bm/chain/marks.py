"""A bit vector in the making: ranges are marked, in any order, and what was never marked takes no memory."""

from __future__ import annotations

import numpy as np
from bitarray import bitarray
from bitarray.util import zeros

from ..bitmap.bits import BitVector
from ..bitmap.chunks import ONES, ZEROES, Chunk
from ..errors import BitmapLimitError
from ..format.geometry import div_up, round_up
from ..format.limits import MAX_BITMAP_BYTES
from .tables import Mask


class Held:
    """A chunk whose bits are in memory."""

    __slots__ = ("bits",)

    def __init__(self, bits: bitarray) -> None:
        self.bits = bits

    def read(self, start: int, length: int) -> bitarray:
        """`length` bytes of the chunk from byte `start` on."""
        return self.bits[8 * start : 8 * (start + length)]


class Marks:
    """Bits over a disk of `size` bytes, `granularity` bytes each.

    Args:
        chunk_bytes: bytes of bits in a chunk of the result: the cluster size of the image it is for.

    Raises:
        BitmapLimitError: QEMU would not take a bitmap of that size.
    """

    def __init__(self, size: int, granularity: int, chunk_bytes: int) -> None:
        self.size = size
        self.granularity = granularity
        self.length = div_up(size, granularity)
        self._chunk_bits = 8 * chunk_bytes
        if div_up(self.length, 8) > MAX_BITMAP_BYTES:
            raise BitmapLimitError(
                f"a bitmap of {self.length} bits is above {MAX_BITMAP_BYTES} bytes", hint="choose a larger granularity"
            )
        self._chunks: list[Chunk] = [ZEROES] * div_up(self.length, self._chunk_bits)

    def mark_bytes(self, start: int, stop: int) -> None:
        """Set every bit that the range of guest bytes touches; what lies past the end of the disk is left out."""
        stop = min(stop, self.size)
        if start < stop:
            self.mark(start // self.granularity, div_up(stop, self.granularity))

    def mark(self, first: int, stop: int) -> None:
        """Set bits."""
        stop = min(stop, self.length)
        while first < stop:
            index, low = divmod(first, self._chunk_bits)
            base = index * self._chunk_bits
            end = min(stop, base + self._chunk_bits)
            if low == 0 and end == min(base + self._chunk_bits, self.length):
                self._chunks[index] = ONES
            elif self._chunks[index] is not ONES:
                self._bits(index)[low : end - base] = True
            first = end

    def mark_units(self, start: int, unit: int, chosen: Mask) -> None:
        """Set every bit that a chosen one of consecutive units touches.

        Args:
            start: guest offset of the first unit, a multiple of `unit`.
            unit: bytes of each, a power of two.
        """
        chosen = chosen[: div_up(max(self.size - start, 0), unit)]
        if unit >= self.granularity:
            self._mark_each(start // self.granularity, np.repeat(chosen, unit // self.granularity))
            return
        ratio = self.granularity // unit
        lead = start % self.granularity // unit
        padded: Mask = np.zeros(round_up(lead + chosen.size, ratio), np.bool_)
        padded[lead : lead + chosen.size] = chosen
        touched: Mask = padded.reshape(-1, ratio).max(axis=1)
        self._mark_each(start // self.granularity, touched)

    def _mark_each(self, first: int, chosen: Mask) -> None:
        end = min(first + chosen.size, self.length)
        at = first
        while at < end:
            index, low = divmod(at, self._chunk_bits)
            part = chosen[at - first : min(end, at - low + self._chunk_bits) - first]
            if part.all():
                self.mark(at, at + part.size)
            elif part.any() and self._chunks[index] is not ONES:
                bits = bitarray(endian="little")
                bits.frombytes(np.packbits(part, bitorder="little").tobytes())
                self._bits(index)[low : low + part.size] |= bits[: part.size]
            at += part.size

    def _bits(self, index: int) -> bitarray:
        chunk = self._chunks[index]
        if not isinstance(chunk, Held):
            chunk = self._chunks[index] = Held(zeros(self._chunk_bits, "little"))
        return chunk.bits

    def vector(self) -> BitVector:
        """The bits so far; mark nothing more afterwards."""
        return BitVector(self.length, self._chunk_bits // 8, self._chunks)
