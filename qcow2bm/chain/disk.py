"""A disk as a guest finds it: the layers of a chain from the top down.

Nothing is read before it is asked for, and ranges that are unallocated everywhere or zero are never read at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from ..image.file import ImageFile
from .layers import Extent, Kind, Layer


class Disk:
    """Guest content, read-only. Use `qcow2bm.chain.opening.open_disk`, as a context manager.

    Attributes:
        layers: the top first.
        size: bytes of the disk.
        is_shareable: several threads may read its extents, while one asks for them.
    """

    def __init__(self, layers: Sequence[Layer], size: int, files: Sequence[ImageFile] = ()) -> None:
        self.layers = tuple(layers)
        self.size = size
        self.is_shareable = all(layer.is_shareable for layer in self.layers)
        self._files = tuple(files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that were opened for this disk, and drop their locks."""
        for file in self._files:
            file.close()

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """The disk between two offsets as runs of data and of zeroes, as long as they come.

        Raises:
            CorruptImageError: a mapping table cannot be read.
        """
        pending: Extent | None = None
        for extent in self._resolved(start, self.size if stop is None else min(stop, self.size)):
            if pending is not None and pending.goes_on_with(extent):
                joined = pending.length + extent.length
                pending = Extent(pending.offset, joined, pending.kind, pending.store, pending.place, pending.skip)
                continue
            if pending is not None:
                yield pending
            pending = extent
        if pending is not None:
            yield pending

    def _resolved(self, start: int, stop: int) -> Iterator[Extent]:
        """Pieces of the layers; where one has nothing the one below is asked, and below the last are zeroes."""
        stack = [(1, self._pieces(0, start, stop))]
        while stack:
            below, pieces = stack[-1]
            piece = next(pieces, None)
            if piece is None:
                stack.pop()
            elif piece.kind is not Kind.UNALLOCATED:
                yield piece
            elif below < len(self.layers):
                stack.append((below + 1, self._pieces(below, piece.offset, piece.end)))
            else:
                yield Extent(piece.offset, piece.length, Kind.ZERO)

    def _pieces(self, index: int, start: int, stop: int) -> Iterator[Extent]:
        """The pieces of one layer in a range; what lies past its end is zeroes, whatever is below it."""
        layer = self.layers[index]
        end = stop if index == 0 else min(max(start, layer.size), stop)
        if end > start:
            yield from layer.pieces(start, end)
        if stop > end:
            yield Extent(end, stop - end, Kind.ZERO)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes of guest data, which the caller keeps small.

        Raises:
            ValueError: the range is not within the disk.
            CorruptImageError: it cannot be read.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are not within a disk of {self.size} bytes")
        buffer = bytearray(length)
        view = memoryview(buffer)
        for extent in self.extents(offset, offset + length):
            read_into(extent, extent.offset, view[extent.offset - offset : extent.end - offset])
        return bytes(buffer)


def read_into(extent: Extent, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with an extent's bytes from guest offset `offset` on; it lies within the extent."""
    if extent.store is None:
        buffer[:] = bytes(len(buffer))
        return
    extent.store.read_into(extent.place, extent.skip + offset - extent.offset, buffer)
