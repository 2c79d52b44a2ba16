"""Reading an export file: all of it once, from its start to its end, before anything in it is believed.

Each part is looked at as it comes, so damage is found where it is and garbage is turned away at its first bytes. No
number in the file is believed beyond what it could be, and of the bits only where they lie is kept: they are read again
when they are asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

from ..errors import ExportFileError
from ..format.geometry import div_up
from ..format.header import MAGIC as QCOW2_MAGIC
from ..format.limits import (
    MAX_BITMAP_BYTES,
    MAX_BITMAP_NAME,
    MAX_BITMAPS,
    MAX_CLUSTER_BITS,
    MAX_FILE_SIZE,
    MAX_GRANULARITY_BITS,
    MIN_CLUSTER_BITS,
    MIN_GRANULARITY_BITS,
)
from ..format.sidecar import (
    BITMAP_FIXED,
    CHUNK_BYTES,
    HEAD_SIZE,
    MAGIC,
    MAX_HEADER_BYTES,
    PREAMBLE_SIZE,
    VERSION,
    Encoding,
    ExportEnd,
    ExportEntry,
    ExportEntryEnd,
    ExportFlag,
    ExportHeader,
    Kind,
    Preamble,
    RecordHead,
    chunk_count,
    chunk_size,
    crc,
    unpack_chunk,
)
from ..format.text import decode_name
from ..image.export_file import Input
from .chunks import ONES, ZEROES
from .sidecar_digest import Content, Sum
from .sidecar_lineage import Lineage
from .sidecar_model import Export, ExportedBitmap, StoredRuns

_KNOWN_FLAGS = int(ExportFlag.RECORDING | ExportFlag.STALE)
_SHORT_BODY = 64
"""Bytes that the body of an end record has at most."""
_DAMAGED = "nothing in it is to be relied on; export the bitmaps again"
T = TypeVar("T")


def read_export(source: str | os.PathLike[str] | BinaryIO) -> Export:
    """Read an export file and see that it is whole.

    Args:
        source: its name, or a stream, which is read to its end and kept in a temporary file.

    Raises:
        ExportFileError: it is none, it is damaged or cut short, or a later version wrote it.
        ImageIOError: the operating system refused.
    """
    opened = Input.open(Path(source)) if isinstance(source, (str, os.PathLike)) else Input.of(source)
    try:
        return read_from(opened)
    except BaseException:
        opened.close()
        raise


def read_from(source: Input) -> Export:
    """Read an export file that is open already, and will be closed with the result; raises as `read_export`."""
    return _Reader(source).export()


class _Reader:
    """Goes through an export file once."""

    def __init__(self, source: Input) -> None:
        self._source = source
        self._hash = hashlib.sha256()

    def export(self) -> Export:
        header = self._header()
        bitmaps: list[ExportedBitmap] = []
        names: set[bytes] = set()
        for number in range(1, header.bitmaps + 1):
            bitmap, name = self._bitmap(header, f"bitmap {number}")
            if name in names:
                self._refuse(f"it holds two bitmaps called '{bitmap.name}'")
            names.add(name)
            bitmaps.append(bitmap)
        self._end(header)
        lineage = Lineage(
            image_id=header.image_id,
            virtual_size=header.virtual_size,
            cluster_size=header.cluster_size,
            made_ns=header.made_ns,
            mtime_ns=header.mtime_ns,
            tool=decode_name(header.tool),
            image=decode_name(header.image),
        )
        return Export(self._source, lineage, tuple(bitmaps))

    # Parts of the file

    def _header(self) -> ExportHeader:
        raw = self._source.read(PREAMBLE_SIZE)
        if not raw.startswith(MAGIC):
            if raw and MAGIC.startswith(raw):
                self._refuse("it is cut short in its preamble")
            raise ExportFileError(
                f"{self._source.name} is not an export file of qcow2bm" if raw else f"{self._source.name} is empty",
                hint="it is an image: the image comes first, then the file"
                if raw.startswith(QCOW2_MAGIC)
                else "of other files --format says what they are",
            )
        if len(raw) < PREAMBLE_SIZE:
            self._refuse("it is cut short in its preamble")
        preamble = Preamble.parse(raw)
        if preamble is None:
            self._refuse("the checksum of its preamble is wrong")
        if preamble.version != VERSION or preamble.flags:
            flags = f" and features {preamble.flags:#x}" if preamble.flags else ""
            raise ExportFileError(
                f"{self._source.name} has version {preamble.version}{flags}, which this program does not know",
                hint="a later version of qcow2bm made it, and can read it",
            )
        if preamble.header_length > MAX_HEADER_BYTES:
            self._refuse(f"its header claims {preamble.header_length} bytes")
        self._hash.update(raw)
        body = self._read(preamble.header_length, "its header")
        if crc(body) != preamble.header_crc:
            self._refuse("the checksum of its header is wrong")
        header = self._parsed(ExportHeader.parse, body, "its header")
        self._require_sane(header)
        return header

    def _require_sane(self, header: ExportHeader) -> None:
        clusters = {1 << bits for bits in range(MIN_CLUSTER_BITS, MAX_CLUSTER_BITS + 1)}
        if not 0 < header.virtual_size <= MAX_FILE_SIZE or header.cluster_size not in clusters:
            self._refuse("its header speaks of no disk there could be")
        if header.chunk_size != CHUNK_BYTES:
            self._refuse(f"its header speaks of chunks of {header.chunk_size} bytes")
        if not 0 < header.bitmaps <= MAX_BITMAPS:
            self._refuse(f"its header speaks of {header.bitmaps} bitmaps")

    def _bitmap(self, header: ExportHeader, what: str) -> tuple[ExportedBitmap, bytes]:
        """The bitmap that comes next, and its name as it is stored."""
        entry = self._entry(header, f"the entry of {what}")
        name, granularity = decode_name(entry.name), 1 << entry.granularity_bits
        what = f"bitmap '{name}'"
        runs, total = StoredRuns(entry.bits), Sum(header.virtual_size, granularity)
        while total.chunks < chunk_count(entry.bits):
            where = f"chunk {total.chunks} of {what}"
            run = self._head(Kind.CHUNKS, where)
            self._require_next(run, entry, total.chunks, where)
            at, stored = self._source.at, self._body(run, where)
            runs.add(run.first, Encoding(run.encoding), at, stored)
            total.add(run.chunks, self._content(run, stored, entry, where))
        where = f"the end of {what}"
        end = self._parsed(ExportEntryEnd.parse, self._body(self._head(Kind.BITMAP_END, where), where), where)
        if (end.dirty_bytes, end.digest) != (total.dirty_bytes, total.digest()):
            self._refuse(f"{what} has other bits than its digest says")
        return ExportedBitmap(
            name=name,
            virtual_size=header.virtual_size,
            granularity=granularity,
            recording=bool(entry.flags & ExportFlag.RECORDING),
            stale=bool(entry.flags & ExportFlag.STALE),
            dirty_bytes=end.dirty_bytes,
            digest=end.digest,
            label=f"{self._source.name}#{name}",
            read_bits=partial(runs.bits, self._source),
        ), entry.name

    def _entry(self, header: ExportHeader, where: str) -> ExportEntry:
        head = self._head(Kind.BITMAP, where)
        if not BITMAP_FIXED < head.length <= BITMAP_FIXED + MAX_BITMAP_NAME:
            self._refuse(f"{where} claims {head.length} bytes")
        entry = self._parsed(ExportEntry.parse, self._body(head, where), where)
        self._require_fitting(entry, header, f"bitmap '{decode_name(entry.name)}'")
        return entry

    def _require_fitting(self, entry: ExportEntry, header: ExportHeader, what: str) -> None:
        # As plain numbers: the inverse of an IntFlag knows no bits above the highest one defined.
        unknown = int(entry.flags) & ~_KNOWN_FLAGS
        if unknown:
            raise ExportFileError(
                f"{self._source.name}: {what} has flags {unknown:#x}, which this program does not know",
                hint="a later version of qcow2bm made it, and can read it",
            )
        if not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS:
            self._refuse(f"{what} has a granularity of 2^{entry.granularity_bits}")
        if entry.bits != div_up(header.virtual_size, 1 << entry.granularity_bits):
            self._refuse(f"{what} has {entry.bits} bits, which is not what the disk takes")
        if div_up(entry.bits, 8) > MAX_BITMAP_BYTES:
            self._refuse(f"{what} is larger than any bitmap")

    def _require_next(self, run: RecordHead, entry: ExportEntry, expected: int, where: str) -> None:
        """The record must speak for the chunks that come next, with as many bytes as its encoding allows."""
        size = chunk_size(entry.bits, expected)
        lengths = {
            Encoding.ZEROES: range(1),
            Encoding.ONES: range(1),
            Encoding.PLAIN: range(size, size + 1),
            Encoding.ZSTD: range(1, size),
        }
        left = chunk_count(entry.bits) - expected
        most = left if run.encoding in (Encoding.ZEROES, Encoding.ONES) else min(left, 1)
        if run.first != expected or not 0 < run.chunks <= most:
            self._refuse(f"{where} is missing: {run.chunks} chunks from {run.first} on follow")
        if run.encoding not in lengths:
            self._refuse(f"{where} has the encoding {run.encoding}, which is not known")
        if run.length not in lengths[Encoding(run.encoding)]:
            self._refuse(f"{where} claims {run.length} bytes")

    def _content(self, run: RecordHead, stored: bytes, entry: ExportEntry, where: str) -> Content:
        if run.encoding in (Encoding.ZEROES, Encoding.ONES):
            return ONES if run.encoding == Encoding.ONES else ZEROES
        size = chunk_size(entry.bits, run.first)
        try:
            plain = unpack_chunk(run.encoding, stored, size)
        except ValueError as error:
            self._refuse(f"{where} is damaged: {error}")
        unused = -entry.bits % 8 if run.first == chunk_count(entry.bits) - 1 else 0
        if plain[-1] >> 8 - unused and unused:
            self._refuse(f"{where} has bits set past the end of the disk")
        return plain

    def _end(self, header: ExportHeader) -> None:
        length, digest = self._source.at, self._hash.digest()
        where = "its end record"
        end = self._parsed(ExportEnd.parse, self._body(self._head(Kind.FILE_END, where), where), where)
        if (end.bitmaps, end.length, end.digest) != (header.bitmaps, length, digest):
            self._refuse("the digest of the whole file is wrong")
        if self._source.read(1):
            self._refuse("something follows after its end")

    # Records

    def _head(self, kind: Kind, where: str) -> RecordHead:
        head = RecordHead.parse(self._read(HEAD_SIZE, where))
        if head is None:
            self._refuse(f"the checksum of the head of {where} is wrong")
        if head.kind != kind:
            self._refuse(f"{where} is missing: a record of kind {head.kind} stands in its place")
        return head

    def _body(self, head: RecordHead, where: str) -> bytes:
        if head.kind in (Kind.BITMAP_END, Kind.FILE_END) and head.length > _SHORT_BODY:
            self._refuse(f"{where} claims {head.length} bytes")
        body = self._read(head.length, where)
        if crc(body) != head.body_crc:
            self._refuse(f"the checksum of {where} is wrong")
        return body

    def _read(self, length: int, where: str) -> bytes:
        data = self._source.read(length)
        if len(data) < length:
            self._refuse(f"it is cut short in {where}")
        self._hash.update(data)
        return data

    def _parsed(self, parse: Callable[[bytes], T], body: bytes, where: str) -> T:
        try:
            return parse(body)
        except ValueError as error:
            self._refuse(f"{where} is damaged: {error}")

    def _refuse(self, what: str) -> NoReturn:
        raise ExportFileError(f"{self._source.name} is damaged: {what}", hint=_DAMAGED)
