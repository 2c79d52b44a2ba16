"""A bitmap as other programs read and write it: JSON or CSV extents, or the bare bits.

The JSON is what `show --extents --output json` prints, and knows its lineage as an export file does. CSV and bare bits
know nothing of the disk they are about, so whoever imports them has to vouch for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum

from ..errors import ExportFileError, UsageError, naming
from ..format.geometry import div_up
from ..format.limits import MAX_BITMAP_BYTES
from ..format.sidecar import CHUNK_BYTES, MAGIC, Encoding, chunk_count, chunk_size
from ..image.export_file import Input
from ..image.image import Qcow2Image
from .algebra import Ranges, marking
from .bits import BitVector
from .chunks import ONES, Constant
from .draft import require_granularity
from .extents import MAX_LIST_BYTES, Where, decoded, parse_extents
from .sidecar import Exported, Progress, lineage_of, named
from .sidecar_digest import Sum, runs
from .sidecar_json import OURS, find_sealed, sealed_json
from .sidecar_lineage import Lineage, require_size
from .sidecar_model import Export, ExportedBitmap, StoredRuns
from .store import State, StoredBitmap


class Form(StrEnum):
    """Kinds of files that bitmaps are exported to and imported from."""

    QCOW2BM = "qcow2bm"
    """An export file: any number of bitmaps with their lineage."""
    JSON = "json"
    """Extents of one bitmap, with their lineage if we wrote them."""
    CSV = "csv"
    """Extents of one bitmap."""
    RAW = "raw"
    """The bits of one bitmap, the least significant of a byte first, as in the image."""


KNOWN_BY: dict[Form, re.Pattern[bytes] | None] = {
    Form.QCOW2BM: re.compile(re.escape(MAGIC)),
    Form.JSON: OURS,
    Form.CSV: re.compile(rb"offset,length,dirty\n(?:\d|\Z)"),
    Form.RAW: None,
}
"""How files of each form begin that we wrote. Bare bits may be anything: a disk, a firmware's variables."""
LARGEST = {Form.JSON: MAX_LIST_BYTES, Form.CSV: MAX_LIST_BYTES, Form.RAW: MAX_BITMAP_BYTES}
"""Bytes that are read of a file of each form."""

_FORMAT_VERSION = 1
_ONES = b"\xff" * CHUNK_BYTES


# ---- out ----


def lines(
    image: Qcow2Image, bitmap: StoredBitmap, form: Form, *, progress: Progress | None = None
) -> tuple[Lineage, Exported, Iterator[bytes]]:
    """A bitmap in a form that holds only one: what is said of it, and the pieces of the file.

    Raises:
        CorruptImageError: a mapping table or the bitmap's data cannot be read.
    """
    with naming(image.file.path):
        lineage = lineage_of(image)
    total = Sum(image.geometry.virtual_size, bitmap.granularity)
    size = image.geometry.bitmap_bytes(bitmap.granularity)
    for count, content in named(image, runs(bitmap.bits)):
        total.add(count, content)
        if progress is not None:
            progress(min(size, total.chunks * CHUNK_BYTES), size)
    stale = bitmap.state is not State.READY
    said = Exported(bitmap.name, bitmap.granularity, bitmap.recording, stale, total.dirty_bytes, total.digest())
    if form is Form.RAW:
        return lineage, said, named(image, _raw(bitmap.bits))
    extents = named(image, _extents(bitmap, lineage.virtual_size))
    return lineage, said, _csv(extents) if form is Form.CSV else _json(image, bitmap, lineage, said, extents)


def _extents(bitmap: StoredBitmap, size: int) -> Iterator[tuple[int, int, bool]]:
    """Offset, length, dirty; together the whole disk."""
    end = 0
    for first, stop in bitmap.bits.runs():
        offset = first * bitmap.granularity
        if offset > end:
            yield end, offset - end, False
        end = min(stop * bitmap.granularity, size)
        yield offset, end - offset, True
    if end < size:
        yield end, size - end, False


def _csv(extents: Iterable[tuple[int, int, bool]]) -> Iterator[bytes]:
    yield b"offset,length,dirty\n"
    for offset, length, dirty in extents:
        yield f"{offset},{length},{'true' if dirty else 'false'}\n".encode()


def _json(
    image: Qcow2Image, bitmap: StoredBitmap, lineage: Lineage, said: Exported, extents: Iterable[tuple[int, int, bool]]
) -> Iterator[bytes]:
    document = {
        "format-version": _FORMAT_VERSION,
        "image": str(image.file.path),
        "name": said.name,
        "state": bitmap.state.value,
        "recording": said.recording,
        "granularity": said.granularity,
        "bytes-on-disk": bitmap.bytes_on_disk,
        "virtual-size": lineage.virtual_size,
        "lineage": sealed_json(lineage, said),
    }
    yield json.dumps(document, indent=2)[:-2].encode() + b',\n  "extents": ['
    separator = "\n    "
    for offset, length, dirty in extents:
        yield (separator + json.dumps({"offset": offset, "length": length, "dirty": dirty})).encode()
        separator = ",\n    "
    yield b"\n  ]\n}\n"


def _raw(bits: BitVector) -> Iterator[bytes]:
    left = div_up(bits.length, 8)
    for count, content in runs(bits):
        for _ in range(count):
            size = min(left, CHUNK_BYTES)
            left -= size
            if not isinstance(content, Constant):
                yield content
            elif content is not ONES:
                yield bytes(size)
            elif left or not bits.length % 8:
                yield _ONES[:size]
            else:
                yield _ONES[: size - 1] + bytes([(1 << bits.length % 8) - 1])


# ---- in ----


def read_extent_file(
    source: Input,
    form: Form,
    image: Qcow2Image,
    *,
    name: str | None,
    granularity: int | None,
    where: Where | None = None,
) -> Export:
    """One bitmap from JSON or CSV extents, or from bare bits. Closed with the result.

    Args:
        image: the image it is for; the size of the disk is nowhere else.
        name: what to call it; JSON that we wrote knows its name.
        granularity: of the bits. JSON that we wrote knows it, and for other extents the image's default is taken.
        where: which rows of a list that somebody else made count, as `parse_extents` takes it.

    Raises:
        UsageError: name or granularity are missing, or the file is no list of extents of this disk, or a map that
            needs `where`.
        ExportFileError: bits are missing or too many, or the JSON was changed since we wrote it.
        BitmapSizeMismatchError: the JSON is about a disk of another size.
    """
    if form is Form.RAW:
        return Export(source, None, (_read_raw(source, image, name, granularity),))
    text = decoded(source.read_rest(MAX_LIST_BYTES))
    known = find_sealed(text) if form is Form.JSON else None
    if known is not None:
        require_size(known[0].virtual_size, image)
        if where not in (None, Where.DIRTY):
            raise UsageError("--where is about lists that other programs made", hint=f"{source.name} is an export")
    if known is None and name is None:
        raise UsageError(f"{source.name} does not say what its bitmap is called", hint="name it with --as")
    finest = image.geometry.default_granularity if granularity is None else granularity
    said = _unsaid(name or "", finest) if known is None else known[1]
    _require_possible(said.granularity, image)
    size = image.geometry.virtual_size
    ranges = ((offset, offset + length) for offset, length in parse_extents(text, where=where, size=size))
    bits = marking(Ranges.of(ranges), said.granularity, image.geometry)
    found = _bitmap(source, said, bits, size)
    if known is not None and (found.digest, found.dirty_bytes) != (said.digest, said.dirty_bytes):
        raise ExportFileError(
            f"{source.name} has other extents than its digest says", hint="it was changed or damaged since it was made"
        )
    return Export(source, known[0] if known is not None else None, (found,))


def _unsaid(name: str, granularity: int) -> Exported:
    """What is known of a bitmap of which nothing is said. It does not record until somebody wants it to."""
    return Exported(name, granularity, recording=False, stale=False, dirty_bytes=0, digest=b"")


def _bitmap(source: Input, said: Exported, bits: BitVector, size: int) -> ExportedBitmap:
    """A bitmap of bits that are at hand, with what they come to."""
    total = Sum(size, said.granularity)
    for count, content in runs(bits):
        total.add(count, content)
    return ExportedBitmap(
        said.name,
        size,
        said.granularity,
        said.recording,
        said.stale,
        total.dirty_bytes,
        total.digest(),
        f"{source.name}#{said.name}",
        lambda: bits,
    )


def _require_possible(granularity: int, image: Qcow2Image) -> None:
    require_granularity(granularity)
    if image.geometry.bitmap_bytes(granularity) > MAX_BITMAP_BYTES:
        raise UsageError(
            f"at granularity {granularity} a bitmap of this disk is above {MAX_BITMAP_BYTES} bytes",
            hint="choose a larger one with -g",
        )


def _read_raw(source: Input, image: Qcow2Image, name: str | None, granularity: int | None) -> ExportedBitmap:
    if name is None:
        raise UsageError("bare bits do not say what their bitmap is called", hint="name it with --as")
    if granularity is None:
        raise UsageError("bare bits do not say how much of the disk each stands for", hint="say it with -g")
    _require_possible(granularity, image)
    bits, size = image.geometry.bitmap_bits(granularity), image.geometry.bitmap_bytes(granularity)
    chunks, last = StoredRuns(bits), b""
    for index in range(chunk_count(bits)):
        at, last = source.at, source.read(chunk_size(bits, index))
        chunks.add(index, Encoding.PLAIN, at, last)
    if source.at != size or source.read(1):
        has = f"more than {size}" if source.at > size else str(source.at)
        raise ExportFileError(
            f"{source.name} has {has} bytes; the bits of this disk at granularity {granularity} take {size}",
            hint="is it of this disk, and is the granularity right?",
        )
    if bits % 8 and last[-1] >> bits % 8:
        raise ExportFileError(f"{source.name} has bits set past the end of the disk")
    return _bitmap(source, _unsaid(name, granularity), chunks.bits(source), image.geometry.virtual_size)
