"""Export files hold any bits, in any cluster size, and no two of them are mistaken for each other."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path

import pytest
from bitarray import bitarray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qcow2bm
from qcow2bm.bitmap.bits import BitVector
from qcow2bm.bitmap.chunks import ONES, ZEROES, Chunk
from qcow2bm.bitmap.draft import Source
from qcow2bm.bitmap.sidecar_digest import Sum, bitmap_digest, runs
from qcow2bm.bitmap.sidecar_text import Form, lines, read_extent_file
from qcow2bm.errors import ExportFileError
from qcow2bm.format import sidecar
from tests import strategies as own
from tests.support.exports import dirty_bits, exported, input_of, reread, seal
from tests.support.scenes import create

DISK = 3 * 65536 * 8 * 512 - 3 * 512
"""Bytes: at granularity 512 its bits take three chunks of an export file, the last one not in full."""
_EXAMPLES = settings().max_examples
THIRD = settings(max_examples=_EXAMPLES // 3)
FEW = settings(max_examples=_EXAMPLES // 8, suppress_health_check=[HealthCheck.function_scoped_fixture])

# ---- the parts of a file ----

names = st.binary(min_size=1, max_size=40)
digests = st.binary(min_size=32, max_size=32)
headers = st.builds(
    sidecar.ExportHeader,
    virtual_size=own.u64,
    cluster_size=own.u32,
    chunk_size=own.u32,
    bitmaps=own.u32,
    made_ns=st.integers(-(1 << 63), (1 << 63) - 1),
    mtime_ns=st.integers(-(1 << 63), (1 << 63) - 1),
    image_id=digests,
    tool=st.binary(max_size=60),
    image=st.binary(max_size=60),
)


@given(headers)
def test_a_header_is_parsed_to_what_it_was_built_from(header: sidecar.ExportHeader) -> None:
    built = header.build()
    preamble = sidecar.Preamble.parse(built[: sidecar.PREAMBLE_SIZE])
    body = built[sidecar.PREAMBLE_SIZE :]
    assert preamble == (sidecar.VERSION, 0, len(body), sidecar.crc(body))
    assert sidecar.ExportHeader.parse(body) == header


@given(headers, st.data())
def test_a_header_of_another_length_is_no_header(header: sidecar.ExportHeader, data: st.DataObject) -> None:
    body = header.build()[sidecar.PREAMBLE_SIZE :]
    cut = data.draw(st.integers(0, len(body) - 1))
    for bad in (body[:cut], body + b"\0"):
        with pytest.raises(ValueError, match="length"):
            sidecar.ExportHeader.parse(bad)


@given(own.u32, own.u32, own.u64, names)
def test_an_entry_is_parsed_to_what_it_was_built_from(
    granularity_bits: int, flags: int, bits: int, name: bytes
) -> None:
    entry = sidecar.ExportEntry(granularity_bits, sidecar.ExportFlag(flags), bits, name)
    assert sidecar.ExportEntry.parse(entry.build()[sidecar.HEAD_SIZE :]) == entry


@given(own.u32, own.u64, digests)
def test_ends_are_parsed_to_what_they_were_built_from(number: int, length: int, digest: bytes) -> None:
    for end in (sidecar.ExportEnd(number, length, digest), sidecar.ExportEntryEnd(length, digest)):
        built = end.build()
        head = sidecar.RecordHead.parse(built[: sidecar.HEAD_SIZE])
        assert head is not None
        assert head.length == len(built) - sidecar.HEAD_SIZE
        assert type(end).parse(built[sidecar.HEAD_SIZE :]) == end


@given(st.binary(min_size=1, max_size=300))
def test_a_chunk_is_unpacked_to_what_it_was_packed_from(plain: bytes) -> None:
    encoding, stored = sidecar.pack_chunk(plain)
    assert len(stored) <= len(plain)
    assert sidecar.unpack_chunk(encoding, stored, len(plain)) == plain
    for wrong in (len(plain) - 1, len(plain) + 1):
        with pytest.raises(ValueError, match=r"size|bytes instead"):
            sidecar.unpack_chunk(encoding, stored, wrong)


@given(st.sampled_from([2, 3]), st.binary(max_size=200), st.integers(1, 200))
def test_any_bytes_are_a_chunk_or_are_refused(encoding: int, stored: bytes, size: int) -> None:
    with contextlib.suppress(ValueError):
        assert len(sidecar.unpack_chunk(encoding, stored, size)) == size


# ---- digests ----


class Repeated:
    """A chunk of a pattern over and over, without keeping it."""

    def __init__(self, pattern: bytes) -> None:
        self._pattern = pattern

    def read(self, start: int, length: int):
        size = len(self._pattern)
        text = self._pattern * (length // size + 2)
        return bitarray(buffer=text[start % size : start % size + length], endian="little")


@st.composite
def large_vectors(draw: st.DrawFn) -> BitVector:
    """Vectors of several chunks of an export file, in clusters of any size."""
    chunk_bytes = draw(st.sampled_from([512, 4096, 65536, 1 << 21]))
    length = draw(st.integers(1, 3 * sidecar.CHUNK_BITS))
    pattern = st.binary(min_size=1, max_size=5).map(Repeated)
    kinds: list[Chunk] = draw(st.lists(st.sampled_from([ZEROES, ONES]) | pattern, min_size=1, max_size=4))
    count = -(-length // (8 * chunk_bytes))
    step = draw(st.integers(1, max(1, count // 2)))
    return BitVector(length, chunk_bytes, [kinds[index // step % len(kinds)] for index in range(count)])


@given(large_vectors(), st.sampled_from([512, 4096, 65536, 1 << 21]))
@THIRD
def test_the_digest_is_of_the_bits_alone(bits: BitVector, chunk_bytes: int) -> None:
    other = bits.resampled(bits.length, chunk_bytes, 1, 1)
    size = bits.length * 512 - 100
    assert bitmap_digest(bits, size, 512) == bitmap_digest(other, size, 512)
    marked = BitVector.marked(bits.length, chunk_bytes, bits.runs())
    assert bitmap_digest(bits, size, 512) == bitmap_digest(marked, size, 512)
    total = Sum(size, 512)
    for count, content in runs(bits):
        total.add(count, content)
    dirty = sum(min(512 * stop, size) - 512 * first for first, stop in bits.runs())
    assert (total.chunks, total.dirty_bytes) == (sidecar.chunk_count(bits.length), dirty)


@given(large_vectors(), st.data())
@THIRD
def test_another_bit_is_another_digest(bits: BitVector, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, bits.length - 1))
    is_set = bits.slice(place, place + 1).any()
    other = bits.with_range(place, place + 1, value=not is_set)
    size = 512 * bits.length
    assert bitmap_digest(bits, size, 512) != bitmap_digest(other, size, 512)
    assert bitmap_digest(bits, size, 512) != bitmap_digest(bits, 2 * size, 1024)


# ---- whole files ----


@pytest.fixture(scope="module", params=["512", "64k", "2M"])
def image(request, tmp_path_factory) -> Path:
    """A disk of no even size; at granularity 512 its bits take three chunks of an export file."""
    folder = tmp_path_factory.mktemp("image")
    return create(folder, str(DISK), f"cluster_size={request.param}")


def put(image: Path, bits: BitVector, granularity: int) -> None:
    """Make `x` the only bitmap of the image."""
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.remove(*opened.bitmaps.names)
        edit.copy(Source("bits", opened.virtual_size, granularity, bits), "x")


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A granularity, and runs of dirty bits over the disk of `image`."""
    granularity = draw(st.sampled_from([512, 4096, 65536, 1 << 22]))
    length = -(-DISK // granularity)
    edges = sorted(draw(st.sets(st.integers(0, length), max_size=12)))
    return granularity, list(zip(edges[::2], edges[1::2], strict=False))


@given(disk=disks())
@FEW
def test_any_bits_come_back_from_every_form(image: Path, disk: tuple[int, list[tuple[int, int]]]) -> None:
    granularity, wanted = disk
    length = -(-DISK // granularity)
    put(image, BitVector.marked(length, 65536, wanted), granularity)
    with reread(exported(image)) as held:
        [found] = held.bitmaps
        assert (found.name, found.granularity) == ("x", granularity)
        assert dirty_bits(found.read_bits()) == wanted
        digest, dirty = found.digest, found.dirty_bytes
    with qcow2bm.open(image) as opened:
        stored = opened.bitmaps["x"].stored
        for form in (Form.JSON, Form.CSV, Form.RAW):
            lineage, said, pieces = lines(opened.qcow2, stored, form)
            source = input_of(b"".join(pieces))
            with read_extent_file(source, form, opened.qcow2, name="x", granularity=granularity) as held:
                [found] = held.bitmaps
                assert (found.digest, found.dirty_bytes) == (digest, dirty) == (said.digest, said.dirty_bytes)
                assert dirty_bits(found.read_bits()) == wanted
                assert held.lineage == (lineage if form is Form.JSON else None)


@given(disk=disks(), noise=st.binary(min_size=1, max_size=20), data=st.data())
@FEW
def test_whatever_is_done_to_a_file_it_is_refused_or_means_the_same(
    image: Path, disk: tuple[int, list[tuple[int, int]]], noise: bytes, data: st.DataObject
) -> None:
    """Bytes put in, left out, or replaced anywhere: never a file that is taken for another one, never a traceback."""
    granularity, wanted = disk
    length = -(-DISK // granularity)
    put(image, BitVector.marked(length, 65536, wanted), granularity)
    good = exported(image)
    for _ in range(30):
        at = data.draw(st.integers(0, len(good)))
        gone = data.draw(st.integers(0, 40))
        bad = good[:at] + noise + good[at + gone :]
        if bad == good:
            continue
        with pytest.raises(ExportFileError):
            reread(bad)


@given(st.binary(max_size=400), st.integers(0, 1 << 32))
def test_garbage_behind_a_good_preamble_is_refused(garbage: bytes, claimed: int) -> None:
    head = seal(b"QCOW2BM bitmaps\0" + struct.pack("<4I", 1, 0, claimed & 0xFFFF_FFFF, sidecar.crc(garbage)))
    with pytest.raises(ExportFileError):
        qcow2bm.read_export(io.BytesIO(head + garbage))
