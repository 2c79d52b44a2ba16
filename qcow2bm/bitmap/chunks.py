"""The chunks a bit vector is made of: all zeroes, all ones, or a recipe for bits.

A recipe holds no bits; it makes those of the range that is asked for. Bits are numbered as in the file: the least
significant bit of a byte first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


class Union:
    """The OR of other chunks."""

    def __init__(self, parts: tuple[Chunk, ...]) -> None:
        self.parts = parts

    def read(self, start: int, length: int) -> bitarray:
        """The union of what the parts read."""
        first, second, *rest = (part.read(start, length) for part in self.parts)
        union = first | second
        for part in rest:
            union |= part
        return union


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


def either(mine: Chunk, theirs: Chunk) -> Chunk:
    """The OR of two chunks; one of them itself where the other adds nothing."""
    if theirs is ZEROES or mine is ONES or mine is theirs:
        return mine
    if mine is ZEROES or theirs is ONES:
        return theirs
    # A union of unions is one union, so that a merge of a thousand sources does not nest a thousand deep.
    parts = (mine.parts if isinstance(mine, Union) else (mine,)) + (
        theirs.parts if isinstance(theirs, Union) else (theirs,)
    )
    return Union(tuple(dict.fromkeys(parts)))


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
