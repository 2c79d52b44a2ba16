"""The limits within which QEMU opens an image, each stated once.

Source: QEMU's `block/qcow2.h` and `block/qcow2-bitmap.c` (7.2) and the qcow2 specification.
"""

from __future__ import annotations

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_REFCOUNT_ORDER = 6

MAX_FILE_SIZE = (1 << 63) - (1 << 30)
"""Bytes (BDRV_MAX_LENGTH): nothing beyond can be read."""
MAX_L1_ENTRIES = (32 << 20) // 8
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_BACKING_NAME = 1023

MAX_ENCRYPTION_HEADER = 1 << 30
"""Bytes; QEMU has no limit, a LUKS header with all its key material takes a few MiB."""

MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_SNAPSHOT_EXTRA_DATA = 1024

MAX_BITMAPS = 65535
MAX_BITMAP_NAME = 1023
MAX_BITMAP_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
MAX_BITMAP_TABLE_ENTRIES = 0x8000000
MAX_BITMAP_BYTES = 512 << 20
"""Bitmap data of one bitmap, in bytes: QEMU holds it in memory while the image is open."""

MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
MIN_DEFAULT_GRANULARITY = 4 << 10
MAX_DEFAULT_GRANULARITY = 64 << 10
