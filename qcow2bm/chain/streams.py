"""Compressed clusters: one cluster out of one stream, and never more.

Source: qcow2 specification, "Compressed Clusters Descriptor", "Header: compression_type". The length in a descriptor
counts whole sectors, so what follows the end of a stream is whatever the last sector holds.
"""

from __future__ import annotations

import zlib

from ..errors import CorruptImageError
from ..format.header import COMPRESSION

_ZLIB_WINDOW = -12
"""A raw deflate stream with a window of 4 KiB, as QEMU reads it."""


def decompress(data: bytes, kind: int, size: int) -> bytes:
    """The `size` bytes of a cluster from its stream; `kind` is the header's compression type.

    Raises:
        CorruptImageError: the stream is damaged, or holds less or more than a cluster.
    """
    plain = _inflate(data, size) if COMPRESSION[kind] == "zlib" else _unpack_zstd(data, size)
    if len(plain) != size:
        raise CorruptImageError(f"a compressed cluster holds {len(plain)} bytes instead of {size}")
    return plain


def _inflate(data: bytes, size: int) -> bytes:
    """As QEMU: a stream that goes on when the cluster is full is taken as it is."""
    try:
        return zlib.decompressobj(_ZLIB_WINDOW).decompress(data, size)
    except zlib.error as error:
        raise CorruptImageError(f"a compressed cluster is damaged: {error}") from error


def _unpack_zstd(data: bytes, size: int) -> bytes:
    """As QEMU: a frame, or several that fill the cluster, the last one ending with it."""
    import zstandard  # few images need it

    decompressor = zstandard.ZstdDecompressor()
    try:
        plain = decompressor.stream_reader(data).read(size + 1)
        if 0 < len(plain) < size:
            plain = decompressor.stream_reader(data, read_across_frames=True).read(size)
    except zstandard.ZstdError as error:
        raise CorruptImageError(f"a compressed cluster is damaged: {error}") from error
    if len(plain) > size:
        raise CorruptImageError(f"a compressed cluster holds more than {size} bytes")
    return plain
