"""Why clusters that nothing refers to may be no leaks although all of the image could be read.

A field of the header that is wrong but not impossible changes what the tables mean, and whole parts of the image then
look unused. No single cluster tells that; the image as a whole does. What is found here is no proof: it only keeps
the clusters from being freed without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ..errors import CorruptImageError
from ..format.entries import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
    L2Entry,
    get_refcount,
    l1_offset,
    refcount_block_offset,
    table_entries,
)
from ..format.extensions import ExtensionType
from ..format.header import Incompatible
from ..format.limits import MAX_REFCOUNT_ORDER, MAX_SNAPSHOTS
from ..format.snapshot_table import SnapshotEntry, parse_snapshots
from .lost import Leaked, counted_too_often
from .view import View

_FEW = 8
"""Clusters that a crash leaks even in a small image."""
_SHARE = 10
"""One in so many of the clusters in use that are leaked is more than a crash leaves."""
_TABLES = 64
"""L2 tables that are read again, to see what else their words could be."""
_COMPARED = 512
"""Refcounts that are read in other widths."""


def header_doubt(view: View, leaked: Leaked) -> str | None:
    """What in the header contradicts the tables, or None.

    Args:
        leaked: the clusters without any reference.
    """
    if leaked:
        if view.header.has_data_file and view.image.extensions.find(ExtensionType.DATA_FILE) is None:
            return "there is a data file bit but no name of a data file: the bit may be wrong"
        if view.geometry.extended_l2 and _names_leaked(view, leaked):
            return "subcluster bitmaps look like L2 entries: the extended L2 bit may be wrong"
        if _fits_larger_clusters(view):
            return "no table begins at an odd cluster: cluster_bits may be wrong"
    if view.nonsense > 1 and not view.geometry.extended_l2 and _has_subclusters(view):
        return "every other L2 entry looks like a subcluster bitmap: the extended L2 bit may be wrong"
    if (leaked or view.overcounted or view.undercounted > _FEW) and _fits_other_width(view):
        return "in another width all refcounts would be right: refcount_order may be wrong"
    return _other_size(view)


def has_wrong_pointers(view: View) -> bool:
    """True if an entry may name another cluster than it should: one is referred to and not counted, one the reverse.

    Lazy refcounts leave that as well, until the dirty bit is gone.
    """
    is_dirty = bool(view.header.incompatible_features & Incompatible.DIRTY)
    return bool(view.uncounted and (view.leaks or view.overcounted)) and not is_dirty


def leak_doubt(view: View, leaked: Leaked, plain: int, *, has_table: bool) -> str | None:
    """Why leaks may be no leaks, or None.

    Args:
        leaked: the clusters without any reference.
        plain: how many clusters are counted too often, without those that belonged to a bitmap.
        has_table: a lost table is among them.
    """
    used = view.census.guest + view.l2_tables + plain
    if not plain:
        return None
    reason = None
    if has_wrong_pointers(view):
        count = sum(run.count for run in view.uncounted)
        clusters = "a cluster that is referred to is" if count == 1 else f"{count} clusters that are referred to are"
        reason = f"{clusters} not counted, and this one may have been meant"
    elif has_table:
        reason = "the lost table may have referred to it"
    elif _lost_snapshot(view, leaked):
        reason = "the snapshot table goes on with a snapshot that the header does not count"
    elif plain > max(_FEW, used // _SHARE):
        reason = f"one of {plain} such clusters, {used} being in use: more than a crash leaves"
    elif view.unseen:
        reason = "there are too many to see what each of them holds"
    elif view.held_before(counted_too_often(view)):
        reason = "the repair whose undo file stands beside the image held it back"
    return reason


# ---- the header ----


def _other_size(view: View) -> str | None:
    """What says that the disk is of another size: tables of all bitmaps that agree, or of one and the mapping too."""
    low, high, count = 0, 1 << 63, 0
    for bitmap in view.bitmaps:
        entry, codes = bitmap.entry, {fault.code for fault in bitmap.entry_faults}
        if entry.in_use or codes - {"bitmap-table-size", "bitmap-name", "bitmap-padding"}:
            continue  # that of one in use may be of any size, and of another nothing is believed
        if "bitmap-table-size" not in codes:
            return None
        reach = 8 * view.geometry.cluster_size * entry.granularity
        low, high = max(low, (entry.bitmap_table_size - 1) * reach), min(high, entry.bitmap_table_size * reach)
        count += 1
    if not 0 <= low < high or not count:
        return None
    beyond = any(view.read_l1(view.roots[0])[view.geometry.l1_entries :]) if view.roots else False
    if count == 1 and not beyond and all(fault.code != "l1-too-small" for fault in view.faults):
        return None
    others = f"all {count} bitmaps are those" if count > 1 else "a bitmap, and the mapping, are those"
    return f"{others} of a disk of more than {low} and at most {high} bytes: the size in the header may be wrong"


def _l2_tables(view: View) -> Iterator[int]:
    """Host offsets of the L2 tables of the active disk."""
    for entry in view.read_l1(view.roots[0]) if view.roots else ():
        offset = l1_offset(entry)
        if offset and view.geometry.may_start(offset, view.geometry.cluster_size):
            yield offset


def _names_leaked(view: View, leaked: Leaked) -> bool:
    """True if subcluster bitmaps read as the L2 entries of leaked clusters: of two, or of one with a copied flag."""
    geometry, found = view.geometry, set[int]()
    for table in islice(_l2_tables(view), _TABLES):
        for value in table_entries(view.file.read_padded(table, geometry.cluster_size))[1::2]:
            offset = value & OFFSET_MASK
            if value & (COMPRESSED | L2_RESERVED | ZERO) or not geometry.is_aligned(offset):
                continue
            if geometry.cluster_of(offset) in leaked:
                found.add(offset)
                if value & COPIED or len(found) > 1:
                    return True
    return False


def _has_subclusters(view: View) -> bool:
    """True if all L2 entries of odd numbers break the format, and no other does."""
    bitmaps = 0
    for table in islice(_l2_tables(view), _TABLES):
        for index, value in enumerate(table_entries(view.file.read_padded(table, view.geometry.cluster_size))):
            is_bitmap = value != 0 and bool(index % 2)
            is_bad = next(L2Entry(value).faults(view.geometry, version=view.header.version), None) is not None
            if is_bad != is_bitmap:
                return False
            bitmaps += is_bitmap
    return bitmaps > 1


def _fits_larger_clusters(view: View) -> bool:
    """True if no table begins at an odd cluster. QEMU puts the first refcount table into the second cluster."""
    header, double = view.header, 2 * view.geometry.cluster_size
    places = [header.refcount_table_offset, header.l1_table_offset]
    places += [refcount_block_offset(entry) for entry in view.stored.table if entry]
    return not any(place % double for place in places) and not any(place % double for place in _l2_tables(view))


def _fits_other_width(view: View) -> bool:
    """True if the first refcounts, read in another width, are all what they should be."""
    block, geometry = view.stored.block(0), view.geometry
    if block is None or view.header.version < 3:
        return False
    orders = [order for order in range(MAX_REFCOUNT_ORDER + 1) if order != geometry.refcount_order]
    for cluster in range(min(_COMPARED, geometry.cluster_size >> 3, view.census.clusters)):
        references = view.census.references(cluster)
        orders = [order for order in orders if get_refcount(block, cluster, order) == references]
        if not orders:
            return False
    return True


# ---- the snapshot table ----


def _lost_snapshot(view: View, leaked: Leaked) -> bool:
    """True if a sound entry follows those that the header counts, and its L1 table is leaked."""
    entry = _entry_after_the_last(view)
    if entry is None or not (entry.l1_table_offset and entry.l1_size):
        return False
    return (
        view.geometry.may_start(entry.l1_table_offset, 8 * entry.l1_size)
        and view.geometry.cluster_of(entry.l1_table_offset) in leaked
    )


def _entry_after_the_last(view: View) -> SnapshotEntry | None:
    header, known = view.header, len(view.snapshots)
    if not header.snapshots_offset or known >= MAX_SNAPSHOTS:
        return None
    try:
        entries = parse_snapshots(view.file.read_padded, header.snapshots_offset, known + 1)
        return next((entry for _, entry in islice(entries, known, None)), None)
    except CorruptImageError:
        return None
