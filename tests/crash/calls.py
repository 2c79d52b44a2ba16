"""The functions of `os` that a command works on files with: what is recorded, fails or is slowed down."""

from __future__ import annotations

READS = ("pread", "preadv")
WRITES = ("pwrite",)
LENGTHS = ("ftruncate",)
FLUSHES = ("fsync", "fdatasync")
NAMES = ("link", "unlink", "rename", "replace")
CHANGING = (*WRITES, *LENGTHS, *FLUSHES, *NAMES)
OTHERS = ("lseek", "fstat", "fstatvfs", "fchown", "utime", "close")
"""Those that neither read nor change what a file holds, how long it is, or its name."""
