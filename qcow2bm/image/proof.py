"""The proof that a plan touches only clusters that are what it takes them for.

A refcount may lie. A bitmap table entry that points at a guest's data cluster makes QEMU overwrite the guest's
data. So before a plan is carried out, everything that refers to the clusters it writes or frees is looked up in the
mapping itself: a cluster to be filled must have no reference at all, one that is rewritten or freed exactly one,
and so must the refcount blocks that count them. The walk reads L1 and L2 tables, never guest data, and looks at the
few clusters concerned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from ..errors import RUN_CHECK, ProofError
from ..format.entries import L2Entry, table_entries
from .image import Qcow2Image
from .mapping import read_l2, tables_in_a_row
from .mapping_tables import MappingTables
from .plan import Plan
from .refcounts import Refcounts
from .references import Reference, structures

_SMALL = 1 << 17
"""Mapping entries up to which plain Python is faster than loading numpy."""


def prove(
    image: Qcow2Image,
    plan: Plan,
    others: Iterable[Reference],
    refcounts: Refcounts,
    relied: Collection[int] = (),
) -> None:
    """Check that a plan may be carried out.

    Args:
        others: what refers to clusters apart from header, mapping, snapshots and refcounts: the bitmaps.
        relied: clusters that the plan leaves alone and that must have one owner as well.

    Raises:
        ProofError: a cluster has other references than the plan takes for granted. Nothing has been written.
        CorruptImageError: a mapping table cannot be read, so nothing can be proved.
    """
    expected = dict.fromkeys(relied, 1) | expected_references(image, plan)
    for cluster in _counting(image, expected, refcounts):
        expected.setdefault(cluster, 1)
    owners: dict[int, list[str]] = {cluster: [] for cluster in expected}
    for cluster, owner in find_references(image, expected, others, refcounts):
        owners[cluster].append(owner)
    for cluster, count in sorted(expected.items()):
        if len(owners[cluster]) != count:
            raise ProofError(_explain(image, cluster, owners[cluster], count), hint=RUN_CHECK)
        if count and not refcounts.get(cluster):
            place = f"the cluster at {image.geometry.offset_of(cluster):#x}"
            raise ProofError(f"{place} has refcount 0 but is used by {owners[cluster][0]}", hint=RUN_CHECK)


def _counting(image: Qcow2Image, clusters: Iterable[int], refcounts: Refcounts) -> Iterator[int]:
    """The refcount blocks that count some clusters: what else uses one of them, refcounts cannot be true."""
    for index in {cluster // image.geometry.refcounts_per_block for cluster in clusters}:
        if refcounts.block_offset(index):
            yield image.geometry.cluster_of(refcounts.block_offset(index))


def expected_references(image: Qcow2Image, plan: Plan) -> dict[int, int]:
    """Cluster number to the references it must have: none if the plan fills it, one if it rewrites or frees it."""
    geometry = image.geometry
    expected = dict.fromkeys(plan.freed, 1)
    for write in plan.writes():
        if write.length:
            clusters = range(geometry.cluster_of(write.offset), geometry.cluster_of(write.end - 1) + 1)
            for cluster in clusters:
                expected[cluster] = 0 if write.old is None else expected.get(cluster, 1)
    return expected


def find_references(
    image: Qcow2Image, wanted: dict[int, int], others: Iterable[Reference], refcounts: Refcounts
) -> Iterator[tuple[int, str]]:
    """Pairs (cluster, owner) for everything in the image that refers to one of the `wanted` clusters."""
    mapping = MappingTables(image)
    l2_references = mapping.l2_references({image.geometry.offset_of(cluster) for cluster in wanted})
    for reference in chain(
        structures(image, refcounts.table, image.crypto_header), mapping.roots, l2_references, others
    ):
        for cluster in _wanted_in(image, wanted, reference.offset, reference.length):
            yield cluster, reference.owner
    if image.header.has_data_file:
        return  # guest clusters lie in the data file
    tables = mapping.l2_tables()
    if len(tables) * image.geometry.l2_entries <= _SMALL:
        yield from _scan(image, tables, wanted)
    else:
        yield from _scan_bulk(image, tables, wanted)


def _wanted_in(image: Qcow2Image, wanted: dict[int, int], offset: int, length: int) -> list[int]:
    """The wanted clusters that a host range touches."""
    if length <= 0:
        return []
    touched = range(image.geometry.cluster_of(offset), image.geometry.cluster_of(offset + length - 1) + 1)
    # A length is only a number in the file: never count up to it.
    if len(touched) > len(wanted):
        return [cluster for cluster in wanted if cluster in touched]
    return [cluster for cluster in touched if cluster in wanted]


def _scan(image: Qcow2Image, tables: dict[int, int], wanted: dict[int, int]) -> Iterator[tuple[int, str]]:
    geometry = image.geometry
    stride = geometry.l2_entry_words
    for offset, l1_index in tables.items():
        for index, value in enumerate(table_entries(read_l2(image, offset))[::stride]):
            place = L2Entry(value).host_range(geometry) if value else None
            if place is not None:
                for cluster in _wanted_in(image, wanted, *place):
                    yield cluster, _guest_owner(image, l1_index, index)


def _scan_bulk(image: Qcow2Image, tables: dict[int, int], wanted: dict[int, int]) -> Iterator[tuple[int, str]]:
    from ..format.vectors import ClusterFilter, host_clusters

    geometry = image.geometry
    wanted_filter = ClusterFilter(wanted)
    for group in tables_in_a_row(sorted(tables), geometry.cluster_size):
        length = len(group) * geometry.cluster_size
        if image.file.is_hole(group[0], length):
            continue
        data = image.file.read_at(group[0], length)
        if not wanted_filter.may_hit(data, geometry):
            continue
        first, last = host_clusters(data, geometry)
        for place, cluster in wanted_filter.range_hits(first, last):
            which, index = divmod(place, geometry.l2_entries)
            yield cluster, _guest_owner(image, tables[group[which]], index)


def _guest_owner(image: Qcow2Image, l1_index: int, l2_index: int) -> str:
    guest = l1_index * image.geometry.l2_span + l2_index * image.geometry.cluster_size
    return f"guest data at {guest:#x}"


def _explain(image: Qcow2Image, cluster: int, owners: list[str], count: int) -> str:
    place = f"the cluster at {image.geometry.offset_of(cluster):#x}"
    if not owners:
        return f"{place} is used by the bitmaps, but nothing refers to it"
    who = " and by ".join(sorted(set(owners))[:3])
    if count == 0:
        return f"{place} has refcount 0 but is used by {who}"
    return f"{place} should have one owner but is used {len(owners)} times, by {who}"
