"""What refers to which host clusters, apart from guest data: the image's own structures as ranges with an owner.

The proof asks whether a cluster has other owners, the usage summary how much each kind takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from ..format.entries import refcount_block_offset
from ..format.extensions import CryptoHeaderPointer
from ..format.snapshot_table import SnapshotEntry
from ..format.text import decode_name
from .image import Qcow2Image


class Kind(Enum):
    """Kinds of clusters, as `info` lists them."""

    HEADER = "header"
    REFCOUNTS = "refcounts"
    L1_TABLES = "l1-tables"
    L2_TABLES = "l2-tables"
    SNAPSHOT_TABLE = "snapshot-table"
    ENCRYPTION_HEADER = "encryption-header"
    BITMAPS = "bitmaps"
    GUEST_DATA = "guest-data"


@dataclass(frozen=True, slots=True)
class Reference:
    """`owner`, of one kind, uses `length` bytes at host offset `offset`."""

    offset: int
    length: int
    kind: Kind
    owner: str


def structures(
    image: Qcow2Image, refcount_table: Iterable[int], crypto: CryptoHeaderPointer | None
) -> Iterator[Reference]:
    """Header, refcount table and blocks, encryption header."""
    yield from single_structures(image, crypto)
    for index, entry in enumerate(refcount_table):
        offset = refcount_block_offset(entry)
        if offset:
            yield Reference(offset, image.geometry.cluster_size, Kind.REFCOUNTS, f"refcount block {index}")


def single_structures(image: Qcow2Image, crypto: CryptoHeaderPointer | None) -> Iterator[Reference]:
    """Those of which there is one: header, refcount table, encryption header."""
    header, geometry = image.header, image.geometry
    yield Reference(0, geometry.cluster_size, Kind.HEADER, "the header")
    table_bytes = header.refcount_table_clusters * geometry.cluster_size
    yield Reference(header.refcount_table_offset, table_bytes, Kind.REFCOUNTS, "the refcount table")
    if crypto is not None:
        yield Reference(crypto.offset, crypto.length, Kind.ENCRYPTION_HEADER, "the encryption header")


def l1_owner(snapshot: SnapshotEntry | None) -> str:
    """What the L1 table of the active disk (None) or of a snapshot is called."""
    return "the active L1 table" if snapshot is None else f"the L1 table of snapshot {decode_name(snapshot.id)}"
