"""Which bitmaps follow a resize, which must be made to fit, and which stand in its way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..bitmap.bits import BitVector
from ..bitmap.store import BitmapDirectory, StoredBitmap, require_ready
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
    """What a bitmap says of bytes that are new.

    Attributes:
        dirty: None for clean in bitmaps that follow, and dirty in those that had been left behind.
        exposed: ranges (offset, length) of the new bytes that may not read as zeroes: dirty in any case.
    """

    dirty: bool | None
    exposed: tuple[tuple[int, int], ...] = ()


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
    return [
        Sized(
            stored.entry.name,
            stored.entry.granularity_bits,
            stored.entry.flags,
            _bits(stored, sizes, tail) if _follows(directory, stored, sizes) else None,
            stored,
        )
        for stored in directory.bitmaps
    ]


def _follows(directory: BitmapDirectory, stored: StoredBitmap, sizes: Sizes) -> bool:
    """True if its bits are to be made for the new size.

    On a disk that keeps its size, what is unusable for other reasons stays as it is: it is in nobody's way.
    """
    if not sizes.differ:
        return directory.attached and stored.is_misfit
    in_use = stored.entry.flags & BitmapFlag.IN_USE
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


def _bits(stored: StoredBitmap, sizes: Sizes, tail: Tail) -> BitVector:
    granularity, misfit = stored.granularity, stored.is_misfit
    dirty = misfit if tail.dirty is None else tail.dirty
    bits = _fitted(stored, sizes.old, dirty=dirty) if misfit else stored.bits
    grown = sizes.new.virtual_size > sizes.old.virtual_size
    bits = resized(bits, sizes.new.bitmap_bits(granularity), tail=False)
    if grown and dirty:
        # The last bit may stand for bytes of the old disk and for new ones.
        bits = bits.with_range(sizes.old.virtual_size // granularity, bits.length, value=True)
    for offset, length in tail.exposed:
        bits = bits.with_range(offset // granularity, div_up(offset + length, granularity), value=True)
    return bits


def _fitted(stored: StoredBitmap, geometry: Geometry, *, dirty: bool) -> BitVector:
    """The bits of a bitmap that was left behind, for the disk as it is."""
    bits = stored.table_bits
    if len(bits.chunks) < geometry.bitmap_table_entries(stored.granularity):
        bits = with_unknown_end(bits, tail=dirty)
    return resized(bits, geometry.bitmap_bits(stored.granularity), tail=dirty)


def lines(bitmaps: Iterable[Sized], sizes: Sizes, tail: Tail) -> Iterator[str]:
    """What is done to each bitmap, for people."""
    for bitmap in bitmaps:
        if bitmap.bits is None or bitmap.stored is None:
            continue
        misfit = bitmap.stored.is_misfit
        dirty = misfit if tail.dirty is None else tail.dirty
        if misfit:
            has, needs = len(bitmap.stored.table), sizes.new.bitmap_table_entries(bitmap.stored.granularity)
            yield (
                f"bitmap '{bitmap.stored.name}': its table of {has} clusters of bits becomes one of {needs}, "
                f"what it did not cover is {'dirty' if dirty else 'clean'}"
            )
        elif sizes.new.virtual_size > sizes.old.virtual_size:
            yield f"bitmap '{bitmap.stored.name}': follows, the new bytes are {'dirty' if dirty else 'clean'}"
        else:
            yield f"bitmap '{bitmap.stored.name}': follows"
    if tail.exposed:
        total = sum(length for _, length in tail.exposed)
        yield f"{total} of the new bytes are not zeroes, or may not be: they are dirty in every bitmap"


def sized(geometry: Geometry, size: int) -> Geometry:
    """The geometry of the same image with another virtual size."""
    return replace(geometry, virtual_size=size)
