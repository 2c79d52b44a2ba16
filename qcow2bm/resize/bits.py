"""The bits of a bitmap for a disk of another size: cut, or longer by a tail that is clean or dirty."""

from __future__ import annotations

from ..bitmap.bits import BitVector
from ..bitmap.chunks import ONES, ZEROES, Chunk, patched
from ..format.geometry import div_up


def resized(bits: BitVector, length: int, *, tail: bool) -> BitVector:
    """The first `length` bits, those that are new being `tail`.

    Chunks stay what they are wherever that can be: of a stored one only the end is looked at, and only if it is the
    last. Whatever it holds past the end of the old bits becomes `tail`, for it never meant anything.
    """
    count, constant = div_up(length, bits.chunk_bits), ONES if tail else ZEROES
    chunks: list[Chunk] = list(bits.chunks[:count])
    last = len(bits.chunks) - 1
    if 0 <= last < count:
        valid = bits.valid_bits(last)
        stop = min(bits.chunk_bits, length - last * bits.chunk_bits)
        if valid < stop and chunks[last] is not constant:
            chunks[last] = patched(chunks[last], (valid, stop, tail))
    chunks += [constant] * (count - len(chunks))
    return BitVector(length, bits.chunk_bytes, chunks)


def with_unknown_end(bits: BitVector, *, tail: bool) -> BitVector:
    """Bits of whole chunks, the last of which ends somewhere after its last set bit: what follows is `tail`.

    Nobody knows where the disk ended that they were made for. A clear bit there may be one of the disk's or none, so
    with a dirty tail more is marked than need be, and nothing is missed.
    """
    if not bits.chunks or not tail:
        return bits
    last = len(bits.chunks) - 1
    first = bits.read(last).find(1, right=True) + 1
    return bits.with_range(last * bits.chunk_bits + first, bits.length, value=True)
