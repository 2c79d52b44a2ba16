"""Export files: writing bitmaps of an image into a stream, with what is needed to know that image again.

The stream is written from its start to its end, a chunk at a time. `sidecar_reader.py` reads it, the layout is in
`format/sidecar.py`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from ..errors import BitmapInconsistentError, BitmapNotFoundError, naming
from ..format.geometry import div_up
from ..format.sidecar import (
    CHUNK_BYTES,
    MAX_TEXT_BYTES,
    Encoding,
    ExportEnd,
    ExportEntry,
    ExportEntryEnd,
    ExportFlag,
    ExportHeader,
    Kind,
    pack_chunk,
    record,
)
from ..format.text import decode_name, encode_name
from ..image.image import Qcow2Image
from ..version import __version__
from .chunks import ONES, Constant
from .sidecar_digest import Content, Sum, runs
from .sidecar_lineage import Lineage, image_id, time_stamp
from .store import BitmapDirectory, State, StoredBitmap, require_ready

T = TypeVar("T")

TOOL = f"qcow2bm {__version__}"

Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was said of a bitmap that was exported."""

    name: str
    granularity: int
    recording: bool
    stale: bool
    dirty_bytes: int
    digest: bytes


def lineage_of(image: Qcow2Image) -> Lineage:
    """What to know the image again by.

    Raises:
        CorruptImageError: a mapping table cannot be read.
    """
    return Lineage(
        image_id=image_id(image),
        virtual_size=image.geometry.virtual_size,
        cluster_size=image.geometry.cluster_size,
        made_ns=time.time_ns(),
        mtime_ns=time_stamp(image),
        tool=TOOL,
        image=image.file.path.name,
    )


def choose(image: Qcow2Image, names: Iterable[str] = (), *, stale: bool = False) -> tuple[StoredBitmap, ...]:
    """The bitmaps of these names, each once; without names all that can be exported.

    Args:
        stale: also those whose bits may lack writes: in use, or detached.

    Raises:
        BitmapNotFoundError: one is not there, or there is none to export.
        BitmapInconsistentError: one may lack writes and `stale` is off.
        BitmapBrokenError: one breaks the format, or the directory does.
    """
    directory = BitmapDirectory(image)
    wanted = list(dict.fromkeys(names))
    if not wanted:
        directory.require_undamaged()
        found = tuple(bitmap for bitmap in directory.bitmaps if _is_fit(bitmap, stale=stale))
        if found:
            return found
        for bitmap in directory.bitmaps:  # why not this one will do for all
            _refuse(bitmap)
        raise BitmapNotFoundError("there is no bitmap to export", hint="`qcow2bm list` shows what there is")
    chosen = tuple(directory.find(name) for name in wanted)
    for bitmap in chosen:
        if not _is_fit(bitmap, stale=stale):
            _refuse(bitmap)
    return chosen


def _is_fit(bitmap: StoredBitmap, *, stale: bool) -> bool:
    return bitmap.state is State.READY or (stale and bitmap.state in (State.INCONSISTENT, State.DETACHED))


def _refuse(bitmap: StoredBitmap) -> None:
    try:
        require_ready(bitmap)
    except BitmapInconsistentError as error:
        if bitmap.state is not State.ACTIVE:
            error.hint = "--stale exports what is stored, marked as stale"
        raise


def export_to(
    stream: BinaryIO, image: Qcow2Image, bitmaps: Sequence[StoredBitmap], *, progress: Progress | None = None
) -> tuple[Lineage, tuple[Exported, ...]]:
    """Write an export file; the image must not change meanwhile.

    Args:
        bitmaps: as `choose` gives them.
        progress: called with bytes of bits that were looked at, and how many there are.

    Raises:
        CorruptImageError: a mapping table or a bitmap's data cannot be read.
        OSError: the stream takes no more.
    """
    with naming(image.file.path):
        lineage = lineage_of(image)
    out = _Out(stream)
    out.write(_header(lineage, len(bitmaps)).build())
    total = sum(image.geometry.bitmap_bytes(bitmap.granularity) for bitmap in bitmaps)
    said: list[Exported] = []
    done = 0

    def looked_at(chunks: int) -> None:
        if progress is not None:
            progress(min(total, done + chunks * CHUNK_BYTES), total)

    for bitmap in bitmaps:
        said.append(_write_bitmap(out, image, bitmap, looked_at))
        done += image.geometry.bitmap_bytes(bitmap.granularity)
    out.write(ExportEnd(len(bitmaps), out.length, out.digest()).build())
    stream.flush()
    return lineage, tuple(said)


def named(image: Qcow2Image, items: Iterable[T]) -> Iterator[T]:
    """What is read of an image, with errors told to be about it; those of whoever takes the items are not."""
    with naming(image.file.path):
        yield from items


def _header(lineage: Lineage, bitmaps: int) -> ExportHeader:
    return ExportHeader(
        virtual_size=lineage.virtual_size,
        cluster_size=lineage.cluster_size,
        chunk_size=CHUNK_BYTES,
        bitmaps=bitmaps,
        made_ns=lineage.made_ns,
        mtime_ns=lineage.mtime_ns,
        image_id=lineage.image_id,
        tool=encode_name(lineage.tool),
        image=encode_name(lineage.image)[:MAX_TEXT_BYTES],
    )


def _write_bitmap(out: _Out, image: Qcow2Image, bitmap: StoredBitmap, looked_at: Callable[[int], object]) -> Exported:
    size, granularity = image.geometry.virtual_size, bitmap.granularity
    stale = bitmap.state is not State.READY
    flags = ExportFlag.RECORDING * bitmap.recording | ExportFlag.STALE * stale
    name = bitmap.entry.name
    out.write(ExportEntry(bitmap.entry.granularity_bits, ExportFlag(flags), div_up(size, granularity), name).build())
    total = Sum(size, granularity)
    for count, content in named(image, runs(bitmap.bits)):
        out.write(_chunks(total.chunks, count, content))
        total.add(count, content)
        looked_at(total.chunks)
    digest = total.digest()
    out.write(ExportEntryEnd(total.dirty_bytes, digest).build())
    return Exported(decode_name(name), granularity, bitmap.recording, stale, total.dirty_bytes, digest)


def _chunks(first: int, count: int, content: Content) -> bytes:
    if isinstance(content, Constant):
        encoding = Encoding.ONES if content is ONES else Encoding.ZEROES
        return record(Kind.CHUNKS, encoding=encoding, first=first, chunks=count)
    encoding, stored = pack_chunk(content)
    return record(Kind.CHUNKS, stored, encoding=encoding, first=first, chunks=count)


class _Out:
    """A stream with the digest of what went into it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes) -> None:
        """Write all of it: a stream without a buffer may take less at a time."""
        self._hash.update(data)
        self.length += len(data)
        view = memoryview(data)
        while view:
            view = view[self._stream.write(view) :]

    def digest(self) -> bytes:
        """Of all bytes so far."""
        return self._hash.digest()
