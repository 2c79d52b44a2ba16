"""Where exported bitmaps come from, and whether they still say the truth about an image.

A bitmap is worth something only for the very disk it was made on. What is told about that disk is cheap to find out:
an *image id*, a digest of the virtual size and of everything that maps guest offsets to host offsets. Changes of
bitmaps, refcounts and snapshots leave it as it is; a guest that writes to a cluster for the first time, or discards
one, changes it, and so does a copy by `qemu-img convert`.

A guest that rewrites clusters in place does not change it. The time stamp of the file tells that something was
written, though not what: so it is a reason to warn and no more. It tells nothing where writes go elsewhere, to an
external data file, nor if somebody set it back (`cp -p`, `rsync -t`).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from bitarray import bitarray

from ..errors import BitmapSizeMismatchError, LineageError
from ..format.entries import COPIED, l1_offset
from ..format.extensions import ExtensionType
from ..format.text import encode_name
from ..image.image import Qcow2Image
from ..image.mapping import read_l1, read_l2

_DOMAIN = b"qcow2bm image 1"
_DISK = struct.Struct("<QII")
_TABLE = struct.Struct("<Q32s")
_REMEMBERED = 1 << 16
"""L2 tables whose digests are kept: an L1 table may name one of them any number of times."""


def image_id(image: Qcow2Image) -> bytes:
    """SHA-256 over the virtual size and all that maps guest offsets to host offsets.

    Where tables lie does not matter, nor do empty ones, nor copied flags: only what they say of the guest's clusters.

    Raises:
        CorruptImageError: a mapping table cannot be read.
    """
    geometry = image.geometry
    total = hashlib.sha256(_DOMAIN)
    total.update(_DISK.pack(geometry.virtual_size, geometry.cluster_bits, geometry.l2_entry_size))
    for name in (image.backing_file, image.extensions.text(ExtensionType.DATA_FILE)):
        raw = encode_name(name or "")
        total.update(_DISK.pack(len(raw), 0, 0) + raw)
    for index, digest in _tables(image):
        total.update(_TABLE.pack(index, digest))
    return total.digest()


def _tables(image: Qcow2Image) -> Iterator[tuple[int, bytes]]:
    """The L1 index of each L2 table that says anything, and a digest of what it says; each table is read once."""
    mask = _relevant(image)

    @lru_cache(maxsize=_REMEMBERED)
    def digest(offset: int) -> bytes | None:
        entries = bitarray(buffer=read_l2(image, offset)) & mask
        return hashlib.sha256(entries).digest() if entries.any() else None

    for index, entry in enumerate(read_l1(image)[: image.geometry.l1_entries]):
        offset = l1_offset(entry)
        found = digest(offset) if offset else None
        if found is not None:
            yield index, found


def _relevant(image: Qcow2Image) -> bitarray:
    """A table with a bit set for each that matters.

    A copied flag says something of refcounts; only in a data file, where no offset is out of the question, does it
    tell an allocated cluster.
    """
    geometry = image.geometry
    everything = (1 << 64) - 1
    first = everything if image.header.has_data_file else everything & ~COPIED
    words = [first] if geometry.l2_entry_words == 1 else [first, everything]
    entry = b"".join(word.to_bytes(8, "big") for word in words)
    mask = bitarray()
    mask.frombytes(entry * geometry.l2_entries)
    return mask


def time_stamp(image: Qcow2Image) -> int:
    """When the image file was last written to, in nanoseconds since 1970; 0 if it has no such time that tells.

    A device has none. With an external data file a guest may rewrite all of its clusters there, and this file stays
    as it is; the time stamp of the other would not do, as writers need not go through the image.
    """
    return 0 if image.file.is_device or image.header.has_data_file else os.fstat(image.file.fd).st_mtime_ns


class Standing(Enum):
    """How an image stands to bitmaps that were exported."""

    UNTOUCHED = "untouched"
    """Nothing was written to its file since."""
    SAME_MAPPING = "same-mapping"
    """Its clusters are where they were; but something was written, bitmaps or rewritten clusters, or nothing tells."""
    OTHER = "other"
    """It is another image, or a guest has written to it since."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What is known of the image that bitmaps were exported from. Sizes in bytes, times in nanoseconds since 1970.

    Attributes:
        image_id: as `image_id` had it.
        cluster_size: of the image.
        made_ns: when the bitmaps were exported.
        mtime_ns: time stamp of the image then; 0 if it had none that tells.
        tool: what exported them.
        image: name of the image file, without its folder.
    """

    image_id: bytes
    virtual_size: int
    cluster_size: int
    made_ns: int
    mtime_ns: int
    tool: str
    image: str

    def standing(self, image: Qcow2Image) -> Standing:
        """How an image stands to the one of then.

        Raises:
            CorruptImageError: a mapping table cannot be read.
        """
        if image_id(image) != self.image_id:
            return Standing.OTHER
        untouched = self.mtime_ns and time_stamp(image) == self.mtime_ns
        return Standing.UNTOUCHED if untouched else Standing.SAME_MAPPING

    def require(self, image: Qcow2Image, *, untouched: bool = False) -> Standing:
        """Refuse an image that the bitmaps are not of; how it stands to them otherwise.

        Args:
            untouched: also one whose file was written to at all since then.

        Raises:
            BitmapSizeMismatchError: its disk has another size.
            LineageError: it is another image, or a guest has written to it since.
        """
        require_size(self.virtual_size, image)
        found = self.standing(image)
        if found is Standing.OTHER:
            raise LineageError(
                f"it is not the image the bitmaps were exported from ('{self.image}'), or was written to since then",
                hint="an incremental backup by them would miss what they do not mark; start over with a full backup, "
                "or, if you know that they are right for this disk, use --force-lineage",
            )
        if untouched and found is not Standing.UNTOUCHED:
            raise LineageError(
                "its file was written to since the bitmaps were exported, or has no time stamp that would tell",
                hint="if that were changes of bitmaps alone, leave --untouched out",
            )
        return found


def require_size(virtual_size: int, image: Qcow2Image) -> None:
    """Raise BitmapSizeMismatchError unless the image's disk has this size."""
    own = image.geometry.virtual_size
    if virtual_size != own:
        raise BitmapSizeMismatchError(
            f"its disk has {own} bytes, that of the exported bitmaps has {virtual_size}",
            hint="only bitmaps of a disk of the same size can be imported",
        )
