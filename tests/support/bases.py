"""Small images to damage: what the format can be, each made by real QEMU and written to by a guest; and their anatomy.

An image is a row of `ROWS`: how it is created and what is done to it, step by step. Made once, it is kept as bytes.
"""

import signal
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tests.support.qemu import QemuError, create_luks, open_arguments, qemu_img, qemu_io
from tests.support.raw import BITMAPS, OFFSET, Raw

KIB, MIB = 1 << 10, 1 << 20
SECRET = "damage"
IMAGE = "image.qcow2"


@dataclass(frozen=True)
class Base:
    """A healthy image, or one as a killed process leaves it. `beside` are its backing file and data file, by name."""

    name: str
    data: bytes
    beside: dict[str, bytes]
    secret: str | None = None


@dataclass(frozen=True)
class Row:
    """How a base is made. A step is qemu-io's commands, or words for qemu-img with the image where `@` stands."""

    name: str
    options: tuple[str, ...] = ()
    size: str = "1M"
    steps: tuple[tuple[str, ...], ...] = ()
    luks: bool = False


def row(name: str, options: str, size: str, *steps: str | tuple[str, ...], luks: bool = False) -> Row:
    """A row with its options as one string of words; a step of one command may be that command."""
    return Row(name, tuple(options.split()), size, tuple((s,) if isinstance(s, str) else s for s in steps), luks)


def img(words: str) -> tuple[str, ...]:
    """A step of qemu-img."""
    return ("qemu-img", *words.split())


GUEST = (
    "write -P 1 0 6k",
    "write -P 2 70k 3k",
    "write -P 3 200k 1k",
    "write -P 4 600k 5k",
    "write -P 5 1023k 1k",
)
"""Writes here and there on a disk of 1 MiB: several clusters of the small sizes, few bytes in the large ones."""
LATER = ("write -P 6 2k 3k", "write -P 7 71k 512", "write -P 8 130k 4k", "discard 600k 4k")
ZEROES = ("write -z 256k 64k", "write -z -u 384k 64k", "write -z 0 2k", "write -z -u 640k 130k")
PACKED = ("write -c -P 9 448k 64k", "write -c -P 10 832k 64k", "write -c -P 11 896k 64k")
SMALL_PACKED = ("write -c -P 9 128k 4k", "write -c -P 10 132k 4k", "write -c -P 11 136k 4k", "write -c -P 12 320k 4k")
SPARSE = ("write -P 1 0 1k", "write -P 2 5M 2k", "write -P 3 9M 1k", "write -P 4 30M 512")
"""Writes for clusters of 2 MiB."""
KILLED = f"sigraise {int(signal.SIGKILL)}"
"""Ends qemu-io as a power cut would: what it holds in memory is lost, bitmaps stay in use, lazy refcounts dirty."""

ROWS = (
    # Cluster sizes with refcount widths.
    row("c512-r1", "cluster_size=512 refcount_bits=1", "1M", GUEST, ZEROES),
    row("c512-r16", "cluster_size=512", "1M", GUEST, LATER),
    row("c512-r64", "cluster_size=512 refcount_bits=64", "1M", GUEST, ("write -P 20 300k 30k",)),
    row("c4k-r1", "cluster_size=4k refcount_bits=1", "1M", GUEST, LATER, ZEROES),
    row("c4k-r2", "cluster_size=4k refcount_bits=2", "1M", GUEST, LATER),
    row("c4k-r4", "cluster_size=4k refcount_bits=4", "1537k", GUEST, ZEROES),
    row("c4k-r8", "cluster_size=4k refcount_bits=8", "3M", GUEST, LATER),
    row("c4k-r32", "cluster_size=4k refcount_bits=32", "3M", GUEST, ZEROES),
    row("c4k-r64", "cluster_size=4k refcount_bits=64", "3M", GUEST, ("write -P 20 2M 80k",)),
    row("c64k", "", "4M", GUEST, LATER),
    row("c64k-r1", "refcount_bits=1", "4M", GUEST, ZEROES),
    row("c64k-r64", "refcount_bits=64", "2M", GUEST),
    row("c2m", "cluster_size=2M", "64M", SPARSE, "write -z 20M 2M", "write -c -P 5 40M 2M"),
    row("c2m-r1", "cluster_size=2M refcount_bits=1", "10M", "write -P 1 0 1k"),
    row("empty", "", "1M"),
    row("no-size", "", "0"),
    # Version 2.
    row("v2-c512", "compat=0.10 cluster_size=512", "1M", GUEST),
    row("v2-snapshot", "compat=0.10 cluster_size=4k", "1M", GUEST, img("snapshot -c old @"), LATER),
    row("v2-compressed", "compat=0.10", "1M", GUEST, PACKED),
    # Extended L2 entries.
    row("extended-c16k", "extended_l2=on cluster_size=16k", "1M", GUEST, LATER, ZEROES),
    row("extended-c64k", "extended_l2=on", "2M", GUEST, ZEROES, LATER, PACKED),
    row("extended-c2m", "extended_l2=on cluster_size=2M", "64M", SPARSE, "write -z 64k 128k"),
    row(
        "extended-snapshot", "extended_l2=on cluster_size=16k", "1M",
        GUEST, img("snapshot -c one @"), ZEROES, LATER,
    ),
    # Compressed clusters; several share a host cluster.
    row("zlib", "", "1M", GUEST, PACKED),
    row("zlib-c4k", "cluster_size=4k refcount_bits=8", "1M", GUEST, SMALL_PACKED, "write -P 12 133k 1k"),
    row("zstd", "compression_type=zstd", "1M", GUEST, PACKED, "write -P 12 840k 1k"),
    row("zstd-snapshot", "compression_type=zstd cluster_size=4k", "1M", SMALL_PACKED, img("snapshot -c a @"), LATER),
    # Zero clusters, with and without a cluster behind them.
    row("zeroes", "cluster_size=4k", "1M", GUEST, ZEROES, "write -z 70k 4k", "write -z 200k 4k"),
    row("metadata", "preallocation=metadata cluster_size=4k", "512k", ("write -P 1 0 6k", "write -z 64k 16k")),
    row("full", "preallocation=full", "512k", "write -P 2 70k 3k"),
    # Internal snapshots.
    row("snapshot", "", "1M", GUEST, img("snapshot -c one @"), LATER),
    row(
        "snapshots", "cluster_size=4k", "1M",
        GUEST, img("snapshot -c one @"), LATER, img("snapshot -c two @"), ZEROES, img("snapshot -c three @"),
        img("snapshot -d two @"), "write -P 30 0 20k", img("snapshot -c last-one @"),
    ),
    row(
        "snapshots-c512-r2", "cluster_size=512 refcount_bits=2", "256k",
        ("write -P 1 0 6k", "write -P 2 70k 3k"), img("snapshot -c a @"), img("snapshot -c b @"), "write -P 3 2k 1k",
    ),
    # Bitmaps.
    row(
        "bitmaps", "", "4M",
        img("bitmap --add @ daily"), img("bitmap --add -g 512 @ fine"), GUEST, img("bitmap --add --disable @ idle"),
    ),
    row("bitmaps-c512", "cluster_size=512", "512k", img("bitmap --add -g 512 @ a"), img("bitmap --add @ b"), GUEST[:3]),
    row(
        "bitmaps-c4k", "cluster_size=4k refcount_bits=8", "300M",
        img("bitmap --add -g 4k @ four"), GUEST, "write -P 1 290M 5k", img("bitmap --add -g 1M @ coarse"),
    ),
    row("bitmaps-snapshot", "", "1M", GUEST, img("bitmap --add @ b"), LATER, img("snapshot -c s @"), GUEST),
    row(
        "bitmaps-in-use", "cluster_size=4k", "4M",
        img("bitmap --add -g 512 @ lost"), GUEST, img("bitmap --add @ kept"), (*LATER, "flush", KILLED),
    ),
    # Files beside.
    row("backing", "backing_file=backing.qcow2 backing_fmt=qcow2", "1M", GUEST, ZEROES),
    row("v2-backing", "compat=0.10 cluster_size=4k backing_file=backing.qcow2 backing_fmt=qcow2", "1M", GUEST),
    row("data-file", "data_file=data.raw", "1M", GUEST, ZEROES, img("bitmap --add @ b"), LATER),
    row("data-file-raw", "data_file=data.raw data_file_raw=on cluster_size=4k", "1M", GUEST, LATER),
    # The rest.
    row("luks", "cluster_size=4k", "1M", GUEST, img("bitmap --add @ b"), LATER, luks=True),
    row("lazy", "lazy_refcounts=on", "1M", GUEST, LATER),
    row("lazy-killed", "lazy_refcounts=on cluster_size=4k", "1M", GUEST, (*LATER, "write -P 13 500k 64k", KILLED)),
)  # fmt: skip
"""All bases, in groups by what they show."""


LUKS_KEEP_SMALL = ("encrypt.cipher-alg=aes-128", "encrypt.cipher-mode=cbc", "encrypt.ivgen-alg=plain64")
"""A short cipher key: the key slots in the header take half the space."""


def make_bases(folder: Path) -> list[Base]:
    """Every base, made in an empty folder."""
    return [_make(folder / row.name, row) for row in ROWS]


def lay_out(base: Base, data: bytes, folder: Path) -> Path:
    """Put an image made from a base, and what belongs beside it, into a folder; where it is zero, leave holes."""
    for name, content in base.beside.items():
        (folder / name).write_bytes(content)
    image = folder / IMAGE
    with image.open("wb") as file:
        for place in range(0, len(data), _BLOCK):
            block = data[place : place + _BLOCK]
            if block != bytes(len(block)):
                file.seek(place)
                file.write(block)
        file.truncate(len(data))
    return image


_BLOCK = 64 * KIB
_COMPRESSED = 1 << 62


def _make(folder: Path, row: Row) -> Base:
    """The base of a row."""
    folder.mkdir()
    image, secret = folder / IMAGE, SECRET if row.luks else None
    if any(option.startswith("backing_file") for option in row.options):
        qemu_img("create", "-q", "-f", "qcow2", folder / "backing.qcow2", row.size)
        qemu_io(folder / "backing.qcow2", "write -P 99 0 100k")
    if row.luks:
        create_luks(image, row.size, SECRET, *row.options, *LUKS_KEEP_SMALL)
    else:
        settings = ("-o", ",".join(row.options)) if row.options else ()
        qemu_img("create", "-q", "-f", "qcow2", *settings, IMAGE, row.size, cwd=folder)
    for step in row.steps:
        _take(image, step, secret)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Base(row.name, files.pop(IMAGE), files, secret)


def _take(image: Path, step: tuple[str, ...], secret: str | None) -> None:
    """One step of making a base."""
    opening, name = open_arguments(image, secret)
    if step[0] == "qemu-img":
        words = [name if word == "@" else word for word in step[2:]]
        if step[1] == "snapshot":
            opening = [] if secret is None else ["--object", f"secret,id=key,data={secret}"]  # it has no -f
        qemu_img(step[1], *opening, *words, cwd=image.parent)
        return
    killed = KILLED in step
    done = qemu_io(image, *step, secret=secret, options=("-d", "unmap"), check=not killed)
    if killed and done.returncode != -signal.SIGKILL:
        raise QemuError(list(done.args), done.returncode, done.stderr)


# ---- where everything lies ----


class Snapshot(NamedTuple):
    """Offset of a snapshot table entry, and of its parts; the offsets of its L1 entries."""

    at: int
    extra: int
    extra_size: int
    name: int
    name_size: int
    l1: range


class Bitmap(NamedTuple):
    """Offset of a bitmap directory entry; the length of its name; the offsets of its table's entries."""

    at: int
    name_size: int
    table: range


class Anatomy:
    """The places of a healthy image's structures: mostly offsets of entries, in lists a damage draws from."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.raw = raw = Raw(base.data)
        self.cluster = raw.cluster_size
        self.version = raw.number(4, 4)
        self.extensions = raw.extensions()
        self.end_of_extensions = self.extensions.pop(0)[0]
        self.l1 = self._table(raw.number(40), raw.number(36, 4))
        self.reftable = self._table(raw.number(48), raw.number(56, 4) * self.cluster // 8)

    @property
    def extended(self) -> bool:
        """Whether L2 entries have a bitmap of subclusters."""
        return self.version == 3 and bool(self.raw.number(72) & 16)

    @property
    def end(self) -> int:
        """The first cluster border at or after the end of the file."""
        return -(-len(self.base.data) // self.cluster) * self.cluster

    def offset(self, place: int) -> int:
        """The offset that the entry at a place holds."""
        return self.raw.number(place) & OFFSET

    @cached_property
    def blocks(self) -> list[int]:
        """The places of the refcount table's entries in use."""
        return list(self._used(self.reftable))

    @cached_property
    def used(self) -> list[int]:
        """The offsets of all clusters that have a refcount."""
        return [at for at in range(0, self.end, self.cluster) if self.raw.refcount(at // self.cluster)]

    @cached_property
    def free(self) -> list[int]:
        """The offsets of clusters that have none, but a place in a refcount block: two after the end, and the holes."""
        reach = len(self.raw.blocks) * self.cluster * 8 // self.raw.refcount_bits * self.cluster
        ends = range(0, min(self.end + 2 * self.cluster, reach), self.cluster)
        return sorted(set(ends) - set(self.used))

    # ---- guest data ----

    @cached_property
    def l1_used(self) -> list[int]:
        """The places of the active L1 entries in use."""
        return list(self._used(self.l1))

    @cached_property
    def l2(self) -> list[int]:
        """The places of the active L2 entries that are not zero."""
        return self._entries(self.l1_used)

    @cached_property
    def standard(self) -> list[int]:
        """Those of `l2` that name a cluster that is not compressed."""
        return [at for at in self.l2 if not self.raw.number(at) & _COMPRESSED and self.offset(at)]

    @cached_property
    def compressed(self) -> list[int]:
        """The places of L2 entries of compressed clusters, those of snapshots too."""
        return [at for at in {**dict.fromkeys(self.l2), **dict.fromkeys(self.snapshot_l2)}
                if self.raw.number(at) & _COMPRESSED]  # fmt: skip

    @cached_property
    def unallocated(self) -> list[int]:
        """Some places of L2 entries that are zero, in every table the first such and the last."""
        found: list[int] = []
        for table in map(self.offset, self.l1_used):
            places = range(table, table + self.cluster, self.entry_size)
            empty = [at for at in (*places[:32], *places[-4:]) if not self.raw.number(at)]
            found += empty[:2] + empty[-2:]
        return found

    @property
    def entry_size(self) -> int:
        """The size of an L2 entry."""
        return 16 if self.extended else 8

    # ---- snapshots and bitmaps ----

    @cached_property
    def snapshots(self) -> list[Snapshot]:
        """The entries of the snapshot table."""
        found, at, number = [], self.raw.number(64), self.raw.number
        for _ in range(number(60, 4)):
            extra_size, id_size, name_size = number(at + 36, 4), number(at + 12, 2), number(at + 14, 2)
            name = at + 40 + extra_size + id_size
            l1 = self._table(number(at), number(at + 8, 4))
            found.append(Snapshot(at, at + 40, extra_size, name, name_size, l1))
            at = (name + name_size + 7) // 8 * 8
        return found

    @cached_property
    def snapshot_l1(self) -> list[int]:
        """The places of all snapshots' L1 entries in use."""
        return [at for snapshot in self.snapshots for at in self._used(snapshot.l1)]

    @cached_property
    def snapshot_l2(self) -> list[int]:
        """The places of L2 entries that are not zero, in tables that snapshots have to themselves."""
        active = {self.offset(at) for at in self.l1_used}
        return self._entries([at for at in self.snapshot_l1 if self.offset(at) not in active])

    @cached_property
    def bitmaps(self) -> list[Bitmap]:
        """The entries of the bitmap directory."""
        if BITMAPS not in self.extensions:
            return []
        at, size, _ = self.raw.directory
        end, found = at + size, []
        while at < end:
            name = self.raw.number(at + 18, 2)
            found.append(Bitmap(at, name, self._table(self.raw.number(at), self.raw.number(at + 8, 4))))
            at += (24 + name + 7) // 8 * 8
        return found

    @cached_property
    def bitmap_entries(self) -> list[int]:
        """The places of all bitmap table entries; in a long table only the first ones."""
        return [at for bitmap in self.bitmaps for at in bitmap.table[:64]]

    @cached_property
    def metadata(self) -> list[range]:
        """The bytes of every structure, for damages that know no better."""
        tables = [range(self.offset(at), self.offset(at) + self.cluster) for at in self.blocks + self.l1_used]
        ranges = [range(self.end_of_extensions), self._bytes(self.l1), *tables]
        ranges += [self._bytes(snapshot.l1) for snapshot in self.snapshots]
        ranges += [range(snapshot.at, snapshot.name + snapshot.name_size) for snapshot in self.snapshots]
        ranges += [range(bitmap.at, bitmap.at + 24 + bitmap.name_size) for bitmap in self.bitmaps]
        ranges += [range(at, at + 8) for at in self.blocks]
        return [places for places in ranges if places]

    # ---- helpers ----

    @staticmethod
    def _table(offset: int, entries: int) -> range:
        return range(offset, offset + 8 * entries, 8)

    @staticmethod
    def _bytes(table: range) -> range:
        return range(table.start, table.stop)

    def _used(self, table: range) -> Iterator[int]:
        """The places of entries that are not zero: quick, as tables of 2 MiB are nearly empty."""
        words = array("Q", self.base.data[table.start : table.stop])
        return (table[index] for index, word in enumerate(words) if word)

    def _entries(self, l1_places: Iterable[int]) -> list[int]:
        """The places of L2 entries that are not zero, in the tables of some L1 entries."""
        found: list[int] = []
        for table in sorted({self.offset(at) for at in l1_places}):
            used = set(self._used(range(table, table + self.cluster, 8)))
            found += sorted({at - at % self.entry_size for at in used})
        return found
