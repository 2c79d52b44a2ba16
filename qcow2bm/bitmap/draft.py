"""What an edit works with: a bitmap as it shall be, and bits to take from elsewhere."""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import UsageError
from ..format.bitmap_directory import BitmapFlag
from ..format.geometry import is_power_of_two
from ..format.limits import MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS
from ..image.image import Qcow2Image
from .bits import BitVector
from .store import BitmapDirectory, StoredBitmap, require_ready


@dataclass(slots=True)
class Draft:
    """A bitmap as it shall be.

    Attributes:
        bits: its bits once an edit has asked for them; None as long as the stored ones stay as they are.
        stored: the bitmap on disk it comes from; None for a new one.
    """

    name: bytes
    granularity_bits: int
    flags: BitmapFlag
    bits: BitVector | None = None
    stored: StoredBitmap | None = None

    @property
    def granularity(self) -> int:
        """Guest bytes one bit stands for."""
        return 1 << self.granularity_bits

    def require_ready(self) -> None:
        """Raise BitmapInconsistentError or BitmapBrokenError unless the bitmap may be used."""
        if self.stored is not None:
            require_ready(self.stored)

    def current_bits(self) -> BitVector:
        """The bits as the draft has them; raises as `require_ready`."""
        self.require_ready()
        if self.bits is None:
            assert self.stored is not None, "a new draft has bits from the start"
            return self.stored.bits
        return self.bits


@dataclass(frozen=True, slots=True)
class Source:
    """Bits to merge or copy from: a bitmap of this or of another image. Sizes in bytes."""

    label: str
    virtual_size: int
    granularity: int
    bits: BitVector
    recording: bool = True

    @classmethod
    def stored(cls, image: Qcow2Image, name: str) -> Source:
        """A bitmap of an open image, which must stay open until the plan is carried out.

        Raises:
            BitmapNotFoundError, BitmapInconsistentError, BitmapBrokenError: it cannot be read.
        """
        bitmap = BitmapDirectory(image).find(name)
        return cls(
            f"{image.file.path}#{name}",
            image.geometry.virtual_size,
            bitmap.granularity,
            bitmap.readable_bits(),
            bitmap.recording,
        )


def require_granularity(granularity: int) -> None:
    """Raise UsageError unless QEMU takes bitmaps of that granularity."""
    bits = granularity.bit_length() - 1
    if not is_power_of_two(granularity) or not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        raise UsageError(f"granularity {granularity} is not a power of two between 512 bytes and 2 GiB")


class Drafts:
    """The drafts of an image's bitmaps, in directory order and by name. There may be tens of thousands.

    QEMU takes no two bitmaps of one name, but a damaged directory may hold them.
    """

    def __init__(self, drafts: Iterable[Draft]) -> None:
        self._at = dict(enumerate(drafts))
        self._places: defaultdict[bytes, list[int]] = defaultdict(list)
        for place, draft in self._at.items():
            self._places[draft.name].append(place)
        self._next = len(self._at)

    def __iter__(self) -> Iterator[Draft]:
        return iter(self._at.values())

    def __len__(self) -> int:
        return len(self._at)

    def find(self, name: bytes, *, last: bool = False) -> Draft | None:
        """The first draft of a name, or the last; None if there is none."""
        places = self._places.get(name)
        return self._at[places[-1 if last else 0]] if places else None

    def append(self, draft: Draft) -> None:
        """Put a draft behind the others."""
        self._at[self._next] = draft
        self._places[draft.name].append(self._next)
        self._next += 1

    def remove_last(self, name: bytes) -> None:
        """Take the last draft of a name out."""
        del self._at[self._places[name].pop()]

    def rename_first(self, old: bytes, new: bytes) -> None:
        """Give the first draft of a name another one, and leave it in its place."""
        place = self._places[old].pop(0)
        self._at[place].name = new
        insort(self._places[new], place)

    def replace_first(self, draft: Draft) -> None:
        """Put a draft in the place of the first of its name."""
        self._at[self._places[draft.name][0]] = draft
