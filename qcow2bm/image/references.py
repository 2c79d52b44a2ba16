"""What refers to which host clusters, apart from guest data: the image's own structures as ranges with an owner.

The proof asks whether a cluster has other owners, the usage summary how much each kind takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from ..errors import RUN_CHECK, CorruptImageError
from ..format.entries import l1_offset, refcount_block_offset
from ..format.extensions import CryptoHeaderPointer
from ..format.limits import MAX_L1_ENTRIES
from ..format.snapshot_table import SnapshotEntry
from ..format.text import decode_name
from .image import Qcow2Image
from .mapping import read_l1, require_l2_aligned


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


def mapping_tables(image: Qcow2Image, tables: dict[int, int]) -> Iterator[Reference]:
    """The snapshot table, every L1 table and every L2 table, once for each L1 entry that names it.

    Args:
        tables: is filled with the offset of each L2 table and the index of the first L1 entry that names it.

    Raises:
        CorruptImageError: an L1 table or the snapshot table cannot be read, or names an L2 table that is not
            cluster-aligned.
    """
    header = image.header
    roots = [(header.l1_table_offset, header.l1_size, l1_owner(None))]
    snapshots = image.snapshots()
    yield Reference(snapshots.offset, snapshots.length, Kind.SNAPSHOT_TABLE, "the snapshot table")
    roots += [(entry.l1_table_offset, entry.l1_size, l1_owner(entry)) for entry in snapshots.entries]
    if sum(size for _, size, _ in roots) > image.file.size // 8 + MAX_L1_ENTRIES:
        raise CorruptImageError("the L1 tables together are larger than the file", hint=RUN_CHECK)
    walked: set[tuple[int, int]] = set()
    for offset, size, owner in roots:
        yield Reference(offset, size * 8, Kind.L1_TABLES, owner)
        # A table is walked once, and a hole not at all: any number of snapshots may name one.
        if (offset, size) in walked or image.file.is_hole(offset, size * 8):
            continue
        walked.add((offset, size))
        l1_table = read_l1(image, offset, size)
        for index, value in enumerate(l1_table if any(l1_table) else ()):
            table = l1_offset(value) if value else 0
            if not table:
                continue
            require_l2_aligned(image, table)
            tables.setdefault(table, index)
            yield Reference(table, image.geometry.cluster_size, Kind.L2_TABLES, f"an L2 table ({owner}, index {index})")
