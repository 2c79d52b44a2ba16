"""What opening an image for writing does to its header: unknown bits are cleared, detached bitmaps dropped."""

from __future__ import annotations

from ...format.extensions import END_MARKER, ExtensionType
from ...format.header import AUTOCLEAR_FIELD, KNOWN_AUTOCLEAR
from .node import Node


def update_header(node: Node) -> None:
    """Clear unknown autoclear bits, and drop the bitmaps extension if it does not count.

    Source: `qcow2_do_open`. Nothing else in the header is touched.
    """
    header, directory = node.view.header, node.view.directory
    known = int(header.autoclear_features & KNOWN_AUTOCLEAR)
    if known != int(header.autoclear_features):
        node.file.write_at(AUTOCLEAR_FIELD, known.to_bytes(8, "big"))
    if directory.extension is None or directory.attached:
        return
    area = node.view.image.extensions
    kept = [each for each in area.extensions if each.type != ExtensionType.BITMAPS]
    if kept == list(area.extensions[: len(kept)]):
        # Only a head is overwritten, which one sector holds; what follows an end marker means nothing.
        node.file.write_at(area.extensions[len(kept)].offset, END_MARKER)
        return
    room = min(area.end + len(END_MARKER), area.limit) - area.start
    node.file.write_at(area.start, b"".join(each.build() for each in kept)[:room].ljust(room, b"\0"))
