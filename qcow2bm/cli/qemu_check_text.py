"""Findings in the words of `qemu-img check` (QEMU 7.2), because scripts read them.

Two tables by problem code: why QEMU would refuse to open the image, in the order in which it looks, and the lines that
its check prints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import repeat

from ..bitmap.store import StoredBitmap
from ..checks.model import Finding
from ..checks.runner import Inspection
from ..checks.view import View
from ..errors import CorruptImageError
from ..format.bitmap_directory import parse_directory
from ..format.entries import COPIED
from ..format.extensions import BitmapsExtension, ExtensionType, parse_feature_names
from ..format.header import KNOWN_INCOMPATIBLE, V3_LENGTH
from ..format.limits import MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, MAX_FILE_SIZE, MAX_L1_ENTRIES, MAX_SNAPSHOTS
from ..format.opening import luks_faults
from ..format.text import decode_name
from .qemu_totals import Totals

Line = Callable[[Finding], str]
Refusal = Callable[[Finding, Inspection], str]
Failure = tuple[tuple[str, ...], str]
"""What is said before the check is given up, and the reason given then."""

_INT_MAX = (1 << 31) - 1


# Why QEMU does not open an image


def _length(_: Finding, seen: Inspection) -> str:
    return "qcow2 header too short" if seen.header.header_length < V3_LENGTH else "qcow2 header exceeds cluster size"


def _features(_: Finding, seen: Inspection) -> str:
    unknown = int(seen.header.incompatible_features) & ~int(KNOWN_INCOMPATIBLE)
    extension = _view(seen).image.extensions.find(ExtensionType.FEATURE_NAMES)
    names = []
    for feature in parse_feature_names(extension.data) if extension is not None else ():
        if feature.type == 0 and feature.bit < 64 and unknown >> feature.bit & 1 and feature.name:
            names.append(feature.name)
            unknown &= ~(1 << feature.bit)
    if unknown:
        names.append(f"Unknown incompatible feature: {unknown:x}")
    return f"Unsupported qcow2 feature(s): {', '.join(names)}"


def _table_offset(name: str, offset: int, length: int, unreadable: str, seen: Inspection) -> str:
    """Of an offset that is only too high QEMU learns when it reads there."""
    if seen.header.geometry.is_aligned(offset) and offset + length < 1 << 63:
        return f"{unreadable}: Input/output error"
    return f"{name} offset invalid"


def _l1_offset(_: Finding, seen: Inspection) -> str:
    offset, length = seen.header.l1_table_offset, 8 * seen.header.l1_size
    return _table_offset("Active L1 table", offset, length, "Could not read L1 table", seen)


def _refcount_table_offset(_: Finding, seen: Inspection) -> str:
    length = seen.header.refcount_table_clusters * seen.header.geometry.cluster_size
    failed = "Could not initialize refcount handling"
    return _table_offset("Reference count table", seen.header.refcount_table_offset, length, failed, seen)


def _l1_size(_: Finding, seen: Inspection) -> str:
    if seen.header.l1_size > MAX_L1_ENTRIES:
        return "Active L1 table too large"
    span = seen.header.geometry.l2_span
    needed = (seen.header.size + span - 1 & (1 << 64) - 1) // span  # in 64 bits, as QEMU computes it
    if needed > _INT_MAX:
        return "Image is too big"
    too_small = seen.header.l1_size < needed
    return "L1 table is too small" if too_small else "Could not refresh total sector count: File too large"


def _compression_bit(_: Finding, seen: Inspection) -> str:
    must = "must be set" if seen.header.compression_type else "must not be set"
    return f"qcow2: Compression type incompatible feature bit {must}"


def _crypto_length(_: Finding, seen: Inspection) -> str:
    extension = _view(seen).image.extensions.find(ExtensionType.CRYPTO_HEADER)
    size = len(extension.data) if extension is not None else 0
    return f"CRYPTO header extension size {size}, but expected size 16"


def _luks(_: Finding, seen: Inspection) -> str:
    view = _view(seen)
    return next(luks_faults(view.image.extensions, view.file.read_padded)).in_qemu


def _view(seen: Inspection) -> View:
    assert seen.view is not None, "said only of what the header led to"
    return seen.view


def _pointer(seen: Inspection) -> BitmapsExtension:
    extension = _view(seen).image.extensions.find(ExtensionType.BITMAPS)
    assert extension is not None
    return BitmapsExtension.parse(extension.data)


def _bitmaps_count(_: Finding, seen: Inspection) -> str:
    count = _pointer(seen).nb_bitmaps
    if not count:
        return "found bitmaps extension with zero bitmaps"
    return f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"


def _directory_size(_: Finding, seen: Inspection) -> str:
    size = _pointer(seen).bitmap_directory_size
    if size > MAX_BITMAP_DIRECTORY_BYTES:
        limit = f"exceeds the maximum supported size ({MAX_BITMAP_DIRECTORY_BYTES})"
        return f"bitmaps_ext: bitmap directory size ({size}) {limit}"
    return "Broken bitmap directory" if size else "Requested bitmap directory size is zero"


def _directory_entries(finding: Finding, _: Inspection) -> str:
    if "goes on after" in finding.message:
        return "More bitmaps found than specified in header extension"
    if "holds" in finding.message:
        return "Less bitmaps found than specified in header extension"
    if "extra data" in finding.message:
        return "Bitmap extra data is not supported"
    return "Broken bitmap directory"


def _directory_outside(_: Finding, seen: Inspection) -> str:
    """QEMU reads zeroes there, which are entries too."""
    pointer, found = _pointer(seen), 0
    if pointer.bitmap_directory_offset + pointer.bitmap_directory_size > MAX_FILE_SIZE:
        return "Failed to read bitmap directory: Input/output error"
    data = _view(seen).file.read_padded(pointer.bitmap_directory_offset, pointer.bitmap_directory_size)
    with contextlib.suppress(CorruptImageError):
        for _place, entry in parse_directory(data, pointer.nb_bitmaps):
            size, limit = entry.bitmap_table_size, seen.header.geometry.max_bitmap_table_entries
            if not entry.bitmap_table_offset or not 0 < size <= limit:
                return f"Bitmap '{_c_string(decode_name(entry.name))}' doesn't satisfy the constraints"
            found += 1
    if found == pointer.nb_bitmaps:
        return "More bitmaps found than specified in header extension"
    return "Bitmap '' doesn't satisfy the constraints"


def _bitmap(finding: Finding, seen: Inspection) -> StoredBitmap:
    """The bitmap whose directory entry a finding is about."""
    assert finding.location.index is not None
    return _view(seen).directory.bitmaps[finding.location.index]


def _table_size(finding: Finding, seen: Inspection) -> str:
    bitmap = _bitmap(finding, seen)
    covered = bitmap.entry.bitmap_table_size * seen.header.geometry.cluster_size * 8 << bitmap.entry.granularity_bits
    limit = seen.header.geometry.max_bitmap_table_entries
    if not 0 < bitmap.entry.bitmap_table_size <= limit or seen.header.geometry.virtual_size > covered:
        return _constraints(finding, seen)
    return f"Could not read bitmap '{_c_string(bitmap.name)}' from image: Invalid argument"


def _constraints(finding: Finding, _: Inspection) -> str:
    return f"Bitmap '{_c_string(finding.location.bitmap)}' doesn't satisfy the constraints"


def _c_string(name: str | None) -> str:
    return (name or "").partition("\0")[0]


def _bitmap_table_offset(finding: Finding, seen: Inspection) -> str:
    entry = _bitmap(finding, seen).entry
    if entry.bitmap_table_offset and seen.header.geometry.is_aligned(entry.bitmap_table_offset):
        name = _c_string(finding.location.bitmap)
        return f"Could not read bitmap_table table from image for bitmap '{name}': Input/output error"
    return _constraints(finding, seen)


def _table_entry(finding: Finding, _: Inspection) -> str:
    name = _c_string(finding.location.bitmap)
    return f"Could not read bitmap_table table from image for bitmap '{name}': Invalid argument"


def _says(text: str) -> Refusal:
    return lambda _finding, _seen: text


REFUSALS: dict[str, Refusal] = {
    "header-cluster-bits": lambda _, seen: f"Unsupported cluster size: 2^{seen.header.cluster_bits}",
    "header-length": _length,
    "backing-name-offset": _says("Invalid backing file offset"),
    "compression-type-unknown": lambda _, seen: f"qcow2: unknown compression type: {seen.header.compression_type}",
    "compression-type-bit": _compression_bit,
    "unknown-incompatible": _features,
    "change-cut-short": _features,
    "extended-l2-cluster-size": lambda _, seen: f"Unsupported subcluster size: {seen.header.geometry.subcluster_size}",
    "header-refcount-order": _says("Reference count entry width too large; may not exceed 64 bits"),
    "refcount-table-size": _says("Reference count table too large"),
    "refcount-table-offset": _refcount_table_offset,
    "l1-size": _l1_size,
    "l1-offset": _l1_offset,
    "l1-too-small": _says("L1 table is too small"),
    "encryption-method": lambda _, seen: f"Unsupported encryption method {seen.header.crypt_method}",
    "extension-too-long": _says("Header extension too large"),
    "backing-format-length": lambda finding, _: (
        f"ERROR: ext_backing_format: len={finding.values['value']} too large (>=16)"
    ),
    "encryption-extension-unexpected": _says("CRYPTO header extension only expected with LUKS encryption method"),
    "encryption-extension-length": _crypto_length,
    "encryption-header-offset": lambda finding, seen: (
        "Could not read encryption header: Input/output error"
        if seen.header.geometry.is_aligned(finding.values["value"])
        else f"Encryption header offset '{finding.values['value']}' is not a multiple of cluster size "
        f"'{seen.header.geometry.cluster_size}'"
    ),
    "encryption-header-size": _says("Request for data outside of extension header"),
    "encryption-header-magic": _luks,
    "encryption-header-damaged": _luks,
    "bitmaps-extension-length": _says("bitmaps_ext: Invalid extension length"),
    "bitmaps-extension-reserved": _says("bitmaps_ext: Reserved field is not zero"),
    "bitmaps-count": _bitmaps_count,
    "bitmap-directory-offset": _says("bitmaps_ext: invalid bitmap directory offset"),
    "bitmap-directory-size": _directory_size,
    "data-file-name-missing": _says("'data-file' is required for this image"),
    "data-file-raw-without-file": _says("data-file-raw requires a data file"),
    "encryption-extension-missing": lambda _, seen: (
        f"Missing CRYPTO header for crypt method {seen.header.crypt_method}"
    ),
    "backing-name-length": _says("Backing file name too long"),
    "bitmap-directory-outside": _directory_outside,
    "bitmap-extra-data": _says("Bitmap extra data is not supported"),
    "bitmap-extra-data-compatible": _says("Bitmap extra data is not supported"),
    "bitmap-table-offset": _bitmap_table_offset,
    "bitmap-flags": _constraints,
    "bitmap-type": _constraints,
    "bitmap-name": _constraints,
    "bitmap-granularity": _constraints,
    "bitmap-table-size": _table_size,
    "bitmap-directory-entries": _directory_entries,
    "bitmap-name-duplicate": lambda finding, _: f"Bitmap already exists: {_c_string(finding.location.bitmap)}",
    "bitmap-entry-reserved": _table_entry,
    "bitmap-entry-all-ones": _table_entry,
    "bitmap-entry-unaligned": _table_entry,
}
"""Code to the message behind "Could not open", in the order in which `qcow2_do_open` looks."""

_ORDER = list(REFUSALS)
_EXTENSIONS = range(_ORDER.index("extension-too-long"), _ORDER.index("bitmap-directory-size") + 1)
_DIRECTORY = range(_ORDER.index("bitmap-extra-data"), _ORDER.index("bitmap-directory-entries") + 1)
_LOADING = range(_ORDER.index("bitmap-name-duplicate"), len(_ORDER))


def refusal_order(finding: Finding, seen: Inspection) -> tuple[int, int, int]:
    """What QEMU meets first: in the extensions what stands first, then directory entries, then bitmap by bitmap."""
    rank = _ORDER.index(finding.code)
    if rank in _EXTENSIONS:
        return _EXTENSIONS.start, finding.location.host_offset or 0, rank
    bitmap = finding.values.get("bitmap", len(seen.view.directory.bitmaps) if seen.view is not None else 0)
    if rank in _DIRECTORY and not REFUSALS[finding.code](finding, seen).startswith("Could not read"):
        return _DIRECTORY.start, bitmap, rank
    if rank in _DIRECTORY or rank in _LOADING:
        return _LOADING.start, bitmap, 0 if finding.code == "bitmap-name-duplicate" else 1 + (rank in _DIRECTORY)
    return rank, 0, 0


# What its check prints


def _region(finding: Finding) -> str:
    return (
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
        f"offset {finding.values['offset']:#x} size {finding.values['size']:#x}"
    )


def _overflow(finding: Finding) -> str:
    return (
        f"ERROR: overflow cluster offset={finding.values['offset']:#x}\n"
        "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the "
        "image cannot be opened for writing"
    )


def _alternative(number: int) -> str:
    """C's %#x, which has no prefix for 0."""
    return f"{number:#x}" if number else "0"


def _force(what: str) -> str:
    return f"You can force-remove {what} with qemu-img check -r all"


LINES: dict[str, Line] = {
    "snapshot-incomplete": lambda f: f"ERROR snapshot table entry {f.values['index']} is incomplete",
    "l1-outside": _region,
    "snapshot-l1-outside": _region,
    "l2-outside": _region,
    "data-outside": _region,
    "compressed-outside": _region,
    "snapshot-table-outside": _region,
    "refcount-table-outside": _region,
    "encryption-header-outside": _region,
    "bitmap-table-outside": _region,
    "bitmap-data-outside": _region,
    "l1-entry-reserved": lambda f: f"ERROR found L1 entry with reserved bits set: {f.values['entry']:x}",
    "l2-unaligned": lambda f: (
        f"ERROR l2_offset={f.values['offset']:x}: Table is not cluster aligned; L1 entry corrupted"
    ),
    "l2-entry-reserved": lambda f: f"ERROR found l2 entry with reserved bits set: {f.values['entry']:x}",
    "data-unaligned": lambda f: (
        f"ERROR offset={f.values['offset']:x}: Data cluster is not properly aligned; L2 entry corrupted."
    ),
    "zero-unaligned": lambda f: (
        f"ERROR offset={f.values['offset']:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
    ),
    "compressed-copied": lambda f: (
        f"ERROR: coffset={f.values['coffset']:#x}: copied flag must never be set for compressed clusters"
    ),
    "compressed-data-file": lambda f: (
        f"ERROR compressed cluster {f.values['index']} with data file, entry={f.values['entry'] & ~COPIED:#x}"
    ),
    "compressed-subclusters": lambda f: (
        f"ERROR compressed cluster {f.values['index']} with non-zero subcluster allocation bitmap, "
        f"entry={f.values['entry'] & ~COPIED:#x}"
    ),
    "subclusters-contradict": lambda f: (
        f"ERROR offset={f.values['offset']:x}: Allocated cluster has corrupted subcluster allocation bitmap"
    ),
    "subclusters-unallocated": lambda _: "ERROR: Unallocated cluster has non-zero subcluster allocation map",
    "snapshot-l1-unaligned": lambda f: (
        f"ERROR snapshot {f.location.snapshot} l1_offset={_alternative(f.values['offset'])}: "
        "L1 table is not cluster aligned; snapshot table entry corrupted"
    ),
    "snapshot-l1-size": lambda f: (
        f"ERROR snapshot {f.location.snapshot} l1_size={_alternative(f.values['entries'])}: "
        "L1 table is too large; snapshot table entry corrupted"
    ),
    "data-file-snapshots": lambda f: f"ERROR {f.values['snapshots']} snapshots in image with data file",
    "refcount-block-reserved": lambda f: f"ERROR refcount table entry {f.values['index']} has reserved bits set",
    "refcount-block-unaligned": lambda f: (
        f"ERROR refcount block {f.values['index']} is not cluster aligned; refcount table entry corrupted"
    ),
    "refcount-block-outside": lambda f: (
        _region(f) if "size" in f.values else f"ERROR refcount block {f.values['index']} is outside image"
    ),
    "refcount-block-shared": lambda f: f"ERROR refcount block {f.values['index']} refcount={f.values['refcount']}",
    "refcount-overflow": _overflow,
    "copied-l1": lambda f: (
        f"ERROR OFLAG_COPIED L2 cluster: l1_index={f.values['index']} l1_entry={f.values['entry']:x} "
        f"refcount={f.values['refcount']}"
    ),
    "copied-l2": lambda f: (
        f"ERROR OFLAG_COPIED data cluster: l2_entry={f.values['entry']:x} refcount={f.values['refcount']}"
    ),
}
"""Code to a line on standard error, printed as often as the finding counts."""

_RUNS = {"refcount-too-low": "ERROR", "leak": "Leaked"}
"""Findings of a run of clusters, with a line for each cluster."""

_BAD_TABLE = "qcow2bm: ERROR failed to read the snapshot table: "


def _lost_snapshot(finding: Finding, _: Inspection) -> Failure:
    """An L1 table where nothing can be read; an offset that is negative to QEMU passes its test of regions."""
    if finding.values["offset"] >> 63:
        return (), "Cannot allocate memory"
    return (_region(finding), "ERROR: I/O error in check_refcounts_l1"), "Input/output error"


def _too_many_snapshots(_: Finding, seen: Inspection) -> Failure:
    overhanging = seen.header.nb_snapshots - MAX_SNAPSHOTS
    said = "qcow2bm: ERROR snapshot table too large", _force(f"all {overhanging} overhanging snapshots")
    return said, "File too large"


def _large_snapshot_table(finding: Finding, _: Inspection) -> Failure:
    overhanging = _force(f"all {finding.values['left']} overhanging snapshots")
    return (f"{_BAD_TABLE}Snapshot table is too big", overhanging), "File too large"


def _too_much_extra_data(finding: Finding, _: Inspection) -> Failure:
    said = f"{_BAD_TABLE}Too much extra metadata in snapshot table entry {finding.values['index']}"
    return (said, _force("this extra metadata")), "File too large"


FAILURES: dict[str, Callable[[Finding, Inspection], Failure]] = {
    "snapshot-count": _too_many_snapshots,
    "snapshot-table-offset": lambda *_: (("qcow2bm: ERROR snapshot table offset invalid",), "Invalid argument"),
    "snapshot-table-size": _large_snapshot_table,
    "snapshot-extra-data-size": _too_much_extra_data,
    "snapshot-l1-outside": _lost_snapshot,
    "bitmap-table-offset": lambda *_: ((), "Cannot allocate memory"),
}
"""Code to how a check ends early."""
FAILED = "Invalid argument"
"""The reason of all other failures."""
REMARK = "qcow2bm: "
"""What lines of the program's own begin with, as those of qemu-img do with its name."""


def lines(finding: Finding, totals: Totals) -> Iterator[str]:
    """What the check prints about a finding: as QEMU a line for each time that it counts, unless that has no end."""
    if finding.code in LINES:
        line, again = LINES[finding.code](finding), finding.count - 1
        if again <= totals.repeats:
            totals.repeats -= again
            yield from repeat(line, finding.count)
        else:
            yield line
            yield f"{REMARK}that counts {finding.count} times"
    elif finding.code in _RUNS:
        values, word = finding.values, _RUNS[finding.code]
        counts = f"refcount={values['refcount']} reference={values['references']}"
        for cluster in range(values["first"], values["first"] + finding.count):
            yield f"{word} cluster {cluster} {counts}"
    elif finding.code == "refcount-unreadable":
        for cluster in range(finding.values["first"], finding.values["first"] + finding.count):
            yield f"Can't get refcount for cluster {cluster}: Input/output error"


def unreadable_block(finding: Finding) -> str:
    """What is printed once, at the first refcount block that cannot be read."""
    return (
        f"qcow2: Image is corrupt: Refblock offset {finding.values['offset']:#x} unaligned "
        f"(reftable index: {_alternative(finding.values['index'])}); "
        "further non-fatal corruption events will be suppressed"
    )
