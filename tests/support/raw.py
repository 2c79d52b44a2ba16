"""An image's bytes read by hand, with the specification's offsets and nothing of qcow2bm: refcounts and header fields.

And the same hand damages an image, or lays its header out as QEMU never does.
"""

import struct
from functools import cached_property
from pathlib import Path

BITMAPS = 0x23852875
OFFSET = 0x00FF_FFFF_FFFF_FE00
END = bytes(8)


class Raw:
    """The bytes of a whole small image. `put` changes them; `save` writes them back."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    @classmethod
    def load(cls, path: Path) -> "Raw":
        return cls(path.read_bytes())

    def save(self, path: Path) -> None:
        path.write_bytes(self.data)

    def number(self, offset: int, length: int = 8) -> int:
        """A big-endian number."""
        return int.from_bytes(self.data[offset : offset + length], "big")

    def put(self, offset: int, value: int, length: int = 8) -> None:
        """Store a big-endian number."""
        self.data[offset : offset + length] = value.to_bytes(length, "big")

    @property
    def cluster_size(self) -> int:
        return 1 << self.number(20, 4)

    @property
    def refcount_bits(self) -> int:
        return 1 << self.number(96, 4) if self.number(4, 4) == 3 else 16

    @cached_property
    def blocks(self) -> dict[int, int]:
        """Refcount block index to its offset."""
        table, clusters = self.number(48), self.number(56, 4)
        entries = ((index, self.number(table + 8 * index)) for index in range(clusters * self.cluster_size // 8))
        return {index: entry for index, entry in entries if entry}

    def refcount_place(self, cluster: int) -> tuple[int, int]:
        """Offset of the first byte and number of the first bit of a refcount."""
        index, within = divmod(cluster, self.cluster_size * 8 // self.refcount_bits)
        at, shift = divmod(within * self.refcount_bits, 8)
        return self.blocks[index] + at, shift

    def refcount(self, cluster: int) -> int:
        """The refcount of a cluster, 0 where there is no block."""
        bits = self.refcount_bits
        if cluster // (self.cluster_size * 8 // bits) not in self.blocks:
            return 0
        at, shift = self.refcount_place(cluster)
        return self.number(at, bits // 8) if bits >= 8 else self.data[at] >> shift & (1 << bits) - 1

    def set_refcount(self, offset: int, value: int) -> None:
        """Make the refcount of the cluster at `offset` lie."""
        at, shift = self.refcount_place(offset // self.cluster_size)
        bits = self.refcount_bits
        if bits >= 8:
            self.put(at, value, bits // 8)
        else:
            self.data[at] = self.data[at] & ~((1 << bits) - 1 << shift) | value << shift

    @property
    def is_marked(self) -> bool:
        """True if it has the mark of a change that qcow2bm has begun, and not ended."""
        return self.number(4, 4) == 3 and bool(self.number(72) >> 62 & 1)

    def extensions(self) -> dict[int, tuple[int, int]]:
        """Header extension type to the offset and length of its data; the end marker's offset under type 0."""
        at = self.number(100, 4) if self.number(4, 4) == 3 else 72
        limit = self.number(8) or self.cluster_size
        found: dict[int, tuple[int, int]] = {}
        while at + 8 <= limit:
            kind, length = struct.unpack_from(">II", self.data, at)
            if kind == 0:
                break
            found[kind] = at + 8, length
            at += 8 + (length + 7) // 8 * 8
        return {**found, 0: (at, 0)}

    def insert_extension(self, data: bytes, *, before: int = 0, kind: int = 0x1BADCAFE) -> None:
        """Put an unknown extension in front of another, or at the end; a backing name is not in the way."""
        place, end = self.extensions()[before][0] - (8 if before else 0), self.extensions()[0][0]
        built = struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
        tail = bytes(self.data[place:end])
        new = built + tail + END
        self.data[place : place + len(new)] = new

    @property
    def directory(self) -> tuple[int, int, int]:
        """Offset of the bitmap directory, its size, and the number of bitmaps."""
        at = self.extensions()[BITMAPS][0]
        return self.number(at + 16), self.number(at + 8), self.number(at, 4)

    def tables(self) -> dict[str, tuple[int, int]]:
        """Bitmap name to offset and entries of its table."""
        at, size, _ = self.directory
        end, found = at + size, {}
        while at < end:
            offset, entries, _, _, _, name, extra = struct.unpack_from(">QIIBBHI", self.data, at)
            found[self.data[at + 24 + extra :][:name].decode()] = offset, entries
            at += (24 + extra + name + 7) // 8 * 8
        return found

    def bitmap_data(self, name: str) -> list[int]:
        """Places (offsets in the bitmap table) of the entries that name a data cluster."""
        offset, entries = self.tables()[name]
        return [at for at in range(offset, offset + 8 * entries, 8) if self.number(at) & OFFSET]

    def l2_entry(self, guest_cluster: int = 0) -> int:
        """Offset of the (standard or extended) L2 entry of a guest cluster."""
        width = 16 if self.number(4, 4) == 3 and self.number(72) & 16 else 8
        index, within = divmod(guest_cluster, self.cluster_size // width)
        return (self.number(self.number(40) + 8 * index) & OFFSET) + width * within
