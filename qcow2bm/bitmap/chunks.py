"""The chunks a bit vector is made of: all zeroes, all ones, or a recipe for bits.

A recipe holds no bits; it makes those of the range that is asked for. Bits are numbered as in the file: the least
significant bit of a byte first.
"""

from __future__ import annotations

import operator
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Protocol

from bitarray import bitarray
from bitarray.util import ones, zeros


class Chunk(Protocol):
    """Bits of one chunk, made on demand."""

    def read(self, start: int, length: int) -> bitarray:
        """`length` bytes of the chunk from byte `start` on, as bits; may be a read-only view."""


class Constant:
    """A chunk of equal bits. There are two, ZEROES and ONES; compare with `is`."""

    def __init__(self, make: Callable[[int, str], bitarray], name: str) -> None:
        self._make = make
        self._name = name

    def read(self, start: int, length: int) -> bitarray:  # noqa: ARG002 - a chunk's signature
        """`length` bytes of the constant."""
        return self._make(8 * length, "little")

    def __repr__(self) -> str:
        return self._name


ZEROES = Constant(zeros, "ZEROES")
ONES = Constant(ones, "ONES")


class Op(StrEnum):
    """How two sets of dirty bytes become one."""

    OR = "or"
    """What is in either."""
    AND = "and"
    """What is in both."""
    XOR = "xor"
    """What is in one of them alone."""
    SUBTRACT = "subtract"
    """What is in the first and not in the second."""


def _subtract(mine: bitarray, theirs: bitarray) -> bitarray:
    return mine & ~theirs


_APPLY: dict[Op, Callable[[bitarray, bitarray], bitarray]] = {
    Op.OR: operator.or_,
    Op.AND: operator.and_,
    Op.XOR: operator.xor,
    Op.SUBTRACT: _subtract,
}


class Combined:
    """Other chunks combined bit by bit, from left to right."""

    __slots__ = ("op", "parts")

    def __init__(self, op: Op, parts: tuple[Chunk, ...]) -> None:
        self.op = op
        self.parts = parts

    def read(self, start: int, length: int) -> bitarray:
        """What comes of the parts' bits, one part after the other: there may be a thousand."""
        first, *rest = self.parts
        bits = first.read(start, length)
        for part in rest:
            bits = _APPLY[self.op](bits, part.read(start, length))
        return bits


class Inverted:
    """Another chunk with every bit turned over."""

    __slots__ = ("base",)

    def __init__(self, base: Chunk) -> None:
        self.base = base

    def read(self, start: int, length: int) -> bitarray:
        """The base's bits, turned over."""
        return ~self.base.read(start, length)


class Marked:
    """A chunk with runs of set bits, taken from the runs of its whole vector.

    Args:
        firsts, stops: where the runs begin and end, in order and apart, in bits of the vector.
        first_bit: the chunk's first one.
    """

    __slots__ = ("_first_bit", "_firsts", "_stops")

    def __init__(self, firsts: array[int], stops: array[int], first_bit: int) -> None:
        self._firsts = firsts
        self._stops = stops
        self._first_bit = first_bit

    def read(self, start: int, length: int) -> bitarray:
        """Zeroes, and the runs that fall into them."""
        low = self._first_bit + 8 * start
        high = low + 8 * length
        bits = zeros(8 * length, "little")
        index = bisect_right(self._stops, low)
        while index < len(self._firsts) and self._firsts[index] < high:
            bits[max(self._firsts[index], low) - low : min(self._stops[index], high) - low] = True
            index += 1
        return bits


class Patched:
    """Another chunk with ranges of bits (start, stop, value) overwritten, the last one winning."""

    def __init__(self, base: Chunk, patches: tuple[tuple[int, int, bool], ...]) -> None:
        self.base = base
        self.patches = patches

    def read(self, start: int, length: int) -> bitarray:
        """The base's bits with the patches that fall into them."""
        bits = bitarray(self.base.read(start, length))
        low, high = 8 * start, 8 * (start + length)
        for first, stop, value in self.patches:
            if first < high and stop > low:
                bits[max(first, low) - low : min(stop, high) - low] = value
        return bits


def combined(op: Op, mine: Chunk, theirs: Chunk) -> Chunk:
    """Two chunks combined: a constant, or one of them itself, wherever that can be told without reading."""
    if mine is theirs:
        return mine if op in (Op.OR, Op.AND) else ZEROES
    known = _with_constant(op, mine, theirs)
    if known is not None:
        return known
    # What is combined from left to right anyway is one recipe, so that a merge of a thousand sources does not nest a
    # thousand deep.
    parts = (*_parts(op, mine), *(_parts(op, theirs) if op is not Op.SUBTRACT else (theirs,)))
    return Combined(op, tuple(dict.fromkeys(parts)) if op in (Op.OR, Op.AND) else parts)


def _parts(op: Op, chunk: Chunk) -> tuple[Chunk, ...]:
    return chunk.parts if isinstance(chunk, Combined) and chunk.op is op else (chunk,)


def _with_constant(op: Op, mine: Chunk, theirs: Chunk) -> Chunk | None:
    """The result if one of them is a constant, else None."""
    if op is Op.SUBTRACT:  # a - b is a & ~b
        op, theirs = Op.AND, inverted(theirs) if isinstance(theirs, Constant) or mine is ONES else theirs
    for one, other in ((mine, theirs), (theirs, mine)):
        if one is ZEROES:
            return ZEROES if op is Op.AND else other
        if one is ONES:
            return {Op.OR: ONES, Op.AND: other, Op.XOR: inverted(other)}[op]
    return None


def inverted(chunk: Chunk) -> Chunk:
    """A chunk with every bit turned over."""
    if isinstance(chunk, Constant):
        return ZEROES if chunk is ONES else ONES
    return chunk.base if isinstance(chunk, Inverted) else Inverted(chunk)


def patched(chunk: Chunk, patch: tuple[int, int, bool]) -> Chunk:
    """A chunk with one more range (first bit, end, value) overwritten."""
    if isinstance(chunk, Patched):
        return Patched(chunk.base, (*chunk.patches, patch))
    return Patched(chunk, (patch,))


def uniform(chunks: Iterable[Chunk]) -> Chunk | None:
    """The constant that all chunks are, or None."""
    first: Chunk | None = None
    for chunk in chunks:
        if not isinstance(chunk, Constant) or (first is not None and chunk is not first):
            return None
        first = chunk
    return first
