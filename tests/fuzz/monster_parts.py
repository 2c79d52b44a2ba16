"""What monsters are made of: a sound image, its longest file, and hands that put tables into it as nobody would.

Byte by byte with the specification's offsets, and with nothing of qcow2bm.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import BITMAPS, OFFSET, Raw

COPIED = 1 << 63
CLUSTER = 1 << 16
FAR = 1 << 42
"""Where holes begin: behind all that is there, and within any file system's largest file."""
ALL = os.environ.get("MONSTERS") == "all"
"""Tables as large as the limits allow, and every command on every image; else smaller tables and a choice."""
L1_MOST, REFTABLE_MOST = (32 << 20, 8 << 20) if ALL else (1 << 19, 1 << 18)
L1_NOISE, L2_NOISE, REFTABLE_NOISE = (32 << 20, 16 << 20, 8 << 20) if ALL else (1 << 21, 1 << 22, 1 << 22)
"""Tables of nothing but nonsense: entry by entry they would take far longer than they may."""
SNAPSHOTS_MOST, BITMAPS_MOST = (65536, 65535) if ALL else (1024, 1024)
_SIZES = (1 << 62, 1 << 60, 1 << 56, 1 << 50, (1 << 44) - (1 << 20), 1 << 43)
"""Lengths to try, the largest first: what a file system holds ends between 8 EiB and 16 TiB."""


def stretch(image: Path) -> None:
    """Make a file as long as may be, with a hole."""
    for size in _SIZES:
        try:
            os.truncate(image, size)
        except OSError:
            continue
        return
    raise OSError(f"no file may be longer than {_SIZES[-1]} bytes in {image.parent}")


def sound_image(folder: Path, *options: str) -> bytes:
    """Data, three bitmaps and a snapshot on a disk of 64 MiB; `options` are those of `qemu-img create`."""
    image = folder / "sound.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *options, image, "64M")
    qemu_img("bitmap", "--add", image, "a")
    qemu_img("bitmap", "--add", "-g", "512", image, "b")
    qemu_io(image, "write -P 1 0 128k", "write -P 2 8M 64k", "write -c -P 3 16M 64k")
    qemu_img("snapshot", "-c", "s", image)
    qemu_img("bitmap", "--add", "--disable", image, "c")
    qemu_io(image, "write -P 4 0 64k")
    return image.read_bytes()


# ---- where things are ----


def appended(raw: Raw, data: bytes) -> int:
    """Put data behind the image, counted once where there is a refcount for it; where it is."""
    end = len(raw.data) + -len(raw.data) % CLUSTER
    raw.data += bytes(end - len(raw.data)) + data + bytes(-len(data) % CLUSTER)
    for offset in range(end, len(raw.data), CLUSTER):
        if offset // CLUSTER // (CLUSTER // 2) in raw.blocks:
            raw.set_refcount(offset, 1)
    return end


def l1_table(raw: Raw) -> int:
    return raw.number(40)


def l2_table(raw: Raw) -> int:
    return raw.number(l1_table(raw)) & OFFSET


def refcount_block(raw: Raw) -> int:
    return raw.number(raw.number(48))


def fill(raw: Raw, table: int, value: int, entries: int = CLUSTER // 8) -> None:
    raw.data[table : table + 8 * entries] = struct.pack(">Q", value) * entries


def l1_at(raw: Raw, offset: int, entries: int) -> None:
    raw.put(40, offset)
    raw.put(36, entries, 4)


def l2_tables_of(raw: Raw, data: bytes) -> None:
    """L2 tables with these bytes, and a disk as large as they map."""
    start, count = appended(raw, data), len(data) // CLUSTER
    l1_at(raw, appended(raw, numbered(8 * count, lambda n: COPIED | start + n * CLUSTER)), count)
    disk_of(raw, count * CLUSTER // 8 * CLUSTER)


def refcounts_at(raw: Raw, table: bytes) -> None:
    """Another refcount table."""
    raw.put(48, appended(raw, table))
    raw.put(56, len(table) // CLUSTER, 4)


def noise(length: int) -> bytes:
    return Random(length).randbytes(length)


def numbered(length: int, entry: Callable[[int], int]) -> bytes:
    """A table whose entries follow from their numbers."""
    return struct.pack(f">{length // 8}Q", *map(entry, range(length // 8)))


def snapshots_at(raw: Raw, offset: int, count: int) -> None:
    raw.put(60, count, 4)
    raw.put(64, offset)


def snapshot_entry(l1: int, entries: int, name: bytes = b"n", number: int = 1) -> bytes:
    """An entry with the extra data that version 3 asks for."""
    identity = b"%d" % number
    fixed = struct.pack(">QIHHIIQII", l1, entries, len(identity), len(name), 0, 0, 0, 0, 16)
    entry = fixed + struct.pack(">QQ", 0, 64 << 20) + identity + name
    return entry + bytes(-len(entry) % 8)


def bitmap_entry(table: int, entries: int, name: bytes, granularity: int = 16, flags: int = 2) -> bytes:
    entry = struct.pack(">QIIBBHI", table, entries, flags, 1, granularity, len(name), 0) + name
    return entry + bytes(-len(entry) % 8)


def directory_of(raw: Raw, entries: list[bytes]) -> int:
    """A new directory; where it is."""
    data = b"".join(entries)
    return directory_at(raw, appended(raw, data), len(entries), len(data))


def bitmaps_of(raw: Raw, table: bytes) -> None:
    """As many bitmaps as may be, all with this table."""
    offset = appended(raw, table)
    directory_of(raw, [bitmap_entry(offset, len(table) // 8, b"%05d" % number) for number in range(BITMAPS_MOST)])


def directory_at(raw: Raw, offset: int, count: int, size: int) -> int:
    at = raw.extensions()[BITMAPS][0]
    raw.data[at : at + 24] = struct.pack(">IIQQ", count, 0, size, offset)
    return offset


def disk_of(raw: Raw, size: int) -> None:
    raw.put(24, size)
