"""From a wanted size to the plan of a resize.

The plan goes the way of every change: what nothing refers to yet is written first (tables, copies, bitmaps), then the
header names all of it at once, with the new size, and only then is given back what the old disk had. A crash leaves the
old disk with its bitmaps or the new one with its own, and at worst leaked clusters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..bitmap.store import BitmapDirectory
from ..bitmap.write import replace_directory
from ..errors import NoSpaceError, UnsupportedImageError, UsageError
from ..format.entries import OFFSET_MASK
from ..format.limits import MAX_FILE_SIZE, MAX_L1_ENTRIES
from ..image.change import Change, no_change
from ..image.file import ImageFile
from ..image.image import Qcow2Image
from ..image.plan import SECTOR, DiskSize, Plan
from . import data_file as external
from .bitmaps import History, Sized, Sizes, Tail, lines, sized, sized_bitmaps
from .counted import require_counted
from .header import switch
from .mapping import Filling, NewMapping
from .tidying import plan_tidying


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks for.

    Attributes:
        size: of the disk, in bytes.
        shrink: the end of the disk may be given up.
        dirty_tail: what bitmaps say of new bytes; None for clean, and dirty if bitmaps had been left behind.
        data_file: the external data file, of an image that has one.
    """

    size: int
    shrink: bool = False
    dirty_tail: bool | None = None
    data_file: Path | None = None


def plan_resize(
    image: Qcow2Image,
    size: int,
    *,
    shrink: bool = False,
    dirty_tail: bool | None = None,
    data_file: str | os.PathLike[str] | None = None,
) -> Plan:
    """What to write to give a disk another size, with every bitmap following.

    With the size that the disk has, bitmaps whose tables do not fit it are made to; an empty plan if all do.

    Args:
        size: bytes, a multiple of 512.
        shrink: without it a smaller size is refused: what lies past the new end is lost.
        dirty_tail: mark new bytes in the bitmaps, or do not; None for clean, but dirty in all bitmaps if one of them
            does not fit.
        data_file: where the external data file is, for an image that has one.

    Raises:
        UsageError: no size of a disk, or a smaller one without `shrink`.
        UnsupportedImageError: an image that cannot be resized.
        BitmapInconsistentError, BitmapBrokenError, BitmapLimitError: a bitmap cannot follow.
        NoSpaceError: no room for the tables.
        CorruptImageError, ProofError: the image is not what the plan would rely on.
    """
    image.require_writable()
    wish = Wish(size, shrink, dirty_tail, None if data_file is None else Path(data_file))
    sizes = Sizes(image.geometry, sized(image.geometry, size))
    _require_possible(image, wish, sizes)
    directory = BitmapDirectory(image)
    if not sizes.differ:
        return _fitting(image, directory, sizes, wish)
    sized_bitmaps(directory, sizes, Tail(dirty_tail))  # refuses first what needs no further look
    with external.opened(image, wish.data_file) as file:
        return _Resize(image, directory, sizes, wish, file).plan()


def _require_possible(image: Qcow2Image, wish: Wish, sizes: Sizes) -> None:
    """Refuse what `qemu-img resize` refuses."""
    old, new = sizes.old.virtual_size, wish.size
    if new <= 0 or new % SECTOR:
        raise UsageError(f"a disk cannot have {new} bytes", hint="its size is a positive multiple of 512")
    if new > MAX_FILE_SIZE:
        raise UsageError(f"a disk of {new} bytes is larger than QEMU can address")
    if new < old and not wish.shrink:
        raise UsageError(
            f"the disk has {old} bytes, and what lies past {new} would be lost",
            hint="--shrink says that this is meant; shrink the file systems on it first",
        )
    if sizes.new.l1_entries > MAX_L1_ENTRIES:
        raise NoSpaceError(
            f"a disk of {new} bytes needs an L1 table above 32 MiB", hint="convert the image to larger clusters"
        )
    if sizes.differ and image.header.version < 3 and image.header.nb_snapshots:
        raise UnsupportedImageError(
            "a version 2 image with internal snapshots cannot be resized: they do not know their own size",
            hint="`qemu-img amend -o compat=1.1` makes it version 3",
        )


def _fitting(image: Qcow2Image, directory: BitmapDirectory, sizes: Sizes, wish: Wish) -> Plan:
    """The plan that makes bitmaps fit the disk as it is."""
    tail = Tail(wish.dirty_tail)
    bitmaps = sized_bitmaps(directory, sizes, tail)
    summary = tuple(lines(bitmaps, sizes, tail, History.of(directory, sizes.old)))
    change = Change(image)
    pointer = replace_directory(change, directory, bitmaps) if directory.pointer is not None else None
    if pointer is None:
        return no_change(image, summary)
    return change.plan(
        lambda head: switch(head, "switch to bitmaps that fit", pointer), directory.references(), summary
    )


class _Resize:
    """A resize as it is being planned."""

    def __init__(
        self, image: Qcow2Image, directory: BitmapDirectory, sizes: Sizes, wish: Wish, data_file: ImageFile | None
    ) -> None:
        self._image = image
        self._directory = directory
        self._sizes = sizes
        self._wish = wish
        self._data_file = data_file
        self._old, self._new = sizes.old.virtual_size, sizes.new.virtual_size
        self._change = Change(image)

    def plan(self) -> Plan:
        """The whole change."""
        image, geometry = self._image, self._image.geometry
        keep = geometry.clusters(min(self._old, self._new))
        mapping = NewMapping(self._change, keep, geometry.clusters(self._new))
        tail = Tail(self._wish.dirty_tail)
        if self._new > self._old:
            tail = replace(tail, exposed=self._extend(mapping))
        l1_table = mapping.put()
        bitmaps = sized_bitmaps(self._directory, self._sizes, tail)
        pointer = replace_directory(self._change, self._directory, bitmaps) if bitmaps else None
        stays = self._directory.pointer
        if stays is not None and self._directory.attached and pointer is None:
            # QEMU writes to it as it opens the image, and refuses to where it lies on another table.
            self._change.rely_on(stays.bitmap_directory_offset, stays.bitmap_directory_size)
        if mapping.dropped:
            self._change.lower(mapping.dropped)
        plan = self._change.plan(
            lambda head: switch(head, "switch to the new disk", pointer, self._new, l1_table),
            self._directory.references(),
            tuple(self._lines(bitmaps, tail)),
        )
        plan = replace(plan, disk=DiskSize(self._old, self._new, tail.exposed_bytes))
        if self._new < self._old:
            # The file's end is cut off, and blocks that count nothing go: by refcounts that must not be too low.
            if mapping.dropped is None:  # else that was seen when the first reference went
                require_counted(image)
            plan = replace(self._change.trimmed(plan), then=plan_tidying)
        if self._data_file is not None:
            plan = replace(plan, data_file=external.lengths(image, self._data_file, self._old, self._new))
        return plan

    def _extend(self, mapping: NewMapping) -> tuple[tuple[int, int], ...]:
        """Say what the mapping has for new bytes; returns the ranges of them that may not read as zeroes."""
        image, old, new = self._image, self._old, self._new
        if self._data_file is not None and external.is_raw(image):
            if new > OFFSET_MASK:
                raise NoSpaceError("an L2 entry cannot say where in the data file so large a disk ends")
            mapping.filling = Filling.IN_PLACE
            return external.exposed_bytes(self._data_file, old, new)
        if image.backing_file is None and not old % image.geometry.cluster_size:
            return ()
        from ..chain.opening import Rules  # guest data is read with numpy
        from .old_end import backing_size, exposed_bytes, hide_backing

        rules = Rules(use_locks=image.locked)
        if backing_size(image, replace(rules, held=(image.file,))) > old:
            if mapping.total > mapping.keep and image.header.version < 3:
                raise UnsupportedImageError(
                    "its backing file is longer than the disk, and version 2 has no zero clusters to hide it",
                    hint="`qemu-img amend -o compat=1.1` makes it version 3",
                )
            mapping.filling = Filling.ZEROES
            hide_backing(mapping, old, rules)
            return ()
        return exposed_bytes(image, old, self._data_file)

    def _lines(self, bitmaps: list[Sized], tail: Tail) -> list[str]:
        verb = "grow" if self._new > self._old else "shrink"
        history = History.of(self._directory, self._sizes.old)
        doubts = () if self._data_file is None else external.doubts(self._image, self._data_file, self._old)
        return [
            f"{verb} the disk from {self._old} to {self._new} bytes",
            *doubts,
            *lines(bitmaps, self._sizes, tail, history),
        ]
