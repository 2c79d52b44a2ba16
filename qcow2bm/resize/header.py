"""The header's part in a resize."""

from __future__ import annotations

from ..format.extensions import BitmapsExtension
from ..format.header import L1_FIELDS, SIZE_FIELD
from ..image.header_draft import HeaderDraft
from ..image.plan import Switch


def switch(
    head: HeaderDraft,
    name: str,
    pointer: tuple[int, BitmapsExtension] | None,
    size: int | None = None,
    l1_table: tuple[int, int] | None = None,
) -> Switch:
    """All of the header that changes, all or nothing."""
    if size is not None:
        head.put(SIZE_FIELD, size.to_bytes(8, "big"), "the virtual size")
    if l1_table is not None:
        entries, offset = l1_table
        head.put(L1_FIELDS, entries.to_bytes(4, "big") + offset.to_bytes(8, "big"), "the L1 table")
    if pointer is not None:
        head.put(pointer[0], pointer[1].build(), "the bitmaps extension")
    return head.at_once(name)
