"""Damaged images, as many as wanted: each is a base with one to three of the damages below, chosen by a seed.

A damage knows the structure it hits: a field of the header, an L2 entry of a snapshot, a refcount. Where the structures
lie is read from the healthy base, so damages do not depend on what others did before them. The same seed and the same
base give the same damage.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.support.bases import Anatomy, Base
from tests.support.raw import BITMAPS, OFFSET

BACKING_FORMAT, FEATURES, DATA_FILE, CRYPTO = 0xE2792ACA, 0x6803F857, 0x44415441, 0x0537BE77
"""Kinds of header extensions."""

FAR = 1 << 50
"""An offset that no file reaches."""


# ---- the patient, and what a damage is ----


@dataclass
class Patient:
    """An image under the knife. What one damage changed stays as it is, so that no other can undo it."""

    anatomy: Anatomy
    chance: random.Random
    log: list[str] = field(default_factory=list)
    length: int | None = None
    tail: bytes = b""

    def __post_init__(self) -> None:
        self.data = bytearray(self.anatomy.base.data)
        self.touched: set[int] = set()

    def number(self, place: int, length: int = 8) -> int:
        """A number as it is by now."""
        return int.from_bytes(self.data[place : place + length], "big")

    def put(self, place: int, value: int, length: int = 8) -> None:
        """Store a number, cut to its length."""
        old, new = self.number(place, length), value % (1 << 8 * length)
        if old != new and place not in self.touched:
            self.touched.add(place)
            self.data[place : place + length] = new.to_bytes(length, "big")
            self.log.append(f"{place:#x}: {old:x} -> {new:x}")

    def fill(self, place: int, content: bytes | bytearray) -> None:
        """Store bytes."""
        if self.data[place : place + len(content)] != content:
            self.data[place : place + len(content)] = content
            self.log.append(f"{place:#x}: {len(content)} other bytes")

    def set_refcount(self, cluster: int, change: Callable[[int], int]) -> None:
        """Replace a cluster's refcount, which stays in its bits."""
        bits = self.anatomy.raw.refcount_bits
        at, shift = self.anatomy.raw.refcount_place(cluster)
        if bits >= 8:
            self.put(at, change(self.number(at, bits // 8)), bits // 8)
            return
        mask, byte = (1 << bits) - 1, self.data[at]
        self.put(at, byte & ~(mask << shift) | (change(byte >> shift & mask) & mask) << shift, 1)

    def resize(self, length: int, tail: bytes = b"") -> None:
        """Cut the file to a length in the end, when all damages are done, and append something."""
        if (length, tail) != (len(self.data), b""):
            self.length, self.tail = length, tail
            self.log.append(f"{length} bytes long, and {len(tail)} more")

    def result(self) -> bytes:
        """The damaged image."""
        return bytes(self.data[: self.length]) + self.tail


class Damage(NamedTuple):
    """A way to damage an image: its name, what it needs to be there, and the change. May find nothing to change."""

    name: str
    places: Callable[[Anatomy], Sequence[object]]
    apply: Callable[[Patient], None]


DAMAGES: list[Damage] = []


def _words(function: Callable[..., object]) -> str:
    """A function's name, to be read."""
    return function.__name__.replace("_", " ").strip()


def damage(places: Callable[[Anatomy], Sequence[object]]) -> Callable[[Callable[[Patient], None]], None]:
    """Decorator of a function that does a damage, where there are places for it."""
    return lambda function: DAMAGES.append(Damage(_words(function), places, function))


# ---- fields: a number gets one of some interesting values ----


class Field(NamedTuple):
    """A number in a structure: its name, place and length, and the values worth a try, by the one it has."""

    name: str
    at: int
    length: int
    values: Callable[[Anatomy, int], Sequence[int]]


def values(*numbers: int) -> Callable[[Anatomy, int], Sequence[int]]:
    """Just these values."""
    return lambda _anatomy, _old: numbers


def near(*numbers: int) -> Callable[[Anatomy, int], Sequence[int]]:
    """Values around the present one, and these."""
    return lambda _anatomy, old: (old - 1, old + 1, old // 2, old * 2, old + 8, *numbers)


def bits(*numbers: int) -> Callable[[Anatomy, int], Sequence[int]]:
    """One of these bits flipped."""
    return lambda _anatomy, old: [old ^ 1 << number for number in numbers]


def anywhere(anatomy: Anatomy, old: int) -> Sequence[int]:
    """Wrong offsets of every sort."""
    end, cluster = anatomy.end, anatomy.cluster
    wrong = (0, old + 8, old + 512, old + cluster, end, end + 5 * cluster, FAR, (1 << 63) - cluster, -cluster)
    return *wrong, *anatomy.used[:8], *anatomy.free[:1]


def fields(structure: str, places: Callable[[Anatomy], Sequence[int]], *table: Field) -> None:
    """A damage for each field of a structure, which an image may have several times."""
    for which in table:

        def change(patient: Patient, which: Field = which) -> None:
            at = patient.chance.choice(places(patient.anatomy)) + which.at
            old = patient.number(at, which.length)
            patient.put(at, patient.chance.choice(which.values(patient.anatomy, old)), which.length)

        DAMAGES.append(Damage(f"{structure}: {which.name}", places, change))


HUGE = 0xFFFF_FFFF

fields(
    "header", lambda _: (0,),
    Field("magic", 0, 4, bits(0, 31)),
    Field("version", 4, 4, values(0, 1, 2, 3, 4)),
    Field("backing name offset", 8, 8, lambda a, old: (0, a.cluster - 4, a.cluster, a.cluster + 1, FAR, old + 1, 104)),
    Field("backing name length", 16, 4, near(0, 1, 1023, 1024, HUGE)),
    Field("cluster bits", 20, 4, near(8, 9, 21, 22, HUGE)),
    Field("size", 24, 8, near(0, 1 << 20, 1 << 40, 1 << 56, 1 << 63, (1 << 64) - 512)),
    Field("encryption", 32, 4, values(0, 1, 2, 3)),
    Field("L1 size", 36, 4, near(0, 1 << 22, (1 << 22) + 1, HUGE)),
    Field("L1 offset", 40, 8, anywhere),
    Field("refcount table offset", 48, 8, anywhere),
    Field("refcount table clusters", 56, 4, near(0, 1 << 14, 1 << 20, HUGE)),
    Field("snapshots", 60, 4, near(0, 1, 3, 65536 + 1, HUGE)),
    Field("snapshot table offset", 64, 8, anywhere),
)  # fmt: skip
fields(
    "header", lambda a: (0,) if a.version == 3 else (),
    Field("dirty and corrupt", 72, 8, bits(0, 1)),
    Field("incompatible features", 72, 8, bits(2, 3, 4, 5, 40, 63)),
    Field("compatible features", 80, 8, bits(0, 1, 33, 63)),
    Field("autoclear features", 88, 8, bits(0, 1, 2, 17, 63)),
    Field("refcount order", 96, 4, values(0, 1, 2, 3, 4, 5, 6, 7, HUGE)),
    Field("header length", 100, 4, near(0, 72, 103, 104, 112, 120, 512, 513, 1 << 16, HUGE)),
    Field("compression", 104, 1, values(0, 1, 2, 255)),
)  # fmt: skip


def snapshot_places(anatomy: Anatomy) -> Sequence[int]:
    """The snapshot table's entries."""
    return [snapshot.at for snapshot in anatomy.snapshots]


fields(
    "snapshot", snapshot_places,
    Field("L1 offset", 0, 8, anywhere),
    Field("L1 size", 8, 4, near(0, 1, 1 << 22, (1 << 22) + 1, HUGE)),
    Field("id length", 12, 2, near(0, 4096, 65535)),
    Field("name length", 14, 2, near(0, 4096, 65535)),
    Field("date", 16, 8, values(0, (1 << 64) - 1)),
    Field("extra length", 36, 4, near(0, 8, 15, 16, 1024, 1025, 70000, HUGE)),
)  # fmt: skip


def bitmap_places(anatomy: Anatomy) -> Sequence[int]:
    """The bitmap directory's entries."""
    return [bitmap.at for bitmap in anatomy.bitmaps]


fields(
    "bitmap", bitmap_places,
    Field("table offset", 0, 8, anywhere),
    Field("table size", 8, 4, near(0, 1 << 20, (1 << 27) + 1, HUGE)),
    Field("known flags", 12, 4, bits(0, 1)),
    Field("other flags", 12, 4, bits(2, 3, 31)),
    Field("type", 16, 1, values(0, 2, 255)),
    Field("granularity", 17, 1, near(0, 8, 9, 31, 32, 255)),
    Field("name length", 18, 2, near(0, 1, 1023, 1024, 65535)),
    Field("extra length", 20, 4, near(8, 24, 1 << 20, HUGE)),
)  # fmt: skip


def extension(kind: int) -> Callable[[Anatomy], Sequence[int]]:
    """The data of a header extension."""
    return lambda a: [a.extensions[kind][0]] if kind in a.extensions else []


fields(
    "bitmaps extension", extension(BITMAPS),
    Field("bitmaps", 0, 4, near(0, 65535, 65536, HUGE)),
    Field("reserved", 4, 4, values(1, HUGE)),
    Field("directory size", 8, 8, near(0, 1 << 20, 65535 * 1024, 65535 * 1024 + 1, -1)),
    Field("directory offset", 16, 8, anywhere),
)  # fmt: skip
fields(
    "encryption extension", extension(CRYPTO),
    Field("offset", 0, 8, anywhere),
    Field("length", 8, 8, near(0, 1, 4096, 1 << 30, 1 << 63)),
)  # fmt: skip
fields(
    "extension", lambda a: [at - 8 for at, _ in a.extensions.values()],
    Field("kind", 0, 4, values(0, 1, 0xBADF00D, BITMAPS, BACKING_FORMAT, CRYPTO, DATA_FILE, FEATURES)),
    Field("length", 4, 4, near(0, 8, 24, 1023, HUGE)),
)  # fmt: skip


# ---- entries of tables: an offset and flags ----


RESERVED: list[int] = [1 << bit for bit in (*range(1, 9), *range(56, 62))]
"""Bits that nothing uses, in any table."""


def _unaligned(patient: Patient, place: int) -> int:
    return patient.number(place) + 512 * patient.chance.randrange(max(1, patient.anatomy.cluster // 512))


def _point(patient: Patient, place: int, target: int) -> int:
    """The entry with another offset, and its flags."""
    return patient.number(place) & ~OFFSET | target & OFFSET


def _outside(patient: Patient, place: int) -> int:
    anatomy = patient.anatomy
    return _point(patient, place, anatomy.end + patient.chance.randrange(3) * anatomy.cluster)


def _far(patient: Patient, place: int) -> int:
    return _point(patient, place, patient.chance.choice((FAR, OFFSET, OFFSET - patient.anatomy.cluster + 1)))


def _shared(patient: Patient, place: int) -> int:
    return _point(patient, place, patient.chance.choice(patient.anatomy.used))


def _moved(patient: Patient, place: int) -> int:
    return _point(patient, place, patient.chance.choice(patient.anatomy.free or [0]))


def _reserved(patient: Patient, place: int) -> int:
    return patient.number(place) ^ patient.chance.choice(RESERVED)


def _lowest(patient: Patient, place: int) -> int:
    """Bit 0: reserved in L1 and refcount table, "reads as zeroes" in an L2 entry, all ones in a bitmap table."""
    return patient.number(place) ^ 1


def _highest(patient: Patient, place: int) -> int:
    """Bit 63: COPIED, or reserved."""
    return patient.number(place) ^ 1 << 63


def _second_highest(patient: Patient, place: int) -> int:
    """Bit 62: a compressed cluster, or reserved."""
    return patient.number(place) ^ 1 << 62


def _zeroed(_patient: Patient, _place: int) -> int:
    return 0


def _any(patient: Patient, _place: int) -> int:
    return patient.chance.getrandbits(64)


def _copied(patient: Patient, _place: int) -> int:
    """An entry from somewhere else: of this table, so that two name one cluster, or of another kind of table."""
    anatomy = patient.anatomy
    return patient.number(patient.chance.choice(anatomy.blocks + anatomy.l1_used + anatomy.l2 + anatomy.snapshot_l2))


TABLES: dict[str, Callable[[Anatomy], Sequence[int]]] = {
    "refcount table": lambda a: a.blocks,
    "L1": lambda a: a.l1_used,
    "L2": lambda a: a.standard,
    "compressed L2": lambda a: a.compressed,
    "snapshot L1": lambda a: a.snapshot_l1,
    "snapshot L2": lambda a: a.snapshot_l2,
    "bitmap table": lambda a: a.bitmap_entries,
    "unused refcount table": lambda a: a.reftable[len(a.blocks) : len(a.blocks) + 3],
    "unused L1": lambda a: a.l1[len(a.l1_used) :][-3:],
    "unused L2": lambda a: a.unallocated,
}
CHANGES = (
    _unaligned, _outside, _far, _shared, _moved, _reserved, _lowest, _highest, _second_highest, _zeroed, _any, _copied,
)  # fmt: skip


def entries(table: str, places: Callable[[Anatomy], Sequence[int]]) -> None:
    """A damage for every change of an entry of a table."""
    for change in CHANGES:
        if table.startswith("unused") and change is _zeroed:
            continue

        def alter(patient: Patient, change: Callable[[Patient, int], int] = change) -> None:
            place = patient.chance.choice(places(patient.anatomy))
            patient.put(place, change(patient, place))

        DAMAGES.append(Damage(f"{table}: {_words(change)}", places, alter))


for _table, _places in TABLES.items():
    entries(_table, _places)


# ---- L2 entries: compressed clusters and subclusters ----


@damage(lambda a: a.compressed)
def compressed_elsewhere(patient: Patient) -> None:
    """The offset of compressed data, which needs no alignment: beyond the file, across its end, over something else."""
    anatomy, place = patient.anatomy, patient.chance.choice(patient.anatomy.compressed)
    mask = (1 << 62 - (anatomy.cluster.bit_length() - 9)) - 1
    target = patient.chance.choice((anatomy.end - 1, anatomy.end + 100, mask, 5, patient.chance.choice(anatomy.used)))
    patient.put(place, patient.number(place) & ~mask | target)


@damage(lambda a: a.compressed)
def compressed_length(patient: Patient) -> None:
    """The number of sectors of compressed data."""
    shift = 62 - (patient.anatomy.cluster.bit_length() - 9)
    place = patient.chance.choice(patient.anatomy.compressed)
    patient.put(place, patient.number(place) ^ 1 << patient.chance.randrange(shift, 62))


def _subclusters(anatomy: Anatomy) -> Sequence[int]:
    return [place + 8 for place in anatomy.l2 + anatomy.snapshot_l2] if anatomy.extended else []


@damage(_subclusters)
def subclusters_of_an_entry(patient: Patient) -> None:
    """Bits of an allocated cluster: some set, none, all; allocated and zero at once."""
    place = patient.chance.choice(_subclusters(patient.anatomy))
    old, bit = patient.number(place), patient.chance.randrange(32)
    patient.put(place, patient.chance.choice((0, 1 << bit, 1 << 32 + bit, old | (1 << 32 | 1) << bit, (1 << 64) - 1)))


@damage(lambda a: a.unallocated if a.extended else ())
def subclusters_of_nothing(patient: Patient) -> None:
    """Bits where no cluster is: to read as zeroes is right, to be allocated is wrong."""
    place = patient.chance.choice(patient.anatomy.unallocated) + 8
    patient.put(place, patient.chance.choice((1, 1 << 31, 1 << 32, 1 << 63, 1 << 40 | 1 << 8)))


@damage(_subclusters)
def subclusters_without_data(patient: Patient) -> None:
    """An offset that is not aligned, and nothing in the cluster but zeroes."""
    place = patient.chance.choice(_subclusters(patient.anatomy))
    patient.put(place, patient.number(place) & 0xFFFF_FFFF << 32)
    patient.put(place - 8, patient.number(place - 8) + 512)


@damage(lambda a: a.standard)
def preallocated_unaligned(patient: Patient) -> None:
    """A cluster that reads as zeroes and whose offset is not aligned."""
    place = patient.chance.choice(patient.anatomy.standard)
    patient.put(place, (patient.number(place) | 1) + 512)


# ---- refcounts ----


def _refcount(change: Callable[[int], int], targets: Callable[[Anatomy], Sequence[int]]) -> Callable[[Patient], None]:
    """A damage to one refcount or a few."""

    def alter(patient: Patient) -> None:
        anatomy = patient.anatomy
        for _ in range(patient.chance.choice((1, 1, 3))):
            patient.set_refcount(patient.chance.choice(targets(anatomy)) // anatomy.cluster, change)

    return alter


for _name, _change in {
    "more": lambda old: old + 1,
    "fewer": lambda old: old - 1,
    "none": lambda _old: 0,
    "the most": lambda _old: -1,
    "twice": lambda old: old * 2,
}.items():
    DAMAGES.append(Damage(f"refcount: {_name}", lambda a: a.used, _refcount(_change, lambda a: a.used)))
DAMAGES.append(Damage("refcount: free", lambda a: a.free, _refcount(lambda _: 1, lambda a: a.free)))


@damage(lambda a: [at for at in a.free if at == a.end])
def leaks(patient: Patient) -> None:
    """Clusters at the end of the file that were allocated and never linked to anything."""
    anatomy = patient.anatomy
    count = patient.chance.randrange(1, 1 + len([at for at in anatomy.free if at >= anatomy.end]))
    for cluster in range(count):
        patient.set_refcount(anatomy.end // anatomy.cluster + cluster, lambda _: 1)
    patient.resize(len(patient.data), bytes(anatomy.end - len(patient.data) + count * anatomy.cluster))


@damage(lambda a: a.blocks)
def refcount_far_away(patient: Patient) -> None:
    """A refcount somewhere in a block, most likely beyond the end of the file."""
    anatomy = patient.anatomy
    block = anatomy.offset(patient.chance.choice(anatomy.blocks))
    patient.put(block + patient.chance.randrange(anatomy.cluster), patient.chance.randrange(256), 1)


# ---- whole pieces ----


def _pieces(anatomy: Anatomy) -> Sequence[int]:
    """The offsets of L2 tables and refcount blocks."""
    return [anatomy.offset(place) for place in anatomy.blocks + anatomy.l1_used + anatomy.snapshot_l1]


@damage(lambda a: a.used)
def cluster_lost(patient: Patient) -> None:
    """A cluster of zeroes: a write that never came, or a hole punched in the wrong place."""
    patient.fill(patient.chance.choice(patient.anatomy.used[1:]), bytes(patient.anatomy.cluster))


@damage(_pieces)
def table_lost(patient: Patient) -> None:
    """The same for a table."""
    patient.fill(patient.chance.choice(_pieces(patient.anatomy)), bytes(patient.anatomy.cluster))


@damage(_pieces)
def sector_lost(patient: Patient) -> None:
    """One sector of a table."""
    place = patient.chance.choice(_pieces(patient.anatomy))
    patient.fill(place + 512 * patient.chance.randrange(min(2, patient.anatomy.cluster // 512)), bytes(512))


@damage(lambda a: a.used[3:])
def cluster_copied(patient: Patient) -> None:
    """A cluster's content over another's: a write to the wrong place."""
    source, target = patient.chance.sample(patient.anatomy.used[1:], 2)
    patient.fill(target, patient.data[source : source + patient.anatomy.cluster])


def _flip(patient: Patient, count: int, mask: Callable[[], int]) -> None:
    place = patient.chance.choice(patient.chance.choice(patient.anatomy.metadata))
    for at in range(place, place + count):
        patient.put(at, patient.number(at, 1) ^ mask(), 1)


@damage(lambda a: a.metadata)
def bit_flipped(patient: Patient) -> None:
    """One bit of the metadata."""
    _flip(patient, 1, lambda: 1 << patient.chance.randrange(8))


@damage(lambda a: a.metadata)
def bytes_changed(patient: Patient) -> None:
    """Some bytes of the metadata."""
    _flip(patient, patient.chance.randrange(2, 9), lambda: patient.chance.randrange(256))


# ---- names, header extensions, what lies between ----


@damage(lambda a: [a.raw.number(8)] if a.raw.number(8) else ())
def backing_name(patient: Patient) -> None:
    """A letter of the backing file's name."""
    at, length = patient.anatomy.raw.number(8), patient.anatomy.raw.number(16, 4)
    patient.put(at + patient.chance.randrange(length), patient.chance.choice(b"x/\0\xff"), 1)


def _names_in_extensions(anatomy: Anatomy) -> Sequence[tuple[int, int]]:
    return [anatomy.extensions[kind] for kind in (BACKING_FORMAT, DATA_FILE) if kind in anatomy.extensions]


@damage(_names_in_extensions)
def name_in_extension(patient: Patient) -> None:
    """A letter of the data file's name, or of the backing file's format."""
    at, length = patient.chance.choice(_names_in_extensions(patient.anatomy))
    patient.put(at + patient.chance.randrange(length), patient.chance.choice(b"x/\0\xff"), 1)


@damage(lambda a: () if a.raw.number(8) else [a.end_of_extensions])
def extension_appended(patient: Patient) -> None:
    """A header extension that nobody knows; or an empty one that somebody does; or garbage."""
    kind = patient.chance.choice((0x0BADCAFE, 0x0BADCAFE, FEATURES, CRYPTO, BITMAPS))
    length = patient.chance.choice((0, 8, 13, 1 << 16))
    header = kind.to_bytes(4, "big") + length.to_bytes(4, "big")
    patient.fill(patient.anatomy.end_of_extensions, header + bytes(min(length, 24)))


@damage(lambda a: [s for s in a.snapshots if s.name_size])
def snapshot_name(patient: Patient) -> None:
    """A letter of a snapshot's name."""
    snapshot = patient.chance.choice(patient.anatomy.snapshots)
    patient.put(snapshot.name + patient.chance.randrange(snapshot.name_size), patient.chance.choice(b"x\0\n\xff"), 1)


@damage(lambda a: [s for s in a.snapshots if s.extra_size])
def snapshot_extra_data(patient: Patient) -> None:
    """The known extra data of a snapshot: sizes, of which a check uses none."""
    snapshot = patient.chance.choice(patient.anatomy.snapshots)
    patient.put(snapshot.extra + patient.chance.choice((0, 8)), patient.chance.getrandbits(64))


@damage(lambda a: a.bitmaps)
def bitmap_name(patient: Patient) -> None:
    """A letter of a bitmap's name, or the name of another bitmap."""
    bitmaps = patient.anatomy.bitmaps
    one, other = patient.chance.choice(bitmaps), patient.chance.choice(bitmaps)
    if one != other and patient.chance.random() < 0.5:
        patient.put(one.at + 18, other.name_size, 2)
        patient.fill(one.at + 24, patient.data[other.at + 24 : other.at + 24 + other.name_size])
        return
    patient.put(one.at + 24 + patient.chance.randrange(one.name_size), patient.chance.choice(b"x\0\n\xff"), 1)


@damage(lambda a: a.standard)
def guest_data(patient: Patient) -> None:
    """A byte of the guest's, which no check can miss."""
    place = patient.anatomy.offset(patient.chance.choice(patient.anatomy.standard))
    if place < len(patient.data):
        patient.put(place + patient.chance.randrange(100), patient.chance.randrange(256), 1)


# ---- the file's length ----


@damage(lambda a: a.used)
def truncated_at_cluster(patient: Patient) -> None:
    """Whole clusters lost at the end of the file: most often few."""
    clusters = patient.anatomy.end // patient.anatomy.cluster
    lost = patient.chance.choice((1, 1, 2, patient.chance.randrange(1, clusters)))
    patient.resize(max(1, clusters - lost) * patient.anatomy.cluster)


@damage(lambda a: a.used)
def truncated_in_cluster(patient: Patient) -> None:
    """The last cluster is not whole, which is allowed, or the file ends somewhere."""
    size, cluster = len(patient.data), patient.anatomy.cluster
    patient.resize(
        max(0, patient.chance.choice((size - 1, size - 512, size - cluster - 7, patient.chance.randrange(size))))
    )


@damage(lambda a: a.used)
def truncated_in_header(patient: Patient) -> None:
    """Hardly more than nothing is left."""
    patient.resize(patient.chance.choice((0, 4, 71, 72, 104, 112, 511, 512)))


@damage(lambda a: a.used)
def lengthened(patient: Patient) -> None:
    """More at the end of the file: bytes, clusters, of zeroes or of something."""
    cluster = patient.anatomy.cluster
    length = patient.chance.choice((1, 512, cluster, cluster * patient.chance.randrange(2, 4)))
    patient.resize(len(patient.data), patient.chance.choice((b"\0", b"\xa5")) * length)


# ---- the choice ----


LIKELIER = {"leaks": 10, "L1: zeroed": 6, "L2: zeroed": 4, "unused L2: lowest": 2, "compressed L2: zeroed": 2}
"""Damages that only leak, and one that harms nothing: else nearly every image would be corrupt or not open at all."""


@dataclass(frozen=True)
class Damaged:
    """A damaged image: its base, and what was done to it, each with the bytes it changed."""

    seed: int
    base: Base
    applied: dict[str, list[str]]
    data: bytes

    @property
    def name(self) -> str:
        """The image in one line."""
        return f"seed {self.seed}: {self.base.name}, {', '.join(self.applied)}"


class Generator:
    """Makes damaged images of some bases. The seeds go round the bases, so that each gets equally many."""

    def __init__(self, bases: Sequence[Base]) -> None:
        self.anatomies = [Anatomy(base) for base in bases]
        self.possible = {
            anatomy.base.name: [damage for damage in DAMAGES if damage.places(anatomy)] for anatomy in self.anatomies
        }
        counts = Counter(damage.name for damages in self.possible.values() for damage in damages)
        # What few bases can suffer is likelier on these, so that every damage is about as frequent.
        self.weights = {name: LIKELIER.get(name, 1) / count for name, count in counts.items()}

    def damaged(self, seed: int) -> Damaged:
        """The image of a seed."""
        chance = random.Random(seed)
        anatomy = self.anatomies[seed % len(self.anatomies)]
        patient, applied = Patient(anatomy, chance), dict[str, list[str]]()
        wanted = chance.choice((1, 1, 1, 1, 2, 2, 3))
        for damage in self._shuffled(anatomy, chance):
            damage.apply(patient)
            if patient.log:
                applied[damage.name] = patient.log
                patient.log = []
            if len(applied) == wanted:
                break
        return Damaged(seed, anatomy.base, applied, patient.result())

    def _shuffled(self, anatomy: Anatomy, chance: random.Random) -> list[Damage]:
        """The possible damages in a random order, by weight (the exponential variates of Efraimidis and Spirakis)."""
        return sorted(
            self.possible[anatomy.base.name], key=lambda damage: chance.expovariate(self.weights[damage.name])
        )
