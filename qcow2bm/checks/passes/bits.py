"""The bits of the bitmaps: what the format forbids or what wastes space, and what bitmaps tell about each other.

Nothing here reads guest data.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from bitarray import bitarray  # noqa: TC002 - loaded already, by `bitmap`

from ...bitmap.bits import BitVector
from ...bitmap.granularity import coarsen
from ...bitmap.store import State, StoredBitmap
from ...format.entries import OFFSET_MASK, l1_offset, used_clusters
from ..model import Finding, Location
from ..problems import found
from ..view import View

_LOOKED_AT = 1 << 20
"""Data clusters that are read to see whether they are needless."""


def bitmap_data(view: View) -> Iterator[Finding]:
    """Bits past the end of the disk, and data clusters that a table entry alone could stand for."""
    seen: set[int] = set()  # a cluster that several tables name is read once
    for bitmap in view.bitmaps:
        if bitmap.state in (State.READY, State.INCONSISTENT, State.DETACHED) and any(bitmap.table):
            yield from _tail(view, bitmap)
            if bitmap.state is State.READY:
                yield from _needless(view, bitmap, seen)


def _tail(view: View, bitmap: StoredBitmap) -> Iterator[Finding]:
    geometry, table = view.geometry, bitmap.table
    bits = geometry.bitmap_bits(bitmap.granularity)
    last, within = divmod(bits - 1, 8 * geometry.cluster_size) if bits else (0, -1)
    if last >= len(table):
        return
    offset = table[last] & OFFSET_MASK
    if not offset or offset >= view.file.size:
        return
    data = int.from_bytes(view.file.read_padded(offset, geometry.cluster_size), "little")
    extra = (data >> within + 1).bit_count()
    if extra:
        where = Location("bitmap data", offset, bitmap=bitmap.name)
        yield found("bitmap-tail-bits", f"bitmap '{bitmap.name}' has {extra} bits set past the end of the disk", where)


def _needless(view: View, bitmap: StoredBitmap, seen: set[int]) -> Iterator[Finding]:
    size = view.geometry.cluster_size
    constants = (bytes(size), b"\xff" * size)
    needless, first = 0, 0
    for value in bitmap.table:
        offset = value & OFFSET_MASK
        if not offset or offset in seen:
            continue
        if len(seen) >= _LOOKED_AT:
            break
        seen.add(offset)
        if view.file.is_hole(offset, size) or view.file.read_padded(offset, size) in constants:
            needless, first = needless + 1, first or offset
    if needless:
        text = f"bitmap '{bitmap.name}' has {needless} data clusters that are all zero or all one"
        where = Location("bitmap data", first, bitmap=bitmap.name)
        yield found("bitmap-needless-clusters", text, where, count=needless)


def nesting(view: View) -> Iterator[Finding]:
    """Of two bitmaps that both recorded throughout, the older holds every bit of the newer one.

    Which is older nobody has written down. But at one granularity, sorted by size, each must be inside the next.
    """
    if view.hidden:
        return  # tables that share clusters tell nothing
    recording = [bitmap for bitmap in view.bitmaps if bitmap.recording and bitmap.state is State.READY]
    coarsest = max((bitmap.granularity for bitmap in recording), default=0)
    # One without any data is empty, and so inside each other one.
    sized = [(bitmap, _coarsened(view, bitmap, coarsest)) for bitmap in recording if any(bitmap.table)]
    sized.sort(key=lambda pair: pair[1].count())
    for (smaller, inner), (larger, outer) in pairwise(sized):
        missing = inner.union(outer).count() - outer.count()
        if missing:
            text = (
                f"both record, but '{smaller.name}' has {missing} dirty granules of {coarsest} bytes that "
                f"'{larger.name}' has not: one of them was merged into, cleared or switched off for a while, "
                "or it misses writes"
            )
            yield found("bitmaps-not-nested", text, Location("bitmaps", bitmap=smaller.name), granules=missing)


def _coarsened(view: View, bitmap: StoredBitmap, granularity: int) -> BitVector:
    if bitmap.granularity == granularity:
        return bitmap.bits
    length = view.geometry.bitmap_bits(granularity)
    ratio = granularity // bitmap.granularity
    return bitmap.bits.resampled(length, view.geometry.cluster_size, 1, ratio)


def overlay(view: View) -> Iterator[Finding]:
    """All that an overlay holds was written since it was made: a recording bitmap of that age must hold it too.

    Of several, the one that holds most is the only candidate for that age.
    """
    if view.image.backing_file is None or view.hidden:
        return
    recording = [bitmap for bitmap in view.bitmaps if bitmap.recording and bitmap.state is State.READY]
    if not recording:
        return
    coarsest = max(view.geometry.cluster_size, *(bitmap.granularity for bitmap in recording))
    bitmap, dirty = max(
        ((bitmap, _coarsened(view, bitmap, coarsest)) for bitmap in recording), key=lambda pair: pair[1].count()
    )
    missing = _not_dirty(view, dirty, coarsest)
    if missing:
        text = (
            f"the overlay holds {missing} granules of {coarsest} bytes that are clean in '{bitmap.name}': it began "
            "after the overlay did, or was cleared since, or data was copied up from the backing file, or it misses "
            "writes"
        )
        yield found("bitmap-misses-overlay", text, Location("bitmaps", bitmap=bitmap.name), granules=missing)


def _not_dirty(view: View, dirty: BitVector, granularity: int) -> int:
    """Granules in which the active disk says something about a cluster, and that are not dirty."""
    geometry, ratio = view.geometry, granularity // view.geometry.cluster_size
    missing, last = 0, -1
    for index, held in _held(view):
        first = index * geometry.l2_entries
        coarse = coarsen(held, ratio) if ratio > 1 else held
        start = first // ratio
        clean = coarse & ~dirty.slice(start, start + len(coarse))
        missing += clean.count()
        if clean[0] and start == last:
            missing -= 1  # one granule over several tables
        if clean[-1]:
            last = start + len(clean) - 1
    return missing


def _held(view: View) -> Iterator[tuple[int, bitarray]]:
    """Of each L2 table of the active disk one bit for each of its clusters about which it says anything."""
    geometry, size = view.geometry, view.geometry.cluster_size
    clusters = geometry.clusters(geometry.virtual_size)
    width = (geometry.l2_entry_size * 8).bit_length() - 1  # log2 of an entry's bits: each is taken for one number
    for index, entry in enumerate(view.read_l1(view.roots[0])):
        offset, left = l1_offset(entry), clusters - index * geometry.l2_entries
        if left <= 0:
            return
        if offset and offset < view.file.size and not view.file.is_hole(offset, size):
            yield index, used_clusters(view.file.read_padded(offset, size), width)[:left]
