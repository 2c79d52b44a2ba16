"""Make the golden files again: `python -m tests.golden.make` from the project root (needs qemu-img and qemu-io).

For each image that the installed qemu-img makes, NAME.head is its start, NAME.directory its bitmap directory and
NAME.snapshots its snapshot table. What they say is read here by hand, with struct and the specification's offsets, so
that expected.json owes nothing to qcow2bm; where `qemu-img info` says the same thing, the two are compared.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.qemu import create_luks, qemu_img, qemu_img_json, qemu_io, version

HERE = Path(__file__).parent
HEAD = 1024
SECRET = "a secret"

V2 = {  # name: (offset, bytes)
    "version": (4, 4), "backing_file_offset": (8, 8), "backing_file_size": (16, 4), "cluster_bits": (20, 4),
    "size": (24, 8), "crypt_method": (32, 4), "l1_size": (36, 4), "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8), "refcount_table_clusters": (56, 4), "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
}  # fmt: skip
V3 = {
    "incompatible_features": (72, 8), "compatible_features": (80, 8), "autoclear_features": (88, 8),
    "refcount_order": (96, 4), "header_length": (100, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One image: options of `qemu-img create -o`, its size, and what is done to it afterwards."""

    name: str
    options: str = ""
    size: str = "64M"
    then: Callable[[Path], object] = lambda _image: None


def bitmaps(image: Path) -> None:
    qemu_img("bitmap", "--add", image, "daily")
    qemu_img("bitmap", "--add", "-g", "1M", image, "wöchentlich")
    qemu_io(image, "write -P 7 1M 64k")
    qemu_img("bitmap", "--disable", image, "daily")


def snapshots(image: Path) -> None:
    qemu_io(image, "write 0 64k")
    for name in ("first", "the second one"):
        qemu_img("snapshot", "-c", name, image)


CASES = (
    Case("plain"),
    Case("v2", "compat=0.10"),
    Case("small-clusters", "cluster_size=512", "1M"),
    Case("large-clusters", "cluster_size=2M", "1T"),
    Case("extended-l2", "extended_l2=on"),
    Case("data-file", "data_file=data.raw"),
    Case("data-file-raw", "data_file=data.raw,data_file_raw=on"),
    Case("lazy-refcounts", "lazy_refcounts=on"),
    Case("refcount-1", "refcount_bits=1"),
    Case("refcount-64", "refcount_bits=64"),
    Case("zstd", "compression_type=zstd"),
    Case("backing", "backing_file=base.qcow2,backing_fmt=qcow2"),
    Case("bitmaps", then=bitmaps),
    Case("backing-and-bitmaps", "backing_file=base.qcow2,backing_fmt=qcow2", then=bitmaps),
    Case("snapshots", then=snapshots),
    Case("luks"),
)


def make(case: Case, folder: Path) -> Path:
    image = folder / "image.qcow2"
    if case.name == "luks":
        create_luks(image, case.size, SECRET)
        return image
    if "backing" in case.name:
        qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", case.size, cwd=folder)
    options = ("-o", case.options) if case.options else ()
    qemu_img("create", "-q", "-f", "qcow2", *options, image.name, case.size, cwd=folder)
    case.then(image)
    return image


# ---- reading by hand ----


def number(data: bytes, place: tuple[int, int]) -> int:
    return int.from_bytes(data[place[0] : sum(place)], "big")


def read_header(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = {name: number(data, place) for name, place in V2.items()}
    if header["version"] == 3:
        header |= {name: number(data, place) for name, place in V3.items()}
        header["additional"] = data[104 : header["header_length"]].hex()
    return header


def read_extensions(data: bytes, start: int, limit: int) -> Iterator[dict[str, Any]]:
    while start + 8 <= limit:
        kind, length = struct.unpack_from(">II", data, start)
        if kind == 0:
            return
        yield {"type": kind, "offset": start, "data": data[start + 8 : start + 8 + length].hex()}
        start += 8 + (length + 7) // 8 * 8


def read_directory(data: bytes) -> Iterator[dict[str, Any]]:
    at = 0
    while at < len(data):
        offset, size, flags, kind, bits, name, extra = struct.unpack_from(">QIIBBHI", data, at)
        text = data[at + 24 + extra :][:name].decode()
        yield {
            "place": at, "bitmap_table_offset": offset, "bitmap_table_size": size, "flags": flags, "type": kind,
            "granularity_bits": bits, "name": text, "extra_data": data[at + 24 :][:extra].hex(),
        }  # fmt: skip
        at += (24 + extra + name + 7) // 8 * 8


def read_snapshots(data: bytes, count: int) -> Iterator[dict[str, Any]]:
    at = 0
    for _ in range(count):
        offset, size, identity, name, *_, extra = struct.unpack_from(">QIHHIIQII", data, at)
        body = data[at + 40 :]
        yield {
            "l1_table_offset": offset, "l1_size": size, "extra_data": body[:extra].hex(),
            "id": body[extra:][:identity].decode(), "name": body[extra + identity :][:name].decode(),
        }  # fmt: skip
        at += (40 + extra + identity + name + 7) // 8 * 8


def describe(image: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the image says, and the golden bytes that say it."""
    data = image.read_bytes()
    header = read_header(data)
    cluster = 1 << header["cluster_bits"]
    head = data[: min(HEAD, cluster)]
    limit = header["backing_file_offset"] or len(head)
    parts = {"head": head}
    expected: dict[str, Any] = {"header": header}
    found = list(read_extensions(head, header.get("header_length", 72), limit))
    expected["extensions"] = found
    start = header["backing_file_offset"]
    expected["backing_file"] = data[start:][: header["backing_file_size"]].decode() if start else None
    for extension in found:
        if extension["type"] == 0x23852875:
            count, _, size, offset = struct.unpack(">IIQQ", bytes.fromhex(extension["data"]))
            parts["directory"] = data[offset : offset + size]
            expected["bitmaps"] = list(read_directory(parts["directory"]))
            assert len(expected["bitmaps"]) == count
    if header["nb_snapshots"]:
        start = header["snapshots_offset"]
        table = data[start : start + cluster]
        expected["snapshots"] = list(read_snapshots(table, header["nb_snapshots"]))
        parts["snapshots"] = table.rstrip(b"\0") + bytes(8)
    return expected, parts


def compare_with_qemu(image: Path, expected: dict[str, Any]) -> None:
    """`qemu-img info` must agree wherever it says the same."""
    info = qemu_img_json("info", "-f", "qcow2", image.absolute(), cwd=image.parent)
    data, header = info["format-specific"]["data"], expected["header"]
    assert info["virtual-size"] == header["size"]
    assert info["cluster-size"] == 1 << header["cluster_bits"]
    assert info.get("backing-filename") == expected["backing_file"]
    assert data["compat"] == ("1.1" if header["version"] == 3 else "0.10")
    assert data["refcount-bits"] == 1 << header.get("refcount_order", 4)
    assert len(info.get("snapshots", [])) == len(expected.get("snapshots", []))
    names = [bitmap["name"] for bitmap in expected.get("bitmaps", [])]
    assert [bitmap["name"] for bitmap in data.get("bitmaps", [])] == names


def main() -> None:
    for old in [*HERE.glob("*.head"), *HERE.glob("*.directory"), *HERE.glob("*.snapshots")]:
        old.unlink()
    everything: dict[str, Any] = {"qemu": version(), "images": {}}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            image = make(case, Path(folder))
            expected, parts = describe(image)
            compare_with_qemu(image, expected)
        everything["images"][case.name] = expected
        for part, data in parts.items():
            (HERE / f"{case.name}.{part}").write_bytes(data)
    text = json.dumps(everything, indent=1, ensure_ascii=False)
    (HERE / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
