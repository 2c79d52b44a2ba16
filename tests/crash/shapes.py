"""The images that commands are cut short on: each with something that a change has to find its way around.

Every one has, made by QEMU: `a`, which records, with QEMU's granularity; `b`, 4 KiB; `c`, disabled. Guest writes lie
between them, so that all hold bits, and one more follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.qemu import create_luks, open_arguments, qemu_img, qemu_io
from tests.support.raw import BITMAPS, Raw

SECRET = "crash"
MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """A kind of image.

    Attributes:
        options: of `qemu-img create`.
        size: bytes of the disk.
        alter: what is done to the image in the end.
    """

    name: str
    options: tuple[str, ...] = ()
    size: int = 4 * MIB
    secret: str | None = None
    snapshots: bool = False
    compressed: bool = False
    alter: Callable[[Path], None] = lambda _: None

    def make(self, folder: Path) -> Path:
        """folder/image.qcow2, with what it needs beside it."""
        image = folder / "image.qcow2"
        if any(option.startswith("backing_file=base") for option in self.options):
            qemu_img("create", "-q", "-f", "qcow2", folder / "base.qcow2", str(self.size))
            qemu_io(folder / "base.qcow2", f"write -P 9 0 {self.size // 2}")
        if self.secret is not None:
            create_luks(image, str(self.size), self.secret, *self.options)
        else:
            settings = ("-o", ",".join(self.options)) if self.options else ()
            qemu_img("create", "-q", "-u", "-f", "qcow2", *settings, image.name, str(self.size), cwd=folder)
        step = self.size // 8
        self._guest(image, f"write -P 1 {step} {step // 16}")
        if self.compressed:
            self._guest(image, f"write -c -P 2 {3 * step} 64k")
        for number, (name, *granularity) in enumerate((("a",), ("b", "-g", "4k"), ("c", "--disable")), 2):
            opening, file = open_arguments(image, self.secret)
            qemu_img("bitmap", "--add", *granularity, *opening, file, name, cwd=folder)
            self._guest(image, f"write -P {number} {number * step} {step // 16}", f"write -z {number * step} 4k")
            if self.snapshots and name == "a":
                qemu_img("snapshot", "-c", "one", image)
        self.alter(image)
        return image

    def _guest(self, image: Path, *requests: str) -> None:
        qemu_io(image, *requests, secret=self.secret)


def _extended(before: int, length: int) -> Callable[[Path], None]:
    def alter(image: Path) -> None:
        raw = Raw.load(image)
        raw.insert_extension(bytes(length), before=before)
        raw.save(image)

    return alter


def _straddle(image: Path) -> None:
    """The 24 bytes of the bitmaps extension lie across the border of two sectors."""
    raw = Raw.load(image)
    raw.insert_extension(bytes(1016 - 8 - raw.extensions()[BITMAPS][0]), before=BITMAPS)
    raw.save(image)


def _unknown_autoclear(image: Path) -> None:
    raw = Raw.load(image)
    raw.put(88, 1 | 1 << 40)
    raw.save(image)


def _full_blocks(image: Path) -> None:
    """Every cluster that a refcount block describes is in use: whoever needs one needs another block."""
    raw = Raw.load(image)
    per_block = raw.cluster_size * 8 // raw.refcount_bits
    for index in raw.blocks:
        for cluster in range(index * per_block, (index + 1) * per_block):
            if raw.refcount(cluster) == 0:
                raw.set_refcount(cluster * raw.cluster_size, 1)
    raw.data.extend(bytes((max(raw.blocks) + 1) * per_block * raw.cluster_size - len(raw.data)))
    raw.save(image)


def _full_table(image: Path) -> None:
    """And every entry of the refcount table has its block: another one needs a larger table."""
    offset, step = MIB, 16 << 10
    qemu_io(image, f"write -P 7 0 {offset}")
    while len(Raw.load(image).blocks) < Raw.load(image).cluster_size // 8:
        qemu_io(image, f"write -P 7 {offset} {step}")
        offset += step
    _full_blocks(image)


SHAPES = (
    Shape("64 KiB clusters"),
    Shape("512-byte clusters", ("cluster_size=512",), size=MIB),
    Shape("2 MiB clusters", ("cluster_size=2M",), size=32 * MIB),
    Shape("extended L2", ("cluster_size=16k", "extended_l2=on")),
    Shape("1-bit refcounts", ("cluster_size=4k", "refcount_bits=1")),
    Shape("64-bit refcounts", ("cluster_size=4k", "refcount_bits=64")),
    Shape("small refcount blocks", ("cluster_size=512", "refcount_bits=64"), size=MIB),
    Shape("LUKS", ("cluster_size=4k",), secret=SECRET),
    Shape("internal snapshot", ("cluster_size=4k",), snapshots=True),
    Shape("overlay", ("cluster_size=4k", "backing_file=base.qcow2", "backing_fmt=qcow2")),
    Shape("data file", ("cluster_size=4k", "data_file=data.raw")),
    Shape("raw data file", ("cluster_size=4k", "data_file=data.raw", "data_file_raw=on")),
    Shape("zstd", ("compression_type=zstd",), compressed=True),
    Shape("extension across sectors", alter=_straddle),
    Shape("extension behind", alter=_extended(0, 16)),
    Shape("extension outside the first sector", alter=_extended(BITMAPS, 600)),
    Shape("unknown autoclear bits", alter=_unknown_autoclear),
    Shape("no room in the refcount blocks", ("cluster_size=512", "refcount_bits=64"), size=MIB, alter=_full_blocks),
    Shape("no room in the refcount table", ("cluster_size=512", "refcount_bits=64"), size=4 * MIB, alter=_full_table),
)
