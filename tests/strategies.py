"""Hypothesis strategies for the on-disk structures: every field at its edges, unknown bits and bytes included."""

from __future__ import annotations

from bitarray import bitarray
from hypothesis import strategies as st

from qcow2bm.bitmap.bits import BitVector
from qcow2bm.bitmap.chunks import ONES, ZEROES, Chunk, Combined, Inverted, Op, Patched
from qcow2bm.format.bitmap_directory import BitmapEntry, BitmapFlag
from qcow2bm.format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO, CompressedDescriptor
from qcow2bm.format.extensions import BitmapsExtension, CryptoHeaderPointer, Extension, ExtensionType, FeatureName
from qcow2bm.format.geometry import Geometry
from qcow2bm.format.header import Autoclear, Compatible, Header, Incompatible
from qcow2bm.format.snapshot_table import SnapshotEntry

u8 = st.integers(0, 0xFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)


def _multiples_of_8(limit: int) -> st.SearchStrategy[bytes]:
    return st.integers(0, limit // 8).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n))


# ---- header ----

_V2_FIELDS = {
    "backing_file_offset": u64,
    "backing_file_size": u32,
    "cluster_bits": u32,
    "size": u64,
    "crypt_method": u32,
    "l1_size": u32,
    "l1_table_offset": u64,
    "refcount_table_offset": u64,
    "refcount_table_clusters": u32,
    "nb_snapshots": u32,
    "snapshots_offset": u64,
}


@st.composite
def v3_headers(draw: st.DrawFn) -> Header:
    """Version 3, feature bits and additional bytes as a newer QEMU might write them."""
    additional = draw(_multiples_of_8(64))
    return Header(
        version=3,
        **{name: draw(field) for name, field in _V2_FIELDS.items()},
        incompatible_features=Incompatible(draw(u64)),
        compatible_features=Compatible(draw(u64)),
        autoclear_features=Autoclear(draw(u64)),
        refcount_order=draw(u32),
        header_length=104 + len(additional),
        additional=additional,
    )


v2_headers = st.builds(Header, version=st.just(2), **_V2_FIELDS)
headers = v2_headers | v3_headers()


# ---- extensions ----

_TYPES = st.sampled_from([int(kind) for kind in ExtensionType if kind != ExtensionType.END])
extension_types = _TYPES | st.integers(1, 0xFFFF_FFFF)


@st.composite
def extensions(draw: st.DrawFn) -> Extension:
    """Any type, any data; padding that is not zero, as nobody forbids."""
    data = draw(st.binary(max_size=60))
    fill = -len(data) % 8
    return Extension(draw(extension_types), data, padding=draw(st.binary(min_size=fill, max_size=fill)))


feature_names = st.builds(FeatureName, u8, u8, st.binary(min_size=46, max_size=46))
bitmaps_extensions = st.builds(BitmapsExtension, u32, u64, u64, u32)
crypto_pointers = st.builds(CryptoHeaderPointer, u64, u64)


# ---- directory and snapshot entries ----


@st.composite
def bitmap_entries(draw: st.DrawFn) -> BitmapEntry:
    """Any field value; extra data, unknown flags and padding included."""
    name, extra = draw(st.binary(max_size=40)), draw(st.binary(max_size=24))
    fill = -(24 + len(name) + len(extra)) % 8
    return BitmapEntry(
        bitmap_table_offset=draw(u64),
        bitmap_table_size=draw(u32),
        flags=BitmapFlag(draw(u32)),
        granularity_bits=draw(u8),
        name=name,
        extra_data=extra,
        type=draw(u8),
        padding=draw(st.binary(min_size=fill, max_size=fill)),
    )


@st.composite
def snapshot_entries(draw: st.DrawFn) -> SnapshotEntry:
    """Any field value; extra data of every length, unknown part and padding included."""
    extra, name = draw(st.binary(max_size=40)), draw(st.binary(max_size=20))
    identity = draw(st.binary(max_size=10))
    fill = -(40 + len(extra) + len(name) + len(identity)) % 8
    return SnapshotEntry(
        l1_table_offset=draw(u64),
        l1_size=draw(u32),
        date_sec=draw(u32),
        date_nsec=draw(u32),
        vm_clock_nsec=draw(u64),
        vm_state_size=draw(u32),
        extra_data=extra,
        id=identity,
        name=name,
        padding=draw(st.binary(min_size=fill, max_size=fill)),
    )


# ---- geometry and mapping ----


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Every cluster size and refcount order; extended L2 where the cluster size allows it."""
    bits = draw(st.integers(9, 21))
    return Geometry(bits, draw(st.integers(0, 1 << 45)), draw(st.integers(0, 6)), bits >= 14 and draw(st.booleans()))


def compressed_descriptors(geometry: Geometry) -> st.SearchStrategy[CompressedDescriptor]:
    """Descriptors that fit the cluster size; the length ends at a sector's end."""
    shift = 62 - (geometry.cluster_bits - 8)
    sectors = st.integers(1, 1 << geometry.cluster_bits - 8)
    offsets = st.integers(0, (1 << shift) - 1)
    return st.builds(lambda at, count: CompressedDescriptor(at, count * 512 - at % 512), offsets, sectors)


def l2_values(geometry: Geometry) -> st.SearchStrategy[int]:
    """L2 entries: none, zero, data (aligned or not), compressed, and any 64 bits at all."""
    aligned = st.integers(1, (1 << 40) - 1).map(lambda cluster: (cluster << geometry.cluster_bits) & OFFSET_MASK)
    low = st.integers(1, 24).map(lambda cluster: cluster << geometry.cluster_bits)
    data = st.builds(lambda offset, flags: offset | flags, aligned | low, st.sampled_from([0, COPIED, ZERO]))
    packed = compressed_descriptors(geometry).map(lambda descriptor: descriptor.build(geometry))
    near = st.integers(0, 24 << geometry.cluster_bits).map(lambda offset: COMPRESSED | offset)
    return st.sampled_from([0, ZERO]) | data | packed | near | u64


# ---- bit vectors ----


class Bits:
    """A chunk whose bits are at hand."""

    def __init__(self, bits: bitarray) -> None:
        self._bits = bits

    def read(self, start: int, length: int) -> bitarray:
        """A copy of the bits."""
        return self._bits[8 * start : 8 * (start + length)]


def _chunks(chunk_bytes: int) -> st.SearchStrategy[Chunk]:
    bits = st.binary(min_size=chunk_bytes, max_size=chunk_bytes).map(_stored)
    simple: st.SearchStrategy[Chunk] = st.sampled_from([ZEROES, ONES]) | bits
    patch = st.tuples(st.integers(0, 8 * chunk_bytes), st.integers(0, 8 * chunk_bytes), st.booleans())
    ordered = patch.map(lambda p: (min(p[:2]), max(p[:2]), p[2]))
    patched = st.builds(Patched, simple, st.lists(ordered, min_size=1, max_size=3).map(tuple))
    both = st.builds(Combined, st.sampled_from(Op), st.tuples(bits, patched))
    return simple | patched | both | st.builds(Inverted, patched)


def _stored(data: bytes) -> Bits:
    bits = bitarray(endian="little")
    bits.frombytes(data)
    return Bits(bits)


@st.composite
def bit_vectors(draw: st.DrawFn, length: int | None = None, chunk_bytes: int | None = None) -> BitVector:
    """Vectors of a few small chunks of every kind, with anything in the bits past their end."""
    size = draw(st.sampled_from([1, 2, 8])) if chunk_bytes is None else chunk_bytes
    bits = draw(st.integers(0, 8 * size * 4)) if length is None else length
    count = -(-bits // (8 * size))
    return BitVector(bits, size, draw(st.lists(_chunks(size), min_size=count, max_size=count)))
