"""Bits at another granularity: several to one, or one to several.

All of it works on whole arrays at a time, at the speed of memory where that can be had; numpy would do the same, but
loading it takes longer than resampling a bitmap of 128 MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from bitarray import bitarray
from bitarray.util import intervals, zeros

_WIDEST = 64
"""Bits that are folded into one at a time: beyond, a second round over what is left costs less than more shifts."""
_BITS_PER_RUN = 2048
"""Bits of a result for each run of set bits, above which drawing the runs one by one is faster."""


def coarsen(bits: bitarray, ratio: int) -> bitarray:
    """One bit for every `ratio` (a power of two), set if any of them is; a short last group counts as one."""
    if 0 < len(bits) <= ratio:
        return bitarray([bits.any()], "little")
    short = -len(bits) % ratio
    bits = bits + zeros(short, "little") if short else bits
    while ratio >= 8:
        step = min(ratio, _WIDEST)
        bits, ratio = _folded(bits, step), ratio // step
    while ratio > 1:
        bits, ratio = _halved(bits), ratio // 2
    return bits


def refine(bits: bitarray, ratio: int, skip: int = 0, length: int | None = None) -> bitarray:
    """Every bit `ratio` times (a power of two); of these, `length` bits (default: the rest) from `skip` on."""
    count = len(bits) * ratio - skip if length is None else min(length, len(bits) * ratio - skip)
    if ratio > 1 and (ratio >= count or (bits ^ bits << 1).count() * _BITS_PER_RUN <= count):
        return _drawn(bits, ratio, skip, count)
    eightfold, rest = divmod(ratio.bit_length() - 1, 3)
    for _ in range(rest):  # these first: the last step costs most, and eight bits at a time come cheapest
        bits = _doubled(bits)
    for _ in range(eightfold):
        bits = _octupled(bits)
    return bits if count == len(bits) else bits[skip : skip + count]


def _drawn(bits: bitarray, ratio: int, skip: int, count: int) -> bitarray:
    """What `refine` gives, run by run."""
    drawn = zeros(count, "little")
    for value, first, end in intervals(bits):
        if value:
            drawn[max(0, first * ratio - skip) : max(0, end * ratio - skip)] = True
    return drawn


def _octupled(bits: bitarray) -> bitarray:
    wide = bitarray(endian="little")
    wide.frombytes(bits.unpack(zero=b"\0", one=b"\xff"))
    return wide


def _folded(bits: bitarray, ratio: int) -> bitarray:
    """`coarsen` by a ratio of 8 or more, to whole groups."""
    groups = len(bits) // ratio
    shift = ratio // 2
    while shift >= 8:  # afterwards the first byte of each group has a bit set if any of the group's is
        bits, shift = bits | bits << shift, shift // 2
    folded = bitarray(endian="little")
    folded.pack(bits.tobytes()[:: ratio // 8])
    return folded[:groups]


@cache
def _byte_table(make: Callable[[int], int]) -> bytes:
    """A table for `bytes.translate`, built when it is first needed: ten times as fast as slices with a step."""
    return bytes(make(byte) for byte in range(256))


def _pairs(byte: int) -> int:
    return sum(1 << bit for bit in range(4) if byte >> 2 * bit & 3)


def _pairs_high(byte: int) -> int:
    return _pairs(byte) << 4


def _spread(byte: int) -> int:
    return sum(3 << 2 * bit for bit in range(4) if byte >> bit & 1)


def _spread_high(byte: int) -> int:
    return _spread(byte >> 4)


def _halved(bits: bitarray) -> bitarray:
    raw = bits.tobytes()
    raw += bytes(len(raw) % 2)
    low = bitarray(buffer=raw.translate(_byte_table(_pairs))[0::2], endian="little")
    high = bitarray(buffer=raw.translate(_byte_table(_pairs_high))[1::2], endian="little")
    return (low | high)[: len(bits) // 2]


def _doubled(bits: bitarray) -> bitarray:
    raw = bits.tobytes()
    wide = bytearray(2 * len(raw))
    wide[0::2] = raw.translate(_byte_table(_spread))
    wide[1::2] = raw.translate(_byte_table(_spread_high))
    doubled = bitarray(endian="little")
    doubled.frombytes(wide)
    return doubled[: 2 * len(bits)]
