"""Everything a test needs from real QEMU: `from tests.support.qemu import StorageDaemon, read_bitmaps`."""

from tests.support.daemon import StorageDaemon
from tests.support.listing import describe, read_bitmap_nbd, read_bitmaps
from tests.support.tools import (
    QemuError,
    Ranges,
    bitmap_info,
    check,
    create_luks,
    guest_digest,
    open_arguments,
    qemu_img,
    qemu_img_json,
    qemu_io,
    run,
    same_guest_data,
    version,
)

__all__ = [
    "QemuError",
    "Ranges",
    "StorageDaemon",
    "bitmap_info",
    "check",
    "create_luks",
    "describe",
    "guest_digest",
    "open_arguments",
    "qemu_img",
    "qemu_img_json",
    "qemu_io",
    "read_bitmap_nbd",
    "read_bitmaps",
    "run",
    "same_guest_data",
    "version",
]
