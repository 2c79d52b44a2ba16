"""What lies behind the end of the file, or is cut off by it: copies that broke off, and pointers to just behind it.

QEMU reads zeroes there, and its check lets a structure pass that reaches less than a cluster behind the end.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest

import qcow2bm
from qcow2bm.checks.model import InQemu, RepairClass, Report
from qcow2bm.format.geometry import round_up
from tests.interop import test_check_differential as differential
from tests.support.qemu import (
    QemuError,
    create_luks,
    guest_digest,
    qemu_img,
    qemu_io,
    read_bitmaps,
)
from tests.support.raw import BITMAPS, OFFSET, Raw

CRYPTO = 0x0537BE77
FAR = 1 << 40
SECTOR = 512


@pytest.fixture(params=["as it chooses", "by whole tables"])
def way(request) -> Iterator[str]:
    """How references are counted: entry by entry in images as small as these, and the way of large ones."""
    if request.param == "by whole tables":
        with patch("qcow2bm.checks.walk.PLAIN_ENTRIES", -1):
            yield request.param
    else:
        yield request.param


# ---- a copy that broke off ----


@dataclass(frozen=True)
class Shape:
    """An image to cut: its options, and which parts it has.

    What lies last in it are tables, or compressed clusters: where a standard cluster was cut nobody can tell.
    """

    name: str
    options: str
    bitmaps: bool = True
    snapshot: bool = True

    def make(self, image: Path) -> None:
        """With guest data, compressed data, and what else it is to have."""
        qemu_img("create", "-q", "-f", "qcow2", "-o", self.options, image, "8M")
        if self.bitmaps:
            qemu_img("bitmap", "--add", "-g", "4k", image, "fine")
            qemu_img("bitmap", "--add", "-g", "64k", image, "coarse")
        writes = [f"write -P {number} {number}M 3k" for number in range(1, 4)]
        half = image.with_name("half")
        half.write_bytes((random.Random(1).randbytes(2 << 10) + bytes(2 << 10)) * 16)
        qemu_io(image, *writes, "write -c -P 7 4M 64k", f"write -c -s {half} 5M 64k")
        if self.snapshot:
            qemu_img("snapshot", "-c", "before", image)
            qemu_io(image, "write -P 9 6M 4k")
            qemu_img("snapshot", "-c", "after", image)


SHAPES = (
    Shape("512", "cluster_size=512"),
    Shape("4k", "cluster_size=4k"),
    Shape("4k-no-bitmaps", "cluster_size=4k", bitmaps=False),
    Shape("4k-no-snapshot", "cluster_size=4k", snapshot=False),
    Shape("4k-plain", "cluster_size=4k", bitmaps=False, snapshot=False),
    Shape("64k", "cluster_size=64k"),
    Shape("64k-extended", "cluster_size=64k,extended_l2=on"),
    Shape("64k-zstd", "cluster_size=64k,compression_type=zstd"),
)


def lengths(data: Raw) -> list[int]:
    """About a hundred lengths to cut a file to: where clusters begin, and whole sectors within them."""
    size, end = data.cluster_size, len(data.data)
    clusters = range(size, end, size)
    chosen = set(clusters[:: max(1, len(clusters) // 60)])
    chosen.update(range(size, end, max(SECTOR, (end // 60) // SECTOR * SECTOR)))
    chosen.update(place + SECTOR for place in clusters[:: max(1, len(clusters) // 20)])
    return sorted(length for length in chosen if length < end)


def ready(image: Path) -> dict[str, list[tuple[int, int]]]:
    """The bitmaps that are called ready, with what is dirty in them."""
    try:
        with qcow2bm.open(image) as opened:
            found = [bitmap for bitmap in opened.bitmaps if bitmap.state is qcow2bm.State.READY]
            return {bitmap.name: [(one.offset, one.length) for one in bitmap.extents()] for bitmap in found}
    except qcow2bm.Qcow2bmError:
        return {}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_whatever_length_a_copy_broke_off_at_nothing_that_is_lost_passes_for_sound(
    shape: Shape, tmp_path: Path
) -> None:
    whole, image = tmp_path / "whole.qcow2", tmp_path / "cut.qcow2"
    shape.make(whole)
    data, digest = Raw.load(whole), guest_digest(whole)
    bitmaps = {name: list(ranges) for name, ranges in read_bitmaps(whole).items()} if shape.bitmaps else {}
    assert ready(whole) == bitmaps
    for length in lengths(data):
        image.write_bytes(data.data[:length])
        status = qcow2bm.check(image).exit_status
        if status in (0, 3):
            assert guest_digest(image) == digest, f"cut to {length:#x}: status {status}, and not what the guest had"
        for name, extents in ready(image).items():
            assert extents == bitmaps[name], f"cut to {length:#x}: {name} is called ready"


@pytest.mark.parametrize("cluster_size", ["4k", "64k"])
def test_a_file_that_ends_where_its_l1_table_begins_is_corrupt(tmp_path: Path, way: str, cluster_size: str) -> None:
    """QEMU calls it sound, and the guest reads zeroes."""
    image = tmp_path / "cut.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", image, "33M")
    qemu_io(image, "write -P 1 0 1M")
    raw = Raw.load(image)
    image.write_bytes(raw.data[: raw.number(40)])
    report = qcow2bm.check(image)
    assert (report.exit_status, dict(report.counts)) == (2, {"l1-outside": 1}), way


# ---- pointers to just behind the end ----


def _bitmap_table(raw: Raw) -> int:
    return raw.directory[0]


def _bitmap_data(raw: Raw) -> int:
    return raw.bitmap_data("one")[0]


POINTERS: dict[str, tuple[str, Callable[[Raw], int]]] = {
    "l1-outside": ("", lambda _: 40),
    "refcount-table-outside": ("", lambda _: 48),
    "refcount-block-outside": ("", lambda raw: raw.number(48)),
    "snapshot-table-outside": ("", lambda _: 64),
    "snapshot-l1-outside": ("", lambda raw: raw.number(64)),
    "l2-outside": ("", lambda raw: raw.number(40)),
    "data-outside": ("", lambda raw: raw.l2_entry()),
    "bitmap-directory-outside": ("", lambda raw: raw.extensions()[BITMAPS][0] + 16),
    "bitmap-table-outside": ("", _bitmap_table),
    "bitmap-data-outside": ("", _bitmap_data),
    "encryption-header-outside": ("luks", lambda raw: raw.extensions()[CRYPTO][0]),
}
"""The code of a structure, and where the pointer to it lies."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Callable[[str, str], Path]:
    """An image with everything that can lie outside, by cluster size and encryption; each is made once."""
    made: dict[tuple[str, str], Path] = {}
    folder = tmp_path_factory.mktemp("sound")

    def image(cluster_size: str, encryption: str) -> Path:
        path = folder / f"{cluster_size}{encryption}.qcow2"
        if (cluster_size, encryption) in made:
            return path
        made[cluster_size, encryption] = path
        if encryption:
            create_luks(path, "4M", "key", f"cluster_size={cluster_size}")
            return path
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, "4M")
        for name in ("one", "two"):
            qemu_img("bitmap", "--add", "-g", "64k", path, name)
        qemu_io(path, "write -P 1 0 300k")
        qemu_img("snapshot", "-c", "before", path)
        qemu_io(path, "write -P 2 0 100k")
        return path

    return image


def pointed(source: Path, image: Path, place: Callable[[Raw], int], target: int | None = None) -> Path:
    """The image with a pointer that leads there: to the first cluster behind the end, unless told otherwise."""
    raw = Raw.load(source)
    at, end = place(raw), round_up(len(raw.data), raw.cluster_size)
    flags = raw.number(at) & ~OFFSET
    raw.put(at, (end if target is None else target) | flags)
    raw.save(image)
    return image


def repaired(image: Path, allow: RepairClass) -> tuple[list[str], list[str], Report]:
    """Keys of the steps that are taken, and of those that are not, and what is left."""
    with qcow2bm.repairing(image, qcow2bm.RepairPolicy(allow=allow)) as repair:
        plan = repair.plan
    return [step.key for step in plan.steps], [step.key for step in plan.refused], plan.after


@pytest.mark.parametrize("cluster_size", ["512", "64k", "2M"])
@pytest.mark.parametrize("code", POINTERS)
def test_what_begins_just_behind_the_end_is_outside_as_what_lies_far_out(
    code: str, cluster_size: str, sound: Callable[[str, str], Path], tmp_path: Path, way: str
) -> None:
    encryption, place = POINTERS[code]
    source = sound(cluster_size, encryption)
    near = pointed(source, tmp_path / "near.qcow2", place)
    far = pointed(source, tmp_path / "far.qcow2", place, FAR)
    there, further = qcow2bm.check(near), qcow2bm.check(far)
    assert code in there.counts
    assert (there.counts, there.exit_status) == (further.counts, further.exit_status), way
    [finding] = [finding for finding in there.findings if finding.code == code]
    if not encryption and finding.qemu is not InQemu.REFUSES:
        said = qemu_img("check", near, check=False).stderr
        told = "exceeding the end of the file" in said or "outside image" in said
        assert finding.qemu is (InQemu.CORRUPTION if told else InQemu.SILENT), said
    for allow in (RepairClass.LOSSLESS, RepairClass.GUESS):
        *steps, after = repaired(near, allow)
        *others, then = repaired(far, allow)
        assert (steps, after.counts) == (others, then.counts), allow


@pytest.mark.parametrize("cluster_size", ["512", "64k"])
@pytest.mark.parametrize("way", differential.WAYS)
def test_the_drop_in_goes_by_qemus_rule(
    cluster_size: str, way: str, sound: Callable[[str, str], Path], tmp_path: Path
) -> None:
    image, source = tmp_path / "image.qcow2", sound(cluster_size, "")
    for code, (encryption, place) in POINTERS.items():
        if not encryption:
            pointed(source, image, place)
            assert differential.ours(image, way) == differential.theirs(image, None), code


def test_no_command_takes_a_bitmap_for_clean_whose_table_lies_just_behind_the_end(
    sound: Callable[[str, str], Path], tmp_path: Path
) -> None:
    image = pointed(sound("64k", ""), tmp_path / "image.qcow2", _bitmap_table)
    with qcow2bm.open(image) as opened:
        states = {bitmap.name: bitmap.state for bitmap in opened.bitmaps}
        assert states == {"one": qcow2bm.State.BROKEN, "two": qcow2bm.State.READY}
        edit = opened.draft()
        with pytest.raises(qcow2bm.Qcow2bmError, match="lie outside the file"):
            edit.merge("two", [opened.bitmaps["one"].source])


@pytest.mark.parametrize("code", ["l1-outside", "snapshot-l1-outside", "refcount-table-outside"])
def test_nothing_is_edited_beside_a_table_just_behind_the_end(
    code: str, sound: Callable[[str, str], Path], tmp_path: Path
) -> None:
    image = pointed(sound("64k", ""), tmp_path / "image.qcow2", POINTERS[code][1])
    before = image.read_bytes()
    with qcow2bm.open(image, writable=True) as opened:
        edit = opened.draft()
        edit.add("three")
        with pytest.raises(qcow2bm.Qcow2bmError, match="outside the file"):
            opened.commit(edit.plan())
    assert image.read_bytes() == before


# ---- tables of several clusters ----


def test_a_table_whose_last_cluster_begins_behind_the_end_is_outside(tmp_path: Path, way: str) -> None:
    """Less than a cluster of it is missing, so that QEMU takes it: all that was in it would read as zeroes."""
    image = tmp_path / "cut.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "3M")  # 96 entries: a cluster and a half
    raw = Raw.load(image)
    table = raw.number(40)
    assert len(raw.data) == table + 8 * 96
    for length, codes in (
        (table + 8 * 96, set()),
        (table + 512 + 8, set()),
        (table + 512, {"l1-outside", "leak-unproven"}),
    ):
        image.write_bytes(raw.data[:length])
        assert set(qcow2bm.check(image).counts) == codes, f"{way}, {length:#x}"


# ---- compressed clusters ----


def _compressed(image: Path, source: Path, version: str = "1.1") -> tuple[Raw, int]:
    """An image that ends with a compressed cluster, and where the last sector of that begins."""
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", "-o", f"compat={version}", source, image)
    raw = Raw.load(image)
    entry = raw.number(raw.l2_entry())
    shift = 62 - (16 - 8)
    offset, more = entry & (1 << shift) - 1, (entry & (1 << 62) - 1) >> shift
    return raw, offset // SECTOR * SECTOR + more * SECTOR


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_a_stream_whose_last_sector_lies_behind_the_end_is_outside(tmp_path: Path, way: str, version: str) -> None:
    """QEMU's check lets it pass, and the guest gets an error. Within its last sector a stream may end with the file."""
    source, image = tmp_path / "raw", tmp_path / "image.qcow2"
    source.write_bytes(random.Random(1).randbytes(40000) + bytes(25536))
    raw, last = _compressed(image, source, version)
    assert last < len(raw.data) <= last + SECTOR
    for length in (len(raw.data), last + 1):
        image.write_bytes(raw.data[:length])
        assert not qcow2bm.check(image).counts, f"{way}, {length:#x}"
    for length in (last, last - 1, last - 20000):
        image.write_bytes(raw.data[:length])
        report = qcow2bm.check(image)
        assert (report.counts["compressed-outside"], report.exit_status) == (1, 2), f"{way}, {length:#x}"
        _, refused, _ = repaired(image, RepairClass.LOSSLESS)
        assert any("compressed-outside" in key for key in refused)
        steps, _, after = repaired(image, RepairClass.LOSSY)
        assert any("compressed-outside" in key for key in steps)
        assert "compressed-outside" not in after.counts
    with pytest.raises(QemuError, match="Input/output error"):
        guest_digest(image)


# ---- sound images ----

SOUND = [
    (*row, extra)
    for row in product(("512", "4k", "64k", "2M"), ("off", "metadata", "falloc", "full"), ("0", "512", "1M", "33M"))
    for extra in ("", "compat=0.10", "extended_l2=on", "refcount_bits=1", "refcount_bits=64")
    if not (extra == "extended_l2=on" and row[0] in ("512", "4k"))
]


def test_what_qemu_makes_is_clean_whatever_the_options(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    sizes = [
        ("512", "off", "100G", ""),
        ("64k", "off", "16T", ""),
        ("2M", "off", "1P", ""),
        ("64k", "metadata", "10G", ""),
    ]
    for cluster_size, preallocation, size, extra in [*SOUND[::3], *sizes]:
        options = f"cluster_size={cluster_size},preallocation={preallocation}"
        image.unlink(missing_ok=True)
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"{options},{extra}".rstrip(","), image, size)
        assert not qcow2bm.check(image).counts, (options, size, extra)


def test_a_table_that_begins_in_the_file_may_be_cut_short(tmp_path: Path, way: str) -> None:
    """A cluster that nobody has filled to its end reads as zeroes, and was never anything else."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_img("bitmap", "--add", image, "one")
    qemu_io(image, "write -P 1 0 64k")
    digest, raw = guest_digest(image), Raw.load(image)
    size = raw.cluster_size
    end = round_up(len(raw.data), size)
    for place in (lambda _: 40, _bitmap_table, lambda raw: raw.number(40)):
        copy = shutil.copy(image, tmp_path / "copy.qcow2")
        changed = Raw.load(copy)
        at = place(changed)
        old = changed.number(at) & OFFSET
        table = bytes(changed.data[old : old + size]).rstrip(b"\0")
        changed.data.extend(bytes(end - len(changed.data)) + table)
        changed.put(at, changed.number(at) & ~OFFSET | end)
        changed.set_refcount(end, 1)
        changed.set_refcount(old, 0)
        changed.save(copy)
        assert not qcow2bm.check(copy).counts, way
        assert guest_digest(copy) == digest
        assert ready(copy) == ready(image)
