"""Where two disks differ: a difference is what a bitmap would have recorded had one been there from one to the other.

It is the smallest bitmap that is right. One that records marks every write, even of what was there before; comparing
sees only what is different in the end. So where a bitmap and a comparison from its beginning disagree without a fault,
the bitmap marks more.

What lies past the end of the older disk differs, whatever is there: nobody knows what is at that place wherever the
older disk was copied to. What the newer disk does not have any more is nowhere in the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..bitmap.bits import BitVector
from ..bitmap.draft import Source
from ..format.geometry import Geometry
from ..format.limits import MAX_DEFAULT_GRANULARITY
from .compare import Progress, compare
from .disk import Disk
from .layers import Qcow2Layer
from .opening import Rules, open_disk
from .pairing import nothing_differs, require_owners, shared_file

Range = tuple[int, int]
"""Offset and length of a guest range, in bytes."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The granules of a newer disk that differ from an older one. Sizes in bytes.

    Attributes:
        bits: one for each granule, set if any byte in it differs.
        shared: a file that both disks are written to, or None: what is there differs nowhere, whatever was written.
    """

    old: Path
    new: Path
    old_size: int
    new_size: int
    granularity: int
    bits: BitVector
    shared: Path | None = None

    @property
    def source(self) -> Source:
        """The same for `Edit.merge` and `Edit.copy`: the difference as a bitmap of an image of the newer disk's size.

        Raises:
            UsageError: the disks share what the newer one is written to, so nothing can differ there.
        """
        if self.shared is not None:
            raise nothing_differs(self.shared, self.old)
        return Source(f"the difference of {self.old} and {self.new}", self.new_size, self.granularity, self.bits)

    @property
    def differing_granules(self) -> int:
        """How many granules differ."""
        return self.bits.count()

    @property
    def differing_bytes(self) -> int:
        """Bytes of the granules that differ, as far as the disk goes. At granularity 512 the sectors that do."""
        return range_bytes(self.bits, self.granularity, self.new_size)

    def extents(self) -> Iterator[Range]:
        """The ranges that differ (offset, length), in order and apart."""
        return ranges(self.bits, self.granularity, self.new_size)


def diff(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    granularity: int | None = None,
    old_format: str | None = None,
    new_format: str | None = None,
    data_files: Mapping[Path, Path] | None = None,
    use_locks: bool = True,
    progress: Progress = lambda _done, _total: None,
) -> Difference:
    """Compare two disks: raw files or devices, or qcow2 images with their backing chains. Nothing is written.

    Args:
        granularity: bytes; by default what QEMU would give a bitmap of the newer disk.
        old_format: "raw" or "qcow2", and so `new_format`; None for raw, unless the file begins like something else.
        data_files: the external data file of each image that has one: no name in an image is believed for it.
        use_locks: False takes no locks: the caller knows that nobody writes to any of the files.
        progress: called with bytes of the newer disk done, and in all.

    Raises:
        UsageError: the granularity or a format is none, a format must be named, or a data file is nobody's.
        UnsupportedImageError: a disk that is encrypted, or not made of files.
        NotQcow2Error, CorruptImageError, InUseError, ImageIOError: as `qcow2bm.open`, of any file of a chain.
        BitmapLimitError: QEMU would not take a bitmap of that granularity.
    """
    rules = Rules(data_files=data_files or {}, use_locks=use_locks)
    with (
        open_disk(old, format=old_format, rules=rules) as older,
        open_disk(new, format=new_format, rules=rules) as disk,
    ):
        require_owners(rules.data_files, older, disk)
        return difference(older, disk, granularity, progress=progress)


def difference(
    old: Disk,
    new: Disk,
    granularity: int | None = None,
    *,
    chunk_bytes: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Difference:
    """The same of open disks. Raises as `compare`.

    Args:
        chunk_bytes: as `BitVector.chunk_bytes`, by default that of a bitmap in the newer image.
    """
    geometry = geometry_of(new)
    default = geometry.default_granularity if geometry is not None else MAX_DEFAULT_GRANULARITY
    chosen = default if granularity is None else granularity
    if chunk_bytes is None:
        chunk_bytes = geometry.cluster_size if geometry is not None else MAX_DEFAULT_GRANULARITY
    bits = compare(old, new, chosen, chunk_bytes=chunk_bytes, progress=progress)
    shared = shared_file(old, new)
    return Difference(old.layers[0].path, new.layers[0].path, old.size, new.size, chosen, bits, shared)


def geometry_of(disk: Disk) -> Geometry | None:
    """That of the image on top; None for a raw disk."""
    top = disk.layers[0]
    return top.image.geometry if isinstance(top, Qcow2Layer) else None


def ranges(bits: BitVector, granularity: int, size: int) -> Iterator[Range]:
    """The guest ranges (offset, length) of set bits, which end with the disk."""
    for first, stop in bits.runs():
        offset = first * granularity
        yield offset, min(stop * granularity, size) - offset


def range_bytes(bits: BitVector, granularity: int, size: int) -> int:
    """The bytes of all these ranges."""
    if not bits.length:
        return 0
    last_is_set = bits.slice(bits.length - 1, bits.length).any()
    beyond = bits.length * granularity - size
    return bits.count() * granularity - (beyond if last_is_set else 0)
