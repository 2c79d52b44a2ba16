"""Boot rescue: bitmaps that break the format are taken out of the directory, and QEMU opens the image again.

Every other bitmap keeps its entry byte for byte, and its table and data where they are. What is taken out is
quarantined: the undo file keeps directory entry, table and data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice

from ..bitmap import header_area
from ..bitmap.quarantine import keep
from ..bitmap.store import StoredBitmap
from ..checks.census import Mismatch
from ..checks.lost import Leaked, LostDirectory, bitmap_places, lost_directories
from ..checks.model import Finding, RepairClass
from ..checks.problems import NOT_ITS_OWN
from ..errors import CorruptImageError
from ..format.bitmap_directory import BitmapEntry
from ..format.entries import ALL_ONES, BitmapTableEntry
from ..format.extensions import BITMAPS_LENGTH, HEAD_LENGTH, BitmapsExtension, ExtensionArea, ExtensionType
from ..format.geometry import round_up
from ..format.header import AUTOCLEAR_FIELD, KNOWN_AUTOCLEAR, Autoclear
from ..format.limits import MAX_BITMAP_NAME
from ..format.text import decode_name
from ..image.header_draft import HeaderDraft
from ..image.plan import Kept
from .listing import SHARED_CLUSTERS, Listing, list_entries
from .model import Proposal, Scope, Step
from .workshop import L1_DAMAGE, Workshop

_DIRECTORY = (
    "bitmaps-count",
    "bitmap-directory-size",
    "bitmap-directory-offset",
    "bitmap-directory-outside",
    "bitmap-directory-entries",
)
_OF_ONE = (
    *("bitmap-table-offset", "bitmap-table-size", "bitmap-flags", "bitmap-type", "bitmap-name", "bitmap-granularity"),
    *("bitmap-extra-data", "bitmap-extra-data-compatible", "bitmap-table-outside", "bitmap-tables-excessive"),
    *("bitmap-entry-reserved", "bitmap-entry-all-ones", "bitmap-entry-unaligned", "bitmap-data-outside"),
    *NOT_ITS_OWN,
)
_MOST_LEAKED = 1 << 16
"""Leaked clusters up to which a lost directory is looked for."""
_CANDIDATES = 64
"""Lost directories that are looked at for the one that counts."""
_NAMES = ("bitmap-name-duplicate", "bitmap-name")


def rescue(shop: Workshop) -> Iterator[Proposal]:
    """The extension first, then the directory with the bitmaps in it, then what is against the letter only."""
    yield from _extension(shop)
    if not shop.view.directory.attached:
        return  # the bitmaps are void; what becomes of them is for the user to say
    yield from _directory(shop)
    if found := shop.found("bitmap-padding"):
        yield _step("clear the padding of bitmap directory entries", found), partial(_clear_padding, shop)
    if found := shop.found("bitmap-tail-bits"):
        yield _step("clear bits past the end of the disk", found), partial(_clear_tails, shop, found)


def _step(title: str, found: list[Finding], kind: RepairClass = RepairClass.LOSSLESS) -> Step:
    codes: Counter[str] = Counter()
    for finding in found:
        codes[finding.code] += finding.count
    return Step(title, kind, Scope.BITMAPS, codes)


def _extension(shop: Workshop) -> Iterator[Proposal]:
    if found := shop.found("bitmaps-extension-missing"):
        title = "clear the autoclear bit for bitmaps: there are none"
        # Where bitmaps are lost, or a field of the header may be, the extension may be there and only not be found.
        lost = bool(shop.view.doubt or shop.found("leak-lost-bitmap"))
        kind = RepairClass.GUESS if lost else RepairClass.LOSSLESS
        yield _step(title, found, kind), partial(_clear_autoclear, shop)
    if found := shop.found("bitmaps-extension-reserved"):
        yield _step("clear the reserved field of the bitmaps extension", found), partial(_clear_reserved, shop)
    if found := shop.found("bitmaps-extension-length"):
        if _would_fit(shop):
            yield _step("correct the length of the bitmaps extension", found), partial(_correct_length, shop)
        else:
            yield _dropping(shop, found), partial(_drop_extension, shop)


def _dropping(shop: Workshop, found: list[Finding]) -> Step:
    title = "drop the bitmaps extension: no bitmap can be found by it"
    return _step(title, found, _quarantine_class(shop))


def _quarantine_class(shop: Workshop) -> RepairClass:
    """Taking out what is broken loses nothing, if the undo file keeps it; but it may be the header that is wrong."""
    if shop.view.doubt or shop.found(*L1_DAMAGE):
        return RepairClass.GUESS  # and while nothing of the disk can be read it is well that QEMU does not open it
    pointer, geometry = shop.view.directory.pointer, shop.view.geometry
    clusters = _directory_clusters(shop, pointer) if pointer is not None else range(0)
    if not all(shop.owns(geometry.offset_of(cluster)) for cluster in clusters):
        return RepairClass.GUESS  # it may be the other structure that is not where its pointer says
    return RepairClass.LOSSLESS if shop.policy.keeps_undo else RepairClass.LOSSY


def _clear_autoclear(shop: Workshop) -> None:
    features = int(shop.image.header.autoclear_features) & ~int(Autoclear.BITMAPS) & int(KNOWN_AUTOCLEAR)
    shop.write(AUTOCLEAR_FIELD, features.to_bytes(8, "big"), "header: the autoclear bit for bitmaps")


def _clear_reserved(shop: Workshop) -> None:
    extension = shop.image.extensions.find(ExtensionType.BITMAPS)
    assert extension is not None, "something was found in it"
    shop.write(extension.data_offset + 4, bytes(4), "bitmaps extension: reserved field")


def _would_fit(shop: Workshop) -> bool:
    """True if the extension is sound but for its length: with the right one the area ends well and names bitmaps."""
    image = shop.image
    extension = image.extensions.find(ExtensionType.BITMAPS)
    if extension is None or extension.data_offset + BITMAPS_LENGTH > image.extensions.limit:
        return False
    head = bytearray(image.head)
    head[extension.offset + 4 : extension.data_offset] = BITMAPS_LENGTH.to_bytes(4, "big")
    area = ExtensionArea.parse(bytes(head), image.extensions.start, image.extensions.limit)
    again = area.find(ExtensionType.BITMAPS)
    if area.fault is not None or again is None or again.offset != extension.offset:
        return False
    pointer = BitmapsExtension.parse(again.data)
    listing = list_entries(shop.view, pointer, attached=shop.view.directory.attached, damaged=False)
    return bool(listing.sound) and not listing.is_damaged


def _correct_length(shop: Workshop) -> None:
    extension = shop.image.extensions.find(ExtensionType.BITMAPS)
    assert extension is not None, "something was found in it"
    length = BITMAPS_LENGTH.to_bytes(4, "big")
    shop.write(extension.offset + HEAD_LENGTH - len(length), length, "bitmaps extension: length")


def _directory(shop: Workshop) -> Iterator[Proposal]:
    """Bitmaps that cannot stay go, those that can be mended are."""
    if places := _doubtful_chunks(shop):
        names = ", ".join(sorted({f"'{bitmap.name}'" for bitmap, _ in places}))
        title = (
            f"mark as dirty what lies in clusters that something else uses too, or may: {len(places)} parts of {names}"
        )
        yield _step(title, shop.found(*NOT_ITS_OWN)), partial(_mark_dirty, shop, places)
    yield from _entries(shop)
    if found := shop.found(*_NAMES):
        yield _step("give bitmaps that cannot be told apart names of their own", found), partial(_rename, shop)


def _entries(shop: Workshop) -> Iterator[Proposal]:
    """By themselves, so that the next step finds memory: there may be tens of thousands, each wrong in five ways."""
    broken = shop.found(*_DIRECTORY, *_OF_ONE)
    pointer = _pointer(shop)
    if not broken or pointer is None:
        return
    damaged = bool(shop.found(*_DIRECTORY))
    listing = list_entries(shop.view, pointer, attached=True, damaged=damaged, shared=_shared(shop))
    lost = None if listing.sound else _lost_directory(shop, pointer)
    if lost is not None:
        title = f"point the bitmaps extension to the directory, which was found at {lost.offset:#x}"
        yield _step(title, broken), partial(_point_to, shop, lost)
    elif not listing.total:
        yield _dropping(shop, broken), partial(_drop_extension, shop)
    elif listing.broken or listing.is_damaged:
        title = "write the bitmap directory anew with the entries that are sound"
        if listing.broken:
            names = ", ".join(f"'{bitmap.name}' ({why})" for bitmap, why in listing.broken[:5])
            title = f"quarantine {len(listing.broken)} of {listing.total} bitmaps: {names}"
        if shop.view.doubt:
            title += f"; but {shop.view.doubt}"
        yield _step(title, broken, _quarantine_class(shop)), partial(_quarantine, shop, pointer, listing)


def _lost_directory(shop: Workshop, pointer: BitmapsExtension) -> LostDirectory | None:
    """The directory that the extension should name, if there is no doubt about it.

    Clusters that were used before still hold older directories. The one that counts is as long as the extension says,
    and explains every cluster that is counted without a reference, or with the extension's wrong one alone.
    """
    view = shop.view
    leaked, mistaken = Leaked(view.leaks), _directory_clusters(shop, pointer)
    if view.directory.pointer is None or shop.file.is_hole(pointer.bitmap_directory_offset, 1):
        mistaken = range(0)
    runs = [*view.leaks, Mismatch(mistaken.start, len(mistaken), 1, 0)]
    counted = Leaked(sorted(runs, key=lambda run: run.first))
    if sum(run.count for run in view.leaks) > _MOST_LEAKED:
        return None
    for lost in islice(lost_directories(view, counted), _CANDIDATES):
        if (len(lost.entries), lost.size) != (pointer.nb_bitmaps, pointer.bitmap_directory_size):
            continue
        places = [place for _, entry in lost.entries for place in bitmap_places(view, entry)]
        clusters = Counter(
            cluster
            for offset, length in [(lost.offset, lost.size), *places]
            for cluster in range(view.geometry.cluster_of(offset), view.geometry.clusters(offset + length))
        )
        if set(leaked) <= clusters.keys() <= {*leaked, *mistaken} and clusters.total() == len(clusters):
            return lost
    return None


def _point_to(shop: Workshop, lost: LostDirectory) -> None:
    extension = shop.image.extensions.find(ExtensionType.BITMAPS)
    assert extension is not None, "something was found in it"
    pointer = BitmapsExtension(len(lost.entries), lost.size, lost.offset)
    shop.write(extension.data_offset, pointer.build(), "bitmaps extension")


def _pointer(shop: Workshop) -> BitmapsExtension | None:
    extension = shop.view.directory.extension
    try:
        return BitmapsExtension.parse(extension.data) if extension is not None else None
    except CorruptImageError:
        return None


def _shared(shop: Workshop) -> list[tuple[int, int]]:
    """The host ranges where a bitmap's cluster has another use, or may have."""
    geometry = shop.view.geometry
    return [
        (geometry.offset_of(finding.values["first"]), geometry.offset_of(finding.values["first"] + finding.count))
        for finding in shop.found(*NOT_ITS_OWN)
    ]


def _doubtful_chunks(shop: Workshop) -> list[tuple[StoredBitmap, int]]:
    """Sound bitmaps of which a data cluster, and not the table, may have another use, each with the entry's index.

    What another owner has written there are no bits, so nobody knows which are set.
    """
    if not shop.found(*NOT_ITS_OWN):
        return []
    found: list[tuple[StoredBitmap, int]] = []
    geometry = shop.view.geometry
    for bitmap in shop.view.directory.bitmaps:
        offset, length = bitmap.entry.bitmap_table_offset, 8 * bitmap.entry.bitmap_table_size
        if bitmap.fault is not None:
            continue
        clusters = range(geometry.cluster_of(offset), geometry.cluster_of(offset + length - 1) + 1)
        if all(shop.owns(geometry.offset_of(cluster)) for cluster in clusters):
            offsets = enumerate(BitmapTableEntry(value).offset for value in bitmap.table)
            found += [(bitmap, index) for index, offset in offsets if offset and not shop.owns(offset)]
    return found


def _mark_dirty(shop: Workshop, places: list[tuple[StoredBitmap, int]]) -> None:
    for bitmap, index in places:
        entry = bitmap.entry.bitmap_table_offset + 8 * index
        shop.write(entry, ALL_ONES.to_bytes(8, "big"), f"table of bitmap '{bitmap.name}': entry {index}")


def _quarantine(shop: Workshop, pointer: BitmapsExtension, listing: Listing) -> None:
    geometry = shop.view.geometry
    kept, given_up = set[tuple[int, int]](), set[tuple[int, int]]()  # any number of bitmaps may name one table
    for bitmap, why in listing.broken:
        table = bitmap.entry.bitmap_table_offset, bitmap.entry.bitmap_table_size
        if _is_as_it_was(shop, bitmap):
            doubtful = why == SHARED_CLUSTERS
            shop.kept.extend(keep(bitmap, why=why, doubtful=doubtful, with_table=table not in kept))
            kept.add(table)
        for reference in bitmap.references() if table not in given_up else ():
            if 0 < reference.length <= shop.file.base.size - reference.offset:
                first, last = (geometry.cluster_of(reference.offset + at) for at in (0, reference.length - 1))
                shop.given_up.update(range(first, last + 1))
        given_up.add(table)
    if listing.is_damaged and 0 < listing.size <= shop.file.base.size - pointer.bitmap_directory_offset:
        shop.kept.append(Kept("bitmap directory", pointer.bitmap_directory_offset, listing.size))
    _write_directory(shop, [bitmap.entry for bitmap in listing.sound], pointer, listing.size)


def _is_as_it_was(shop: Workshop, bitmap: StoredBitmap) -> bool:
    """False if an earlier step has moved its entry: what the undo file keeps is the image before all steps."""
    return shop.file.base.read_padded(bitmap.place, bitmap.entry.size) == bitmap.entry.build()


def _write_directory(shop: Workshop, entries: list[BitmapEntry], pointer: BitmapsExtension, old_size: int) -> None:
    """In place if the clusters have the room and no other use, else into free ones.

    Args:
        old_size: bytes of the old directory: what its entries take where the extension's size is nonsense, because
            what lies behind them then may be anybody's.
    """
    if not entries:
        _drop_extension(shop)
        return
    geometry, offset = shop.view.geometry, pointer.bitmap_directory_offset
    data = b"".join(entry.build() for entry in entries)
    room = round_up(old_size, geometry.cluster_size)
    clusters = range(geometry.cluster_of(offset), geometry.cluster_of(offset + room))
    if len(data) <= room and all(shop.owns(geometry.offset_of(cluster)) for cluster in clusters):
        shop.write(offset, data.ljust(old_size, b"\0"), "bitmap directory")
    else:
        offset = shop.put(data, "bitmap directory")
        shop.given_up.update(clusters)
    new = BitmapsExtension(len(entries), len(data), offset)
    extension = shop.seen.image.extensions.find(ExtensionType.BITMAPS)
    assert extension is not None, "the directory was found by it"
    shop.write(extension.data_offset, new.build(), "bitmaps extension")


def _directory_clusters(shop: Workshop, pointer: BitmapsExtension) -> range:
    geometry, offset = shop.view.geometry, pointer.bitmap_directory_offset
    return range(geometry.cluster_of(offset), geometry.clusters(offset + pointer.bitmap_directory_size))


def _drop_extension(shop: Workshop) -> None:
    image, pointer = shop.image, _pointer(shop)
    extension = image.extensions.find(ExtensionType.BITMAPS)
    assert extension is not None, "something was found in it"
    if shop.view.directory.pointer is not None and pointer is not None:
        shop.given_up.update(_directory_clusters(shop, pointer))
    draft = HeaderDraft(image)
    header_area.drop(draft, extension)
    for step in draft.steps:
        shop.write(step.offset, step.data, f"header: {step.purpose}")


@dataclass(slots=True)
class _Names:
    """Names that are taken, and the number to try next behind each: tens of thousands may be alike."""

    taken: set[bytes]
    next: dict[bytes, int] = field(default_factory=dict)

    def free_like(self, name: bytes) -> bytes:
        """A name like this one that no bitmap has: with a number behind it."""
        for number in count(self.next.get(name, 2)):
            suffix = f"-{number}".encode()
            candidate = name[: MAX_BITMAP_NAME - len(suffix)] + suffix
            if candidate not in self.taken:
                self.taken.add(candidate)
                self.next[name] = number + 1
                return candidate
        raise AssertionError("there is no last number")


def _rename(shop: Workshop) -> None:
    directory = shop.view.directory
    assert directory.pointer is not None, "its entries were read"
    entries = [bitmap.entry for bitmap in directory.bitmaps]
    names, seen = _Names({entry.qemu_name for entry in entries}), set[bytes]()
    whole = {entry.name for entry in entries}
    for index, entry in enumerate(entries):
        name = entry.qemu_name  # what follows a zero byte goes, unless that makes it the name of another
        if not name or name in seen or (name != entry.name and name in whole):
            name = names.free_like(name or b"unnamed")
        if name != entry.name:
            entries[index] = replace(entry, name=name, padding=b"")
        seen.add(name)
    _write_directory(shop, entries, directory.pointer, directory.pointer.bitmap_directory_size)


def _clear_padding(shop: Workshop) -> None:
    for bitmap in shop.view.directory.bitmaps:
        entry = bitmap.entry
        if any(entry.padding):
            place = bitmap.place + entry.size - len(entry.padding)
            shop.write(place, bytes(len(entry.padding)), f"padding of bitmap '{decode_name(entry.name)}'")


def _clear_tails(shop: Workshop, found: list[Finding]) -> None:
    by_name: dict[str, StoredBitmap] = {bitmap.name: bitmap for bitmap in shop.view.bitmaps}
    geometry = shop.view.geometry
    for finding in found:
        place, bitmap = finding.location.host_offset, by_name[finding.location.bitmap or ""]
        assert place is not None, "the bits were read there"
        whole, rest = divmod((geometry.bitmap_bits(bitmap.granularity) - 1) % (8 * geometry.cluster_size) + 1, 8)
        data = bytearray(shop.file.read_padded(place, geometry.cluster_size))
        if whole < len(data):
            data[whole] &= (1 << rest) - 1
            data[whole + 1 :] = bytes(len(data) - whole - 1)
        shop.write(place, bytes(data), f"data of bitmap '{bitmap.name}'")
