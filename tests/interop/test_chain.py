"""Reading guest data, beside QEMU: every disk read by us is what `qemu-img convert` makes of it.

QCOW2BM_ROUNDS multiplies the random disks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Hashable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from qcow2bm.bitmap.bits import BitVector
from qcow2bm.chain.batches import BATCH, BATCH_PAIRS, batches
from qcow2bm.chain.compare import BLOCK, compare, differing
from qcow2bm.chain.disk import Disk
from qcow2bm.chain.layers import Extent, FileStore, Kind, StreamStore
from qcow2bm.chain.opening import Rules, disk_of, open_disk
from qcow2bm.errors import CorruptImageError, ImageIOError, Qcow2bmError, UnsupportedImageError, UsageError
from qcow2bm.image.image import Qcow2Image, read_head
from qcow2bm.image.overlay import OverlayFile
from tests.support.disks import KIB, MIB, STEP, Made, converted, random_chain, random_layer
from tests.support.images import unpack
from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import Raw

TIB = 1 << 40
ROUNDS = int(os.environ.get("QCOW2BM_ROUNDS", "1"))


def content(disk: Disk) -> bytes:
    """What we read, run by run; the runs have no gaps and do not overlap."""
    parts, at = [], 0
    for extent in disk.extents():
        assert extent.offset == at
        assert extent.length > 0
        parts.append(bytes(extent.length) if extent.kind is Kind.ZERO else disk.read(extent.offset, extent.length))
        at = extent.end
    assert at == disk.size
    return b"".join(parts)


@pytest.mark.parametrize("seed", range(20 * ROUNDS))
def test_a_disk_is_what_qemu_reads(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    size = chance.randrange(64 * KIB, 6 * MIB, STEP)
    made = random_chain(chance, tmp_path, "a", size)
    expected = converted(made, tmp_path)
    with open_disk(made.path, format=made.format, rules=made.rules) as disk:
        assert disk.size == len(expected)
        assert content(disk) == expected
        for _ in range(20):
            offset = chance.randrange(disk.size)
            length = min(chance.choice((1, 511, 70_001, MIB)), disk.size - offset)
            assert disk.read(offset, length) == expected[offset : offset + length]


# ---- comparing ----


def truth(old: bytes, new: bytes, granularity: int) -> list[bool]:
    """Which granules of `new` differ; what only `old` has does not count."""
    old, found = old[: len(new)], []
    for start in range(0, len(new), granularity):
        mine, theirs = new[start : start + granularity], old[start : start + granularity]
        found.append(mine != theirs)
    return found


def bits_of(vector: BitVector) -> list[bool]:
    return [bool(bit) for bit in vector.slice(0, vector.length)]


@pytest.mark.parametrize("seed", range(10 * ROUNDS))
def test_compare_is_exact(seed: int, tmp_path: Path) -> None:
    """Two disks of which one may have grown out of the other, or that share a backing file, or have nothing in common.

    The sizes may differ. `qemu-img compare` says the same of the whole.
    """
    chance = random.Random(seed)
    size = chance.randrange(64 * KIB, 5 * MIB, STEP)
    old = random_chain(chance, tmp_path, "old", size)
    if chance.random() < 0.7 and not old.data_files:
        new = random_layer(chance, tmp_path / "new", chance.choice((size, size + 3 * STEP)), old, last=True)
    else:
        new = random_chain(chance, tmp_path, "new", chance.choice((size, size // 2 // STEP * STEP + STEP)))
    before, after = converted(old, tmp_path), converted(new, tmp_path)
    with (
        open_disk(old.path, format=old.format, rules=old.rules) as left,
        open_disk(new.path, format=new.format, rules=new.rules) as right,
    ):
        for granularity in (512, 4 * KIB, 64 * KIB, 1 * MIB, 4 * MIB, 1 << 31):
            expected = truth(before, after, granularity)
            found = compare(left, right, granularity, chunk_bytes=512)
            assert bits_of(found) == expected
            runs = list(differing(left, right, granularity))
            assert all(first < stop for first, stop in runs)
            assert all(one[1] < two[0] for one, two in pairwise(runs))
            assert sum(stop - first for first, stop in runs) == sum(expected)
    if len(before) == len(after):
        said = qemu_img(
            "compare", "-f", old.format, "-F", new.format, old.path, new.path, check=False, cwd=tmp_path
        )  # fmt: skip
        assert said.returncode == (before != after), said.stdout + said.stderr


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of guest data that are read, request by request."""
    counted: list[int] = []
    for kind in (FileStore, StreamStore):

        def read_into(self: FileStore, place: int, skip: int, buffer: memoryview, *, inner=kind.read_into) -> None:
            counted.append(len(buffer))
            inner(self, place, skip, buffer)

        monkeypatch.setattr(kind, "read_into", read_into)
    return counted


def test_only_what_can_differ_is_read(tmp_path: Path, reads: list[int]) -> None:
    """Two overlays over one base, of a disk of 8 TiB: neither the base nor what is empty is read."""
    base, left, right = (tmp_path / name for name in ("base", "left", "right"))
    qemu_img("create", "-q", "-f", "qcow2", base, "8T")
    qemu_io(base, "write -P 1 0 4M", "write -P 1 3T 1M", "write -c -P 4 5T 64k", "write -z 6T 1G")
    for overlay in (left, right):
        qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, overlay)
    qemu_io(right, "write -P 2 1M 64k", "write -z 4T 1M", "write -z 0 64k", "write -P 4 5T 64k")
    with open_disk(left, format="qcow2") as old, open_disk(right, format="qcow2") as new:
        found = list(differing(old, new, 64 * KIB))
        assert found == [(0, 1), (16, 17)]
        assert sum(reads) == 2 * 64 * KIB + 64 * KIB + 2 * 64 * KIB
        reads.clear()
        assert list(differing(old, old, 64 * KIB)) == []
        assert not reads


def test_one_file_at_other_places_is_read(tmp_path: Path) -> None:
    """A qcow2 image beside its own bytes as a raw disk: one file, and hardly a byte at the same place."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, *(f"write -P {number + 1} {number * 64}k 64k" for number in range(16)))
    before, after = path.read_bytes(), converted(Made(path, "qcow2"), tmp_path)
    with open_disk(path, format="raw") as old, open_disk(path, format="qcow2") as new:
        assert bits_of(compare(old, new, 4 * KIB)) == truth(before, after, 4 * KIB)


def test_a_file_and_changes_over_it_are_two(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 1 0 1M")
    with Qcow2Image.open(path) as found:
        changed = OverlayFile(found.file)
        changed.write_at(found.file.read_at(0, found.file.size).index(b"\1" * (64 * KIB)) + 70 * KIB, b"changed")
        repaired = Qcow2Image(changed, *read_head(changed), locked=True)
        with disk_of(found) as old, disk_of(repaired) as new:
            assert list(differing(old, new, 4 * KIB)) == [(17, 18)]
            assert list(differing(new, new, 4 * KIB)) == []
        changed.close()


def test_of_a_large_granule_that_differs_no_more_is_read(tmp_path: Path, reads: list[int]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path, pattern in ((one, 1), (two, 2)):
        qemu_img("create", "-q", "-f", "qcow2", path, "64M")
        qemu_io(path, f"write -P {pattern} 0 32M")
    with open_disk(one, format="qcow2") as old, open_disk(two, format="qcow2") as new:
        assert list(differing(old, new, 16 * MIB)) == [(0, 2)]
        # One block of each batch at most: by the time a thread goes on, another may know the granule.
        assert 2 * 2 * BLOCK <= sum(reads) <= 2 * 32 * MIB // BATCH * BLOCK
        told: list[tuple[int, int]] = []
        list(differing(old, new, 64 * KIB, progress=lambda *pair: told.append(pair)))
        assert len(told) > 32 * MIB // BATCH  # the first 32 MiB are one extent, told of as it is read
        assert told == sorted(told)
        assert told[-1] == (64 * MIB, 64 * MIB)


def test_a_raw_hole_is_not_read(tmp_path: Path, reads: list[int]) -> None:
    path = tmp_path / "raw"
    path.touch()
    os.truncate(path, 4 * TIB)
    with path.open("r+b") as file:
        file.seek(TIB)
        file.write(b"x" * 4096)
    with open_disk(path) as disk:
        assert [extent.length for extent in disk.extents() if extent.kind is Kind.DATA] == [4096]
        empty = tmp_path / "empty"
        qemu_img("create", "-q", "-f", "qcow2", empty, "4T")
        with open_disk(empty, format="qcow2") as other:
            assert list(differing(other, disk, 64 * KIB)) == [(TIB // (64 * KIB), TIB // (64 * KIB) + 1)]
    assert 0 < sum(reads) <= 2 * 4096


def test_preallocated_clusters_that_the_file_has_no_bytes_for_are_not_read(tmp_path: Path, reads: list[int]) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "1G")
    with open_disk(path, format="qcow2") as disk:
        assert [extent.kind for extent in disk.extents()] == [Kind.ZERO]
        assert disk.read(5 * MIB, 4096) == bytes(4096)
    assert not reads


def test_a_batch_is_bounded_wherever_extents_begin_and_end() -> None:
    """Rows that never end where the largest cluster does, with data in every other cluster, and zeroes over borders."""
    store = Place()

    def rows(first: int, each: int, count: int) -> Iterator[tuple[Extent, Extent]]:
        at = 0
        for number in range(count):
            length = first if number == 0 else each
            left = Extent(at, length, Kind.ZERO)
            yield left, (Extent(at, length, Kind.DATA, store, at) if number % 2 else left)
            at += length

    for first, each, count in ((96 * KIB, 64 * KIB, 20_000), (64 * KIB, 3 * MIB, 500), (512, 512, 50_000),
                               (KIB, 60 * MIB, 20), (64 * KIB, 64 * KIB, 20_000)):  # fmt: skip
        found = list(batches(rows(first, each, count)))
        assert max(batch.length for batch in found) <= 2 * BATCH + 2 * MIB
        assert max(len(batch.pairs) for batch in found) <= BATCH_PAIRS + 2 * MIB // min(each, 2 * MIB)
        assert [batch.end for batch in found] == sorted(batch.end for batch in found)
        read = [(left.offset, left.end) for batch in found for left, _ in batch.pairs]
        assert sum(end - start for start, end in read) == count // 2 * each
        assert all(one[1] <= two[0] for one, two in pairwise(read))


class Place:
    """A store that nobody reads."""

    path = Path("nowhere")
    identity: Hashable = "nowhere"
    contiguous = True

    def read_into(self, *_: object) -> None:
        raise AssertionError


def test_no_compressed_cluster_is_decompressed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a raw disk with holes at odd places, so that no extents of both end together."""
    chance = random.Random(3)
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    data = bytearray(b"".join(chance.randbytes(64) * 1024 for _ in range(24 * MIB // (64 * KIB))))
    raw.write_bytes(data)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=2M", raw, image)
    qemu_io(raw, *(f"write -z -u {number * 52}k 4k" for number in range(400)), fmt="raw", options=("-d", "unmap"))
    seen: list[int] = []
    inner = StreamStore._decompress

    def decompressing(self: StreamStore, value: int) -> bytes:
        seen.append(value)
        return inner(self, value)

    monkeypatch.setattr(StreamStore, "_decompress", decompressing)
    with open_disk(raw) as old, open_disk(image, format="qcow2") as new:
        found = sum(stop - first for first, stop in differing(old, new, 512))
    assert found == 400 * 8
    assert len(seen) == len(set(seen)) == 12


def test_a_granularity_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(1024))
    with open_disk(path) as disk:
        for granularity in (0, 256, 513, 65537, 1 << 32):
            with pytest.raises(UsageError):
                compare(disk, disk, granularity)
            with pytest.raises(UsageError):
                list(differing(disk, disk, granularity))


# ---- names ----


def overlay(path: Path, name: str, fmt: str | None, size: str = "1M") -> Path:
    """An overlay that names its backing file in just that way; nothing is looked up."""
    with_format = ("-F", fmt) if fmt else ()
    # qemu-img insists on a format; it is taken out again afterwards.
    qemu_img("create", "-q", "-u", "-f", "qcow2", *(with_format or ("-F", "raw")), "-b", name, path, size)
    if not fmt:
        raw = Raw.load(path)
        at = raw.extensions()[0xE2792ACA][0]
        raw.put(at - 8, 0x1BADCAFE, 4)
        raw.save(path)
    return path


def test_relative_names_count_from_the_directory_of_the_name_that_was_opened(tmp_path: Path) -> None:
    """Not from the working directory, and of a link from where the link is: as QEMU."""
    for folder, pattern in (("here", 1), ("there", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "base").write_bytes(bytes([pattern]) * MIB)
    image = overlay(tmp_path / "here" / "image", "base", "raw")
    link = tmp_path / "there" / "link"
    link.symlink_to(image)
    for path, pattern in ((image, 1), (link, 2)):
        with open_disk(path, format="qcow2") as disk:
            assert disk.read(0, 16) == bytes([pattern]) * 16
        assert converted(Made(path, "qcow2"), tmp_path)[:16] == bytes([pattern]) * 16


@pytest.mark.parametrize(
    "name",
    ["./with:colon", "a b\n", "sub/../with:colon2/./x", "file:{}/plain"],
)
def test_names_of_files_are_followed_as_qemu_does(name: str, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "with:colon2").mkdir()
    for each in ("with:colon", "a b\n", "with:colon2/x", "plain"):
        (tmp_path / each).write_bytes(b"\7" * MIB)
    image = overlay(tmp_path / "image", name, "raw")
    with open_disk(image, format="qcow2") as disk:
        assert disk.read(0, MIB) == b"\7" * MIB == converted(Made(image, "qcow2"), tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ('json:{"driver":"raw","file":{"driver":"file","filename":"base"}}', "not the name of a file"),
        ("nbd://127.0.0.1:9/x", "not the name of a file"),
        ("http://example.org/disk", "not the name of a file"),
        ("nbd:unix:/tmp/socket", "not the name of a file"),
        ("fat:/etc", "not the name of a file"),
        ("file:base", "where it happens to be started"),
    ],
)
def test_other_names_are_refused(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    image = overlay(tmp_path / "image", name, "raw")
    with pytest.raises(UnsupportedImageError, match=words) as caught:
        open_disk(image, format="qcow2")
    assert caught.value.image == image


def test_what_is_missing_or_no_file_is_refused(tmp_path: Path) -> None:
    image = overlay(tmp_path / "image", "base", "raw")
    with pytest.raises(ImageIOError, match="No such file"):
        open_disk(image, format="qcow2")
    os.mkfifo(tmp_path / "base")
    with pytest.raises(ImageIOError, match="neither a regular file nor a block device"):
        open_disk(image, format="qcow2")
    (tmp_path / "base").unlink()
    (tmp_path / "base").mkdir()
    with pytest.raises(ImageIOError, match="directory"):
        open_disk(image, format="qcow2")


def test_a_name_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    image = overlay(tmp_path / "image", "base", "raw")
    raw = Raw.load(image)
    raw.data[raw.number(8) + 1] = 0
    raw.save(image)
    with pytest.raises(CorruptImageError, match="zero byte"):
        open_disk(image, format="qcow2")


def test_a_loop_is_told(tmp_path: Path) -> None:
    overlay(tmp_path / "a", "b", "qcow2")
    overlay(tmp_path / "b", "c", "qcow2")
    (tmp_path / "c").hardlink_to(tmp_path / "a")
    with pytest.raises(UnsupportedImageError, match="loop"):
        open_disk(tmp_path / "a", format="qcow2")
    image = overlay(tmp_path / "d", "d", "qcow2")
    with pytest.raises(UnsupportedImageError, match="loop"), Qcow2Image.open(image) as opened:
        disk_of(opened)


def test_a_chain_without_end_is_cut(tmp_path: Path) -> None:
    first = overlay(tmp_path / "0", "1", "qcow2")
    data = first.read_bytes()
    for number in range(1, 300):
        raw = Raw(data)
        at = raw.number(8)
        name = f"{number + 1}".encode()
        raw.put(16, len(name), 4)
        raw.data[at : at + len(name)] = name
        raw.save(tmp_path / str(number))
    with pytest.raises(UnsupportedImageError, match="more than 256 files"):
        open_disk(first, format="qcow2")


def test_a_format_that_nobody_says(tmp_path: Path) -> None:
    """A raw disk on which the guest has written a qcow2 header is never taken for one, nor for raw by mistake."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    guest = overlay(tmp_path / "guest", str(secret), "raw")
    image = overlay(tmp_path / "image", "guest", None)
    with pytest.raises(UsageError, match="begins like qcow2"):
        open_disk(image, format="qcow2")
    with pytest.raises(UsageError, match="begins like qcow2"):
        open_disk(guest)
    with open_disk(guest, format="raw") as disk:
        assert disk.read(0, 512) == guest.read_bytes()[:512]
    with open_disk(image, format="qcow2", rules=Rules(guess=True)) as disk:
        assert disk.read(0, 6) == b"secret"
    guest.write_bytes(b"KDMV" + bytes(5000))
    with pytest.raises(UsageError, match="begins like vmdk"):
        open_disk(image, format="qcow2", rules=Rules(guess=True))
    guest.write_bytes(b"plain" + bytes(5000))
    with open_disk(image, format="qcow2") as disk:
        assert disk.read(0, 5) == b"plain"


def test_formats_that_are_not_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    image = overlay(tmp_path / "image", "base", "vmdk")
    with pytest.raises(UnsupportedImageError, match="format 'vmdk'"):
        open_disk(image, format="qcow2")
    with pytest.raises(UsageError, match="format 'vmdk'"):
        open_disk(image, format="vmdk")


def test_a_data_file_is_opened_only_by_the_users_word(tmp_path: Path) -> None:
    image = unpack("data-file", tmp_path)
    name = next(path for path in tmp_path.iterdir() if path != image)
    with pytest.raises(UnsupportedImageError, match="external data file"):
        open_disk(image, format="qcow2")
    moved = name.rename(tmp_path / "elsewhere")
    with open_disk(image, format="qcow2", rules=Rules(data_files={image: moved})) as disk:
        found = content(disk)
    moved.rename(name)
    assert found == converted(Made(image, "qcow2"), tmp_path)


def test_an_encrypted_image_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedImageError, match=r"encrypted.*qemu-img convert"):
        open_disk(unpack("luks", tmp_path), format="qcow2")


def test_files_are_locked_and_let_go(tmp_path: Path) -> None:
    base = tmp_path / "base"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    image = overlay(tmp_path / "image", "base", "qcow2")
    with open_disk(image, format="qcow2"):
        for path in (base, image):
            assert "Failed to get" in qemu_img("resize", path, "2M", check=False).stderr
        with open_disk(image, format="qcow2"):  # readers go together
            pass
    qemu_img("resize", base, "2M")
    before = len(list(Path("/proc/self/fd").iterdir()))
    base.unlink()
    with pytest.raises(ImageIOError):
        open_disk(image, format="qcow2")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ---- damage ----


def damaged(chance: random.Random, data: bytes, image: Path) -> None:
    """Some entries of L1 and L2 tables overwritten."""
    raw = Raw(data)
    span = raw.cluster_size // 8
    tables = [raw.number(raw.number(40) + 8 * index) & 0x00FF_FFFF_FFFF_FE00 for index in range(raw.number(36, 4))]
    places = [raw.number(40) + 8 * index for index in range(raw.number(36, 4))]
    places += [table + 8 * index for table in tables if table for index in range(min(span, 64))]
    for _ in range(chance.randrange(1, 4)):
        place = chance.choice(places)
        entry = raw.number(place)
        values = (
            0, 1, 1 << 62, (1 << 62) | entry, entry ^ 1 << chance.randrange(64), entry + 512, 1 << 50,
            chance.getrandbits(64), raw.number(chance.choice(places)), len(data) - 512, len(data), (1 << 64) - 1,
        )  # fmt: skip
        raw.put(place, chance.choice(values) & (1 << 64) - 1)
    raw.save(image)


@pytest.mark.parametrize("seed", range(6 * ROUNDS))
def test_a_damaged_mapping_is_an_error_or_read_as_qemu_reads_it(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    image = tmp_path / "image"
    chosen = chance.choice(("cluster_size=4k", "cluster_size=64k,extended_l2=on", "cluster_size=512,compat=0.10"))
    qemu_img("create", "-q", "-f", "qcow2", "-o", chosen, image, "4M")
    qemu_io(image, "write -P 1 0 700k", "write -P 2 2M 512k", "write -c -P 3 1M 64k")
    sound = image.read_bytes()
    read = refused = 0
    for _ in range(12):
        damaged(chance, sound, image)
        said = qemu_img("convert", "-f", "qcow2", "-O", "raw", image, tmp_path / "out", check=False)
        try:
            with open_disk(image, format="qcow2") as disk:
                found = content(disk)
        except Qcow2bmError:
            refused += 1
            continue
        assert said.returncode == 0, said.stderr
        assert found == (tmp_path / "out").read_bytes()
        read += 1
    assert read + refused == 12


def test_hostile_tables_take_no_time(tmp_path: Path) -> None:
    """Every L1 entry names one L2 table: a disk of petabytes in a file of a few MiB."""
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", image, "64T")
    qemu_io(image, "write -P 1 0 64k")
    raw = Raw.load(image)
    table = raw.number(40)
    for index in range(raw.number(36, 4)):
        raw.put(table + 8 * index, raw.number(table))
    raw.save(image)
    with pytest.raises(CorruptImageError, match="twice"):
        open_disk(image, format="qcow2")


def test_the_open_image_stays_open(tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    with Qcow2Image.open(image) as opened:
        with disk_of(opened) as disk:
            assert disk.read(0, 512) == bytes(512)
        assert opened.file.fd >= 0


def test_reading_outside_is_the_callers_mistake(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(1000))
    with open_disk(path) as disk:
        assert disk.size == 1024
        assert disk.read(900, 124) == bytes(124)
        for offset, length in ((0, 1025), (-1, 1), (1024, 1), (0, -1)):
            with pytest.raises(ValueError, match="not within"):
                disk.read(offset, length)
