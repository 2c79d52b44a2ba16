"""Bit vectors in cluster-sized chunks: zeroes, ones, or bits that are made when they are asked for.

Pure: no files. A vector is immutable; an operation gives a new one whose chunks are the old ones wherever nothing
changed, so an operation costs what it changes. A chunk that is neither all zeroes nor all ones is a recipe (stored
somewhere, others combined, one with ranges set, another granularity) and holds no bits, so a vector of any size
takes a list of its chunks and no more.

Bits are numbered from 0, the least significant bit of a byte first, as in the file. A chunk may hold anything in
the bits past the end of its vector; `BitVector.read` gives them as zeroes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

from bitarray import bitarray
from bitarray.util import count_and, intervals, zeros

from ..format.geometry import div_up
from .chunks import ONES, ZEROES, Chunk, Constant, Marked, Op, combined, inverted, patched, uniform
from .granularity import coarsen, refine

_FIRST_PIECE = 4 << 10
_PIECE = 64 << 10
"""Bytes looked at first, and then at a time, to tell what a chunk is: most show it in the first piece."""


class Resampled:
    """A chunk of a vector at another granularity, read from that vector."""

    def __init__(self, source: BitVector, first_bit: int, refine: int, coarsen: int) -> None:
        self._source = source
        self._first_bit = first_bit
        self._refine = refine
        self._coarsen = coarsen

    def read(self, start: int, length: int) -> bitarray:
        """The bits of the source that fall into this range, more of them or fewer."""
        first = self._first_bit + 8 * start
        if self._coarsen > 1:
            return self._coarse(first, 8 * length)
        low = first // self._refine
        high = div_up(first + 8 * length, self._refine)
        bits = refine(self._source.slice(low, high), self._refine, first - low * self._refine, 8 * length)
        # The source may end before the chunk does.
        return bits if len(bits) == 8 * length else bits + zeros(8 * length - len(bits), "little")

    def _coarse(self, first: int, count: int) -> bitarray:
        """Chunk by chunk of the source, so that a coarse bit over a large source takes no memory."""
        ratio, source = self._coarsen, self._source
        out = zeros(count, "little")
        for place, chunk, width in source.spans(first * ratio, (first + count) * ratio):
            low, high = place // ratio - first, div_up(place + width, ratio) - first
            if chunk is ONES:
                out[low:high] = True
            elif chunk is not ZEROES:
                bits = source.slice(place, place + width)
                out[low:high] |= coarsen(bits, ratio) if width >= ratio or place % ratio == 0 else _any(bits)
        return out


def _any(bits: bitarray) -> bitarray:
    return bitarray([bits.any()], "little")


class BitVector:
    """`length` bits in chunks of `chunk_bytes` bytes each."""

    def __init__(self, length: int, chunk_bytes: int, chunks: Sequence[Chunk]) -> None:
        self.length = length
        self.chunk_bytes = chunk_bytes
        self.chunks = chunks

    @classmethod
    def filled(cls, length: int, chunk_bytes: int, constant: Constant = ZEROES) -> BitVector:
        """All bits alike."""
        return cls(length, chunk_bytes, [constant] * div_up(length, 8 * chunk_bytes))

    @classmethod
    def marked(cls, length: int, chunk_bytes: int, runs: Iterable[tuple[int, int]]) -> BitVector:
        """Only the bits of some runs (first, end) are set. The runs are in order and apart, and within the vector.

        Takes 16 bytes for a run, and the time of one pass: there may be millions.
        """
        firsts, stops = array("Q"), array("Q")
        result = cls.filled(length, chunk_bytes)
        chunks: list[Chunk] = list(result.chunks)
        for first, stop in runs:
            firsts.append(first)
            stops.append(stop)
            for place, _, width in result.spans(first, stop):
                index = place // result.chunk_bits
                if width == result.valid_bits(index):
                    chunks[index] = ONES
                elif chunks[index] is ZEROES:
                    chunks[index] = Marked(firsts, stops, index * result.chunk_bits)
        return cls(length, chunk_bytes, chunks)

    @property
    def chunk_bits(self) -> int:
        """Bits in a chunk."""
        return 8 * self.chunk_bytes

    def valid_bits(self, index: int) -> int:
        """Bits of chunk `index` that belong to the vector: all, but for the last one."""
        return min(self.chunk_bits, self.length - index * self.chunk_bits)

    # Reading

    def read(self, index: int, start: int = 0, length: int | None = None) -> bitarray:
        """`length` bytes (default: the rest) of chunk `index` from byte `start` on.

        Bits past the end of the vector are zero.
        """
        size = self.chunk_bytes - start if length is None else length
        bits = self.chunks[index].read(start, size)
        valid = self.valid_bits(index) - 8 * start
        if valid < len(bits):
            bits = bits[: max(0, valid)]
            bits.extend(zeros(8 * size - len(bits), "little"))
        return bits

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, Chunk, int]]:
        """The parts of the chunks between bits `start` and `stop`, cut at the end of the vector.

        Each as (first bit, chunk, bits).
        """
        stop = min(stop, self.length)
        while start < stop:
            index = start // self.chunk_bits
            end = min(stop, (index + 1) * self.chunk_bits)
            yield start, self.chunks[index], end - start
            start = end

    def slice(self, start: int, stop: int) -> bitarray:
        """The bits from `start` up to `stop`, fewer at the end of the vector; may be a read-only view.

        The caller keeps the range small.
        """
        parts = [self._part(place, width) for place, _, width in self.spans(start, stop)]
        if len(parts) == 1:
            return parts[0]
        out = bitarray(endian="little")
        for part in parts:
            out += part
        return out

    def _part(self, place: int, width: int) -> bitarray:
        """`width` bits from `place` on, all of one chunk; may be a read-only view."""
        index, first = divmod(place, self.chunk_bits)
        low, high = first // 8, div_up(first + width, 8)
        bits = self.read(index, low, high - low)
        skip = first - 8 * low
        return bits if len(bits) == width else bits[skip : skip + width]

    def count(self) -> int:
        """How many bits are set."""
        return sum(self._count(index, chunk) for index, chunk in enumerate(self.chunks))

    def density(self, start: int, stop: int) -> float:
        """The share of set bits between `start` and `stop`, 0 to 1."""
        total = found = 0
        for place, chunk, width in self.spans(start, stop):
            total += width
            if chunk is ONES:
                found += width
            elif chunk is not ZEROES:
                found += self.slice(place, place + width).count()
        return found / total if total else 0.0

    def _count(self, index: int, chunk: Chunk) -> int:
        if isinstance(chunk, Constant):
            return self.valid_bits(index) if chunk is ONES else 0
        return self.read(index).count()

    def runs(self) -> Iterator[tuple[int, int]]:
        """The runs of set bits as (first, end), in order; runs that touch are one."""
        pending: tuple[int, int] | None = None
        for index, chunk in enumerate(self.chunks):
            base = index * self.chunk_bits
            for first, end in self._chunk_runs(index, chunk):
                if pending is not None and pending[1] == base + first:
                    pending = (pending[0], base + end)
                    continue
                if pending is not None:
                    yield pending
                pending = (base + first, base + end)
        if pending is not None:
            yield pending

    def count_runs(self) -> int:
        """How many runs there are. They may be billions, and need not be made to be counted."""
        count, goes_on = 0, False
        for index, chunk in enumerate(self.chunks):
            if chunk is ZEROES or chunk is ONES:
                count += chunk is ONES and not goes_on
                goes_on = chunk is ONES
                continue
            bits = self.read(index)
            count += count_and(bits, ~(bits >> 1)) - (goes_on and bits[0])
            goes_on = bool(bits[-1])
        return count

    def _chunk_runs(self, index: int, chunk: Chunk) -> Iterator[tuple[int, int]]:
        if chunk is ZEROES:
            return
        if chunk is ONES:
            yield 0, self.valid_bits(index)
        else:
            yield from ((first, end) for value, first, end in intervals(self.read(index)) if value)

    # New vectors from old ones

    def union(self, *others: BitVector) -> BitVector:
        """The bits set here or in any of `others`, which must have the same length and chunks."""
        return self.combined(Op.OR, *others)

    def combined(self, op: Op, *others: BitVector) -> BitVector:
        """These bits combined with each of `others` in turn, which must have the same length and chunks."""
        chunks = self.chunks
        for other in others:
            if (other.length, other.chunk_bytes) != (self.length, self.chunk_bytes):
                raise ValueError("only vectors of one shape can be combined; use `resampled` first")
            chunks = [combined(op, mine, theirs) for mine, theirs in zip(chunks, other.chunks, strict=True)]
        return BitVector(self.length, self.chunk_bytes, chunks)

    def inverted(self) -> BitVector:
        """Every bit turned over."""
        return BitVector(self.length, self.chunk_bytes, [inverted(chunk) for chunk in self.chunks])

    def with_range(self, start: int, stop: int, *, value: bool) -> BitVector:
        """The same bits but for those from `start` up to `stop`."""
        chunks = list(self.chunks)
        for place, chunk, width in self.spans(start, stop):
            index, first = divmod(place, self.chunk_bits)
            constant = ONES if value else ZEROES
            if chunk is constant:
                continue
            chunks[index] = (
                constant if width == self.valid_bits(index) else patched(chunk, (first, first + width, value))
            )
        return BitVector(self.length, self.chunk_bytes, chunks)

    def resampled(self, length: int, chunk_bytes: int, refine: int, coarsen: int) -> BitVector:
        """These bits at another granularity, or in chunks of another size. No set bit is lost.

        Args:
            length: bits of the result; those past the end of these bits are zero.
            refine: how many bits one bit becomes; 1 unless the result is finer.
            coarsen: how many bits become one, set if any of them is; 1 unless the result is coarser.
        """
        if refine == coarsen == 1 and (length, chunk_bytes) == (self.length, self.chunk_bytes):
            return self
        result = BitVector.filled(length, chunk_bytes)
        known = div_up(self.length * refine, coarsen)
        chunks: list[Chunk] = []
        for index in range(len(result.chunks)):
            first = index * result.chunk_bits
            stop = first + result.valid_bits(index)
            covered = (chunk for _, chunk, _ in self.spans(first * coarsen // refine, div_up(stop * coarsen, refine)))
            constant = uniform(covered) if first < known else ZEROES
            if constant is None or (constant is ONES and stop > known):
                chunks.append(Resampled(self, first, refine, coarsen))
            else:
                chunks.append(constant)
        return BitVector(length, chunk_bytes, chunks)

    # Which chunk to write

    def settle(self, index: int, stored: BitVector | None) -> Chunk:
        """What chunk `index` comes to: the chunk of `stored` if equal, ZEROES, ONES, or the chunk itself.

        Reads as few bytes as tell it.
        """
        chunk = self.chunks[index]
        old = stored.chunks[index] if stored is not None else None
        if isinstance(chunk, Constant) or chunk is old:
            return chunk
        same, empty, full = old is not None, True, True
        for start, length in _pieces(div_up(self.valid_bits(index), 8)):
            bits = self.read(index, start, length)
            empty = empty and not bits.any()
            full = full and bits.count() == min(len(bits), self.valid_bits(index) - 8 * start)
            same = same and stored is not None and bits == stored.read(index, start, length)
            if not (same or empty or full):
                return chunk
        if same and old is not None:
            return old
        return ZEROES if empty else ONES


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    start, size = 0, _FIRST_PIECE
    while start < length:
        yield start, min(size, length - start)
        start, size = start + size, _PIECE
