"""Names in the file as text: of bitmaps, snapshots, features, backing and data files.

The file holds bytes, meant as UTF-8. Those that are not become surrogates, so that every name survives both ways.
"""

from __future__ import annotations


def encode_name(name: str) -> bytes:
    """A name as it is stored."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    """A stored name as text; `encode_name` gives its bytes back."""
    return name.decode("utf-8", "surrogateescape")
