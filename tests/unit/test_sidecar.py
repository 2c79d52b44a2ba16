"""Export files: what is read is what was written, and whatever is wrong with a file is found and named."""

from __future__ import annotations

import hashlib
import io
import itertools
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import zstandard
from bitarray import bitarray

import qcow2bm
from qcow2bm.bitmap import sidecar_lineage
from qcow2bm.bitmap.bits import BitVector
from qcow2bm.bitmap.draft import Source
from qcow2bm.bitmap.sidecar import choose
from qcow2bm.bitmap.sidecar_lineage import image_id
from qcow2bm.bitmap.store import BitmapDirectory
from qcow2bm.errors import BitmapBrokenError, BitmapInconsistentError, BitmapNotFoundError, ExportFileError
from qcow2bm.format.sidecar import CHUNK_BYTES, Kind
from qcow2bm.image.mapping import read_l2
from tests.support.exports import (
    DISK,
    PREAMBLE,
    Part,
    dirty_bits,
    exported,
    parts,
    preamble,
    rebuilt,
    record,
    reread,
    varied,
)
from tests.support.images import unpack
from tests.support.qemu import qemu_io
from tests.support.raw import Raw
from tests.support.scenes import create

NAMES = ["all kinds", "ones", "nothing", "täglich\x1b[1m"]


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    return varied(tmp_path_factory.mktemp("varied"))


@pytest.fixture(scope="module")
def data(image: Path) -> bytes:
    return exported(image)


@pytest.fixture(scope="module")
def small(image: Path) -> bytes:
    return exported(image, "all kinds", "ones")


# ---- whole ----


def test_what_is_read_is_what_was_there(image: Path, data: bytes) -> None:
    with qcow2bm.open(image) as opened, reread(data) as held:
        assert [bitmap.name for bitmap in held.bitmaps] == opened.bitmaps.names == NAMES
        for found, stored in zip(held.bitmaps, opened.bitmaps, strict=True):
            assert (found.granularity, found.recording, found.stale) == (stored.granularity, stored.recording, False)
            assert found.dirty_bytes == stored.dirty_bytes
            assert dirty_bits(found.read_bits()) == dirty_bits(stored.stored.bits)
        lineage = held.lineage
    assert lineage is not None
    assert (lineage.virtual_size, lineage.cluster_size, lineage.image) == (DISK, 65536, "image.qcow2")
    assert lineage.tool == f"qcow2bm {qcow2bm.__version__}"
    assert lineage.mtime_ns == image.stat().st_mtime_ns < lineage.made_ns


def test_chunks_that_are_alike_have_no_bytes(data: bytes) -> None:
    chunks = [part for part in parts(data) if part.kind == Kind.CHUNKS]
    assert [(part.encoding, part.first, part.chunks) for part in chunks[:5]] == [
        (0, 0, 1), (1, 1, 1), (3, 2, 1), (0, 3, 1), (2, 4, 1),
    ]  # fmt: skip
    assert all(part.body == part.end for part in chunks if part.encoding in (0, 1))
    assert [part.encoding for part in chunks[5:]] == [1, 0, 1]


def test_only_the_bitmaps_that_are_named_are_there_and_each_once(image: Path) -> None:
    with reread(exported(image, "ones", "nothing", "ones")) as held:
        assert [bitmap.name for bitmap in held.bitmaps] == ["ones", "nothing"]
        with pytest.raises(BitmapNotFoundError, match="holds no bitmap called 'all kinds'"):
            held.find("all kinds")


def test_a_stream_is_read_in_the_pieces_it_comes_in(data: bytes) -> None:
    class Dripping(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 7))

    with qcow2bm.read_export(Dripping(data)) as held:
        assert len(held.bitmaps) == len(NAMES)
        assert dirty_bits(held.find("ones").read_bits()) == [(0, 1025)]


def test_a_stream_that_takes_little_at_a_time_gets_all(image: Path, data: bytes) -> None:
    class Narrow(io.BytesIO):
        def write(self, part: object) -> int:
            return super().write(memoryview(part)[:5])  # type: ignore[arg-type]

    stream = Narrow()
    with qcow2bm.open(image) as opened:
        qcow2bm.export_bitmaps(opened, [], stream)
    assert len(stream.getvalue()) == len(data)
    reread(stream.getvalue()).close()


def digests(data: bytes) -> dict[str, bytes]:
    with reread(data) as held:
        return {bitmap.name: bitmap.digest for bitmap in held.bitmaps}


def test_the_digest_does_not_depend_on_the_cluster_size(data: bytes, tmp_path: Path) -> None:
    expected = digests(data)
    assert len(set(expected.values())) == len(expected) == len(NAMES)
    for cluster in ("512", "2M"):
        (tmp_path / cluster).mkdir()
        assert digests(exported(varied(tmp_path / cluster, f"cluster_size={cluster}"))) == expected


def test_the_digest_is_the_one_that_the_document_describes(data: bytes) -> None:
    found = digests(data)
    text = b"qcow2bm bitmap 1"
    bits = -(-DISK // 65536)
    assert found["nothing"] == hashlib.sha256(text + struct.pack("<QQBQ", 65536, bits, 0, 1)).digest()
    bits = -(-DISK // (1 << 20))
    assert found["ones"] == hashlib.sha256(text + struct.pack("<QQBQ", 1 << 20, bits, 1, 1)).digest()
    part = next(part for part in parts(data) if part.encoding == 3)
    middle = zstandard.decompress(data[part.body : part.end])
    whole = struct.pack("<QQ", 512, -(-DISK // 512))
    whole += struct.pack("<BQBQ", 0, 1, 1, 1) + struct.pack("<BQ", 2, CHUNK_BYTES) + middle
    whole += struct.pack("<BQ", 0, 1) + struct.pack("<BQ", 2, 1) + b"\x04"
    assert found["all kinds"] == hashlib.sha256(text + whole).digest()


def test_the_image_id_is_the_one_that_the_document_describes(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"")
    image = create(tmp_path, "1G", "cluster_size=4k", "backing_file=base", "backing_fmt=raw")
    qemu_io(image, "write 0 10k", "write -z 700M 4k", "write -c 900M 4k")
    raw = Raw.load(image)
    whole = b"qcow2bm image 1" + struct.pack("<QII", 1 << 30, 12, 8)
    whole += struct.pack("<QQ", 4, 0) + b"base" + struct.pack("<QQ", 0, 0)
    l1_table = raw.number(40)
    for index in range((1 << 30) >> 21):
        table = raw.number(l1_table + 8 * index) & 0x00FF_FFFF_FFFF_FE00
        entries = struct.unpack(">512Q", raw.data[table : table + 4096]) if table else ()
        plain = [entry & ~(1 << 63) for entry in entries]
        if any(plain):
            whole += struct.pack("<Q", index) + hashlib.sha256(struct.pack(">512Q", *plain)).digest()
    with qcow2bm.open(image) as opened:
        assert image_id(opened.qcow2) == hashlib.sha256(whole).digest()


def test_an_l2_table_that_is_named_very_often_is_read_once(tmp_path: Path, monkeypatch) -> None:
    image = create(tmp_path, "64G", "cluster_size=4k")
    qemu_io(image, "write 0 4k")
    raw = Raw.load(image)
    l1_table, entry = raw.number(40), raw.number(raw.number(40))
    for index in range(raw.number(36, 4)):
        raw.put(l1_table + 8 * index, entry)
    raw.save(image)
    reads: list[int] = []
    monkeypatch.setattr(sidecar_lineage, "read_l2", lambda image, at: (reads.append(at), read_l2(image, at))[1])
    with qcow2bm.open(image) as opened:
        image_id(opened.qcow2)
    assert reads == [entry & 0x00FF_FFFF_FFFF_FE00]


def test_an_export_takes_a_chunk_of_memory_and_not_a_bitmap(tmp_path: Path) -> None:
    """16 MiB of bits that zstd cannot shorten, there and back."""

    class Noise:
        def __init__(self, seed: int) -> None:
            self._seed = seed

        def read(self, start: int, length: int) -> bitarray:
            return bitarray(buffer=Random(self._seed).randbytes(CHUNK_BYTES)[start : start + length], endian="little")

    size, chunks = 64 << 30, 256
    image = create(tmp_path, str(size))
    bits = BitVector(8 * CHUNK_BYTES * chunks, CHUNK_BYTES, [Noise(seed) for seed in range(chunks)])
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.copy(Source("noise", size, 512, bits), "noise")
    file = tmp_path / "noise"
    tracemalloc.start()
    with qcow2bm.open(image) as opened, file.open("wb") as stream:
        qcow2bm.export_bitmaps(opened, ["noise"], stream)
    with qcow2bm.open(image, writable=True) as opened, qcow2bm.read_export(file) as held, opened.edit() as edit:
        edit.copy(held.find("noise").source, "again", granularity=1024)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file.stat().st_size > 16 << 20
    assert peak < 8 << 20
    with qcow2bm.open(image) as opened:
        assert opened.bitmaps["again"].dirty_bytes >= opened.bitmaps["noise"].dirty_bytes


# ---- damaged ----


def test_every_flipped_bit_is_found_and_its_place_is_named(small: bytes) -> None:
    places = list(labels(small))
    assert len(places) == len(small)
    for at, label in enumerate(places):
        for bit in range(8):
            bad = bytearray(small)
            bad[at] ^= 1 << bit
            with pytest.raises(ExportFileError) as caught:
                reread(bytes(bad))
            assert label in caught.value.message, (at, bit, caught.value.message)


def labels(data: bytes) -> Iterator[str]:
    """For each byte, what an error about it must say."""
    number, name, chunk = 0, "", 0
    for part in parts(data):
        if part.kind == 0:
            yield from itertools.chain(["is not an export file"] * 16, ["preamble"] * (PREAMBLE - 16))
            yield from ["its header"] * (part.end - part.body)
            continue
        if part.kind == Kind.BITMAP:
            number, chunk = number + 1, 0
            name = data[part.body + 16 : part.end].decode()
            label = f"the entry of bitmap {number}"
        elif part.kind == Kind.CHUNKS:
            label = f"chunk {chunk} of bitmap '{name}'"
            chunk += part.chunks
        else:
            label = f"the end of bitmap '{name}'" if part.kind == Kind.BITMAP_END else "its end record"
        yield from [label] * (part.end - part.start)


def test_every_cut_is_found_and_its_place_is_named(small: bytes) -> None:
    places = list(labels(small))
    for length, place in enumerate(places):
        with pytest.raises(ExportFileError) as caught:
            reread(small[:length])
        label = "preamble" if place == "is not an export file" else place
        assert (label if length else "is empty") in caught.value.message
        assert ("cut short" if length else "is empty") in caught.value.message


def test_what_follows_the_end_is_refused(small: bytes) -> None:
    for rest in (b"\0", small):
        with pytest.raises(ExportFileError, match="something follows after its end"):
            reread(small + rest)


def test_a_record_that_is_left_out_doubled_or_moved_is_found(data: bytes) -> None:
    """All checksums of the parts are right."""
    found = parts(data)
    pieces = [data[part.start : part.end] for part in found]
    for index in range(1, len(pieces)):
        for bad in (
            pieces[:index] + pieces[index + 1 :],
            pieces[: index + 1] + pieces[index:],
            [*pieces[: index - 1], pieces[index], pieces[index - 1], *pieces[index + 1 :]],
        ):
            with pytest.raises(ExportFileError):
                reread(b"".join(bad))


def test_a_chunk_from_another_file_is_found(data: bytes) -> None:
    other = rebuilt(
        data, lambda part, raw: [record(2, encoding=1, first=0, chunks=1) if (part.kind, part.first) == (2, 0) else raw]
    )
    with pytest.raises(ExportFileError, match="bitmap 'all kinds' has other bits than its digest says"):
        reread(other)


# ---- hostile ----


def header(data: bytes, **fields: int) -> bytes:
    """The header's body with some of its numbers changed."""
    first = parts(data)[0]
    layout = {"virtual_size": (0, "<Q"), "cluster_size": (8, "<I"), "chunk_size": (12, "<I"), "bitmaps": (16, "<I")}
    body = bytearray(data[first.body : first.end])
    for name, value in fields.items():
        at, kind = layout[name]
        struct.pack_into(kind, body, at, value)
    return bytes(body)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"virtual_size": 0}, "no disk there could be"),
        ({"virtual_size": (1 << 64) - 1}, "no disk there could be"),
        ({"virtual_size": 1 << 62}, "the entry of|has .* bits, which is not what the disk takes"),
        ({"cluster_size": 0}, "no disk there could be"),
        ({"cluster_size": 65535}, "no disk there could be"),
        ({"cluster_size": 1 << 31}, "no disk there could be"),
        ({"chunk_size": 1 << 30}, "speaks of chunks of 1073741824 bytes"),
        ({"bitmaps": 0}, "speaks of 0 bitmaps"),
        ({"bitmaps": 1}, "a record of kind 1 stands in its place"),
        ({"bitmaps": 65535}, "a record of kind 4 stands in its place"),
        ({"bitmaps": 65536}, "speaks of 65536 bitmaps"),
        ({"bitmaps": (1 << 32) - 1}, "speaks of 4294967295 bitmaps"),
    ],
)
def test_a_header_that_claims_too_much(fields: dict[str, int], complaint: str, small: bytes) -> None:
    bad = preamble(header(small, **fields)) + small[parts(small)[0].end :]
    with pytest.raises(ExportFileError, match=complaint):
        reread(bad)


def test_a_later_version_or_feature_is_refused_as_such(small: bytes) -> None:
    body, rest = header(small), small[parts(small)[0].end :]
    assert preamble(body) + rest == small
    for how, said in (
        ({"version": 2}, "version 2, which"),
        ({"flags": 4}, "version 1 and features 0x4, which"),
        ({"version": 0}, "version 0, which"),
    ):
        with pytest.raises(ExportFileError, match=f"has {said} this program does not know; a later version") as caught:
            reread(preamble(body, **how) + rest)
        assert "damaged" not in str(caught.value)


def test_headers_that_are_not_what_their_length_says(small: bytes) -> None:
    body, rest = header(small), small[parts(small)[0].end :]
    for bad in (body[:-1], body + b"\0", body[:20], b""):
        with pytest.raises(ExportFileError, match="its header is damaged"):
            reread(preamble(bad) + rest)
    with pytest.raises(ExportFileError, match="its header claims 1048576 bytes"):
        reread(preamble(bytes(1 << 20)) + rest)


def entry(granularity_bits: int = 16, flags: int = 0, bits: int = -(-DISK // 65536), name: bytes = b"x") -> bytes:
    return struct.pack("<IIQ", granularity_bits, flags, bits) + name


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (record(1, entry(flags=4)), "'x' has flags 0x4, which this program does not know"),
        (record(1, entry(flags=1 << 31)), "'x' has flags 0x80000000"),
        (record(1, entry(granularity_bits=8)), r"granularity of 2\^8"),
        (record(1, entry(granularity_bits=32)), r"granularity of 2\^32"),
        (record(1, entry(granularity_bits=(1 << 32) - 1)), r"granularity of 2\^4294967295"),
        (record(1, entry(bits=(1 << 64) - 1)), "has 18446744073709551615 bits"),
        (record(1, entry(bits=1)), "has 1 bits"),
        (record(1, entry(name=b"")), "claims 16 bytes"),
        (record(1, entry(name=b"x" * 1024)), "claims 1040 bytes"),
        (record(1, entry(), length=(1 << 32) - 1), "claims 4294967295 bytes"),
        (record(1, entry(), length=18), "the checksum of the entry of bitmap 1 is wrong"),
        (record(2, first=0, chunks=1), "the entry of bitmap 1 is missing: a record of kind 2"),
        (record(9), "the entry of bitmap 1 is missing: a record of kind 9"),
    ],
)
def test_a_bitmap_that_claims_too_much(raw: bytes, complaint: str, small: bytes) -> None:
    with pytest.raises(ExportFileError, match=complaint):
        reread(small[: parts(small)[0].end] + raw + small[parts(small)[1].end :])


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (record(2, first=0, chunks=0), "0 chunks from 0 on follow"),
        (record(2, first=0, chunks=6), "6 chunks from 0 on follow"),
        (record(2, first=0, chunks=(1 << 64) - 1), "chunks from 0 on follow"),
        (record(2, first=1, chunks=1), "1 chunks from 1 on follow"),
        (record(2, first=(1 << 64) - 1, chunks=1), "follow"),
        (record(2, encoding=4, first=0, chunks=1), "has the encoding 4"),
        (record(2, b"x", encoding=0, first=0, chunks=1), "claims 1 bytes"),
        (record(2, b"x", encoding=1, first=0, chunks=1), "claims 1 bytes"),
        (record(2, b"x", encoding=2, first=0, chunks=1), "claims 1 bytes"),
        (record(2, b"", encoding=3, first=0, chunks=1), "claims 0 bytes"),
        (record(2, b"x", encoding=2, first=0, chunks=1, length=(1 << 32) - 1), "claims 4294967295 bytes"),
        (record(2, b"x" * 65536, encoding=3, first=0, chunks=1), "claims 65536 bytes"),
        (record(2, b"x" * 65536, encoding=2, first=0, chunks=2), "2 chunks from 0 on follow"),
        (record(2, b"not zstd", encoding=3, first=0, chunks=1), "chunk 0 of bitmap 'all kinds' is damaged"),
        (record(2, zstandard.compress(bytes(65535)), encoding=3, first=0, chunks=1), "not of its size"),
        (record(2, zstandard.compress(bytes(1 << 30)), encoding=3, first=0, chunks=1), "not of its size"),
    ],
)  # fmt: skip
def test_a_chunk_that_claims_too_much(raw: bytes, complaint: str, small: bytes) -> None:
    place = next(part for part in parts(small) if part.kind == Kind.CHUNKS)
    tracemalloc.start()
    with pytest.raises(ExportFileError, match=complaint):
        reread(small[: place.start] + raw + small[place.end :])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_stream_without_a_stated_size_makes_no_bomb(small: bytes) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))
    assert len(bomb) < CHUNK_BYTES
    lying = bytearray(zstandard.compress(bytes(65536)))
    stated = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    blocks = stated[zstandard.frame_header_size(stated) :]
    lying[zstandard.frame_header_size(bytes(lying)) :] = blocks
    place = next(part for part in parts(small) if part.kind == Kind.CHUNKS)
    for packed in (bomb, bytes(lying)):
        raw = record(2, packed, encoding=3, first=0, chunks=1)
        with pytest.raises(ExportFileError, match="chunk 0 of bitmap 'all kinds' is damaged"):
            reread(small[: place.start] + raw + small[place.end :])


def test_a_bitmap_that_is_larger_than_any(small: bytes) -> None:
    bad = preamble(header(small, virtual_size=1 << 42)) + record(1, entry(granularity_bits=9, bits=1 << 33))
    with pytest.raises(ExportFileError, match="bitmap 'x' is larger than any bitmap"):
        reread(bad)


def test_end_records_that_claim_too_much_or_something_else(small: bytes) -> None:
    *_, bitmap_end, end = parts(small)
    before = small[: bitmap_end.start]
    for bad, said in (
        (before + record(3, length=(1 << 32) - 1), "the end of bitmap 'ones' claims 4294967295 bytes"),
        (before + record(3, bytes(39)), "the end of bitmap 'ones' is damaged"),
        (before + record(3, bytes(40)), "bitmap 'ones' has other bits than its digest says"),
        (small[: end.start] + record(4, bytes(45)), "its end record is damaged"),
        (small[: end.start] + record(4, bytes(44)), "the digest of the whole file is wrong"),
    ):
        with pytest.raises(ExportFileError, match=said):
            reread(bad)


def test_bits_past_the_end_of_the_disk_are_refused(data: bytes) -> None:
    def change(part: Part, raw: bytes) -> list[bytes]:
        return [record(2, b"\x0c", encoding=2, first=4, chunks=1) if (part.kind, part.first) == (2, 4) else raw]

    with pytest.raises(ExportFileError, match="chunk 4 of bitmap 'all kinds' has bits set past the end of the disk"):
        reread(rebuilt(data, change))


def test_two_bitmaps_of_one_name_are_refused(image: Path) -> None:
    data = exported(image, "nothing")
    first, *records, end = parts(data)
    body = data[records[0].start : records[-1].end]
    head = preamble(header(data, bitmaps=2))
    whole = head + body + body
    end_body = struct.pack("<IQ", 2, len(whole)) + hashlib.sha256(whole).digest()
    with pytest.raises(ExportFileError, match="two bitmaps called 'nothing'"):
        reread(whole + record(4, end_body))
    del first, end


def test_a_file_that_changes_while_it_is_used_is_noticed(small: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(small)
    place = next(part for part in parts(small) if part.encoding == 3)
    packed = zstandard.compress(b"\1" + bytes(CHUNK_BYTES - 1))
    other = record(2, packed, encoding=3, first=2, chunks=1)  # as another export might have it, checksums and all
    for bad in (
        small[: place.body + 3] + b"\0\0\0" + small[place.body + 6 :],
        small[: place.body + 2],
        small[: place.start] + other + small[place.end :],
    ):
        file.write_bytes(small)
        with qcow2bm.read_export(file) as held:
            file.write_bytes(bad)
            with pytest.raises(ExportFileError, match="has changed since it was read"):
                held.find("all kinds").read_bits().count()


def test_files_of_other_kinds_are_no_export_files(image: Path, tmp_path: Path) -> None:
    for other in (image.read_bytes(), b"offset,length\n", b"{}", bytes(1000)):
        with pytest.raises(ExportFileError, match="is not an export file of qcow2bm"):
            reread(other)
    with pytest.raises(ExportFileError, match="is empty"):
        reread(b"")
    with pytest.raises(qcow2bm.errors.ImageIOError, match="No such file"):
        qcow2bm.read_export(tmp_path / "missing")
    with pytest.raises(qcow2bm.errors.ImageIOError, match="directory"):
        qcow2bm.read_export(tmp_path)


# ---- which bitmaps ----


def test_a_stale_bitmap_is_exported_only_on_demand_and_marked(tmp_path: Path) -> None:
    image = unpack("in-use", tmp_path)
    with qcow2bm.open(image) as opened:
        names = opened.bitmaps.names
        states = {bitmap.name: bitmap.state for bitmap in opened.bitmaps}
    stale = [name for name in names if states[name] is qcow2bm.State.INCONSISTENT]
    assert stale
    with pytest.raises(BitmapInconsistentError, match="--stale exports what is stored, marked as stale"):
        exported(image, stale[0])
    with reread(exported(image, stale=True)) as held, qcow2bm.open(image) as opened:
        assert [bitmap.name for bitmap in held.bitmaps] == names
        assert [bitmap.name for bitmap in held.bitmaps if bitmap.stale] == stale
        for bitmap in held.bitmaps:
            assert dirty_bits(bitmap.read_bits()) == dirty_bits(opened.bitmaps[bitmap.name].stored.bits)


def test_a_broken_bitmap_is_never_exported(tmp_path: Path) -> None:
    image = unpack("corrupt/bitmap-table-offset", tmp_path)
    with qcow2bm.open(image) as opened:
        broken = [bitmap.name for bitmap in opened.bitmaps if bitmap.state is qcow2bm.State.BROKEN]
        assert broken
        for stale in (False, True):
            with pytest.raises(BitmapBrokenError):
                choose(opened.qcow2, broken, stale=stale)
            ready = [b for b in BitmapDirectory(opened.qcow2).bitmaps if b.state is qcow2bm.State.READY]
            if ready:
                assert [b.name for b in choose(opened.qcow2, stale=stale)] == [b.name for b in ready]


def test_an_image_without_bitmaps_has_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(BitmapNotFoundError, match="there is no bitmap to export"):
        exported(unpack("no-bitmaps", tmp_path))
    with pytest.raises(BitmapNotFoundError, match="no bitmap is called 'x'"):
        exported(tmp_path / "image.qcow2", "x")
