"""What could show through in the bytes that a disk grows by, although they must read as zeroes.

A backing file that is longer than the old disk would: zero clusters hide it, and the cluster in which the disk ended is
copied with zeroes behind the old end, the old one staying as it is. And that cluster may hold bytes there from a time
when the disk was larger: QEMU lets them come back, so the bitmaps say that they have changed.
"""

from __future__ import annotations

from dataclasses import replace

from ..chain.layers import StreamStore
from ..chain.opening import Rules, backing_path, disk_of, open_disk
from ..errors import CorruptImageError, Qcow2bmError, UnsupportedImageError, naming
from ..format.entries import COPIED, ClusterKind, L2Entry
from ..format.extensions import ExtensionType
from ..format.geometry import ALL_SUBCLUSTERS, SUBCLUSTERS
from ..format.header import ENCRYPTION
from ..image.file import ImageFile
from ..image.image import Qcow2Image
from .mapping import NewMapping, entry_at


def exposed_bytes(image: Qcow2Image, old: int, data_file: ImageFile | None) -> tuple[tuple[int, int], ...]:
    """The range (offset, length) from the old end to the end of its cluster, unless it certainly reads as zeroes."""
    geometry = image.geometry
    within = old % geometry.cluster_size
    if not within:
        return ()
    entry, length = entry_at(image, old // geometry.cluster_size), geometry.cluster_size - within
    if entry.is_compressed:
        return ((old, length),) if _stream_tail(image, entry, within) else ()
    size = geometry.subcluster_size
    host = data_file if data_file is not None else image.file
    for index in range(within // size, geometry.cluster_size // size):
        start = max(within, index * size)
        if _kind(image, entry, index) is not ClusterKind.DATA:
            continue
        if _is_encrypted(image) or any(host.read_padded(entry.host_offset + start, (index + 1) * size - start)):
            return ((old, length),)
    return ()


def _stream_tail(image: Qcow2Image, entry: L2Entry, within: int) -> bool:
    """True if a compressed cluster holds anything from `within` on, or may."""
    tail = bytearray(image.geometry.cluster_size - within)
    try:
        StreamStore(image).read_into(entry.value, within, memoryview(tail))
    except CorruptImageError:
        return True
    return _is_encrypted(image) or any(tail)


def _kind(image: Qcow2Image, entry: L2Entry, index: int) -> ClusterKind:
    """What subcluster `index` is, of an image without subclusters the whole cluster."""
    data_file = image.header.has_data_file
    if image.geometry.extended_l2:
        return entry.subcluster_kind(index, data_file=data_file)
    return entry.kind(image.geometry, data_file=data_file)


def _is_encrypted(image: Qcow2Image) -> bool:
    return ENCRYPTION[image.header.crypt_method] != "none"


def backing_size(image: Qcow2Image, rules: Rules) -> int:
    """The size of the backing file's disk in bytes, 0 if there is none.

    Raises:
        UnsupportedImageError, UsageError, InUseError, ImageIOError: it cannot be opened, so nobody knows.
    """
    name = image.backing_file
    if name is None:
        return 0
    said = (image.extensions.text(ExtensionType.BACKING_FORMAT) or "").partition("\0")[0] or None
    with naming(image.file.path):
        path = backing_path(image.file.path, name)
    try:
        with open_disk(path, format=said, rules=rules) as disk:
            return disk.layers[0].size
    except Qcow2bmError as error:
        place = path if error.image is None else error.image
        error.message = f"its backing file {place} cannot be read: {error.message}"
        error.image = image.file.path
        error.hint = error.hint or "nobody knows then what of it would show through in new bytes"
        raise


def hide_backing(mapping: NewMapping, old: int, rules: Rules) -> None:
    """Make what follows the old end within its cluster read as zeroes, in an image whose backing file goes on there.

    Raises:
        UnsupportedImageError: guest data would have to be copied that cannot be read or written here.
        CorruptImageError, InUseError, ImageIOError: the cluster cannot be read.
    """
    geometry = mapping.geometry
    cluster, within = divmod(old, geometry.cluster_size)
    if not within:
        return
    entry = entry_at(mapping.image, cluster)
    index, beside = divmod(within, geometry.subcluster_size)
    holds = beside and _kind(mapping.image, entry, index) in (ClusterKind.DATA, ClusterKind.UNALLOCATED)
    changed = _copied(mapping, cluster, entry, within, rules) if entry.is_compressed or holds else entry
    if geometry.extended_l2:
        # Subclusters that begin past the end are zeroed whole.
        later = ALL_SUBCLUSTERS & ~((1 << index + bool(beside)) - 1)
        changed = replace(changed, bitmap=changed.bitmap & ~later | later << SUBCLUSTERS)
    if changed != entry:
        mapping.replaced[cluster] = changed


def _copied(mapping: NewMapping, cluster: int, entry: L2Entry, within: int, rules: Rules) -> L2Entry:
    """The entry of a copy that holds the cluster's first `within` bytes, and zeroes behind them."""
    image, geometry = mapping.image, mapping.geometry
    if _is_encrypted(image) or image.header.has_data_file:
        what = "it is encrypted" if _is_encrypted(image) else "its data lies in an external file"
        raise UnsupportedImageError(
            f"its backing file is longer than the disk, which ends within a cluster: {what}, so that cannot be copied",
            hint="`qemu-img resize` can, once the bitmaps have been removed",
        )
    with disk_of(image, rules=rules) as disk:
        data = disk.read(cluster * geometry.cluster_size, within)
    offset = mapping.change.put(data, "copy of the cluster in which the disk ended")
    index, beside = divmod(within, geometry.subcluster_size)
    bitmap = 0
    if geometry.extended_l2:
        before = (1 << index) - 1
        bitmap = before if entry.is_compressed else entry.bitmap & (before | before << SUBCLUSTERS)
        bitmap |= bool(beside) << index
    if entry.is_compressed:
        mapping.give_back_stream(entry)
    elif entry.host_offset:
        mapping.give_back(entry.host_offset)
    return L2Entry(COPIED | offset, bitmap)
