"""`qcow2bm info`: an image at a glance."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import IntFlag
from typing import Any

from .. import api
from ..errors import Qcow2bmError, naming
from ..format.extensions import ExtensionType, parse_feature_names
from ..format.header import COMPRESSION, ENCRYPTION, Autoclear, Compatible, Header, Incompatible
from ..format.snapshot_table import SnapshotEntry
from ..format.text import decode_name
from .failures import BROKEN_BITMAP, worst
from .options import ForceShareOption, ImageArgument, OutputOption
from .output import Column, JsonObject, Output, complain, print_json, print_pairs, print_table, warn
from .reading import bitmaps_json, complaints, reading
from .sizes import exact_size, human_size, percent

_FEATURES: tuple[tuple[str, type[IntFlag]], ...] = (
    ("incompatible", Incompatible),
    ("compatible", Compatible),
    ("autoclear", Autoclear),
)
"""Kinds of features in the order of their numbers in the feature name table."""


def info(image: ImageArgument, *, force_share: ForceShareOption = False, output: OutputOption = Output.HUMAN) -> int:
    """Show an image at a glance: header, features, snapshots, bitmaps, and what takes how much of the file.

    Nothing that the image names (backing file, data file) is opened. A part that cannot be read is reported on stderr
    and left out; the worst exit status counts: 2 for a damaged table, 4 for a broken bitmap or bitmap directory.
    """
    with reading(image, force_share=force_share) as opened:
        document = _header(opened)
        errors = _add(document, "snapshots", lambda: [_snapshot(entry) for entry in opened.snapshots()])
        with naming(image):
            bitmaps = opened.bitmaps
            members = bitmaps_json(bitmaps)
            warnings = complaints(bitmaps)
        document["bitmaps"] = {"attached": bitmaps.attached, "damage": bitmaps.damage, "members": members}
        errors += _add(document, "usage", lambda: {kind.value: size for kind, size in opened.usage().items() if size})
    for text in warnings:
        warn(text, image)
    for error in errors:
        complain(error)
    if output is Output.JSON:
        print_json(document)
    else:
        _print(document)
    return worst([BROKEN_BITMAP if warnings else 0, *(error.exit_status for error in errors)])


def _add(document: dict[str, Any], name: str, make: Callable[[], object]) -> list[Qcow2bmError]:
    """Add a part of the document, null if it cannot be read; why it cannot."""
    try:
        document[name] = make()
    except Qcow2bmError as error:
        document[name] = None
        return [error]
    return []


def _header(image: api.Image) -> dict[str, Any]:
    header, geometry, file = image.qcow2.header, image.qcow2.geometry, image.qcow2.file
    return {
        "image": str(image.path),
        "format": "qcow2",
        "version": header.version,
        "virtual-size": image.virtual_size,
        "file-size": file.size,
        "allocated-size": None if file.is_device else os.fstat(file.fd).st_blocks * 512,
        "cluster-size": geometry.cluster_size,
        "refcount-bits": geometry.refcount_bits,
        "compression-type": COMPRESSION.get(header.compression_type, f"unknown-{header.compression_type}"),
        "encryption": ENCRYPTION.get(header.crypt_method, f"unknown-{header.crypt_method}"),
        "features": _features(image, header),
        "backing-file": image.backing_file,
        "backing-format": image.backing_format,
        "data-file": image.data_file,
    }


def _features(image: api.Image, header: Header) -> JsonObject:
    """Names of the features that are set. One that is not known here is called as the image itself calls it."""
    table = image.qcow2.extensions.find(ExtensionType.FEATURE_NAMES)
    own = {(row.type, row.bit): row.name for row in parse_feature_names(table.data)} if table is not None else {}

    def names(kind: int, known: type[IntFlag], value: int) -> Iterator[str]:
        for bit in range(value.bit_length()):
            if value >> bit & 1:
                member = next((flag.name for flag in known if flag == 1 << bit), None)
                yield (member or own.get((kind, bit)) or f"bit-{bit}").lower().replace("_", "-")

    return {
        kind: list(names(number, known, int(getattr(header, f"{kind}_features"))))
        for number, (kind, known) in enumerate(_FEATURES)
    }


def _snapshot(entry: SnapshotEntry) -> JsonObject:
    return {
        "id": decode_name(entry.id),
        "name": decode_name(entry.name),
        "date": datetime.fromtimestamp(entry.date_sec, UTC).isoformat(),
        "vm-state-size": entry.full_vm_state_size,
        "virtual-size": entry.virtual_size,
    }


# For humans


def _print(document: dict[str, Any]) -> None:
    print_pairs(_facts(document))
    if document["snapshots"]:
        print()
        columns = [
            Column("SNAPSHOT"),
            Column("NAME", flexible=True),
            Column("DATE (UTC)"),
            Column("VM STATE", right=True),
        ]
        print_table(columns, map(_snapshot_row, document["snapshots"]))
    if document["usage"] is not None:
        print()
        columns = [Column("USED BY"), Column("SIZE", right=True), Column("SHARE", right=True)]
        total = sum(document["usage"].values())
        rows = [(kind, human_size(size), percent(size, total)) for kind, size in document["usage"].items()]
        print_table(columns, rows)


def _facts(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    allocated = document["allocated-size"]
    taken = "" if allocated is None else f", {human_size(allocated)} allocated"
    yield "image", document["image"]
    yield "format", f"qcow2 version {document['version']}"
    yield "virtual size", exact_size(document["virtual-size"])
    yield "file size", exact_size(document["file-size"]) + taken
    yield "clusters", f"{human_size(document['cluster-size'])}, refcounts of {document['refcount-bits']} bits"
    yield "compression", document["compression-type"]
    yield "encryption", document["encryption"]
    for kind, names in document["features"].items():
        if names:
            yield f"{kind}", ", ".join(names)
    if document["backing-file"] is not None:
        yield "backing file", f"{document['backing-file']} (format {document['backing-format'] or 'not stated'})"
    if document["data-file"] is not None:
        yield "data file", document["data-file"]
    yield "bitmaps", _bitmaps_text(document["bitmaps"])


def _bitmaps_text(bitmaps: dict[str, Any]) -> str:
    members = bitmaps["members"]
    if not members:
        return "none" if bitmaps["damage"] is None else "their directory is damaged"
    states = Counter(member["state"] for member in members)
    recording = sum(member["recording"] for member in members)
    size = sum(member["bytes-on-disk"] for member in members)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"{counted}; {recording} recording; {human_size(size)} on disk"


def _snapshot_row(snapshot: dict[str, Any]) -> tuple[str, ...]:
    date = snapshot["date"].removesuffix("+00:00").replace("T", " ")
    return snapshot["id"], snapshot["name"], date, human_size(snapshot["vm-state-size"])
