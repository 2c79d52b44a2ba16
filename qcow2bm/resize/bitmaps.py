"""Which bitmaps follow a resize, which must be made to fit, and which stand in its way.

A bitmap whose table does not fit the disk proves that something resized the disk and left the bitmaps behind: all of
them, also those whose tables happen to fit, since a table of one cluster of bits may be right for many sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..bitmap.bits import BitVector
from ..bitmap.store import BitmapDirectory, State, StoredBitmap, require_ready
from ..errors import BitmapBrokenError, BitmapError, BitmapLimitError
from ..format.bitmap_directory import BitmapFlag
from ..format.geometry import Geometry, div_up
from ..format.limits import MAX_BITMAP_BYTES
from .bits import resized, with_unknown_end

WAY_OUT = "`qcow2bm repair` or `qcow2bm remove` it first, then resize"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The disk before and after, in bytes."""

    old: Geometry
    new: Geometry

    @property
    def differ(self) -> bool:
        """True if the disk gets another size."""
        return self.old.virtual_size != self.new.virtual_size


@dataclass(frozen=True, slots=True)
class Tail:
    """What bitmaps say of bytes that are new.

    Attributes:
        wanted: what the user says; None for clean, but dirty where bitmaps had been left behind.
        exposed: ranges (offset, length) of the new bytes that may not read as zeroes: dirty in any case.
    """

    wanted: bool | None
    exposed: tuple[tuple[int, int], ...] = ()

    @property
    def exposed_bytes(self) -> int:
        """How many bytes of them there are."""
        return sum(length for _, length in self.exposed)


@dataclass(frozen=True, slots=True)
class History:
    """What the bitmaps of an image tell of its disk.

    Attributes:
        left_behind: one of them does not fit, so something resized the disk without them.
        grown_from: the disk may have grown from as few bytes as these, meanwhile; None if nothing tells of a growth.
    """

    left_behind: bool
    grown_from: int | None

    @classmethod
    def of(cls, directory: BitmapDirectory, geometry: Geometry) -> History:
        """As the tables tell it. Their bits do not: the last cluster may be marked as a whole, past any end."""
        misfits = [stored for stored in directory.bitmaps if directory.attached and stored.is_misfit]
        ends = [
            max(0, len(stored.table) - 1) * geometry.cluster_size * 8 * stored.granularity
            for stored in misfits
            if len(stored.table) < geometry.bitmap_table_entries(stored.granularity)
        ]
        # Of several the lowest: nobody knows which of them was made first.
        return cls(bool(misfits), min(ends, default=None))

    def dirty(self, tail: Tail) -> bool:
        """What bytes are that are new, or may be."""
        return self.left_behind if tail.wanted is None else tail.wanted

    def unknown_from(self, stored: StoredBitmap, geometry: Geometry) -> int | None:
        """From where on a bitmap whose table is long enough may lack the growth, in bytes; None if it cannot."""
        if self.grown_from is None or stored.is_misfit:
            return self.grown_from
        # Nor was the disk smaller than what the table's last cluster begins with.
        last = max(0, len(stored.table) - 1) * geometry.cluster_size * 8 * stored.granularity
        return max(self.grown_from, last)


@dataclass(slots=True)
class Sized:
    """A bitmap as it shall be; `bits` None means as stored."""

    name: bytes
    granularity_bits: int
    flags: BitmapFlag
    bits: BitVector | None
    stored: StoredBitmap | None


def sized_bitmaps(directory: BitmapDirectory, sizes: Sizes, tail: Tail) -> list[Sized]:
    """All bitmaps of an image as they shall be on the disk's new size.

    Raises:
        BitmapInconsistentError, BitmapBrokenError: one cannot follow.
        BitmapLimitError: one would be larger than QEMU takes.
    """
    if directory.damage is not None:
        raise BitmapBrokenError(
            f"the bitmap directory is damaged: {directory.damage}", hint="`qcow2bm repair` says what can be done"
        )
    history = History.of(directory, sizes.old)
    return [
        Sized(
            stored.entry.name,
            stored.entry.granularity_bits,
            stored.entry.flags,
            _bits(stored, sizes, tail, history) if _follows(directory, stored, sizes, history) else None,
            stored,
        )
        for stored in directory.bitmaps
    ]


def _follows(directory: BitmapDirectory, stored: StoredBitmap, sizes: Sizes, history: History) -> bool:
    """True if its bits are to be made for the new size.

    On a disk that keeps its size, what is unusable for other reasons stays as it is: it is in nobody's way.
    """
    if not sizes.differ:
        doubtful = history.grown_from is not None and stored.state is State.READY
        return directory.attached and (stored.is_misfit or doubtful)
    in_use = stored.entry.in_use
    if not (directory.attached and stored.is_misfit and not in_use):
        try:
            require_ready(stored)
        except BitmapError as error:
            raise type(error)(error.message, hint=f"it cannot follow the disk: {WAY_OUT}") from None
    size = sizes.new.bitmap_bytes(stored.granularity)
    if size > MAX_BITMAP_BYTES:
        raise BitmapLimitError(
            f"bitmap '{stored.name}' would have {size} bytes, above {MAX_BITMAP_BYTES}",
            hint="give it a larger granularity first",
        )
    return True


def _bits(stored: StoredBitmap, sizes: Sizes, tail: Tail, history: History) -> BitVector:
    granularity, dirty = stored.granularity, history.dirty(tail)
    bits = _fitted(stored, sizes.old, history, dirty=dirty)
    grown = sizes.new.virtual_size > sizes.old.virtual_size
    bits = resized(bits, sizes.new.bitmap_bits(granularity), tail=False)
    if grown and dirty:
        # The last bit may stand for bytes of the old disk and for new ones.
        bits = bits.with_range(sizes.old.virtual_size // granularity, bits.length, value=True)
    for offset, length in tail.exposed:
        bits = bits.with_range(offset // granularity, div_up(offset + length, granularity), value=True)
    return bits


def _fitted(stored: StoredBitmap, geometry: Geometry, history: History, *, dirty: bool) -> BitVector:
    """The bits for the disk as it is, of a bitmap that may have been left behind."""
    bits = stored.table_bits if stored.is_misfit else stored.bits
    short = len(bits.chunks) < geometry.bitmap_table_entries(stored.granularity)
    if short:
        bits = with_unknown_end(bits, tail=dirty)
    bits = resized(bits, geometry.bitmap_bits(stored.granularity), tail=dirty)
    start = None if short or not dirty else history.unknown_from(stored, geometry)
    if start is not None and start < geometry.virtual_size:
        bits = bits.with_range(start // stored.granularity, bits.length, value=True)
    return bits


def lines(bitmaps: Iterable[Sized], sizes: Sizes, tail: Tail, history: History) -> Iterator[str]:
    """What is done to each bitmap, for people."""
    if history.left_behind:
        yield "something resized the disk and left the bitmaps behind: what they may lack is " + (
            "dirty in all of them" if history.dirty(tail) else "clean in all of them, as --clean-tail says"
        )
    for bitmap in bitmaps:
        if bitmap.bits is not None and bitmap.stored is not None:
            yield f"bitmap '{bitmap.stored.name}': {_line(bitmap.stored, sizes, tail, history)}"
    if tail.exposed:
        despite = ", whatever --clean-tail says" if tail.wanted is False else ""
        yield (
            f"{tail.exposed_bytes} of the new bytes are not zeroes, or may not be: "
            f"they are dirty in every bitmap{despite}"
        )
    if tail.wanted and sizes.new.virtual_size < sizes.old.virtual_size and not history.left_behind:
        yield "a smaller disk has no new bytes: --dirty-tail means nothing here"


def _line(stored: StoredBitmap, sizes: Sizes, tail: Tail, history: History) -> str:
    said = "dirty" if history.dirty(tail) else "clean"
    start = history.unknown_from(stored, sizes.old)
    if stored.is_misfit:
        has, needs = len(stored.table), sizes.new.bitmap_table_entries(stored.granularity)
        return f"its table of {has} clusters of bits becomes one of {needs}, what it did not cover is {said}"
    if start is not None:
        return f"its table fits, but nothing says that it was made for this size: from byte {start} on it is " + (
            said if history.dirty(tail) else "as it was"
        )
    if sizes.new.virtual_size <= sizes.old.virtual_size:
        return "follows"
    if tail.exposed and said == "clean":
        said = "clean but for those that may not be zeroes"
    return f"follows, the new bytes are {said}"


def sized(geometry: Geometry, size: int) -> Geometry:
    """The geometry of the same image with another virtual size."""
    return replace(geometry, virtual_size=size)
