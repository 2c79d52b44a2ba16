"""Bits at another granularity: several to one, or one to several."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from bitarray import bitarray
from bitarray.util import zeros


def coarsen(bits: bitarray, ratio: int) -> bitarray:
    """One bit for every `ratio` (a power of two), set if any of them is; a short last group counts as one."""
    short = -len(bits) % ratio
    bits = bits + zeros(short, "little") if short else bits
    while ratio >= 8:
        packed = bitarray(endian="little")
        packed.pack(bits.tobytes())
        bits, ratio = packed, ratio // 8
    while ratio > 1:
        bits, ratio = _halved(bits), ratio // 2
    return bits


def refine(bits: bitarray, ratio: int) -> bitarray:
    """Every bit `ratio` times (a power of two)."""
    while ratio >= 8:
        wide = bitarray(endian="little")
        wide.frombytes(bits.unpack(zero=b"\0", one=b"\xff"))
        bits, ratio = wide, ratio // 8
    while ratio > 1:
        bits, ratio = _doubled(bits), ratio // 2
    return bits


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
