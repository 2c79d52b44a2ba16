"""The digest of a bitmap: the same bits give the same one, whatever the cluster size of the image they are in.

Bits are looked at in the chunks of an export file, and a chunk is one of three things: all zeroes, all ones, or bytes.
Chunks alike count as one run, so that the digest of a large bitmap costs what is in it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

from bitarray import bitarray

from ..format.sidecar import CHUNK_BITS, CHUNK_BYTES, Encoding, chunk_size
from .bits import BitVector
from .chunks import ONES, ZEROES, Constant

Content = Constant | bytes
"""What a chunk is: ZEROES, ONES, or its bytes; bits past the end of the bitmap are zero."""

_DOMAIN = b"qcow2bm bitmap 1"
_START = struct.Struct("<QQ")
_RUN = struct.Struct("<BQ")
_KINDS = {ZEROES: Encoding.ZEROES, ONES: Encoding.ONES}


def runs(bits: BitVector) -> Iterator[tuple[int, Content]]:
    """The chunks in order: how many alike there are, and what they are. Bytes come one chunk at a time."""
    vector = bits.resampled(bits.length, CHUNK_BYTES, 1, 1)
    count, last = 0, ZEROES
    for index in range(len(vector.chunks)):
        chunk = vector.settle(index, None)
        if isinstance(chunk, Constant) and (chunk is last or not count):
            count, last = count + 1, chunk
            continue
        if count:
            yield count, last
        if isinstance(chunk, Constant):
            count, last = 1, chunk
        else:
            count = 0
            yield 1, vector.read(index, 0, chunk_size(bits.length, index)).tobytes()
    if count:
        yield count, last


class Sum:
    """What the bits of a bitmap come to, fed with its chunks in order.

    Attributes:
        bits: how many the bitmap has.
        chunks: how many were added.
        dirty_bytes: bytes of the disk marked so far.
    """

    def __init__(self, virtual_size: int, granularity: int) -> None:
        self._size = virtual_size
        self._granularity = granularity
        self.bits = -(-virtual_size // granularity)
        self.chunks = 0
        self.dirty_bytes = 0
        self._hash = hashlib.sha256(_DOMAIN + _START.pack(granularity, self.bits))
        self._pending: tuple[int, Constant] = 0, ZEROES

    def add(self, count: int, content: Content) -> None:
        """Take the next chunks: `count` constant ones, or one of bytes."""
        start = self.chunks * CHUNK_BITS
        self.chunks += count
        stop = min(self.chunks * CHUNK_BITS, self.bits)
        if not isinstance(content, Constant):
            self._flush()
            self._hash.update(_RUN.pack(Encoding.PLAIN, len(content)))
            self._hash.update(content)
            found = bitarray(buffer=content, endian="little")
            self._mark(found.count(), ends=stop == self.bits and bool(found[stop - start - 1]))
            return
        if content is ONES:
            self._mark(stop - start, ends=stop == self.bits)
        if content is not self._pending[1]:
            self._flush()
        self._pending = self._pending[0] + count, content

    def _mark(self, bits: int, *, ends: bool) -> None:
        """Count set bits; the last bit of the bitmap stands for what is left of the disk."""
        self.dirty_bytes += bits * self._granularity - (self.bits * self._granularity - self._size if ends else 0)

    def _flush(self) -> None:
        count, constant = self._pending
        if count:
            self._hash.update(_RUN.pack(_KINDS[constant], count))
        self._pending = 0, ZEROES

    def digest(self) -> bytes:
        """SHA-256 over granularity, number of bits, and the bits; when all chunks are there."""
        self._flush()
        return self._hash.digest()


def bitmap_digest(bits: BitVector, virtual_size: int, granularity: int) -> bytes:
    """The digest of bits that are at hand."""
    total = Sum(virtual_size, granularity)
    for count, content in runs(bits):
        total.add(count, content)
    return total.digest()
