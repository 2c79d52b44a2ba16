"""The images of the matrix: every cluster size with every refcount width and every kind of image that can be.

All of them are made by real QEMU, with guest writes of a generator seeded by the combination's name, so a failure
happens again. A combination that the format or QEMU rules out is left out by `Combination.possible`, which says why.
"""

import os
import random
import shutil
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path

from tests.support.qemu import StorageDaemon, create_luks, open_arguments, qemu_img, qemu_io, run

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

SECRET = "matrix"

SIZES = {
    512: 20 * MIB + 512,
    4 * KIB: 48 * MIB + 3 * 512,
    64 * KIB: 640 * MIB + 5 * 512,
    2 * MIB: 9 * GIB + 7 * 512,
}
"""Virtual sizes by cluster size: at granularity 512 every bitmap has two chunks at least, and no granule but 512 bytes
divides the disk, so that a last bit always stands for less than the others."""


class Kind(Enum):
    """What an image is besides its cluster size and refcount width."""

    PLAIN = "plain"
    EXTENDED_L2 = "extended-l2"
    DATA_FILE_RAW = "data-file-raw"
    DATA_FILE = "data-file"
    LUKS = "luks"
    COMPRESSED = "zstd"
    SNAPSHOTS = "snapshots"
    BACKING = "backing"


OPTIONS = {
    Kind.EXTENDED_L2: ("extended_l2=on",),
    Kind.DATA_FILE_RAW: ("data_file=data.raw", "data_file_raw=on"),
    Kind.DATA_FILE: ("data_file=data.raw",),
    Kind.COMPRESSED: ("compression_type=zstd",),
    Kind.BACKING: ("backing_file=backing.qcow2", "backing_fmt=qcow2"),
}


@dataclass(frozen=True)
class Combination:
    """One cell of the matrix."""

    cluster_size: int
    refcount_bits: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind.value}-{self.cluster_size}-{self.refcount_bits}"

    @property
    def possible(self) -> bool:
        """False for what QEMU refuses to make: the two rules of the format that tie the three together."""
        if self.kind is Kind.EXTENDED_L2:
            return self.cluster_size >= 16 * KIB  # a subcluster, 1/32 of a cluster, has 512 bytes at least
        if self.kind is Kind.SNAPSHOTS:
            return self.refcount_bits > 1  # a cluster that image and snapshot share has refcount 2
        return True

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return SIZES[self.cluster_size]

    @property
    def secret(self) -> str | None:
        """The key of an encrypted image."""
        return SECRET if self.kind is Kind.LUKS else None

    @property
    def guest_is_daemon(self) -> bool:
        """Whether the guest writes through a storage daemon, as a VM, or by qemu-io on the image itself.

        The daemon, where the refcounts have QEMU's usual 16 bits.
        """
        return self.refcount_bits == 16


WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Bits of a refcount."""


def matrix() -> list[Combination]:
    """Every possible combination."""
    return [combination for cell in product(SIZES, WIDTHS, Kind) if (combination := Combination(*cell)).possible]


def sample() -> list[Combination]:
    """The half that CI has the time for: chequered, so that it has every pair of size, width and kind that can be.

    `MATRIX=all` is every possible combination.
    """
    if os.environ.get("MATRIX") == "all":
        return matrix()
    sizes, kinds = list(SIZES), list(Kind)

    def square(one: Combination) -> int:
        return sizes.index(one.cluster_size) + WIDTHS.index(one.refcount_bits) + kinds.index(one.kind)

    return [combination for combination in matrix() if square(combination) % 2 == 0]


class Maker:
    """Makes the image of a combination, folder/image.qcow2, and what it needs beside it.

    Its bitmaps: `daily` records; `fine` (512 bytes) and `coarse` (1 MiB) recorded and are disabled; `scratch` and `old`
    record; `idle` is disabled and empty. Beside it lies source.qcow2, another image of the same size, with `elsewhere`
    of 4 KiB granularity.
    """

    def __init__(self, combination: Combination, folder: Path) -> None:
        self.combination = combination
        self.folder = folder
        self.image = folder / "image.qcow2"
        self.random = random.Random(str(combination))

    def make(self) -> Path:
        """The image."""
        self.folder.mkdir()
        self._other("source.qcow2", "elsewhere")
        if self.combination.kind is Kind.BACKING:
            self._other("backing.qcow2", "below")
        self._create()
        self._guest()
        if self.combination.kind is Kind.SNAPSHOTS:
            qemu_img("snapshot", "-c", "one", self.image)
        for name, *granularity in (
            ("old",), ("scratch",), ("idle", "--disable"), ("coarse", "-g", "1M"), ("fine", "-g", "512"),
        ):  # fmt: skip
            self._bitmap("--add", *granularity, name=name)
        self._guest()
        if self.combination.kind is Kind.SNAPSHOTS:
            qemu_img("snapshot", "-c", "two", self.image)
        for name in ("fine", "coarse"):
            self._bitmap("--disable", name=name)
        self._bitmap("--add", name="daily")
        self._guest()
        return self.image

    def _create(self) -> None:
        combination = self.combination
        options = (
            f"cluster_size={combination.cluster_size}", f"refcount_bits={combination.refcount_bits}",
            *OPTIONS.get(combination.kind, ()),
        )  # fmt: skip
        if combination.kind is Kind.LUKS:
            create_luks(self.image, str(combination.size), SECRET, *options)
        else:
            size = str(combination.size)
            qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(options), self.image.name, size, cwd=self.folder)

    def _guest(self) -> None:
        """A session of the guest: writes, zeroes and discards anywhere, and always in the last sector."""
        size, cluster_size = self.combination.size, self.combination.cluster_size
        requests = [f"write -P {self.random.randrange(1, 256)} {size - 512} 512"]
        for verb in ("write -P 7", "write -P 8", "write -P 9", "write -z", "discard"):
            offset = self.random.randrange(0, size - 256 * KIB, 512)
            requests.append(f"{verb} {offset} {self.random.randrange(512, 96 * KIB, 512)}")
        if self.combination.guest_is_daemon:
            with StorageDaemon(self.image, secret=self.combination.secret) as vm:
                vm.io(*requests)
        else:
            qemu_io(self.image, *requests, secret=self.combination.secret, options=("-d", "unmap"))
        if self.combination.kind is Kind.COMPRESSED:
            # NBD knows no compressed writes, so these never come from the daemon.
            starts = [self.random.randrange(size // cluster_size - 2) * cluster_size for _ in range(3)]
            qemu_io(
                self.image, *(f"write -c -P {number} {start} {cluster_size}" for number, start in enumerate(starts, 1))
            )

    def _bitmap(self, *options: str, name: str) -> None:
        bitmap(self.image, *options, name=name, secret=self.combination.secret)

    def _other(self, file: str, name: str) -> None:
        """Another image of the same size, with a bitmap of its own."""
        other, size = self.folder / file, self.combination.size
        qemu_img("create", "-q", "-f", "qcow2", other, str(size))
        qemu_img("bitmap", "--add", "-g", "4k", other, name)
        requests = [f"write -P 5 {self.random.randrange(0, size - KIB, 512)} 1k" for _ in range(4)]
        qemu_io(other, *requests, f"write -P 6 {size - 512} 512")


def bitmap(image: Path, *options: str, name: str, secret: str | None = None) -> None:
    """`qemu-img bitmap OPTIONS IMAGE NAME`, in the image's folder, whatever the image needs to be opened."""
    opening, file = open_arguments(image, secret)
    qemu_img("bitmap", *options, *opening, file, name, cwd=image.parent)


def copy(image: Path, folder: Path) -> Path:
    """The image with everything beside it, in a folder of its own. Holes stay holes."""
    folder.mkdir()
    run("cp", "--sparse=always", *sorted(image.parent.iterdir()), folder)
    return folder / image.name


def discard(image: Path) -> None:
    """Remove a copy: pytest keeps the folders of the last three runs, and this matrix would be gigabytes."""
    shutil.rmtree(image.parent)
