"""The export file of version 1 that make_export.py made: a format is a promise, so it is read for ever."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import crc32c
import zstandard

import qcow2bm
from tests.golden.make_export import DISK

FILE = Path(__file__).parent / "export-1.qcow2bm"
FINE = [(2048, 2648), (614400, 614401), ((1 << 20) + 2, (1 << 20) + 3)]
"""What was written, in bits of 512 bytes."""
EXPECTED = {
    "fine": (512, True, FINE, 600 * 512 + 2 * 512),
    "Wöchentlich": (1 << 20, False, [(1, 2), (512, 513)], (1 << 20) + 1536),
    "ones": (512, True, [(0, (1 << 20) + 3)], DISK),
    "nothing": (65536, False, [], 0),
}


def test_it_is_read_as_ever() -> None:
    with qcow2bm.read_export(FILE) as held:
        found = {
            bitmap.name: (bitmap.granularity, bitmap.recording, list(bitmap.read_bits().runs()), bitmap.dirty_bytes)
            for bitmap in held.bitmaps
        }
        assert found == EXPECTED
        assert list(found) == list(EXPECTED)
        assert not any(bitmap.stale for bitmap in held.bitmaps)
        assert held.lineage is not None
        lineage = held.lineage
    assert (lineage.virtual_size, lineage.cluster_size, lineage.image) == (DISK, 65536, "vm.qcow2")
    assert lineage.tool.startswith("qcow2bm ")
    assert lineage.made_ns > lineage.mtime_ns > 0


def test_it_is_what_the_document_describes() -> None:
    """Read by hand, by somebody who knows only docs/export-format.md."""
    data = FILE.read_bytes()
    magic, version, flags, length, header_crc, seal = struct.unpack_from("<16s5I", data)
    assert (magic, version, flags) == (b"QCOW2BM bitmaps\0", 1, 0)
    assert seal == crc32c.crc32c(data[:32])
    header = data[36 : 36 + length]
    assert header_crc == crc32c.crc32c(header)
    virtual_size, cluster_size, chunk_size, count, _, _ = struct.unpack_from("<QIIIqq", header)
    assert (virtual_size, cluster_size, chunk_size, count) == (DISK, 65536, 65536, len(EXPECTED))
    at = 36 + length
    found = {}
    for _ in range(count):
        at, name, bitmap = read_bitmap(data, at)
        found[name] = bitmap
    assert found == EXPECTED
    kind, end, body, _, _ = read_record(data, at)
    bitmaps, length, digest = struct.unpack("<IQ32s", body)
    assert (kind, end, bitmaps, length) == (4, len(data), count, at)
    assert digest == hashlib.sha256(data[:at]).digest()


def read_record(data: bytes, at: int) -> tuple[int, int, bytes, int, int]:
    """Kind, where it ends, body, encoding, chunks."""
    kind, encoding, length, _, chunks, body_crc, seal = struct.unpack_from("<HHIQQII", data, at)
    assert seal == crc32c.crc32c(data[at : at + 28])
    body = data[at + 32 : at + 32 + length]
    assert body_crc == crc32c.crc32c(body)
    return kind, at + 32 + length, body, encoding, chunks


def read_bitmap(data: bytes, at: int) -> tuple[int, str, tuple[int, bool, list[tuple[int, int]], int]]:
    """Where it ends, its name, and what is in it."""
    kind, at, body, _, _ = read_record(data, at)
    granularity_bits, flags, bits = struct.unpack_from("<IIQ", body)
    assert kind == 1
    plain = b""
    total = (bits + 7) // 8
    while len(plain) < total:
        kind, at, chunk, encoding, chunks = read_record(data, at)
        size = min(chunks * 65536, total - len(plain))
        assert kind == 2
        if encoding == 3:
            chunk = zstandard.decompress(chunk)
        plain += (bytes(size), b"\xff" * size, chunk, chunk)[encoding]
    kind, at, end, _, _ = read_record(data, at)
    dirty, _ = struct.unpack("<Q32s", end)
    assert kind == 3
    runs: list[tuple[int, int]] = []
    text = "".join(f"{byte:08b}"[::-1] for byte in plain)[:bits]
    place = text.find("1")
    while place >= 0:
        stop = text.find("0", place)
        stop = bits if stop < 0 else stop
        runs.append((place, stop))
        place = text.find("1", stop)
    return at, body[16:].decode(), (1 << granularity_bits, bool(flags & 1), runs, dirty)
