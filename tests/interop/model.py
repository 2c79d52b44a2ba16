"""What the bitmaps of an image must be after edits and guest writes, without bits, tables or clusters.

`Model` has the methods of `qcow2bm.bitmap.edit.Edit`, so that a test says an edit once and does it to both.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tests.interop.ranges import joined, mark, unmark
from tests.support.qemu import Ranges


@dataclass
class Modelled:
    """One bitmap."""

    granularity: int
    recording: bool
    ranges: Ranges = field(default_factory=list)


class Model:
    """The bitmaps of an image with a disk of `size` bytes and, for QEMU's default granularity, its cluster size."""

    def __init__(self, size: int, cluster_size: int) -> None:
        self.size = size
        self.default_granularity = min(max(cluster_size, 4096), 65536)
        self.bitmaps: dict[str, Modelled] = {}

    # As Edit has them

    def add(
        self, name: str, *, granularity: int | None = None, recording: bool = True, all_dirty: bool = False
    ) -> None:
        """A new bitmap."""
        ranges = [(0, self.size)] if all_dirty else []
        self.bitmaps[name] = Modelled(granularity or self.default_granularity, recording, ranges)

    def remove(self, *names: str) -> None:
        """Remove bitmaps."""
        for name in names:
            del self.bitmaps[name]

    def rename(self, old: str, new: str) -> None:
        """Another name."""
        self.bitmaps[new] = self.bitmaps.pop(old)

    def clear(self, *names: str) -> None:
        """No dirty range is left."""
        for name in names:
            self.bitmaps[name].ranges = []

    def enable(self, *names: str) -> None:
        """Record from here on."""
        for name in names:
            self.bitmaps[name].recording = True

    def disable(self, *names: str) -> None:
        """Record no more."""
        for name in names:
            self.bitmaps[name].recording = False

    def merge(self, target: str, sources: Iterable[str]) -> None:
        """Every granule that a dirty range of a source touches is dirty."""
        for source in list(sources):
            for offset, length in self.bitmaps[source].ranges:
                self.set_range(target, offset, length)

    def copy(self, source: str, name: str, *, granularity: int | None = None) -> None:
        """A new bitmap like another."""
        old = self.bitmaps[source]
        self.bitmaps[name] = replace(old, granularity=granularity or old.granularity, ranges=[])
        self.merge(name, [source])

    def set_range(self, name: str, offset: int, length: int) -> None:
        """Dirty, every granule that the range touches."""
        bitmap = self.bitmaps[name]
        bitmap.ranges = mark(bitmap.ranges, offset, length, granularity=bitmap.granularity, size=self.size)

    def unset_range(self, name: str, offset: int, length: int) -> None:
        """Clean, every granule within the range."""
        bitmap = self.bitmaps[name]
        bitmap.ranges = unmark(bitmap.ranges, offset, length, granularity=bitmap.granularity, size=self.size)

    # What a guest does, and what can be seen

    def guest_wrote(self, offset: int, length: int) -> None:
        """A guest write, zero write or discard: in every bitmap that records."""
        for name, bitmap in self.bitmaps.items():
            if bitmap.recording:
                self.set_range(name, offset, length)

    @property
    def dirty(self) -> dict[str, Ranges]:
        """Dirty ranges by name."""
        return {name: joined(bitmap.ranges) for name, bitmap in self.bitmaps.items()}

    @property
    def listing(self) -> dict[str, tuple[int, bool]]:
        """Granularity and whether it records, by name."""
        return {name: (bitmap.granularity, bitmap.recording) for name, bitmap in self.bitmaps.items()}
