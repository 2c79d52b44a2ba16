"""Images with bitmaps worth exporting, and export files taken apart by hand."""

import io
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import crc32c

import qcow2bm
from qcow2bm.bitmap.bits import BitVector
from qcow2bm.image.export_file import Input
from tests.support.scenes import create

DISK = (1 << 30) + 1536
"""At granularity 512 its bits take four chunks and a bit of a fifth one."""
CHUNK_SPAN = 512 * 8 * 65536
"""Bytes of the disk that a chunk at granularity 512 stands for."""


def varied(folder: Path, *options: str) -> Path:
    """An image with bitmaps of all kinds of chunks: zeroes, ones, bytes; recording or not; several granularities."""
    image = create(folder, str(DISK), *options)
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("all kinds", granularity=512)
        edit.set_range("all kinds", CHUNK_SPAN, CHUNK_SPAN)
        edit.set_range("all kinds", 2 * CHUNK_SPAN + 5000, 100_000)
        edit.set_range("all kinds", DISK - 1, 1)
        edit.add("ones", granularity=1 << 20, recording=False, all_dirty=True)
        edit.add("nothing", granularity=65536)
        edit.add("täglich\x1b[1m", granularity=1 << 31)
        edit.set_range("täglich\x1b[1m", 0, 1)
    return image


def exported(image: Path, *names: str, stale: bool = False) -> bytes:
    """The export file of an image's bitmaps."""
    stream = io.BytesIO()
    with qcow2bm.open(image) as opened:
        qcow2bm.export_bitmaps(opened, names, stream, stale=stale)
    return stream.getvalue()


def reread(data: bytes) -> qcow2bm.Export:
    """What `read_export` makes of the bytes of a file."""
    return qcow2bm.read_export(io.BytesIO(data))


def input_of(data: bytes) -> Input:
    """Bytes as they would come through a pipe."""
    return Input.of(io.BytesIO(data), "pipe")


def dirty_bits(bits: BitVector) -> list[tuple[int, int]]:
    """The runs of set bits."""
    return list(bits.runs())


# ---- by hand, with struct and the offsets of docs/export-format.md ----

PREAMBLE = 36
HEAD = 32


class Part(NamedTuple):
    """A part of an export file: where its head starts, where its body starts, where it ends."""

    kind: int
    start: int
    body: int
    end: int
    encoding: int = 0
    first: int = 0
    chunks: int = 0


def parts(data: bytes) -> list[Part]:
    """Preamble and header as one part of kind 0, then the records."""
    length = struct.unpack_from("<I", data, 24)[0]
    found = [Part(0, 0, PREAMBLE, PREAMBLE + length)]
    while found[-1].end < len(data):
        at = found[-1].end
        kind, encoding, length, first, chunks = struct.unpack_from("<HHIQQ", data, at)
        found.append(Part(kind, at, at + HEAD, at + HEAD + length, encoding, first, chunks))
    return found


def seal(head: bytes) -> bytes:
    """With its checksum behind it."""
    return head + struct.pack("<I", crc32c.crc32c(head))


def preamble(body: bytes, *, version: int = 1, flags: int = 0, magic: bytes = b"QCOW2BM bitmaps\0") -> bytes:
    """A preamble with a right checksum, and the header."""
    return seal(magic + struct.pack("<4I", version, flags, len(body), crc32c.crc32c(body))) + body


def record(
    kind: int, body: bytes = b"", *, encoding: int = 0, first: int = 0, chunks: int = 0, length: int | None = None
) -> bytes:
    """A record with right checksums; `length` is what it claims."""
    claimed = len(body) if length is None else length
    return seal(struct.pack("<HHIQQI", kind, encoding, claimed, first, chunks, crc32c.crc32c(body))) + body


def rebuilt(data: bytes, change: Callable[[Part, bytes], Iterable[bytes]]) -> bytes:
    """The file with each record replaced by what `change` makes of it, given its part and its bytes."""
    return b"".join(piece for part in parts(data) for piece in change(part, data[part.start : part.end]))
