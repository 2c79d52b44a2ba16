"""Salvaged bitmaps miss no change: a real QEMU, guest requests, and its death at a random moment.

What has changed is known from raw copies of the disk, made by QEMU before and after. Every policy is held against
that, and QEMU must read from the image the very bits that were salvaged. QCOW2BM_ROUNDS multiplies the random runs.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import qcow2bm
from qcow2bm.bitmap.bits import BitVector
from qcow2bm.bitmap.store import BitmapDirectory, State
from qcow2bm.chain.opening import Rules
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapError,
    BitmapInconsistentError,
    CorruptImageError,
    UnsupportedImageError,
    UsageError,
)
from qcow2bm.image.commit import commit
from qcow2bm.image.file import ImageFile
from qcow2bm.image.image import Qcow2Image, read_head
from qcow2bm.image.overlay import OverlayFile
from qcow2bm.repair.model import Salvage
from qcow2bm.repair.salvage import Proof, Salvaged, Terms, apply_salvage, salvaged
from tests.support.images import unpack
from tests.support.qemu import (
    Ranges,
    StorageDaemon,
    bitmap_info,
    check,
    guest_digest,
    qemu_img,
    qemu_io,
    read_bitmap_nbd,
)
from tests.support.raw import BITMAPS, Raw

KIB, MIB = 1 << 10, 1 << 20
ROUNDS = int(os.environ.get("QCOW2BM_ROUNDS", "1"))
STEP = 512


# ---- what a guest does ----


def requests(chance: random.Random, size: int, count: int) -> list[str]:
    """Writes, zeroes and discards of all sizes, some of them in flight together."""
    said = []
    for _ in range(count):
        verb = chance.choice(("write -P {}", "aio_write -P {}", "write -z", "write -z -u", "discard", "flush"))
        if verb == "flush":
            said.append(verb)
            continue
        length = min(chance.choice((STEP, 4 * KIB, 4 * KIB, 64 * KIB, 300 * KIB)) * chance.randrange(1, 4), size)
        offset = chance.randrange(0, size - length + 1, STEP)
        if chance.random() < 0.4:  # whole clusters, so that some come to be as they were
            offset, length = offset // (64 * KIB) * 64 * KIB, min(128 * KIB, size - offset // (64 * KIB) * 64 * KIB)
        said.append(f"{verb.format(chance.randrange(1, 4))} {offset} {length}")
    return said


def die_at_work(vm: StorageDaemon, chance: random.Random, commands: list[str]) -> None:
    """SIGKILL while a guest's requests come in."""
    words = [word for command in commands for word in ("-c", command)]
    argv = ["qemu-io", "-f", "raw", "-d", "unmap", *words, vm.uri()]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as guest:
        time.sleep(0.01 + chance.choice((0.01, 0.03, 0.1)) * chance.random())
        vm.kill()
        guest.wait(60)


def raw_copy(image: Path, out: Path) -> bytes:
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", image, out)
    return out.read_bytes()


def changed(before: bytes, after: bytes, granularity: int) -> set[int]:
    """The granules that differ."""
    size = max(len(before), len(after))
    old, new = (np.frombuffer(data.ljust(size, b"\0"), np.uint8) for data in (before, after))
    return set((np.flatnonzero(old != new) // granularity).tolist())


def marked(bits: BitVector) -> set[int]:
    return {index for first, stop in bits.runs() for index in range(first, stop)}


# ---- an image, its bitmaps, and the death of who wrote to it ----


@dataclass
class Case:
    """An image after its writer died.

    Attributes:
        before: the disk when the bitmaps began, as a raw file.
        layer_is_newer: whether that is so: nothing had been written to the image by then.
        starts: ids of snapshots of that very moment, and of an earlier one.
        recording: by bitmap.
    """

    image: Path
    before: Path
    after: bytes
    layer_is_newer: bool
    start: str | None
    earlier: str | None
    recording: dict[str, bool] = field(default_factory=dict)


def make(chance: random.Random, folder: Path) -> tuple[Path, int, bool]:
    """A disk with or without data, alone or over another; and whether the top holds nothing yet."""
    size = chance.randrange(1 * MIB, 6 * MIB, STEP)
    cluster = chance.choice(
        ("cluster_size=4k", "cluster_size=64k", "cluster_size=64k,extended_l2=on", "cluster_size=512")
    )
    image, base = folder / "image.qcow2", folder / "base.qcow2"
    over = ()
    if chance.random() < 0.5:
        length = chance.choice((size, size // 2 // STEP * STEP + STEP))
        qemu_img("create", "-q", "-f", "qcow2", base, str(length))
        qemu_io(base, *(f"write -P {number + 5} {number * length // 8 // STEP * STEP} 8k" for number in range(7)))
        over = ("-F", "qcow2", "-b", base)
    qemu_img("create", "-q", "-f", "qcow2", *over, "-o", cluster, image, str(size))
    is_empty = chance.random() < 0.5
    if not is_empty:
        qemu_io(image, *guest(chance, size, 12), options=("-d", "unmap"))
        if "512" not in cluster and chance.random() < 0.5:
            qemu_io(image, f"write -c -P 9 0 {64 * KIB}", check=False)
    return image, size, is_empty


def guest(chance: random.Random, size: int, count: int) -> list[str]:
    """Requests that one connection makes one after the other."""
    return [said for said in requests(chance, size, count) if not said.startswith("aio")]


def run(chance: random.Random, folder: Path) -> Case:
    """Bitmaps begin; one session ends well, the next does not."""
    image, size, is_empty = make(chance, folder)
    earlier = start = None
    snapshots = chance.random() < 0.6
    if snapshots:
        qemu_img("snapshot", "-c", "earlier", image)
        earlier = "earlier"
        commands = guest(chance, size, chance.randrange(8))
        if commands:
            qemu_io(image, *commands, options=("-d", "unmap"))
            is_empty = False
        qemu_img("snapshot", "-c", "start", image)
        start = "start"
    before = folder / "before.raw"
    raw_copy(image, before)
    granularities = chance.sample([512, 4 * KIB, 64 * KIB, 1 * MIB], k=2)
    recording = {}
    with StorageDaemon(image) as vm:
        for number, granularity in enumerate(granularities):
            name = f"b{number}"
            recording[name] = True
            vm.add_bitmap(name, granularity)
        vm.io(*requests(chance, size, chance.randrange(1, 10)))
    vm = StorageDaemon(image)
    vm.start()
    try:
        if chance.random() < 0.3:
            vm.io(*requests(chance, size, 4))
        die_at_work(vm, chance, requests(chance, size, 150))
    finally:
        vm.kill()
    return Case(image, before, raw_copy(image, folder / "after.raw"), is_empty, start, earlier, recording)


def entries(raw: Raw) -> dict[str, tuple[int, int]]:
    """Bitmap name to offset and length of its directory entry."""
    at, size, _ = raw.directory
    end, found = at + size, {}
    while at < end:
        extra, name = raw.number(at + 20, 4), raw.number(at + 18, 2)
        length = (24 + extra + name + 7) // 8 * 8
        found[raw.data[at + 24 + extra :][:name].decode()] = at, length
        at += length
    return found


def detach(image: Path) -> None:
    """As if what was written last had been written by a program that knows no bitmaps."""
    raw = Raw.load(image)
    raw.put(88, 0)
    for at, _ in entries(raw).values():
        raw.put(at + 12, raw.number(at + 12, 4) & ~1, 4)
    raw.save(image)


def terms_of(case: Case) -> Iterator[tuple[Salvage, Terms]]:
    """All that holds for an image."""
    yield Salvage.ALL_DIRTY, Terms()
    yield Salvage.REBUILD, Terms(base=case.before, base_format="raw")
    yield Salvage.REBUILD, Terms(base=case.before, base_format="raw", keep_stale=True)
    if case.layer_is_newer:
        yield Salvage.ALLOCATED, Terms(layer_is_newer=True)
        yield Salvage.ALLOCATED, Terms(layer_is_newer=True, keep_stale=False)
    if case.start is not None:
        yield Salvage.SNAPSHOT, Terms(snapshot=case.start, snapshot_is_start=True)
        yield Salvage.SNAPSHOT, Terms(snapshot=case.start, snapshot_is_start=True, keep_stale=False)
        yield Salvage.SNAPSHOT, Terms(snapshot=case.start, keep_stale=False)
    if case.earlier is not None:
        yield Salvage.SNAPSHOT, Terms(snapshot=case.earlier, keep_stale=False)


def salvage(image: Path, name: str, policy: Salvage, terms: Terms | None = None) -> tuple[Salvaged, set[int]]:
    """A salvage and its granules, which are read while the image is open."""
    with Qcow2Image.open(image) as opened:
        found = salvaged(opened, BitmapDirectory(opened).find(name), policy, terms)
        return found, marked(found.bits) if found.bits is not None else set()


def carry_out(image: Path, wanted: dict[str, tuple[Salvage, Terms]], *, removed: tuple[str, ...] = ()) -> None:
    """Salvage and commit."""
    with Qcow2Image.open(image, writable=True) as opened:
        directory = BitmapDirectory(opened)
        done = [salvaged(opened, directory.find(name), *how) for name, how in wanted.items()]
        commit(opened, apply_salvage(opened.file, done, removed=removed))


def ranges(granules: set[int], granularity: int, size: int) -> Ranges:
    found: Ranges = []
    for granule in sorted(granules):
        start, stop = granule * granularity, min((granule + 1) * granularity, size)
        if found and sum(found[-1]) == start:
            start = found.pop()[0]
        found.append((start, stop - start))
    return found


def corruptions(image: Path) -> int:
    """As qemu-img counts them. A QEMU that is killed among discards can leave some: one cluster at two places."""
    return int(check(image).get("corruptions", 0))


def require_as_salvaged(
    image: Path, expected: dict[str, set[int]], recording: dict[str, bool], digest: str, corrupt: int
) -> None:
    """QEMU opens the image, finds the bitmaps in order, reads their bits, and the disk is as it was."""
    size = Raw.load(image).number(24)
    said = {entry["name"]: entry for entry in bitmap_info(image)}
    assert set(said) == set(recording)
    for name, granules in expected.items():
        flags = ["auto"] if recording[name] else []
        assert said[name]["flags"] == flags
        assert read_bitmap_nbd(image, name) == ranges(granules, said[name]["granularity"], size)
    assert corruptions(image) == corrupt
    assert guest_digest(image) == digest


@pytest.mark.parametrize("seed", range(14 * ROUNDS))
def test_no_change_is_missed(seed: int, tmp_path: Path) -> None:
    """Each policy for an image whose writer died; and for the same image with its bitmaps detached."""
    chance = random.Random(seed)
    case = run(chance, tmp_path)
    before, digest, corrupt = case.before.read_bytes(), guest_digest(case.image), corruptions(case.image)
    detached = tmp_path / "detached.qcow2"
    shutil.copyfile(case.image, detached)
    detach(detached)
    for policy, terms in terms_of(case):
        for image in (case.image, detached):
            results: dict[str, set[int]] = {}
            for name in case.recording:
                found, granules = salvage(image, name, policy, terms)
                if policy is Salvage.SNAPSHOT and image is detached and not terms.snapshot_is_start:
                    assert found.proof is Proof.UNKNOWN
                    assert found.bits is None
                    continue
                truth = changed(before, case.after, found.granularity)
                assert truth <= granules, f"{policy} misses {sorted(truth - granules)[:5]}"
                exact = policy is Salvage.REBUILD and not terms.keep_stale
                assert found.proof is (Proof.EXACT if exact else Proof.SUPERSET)
                assert granules == truth or not exact
                results[name] = granules
            if results and chance.random() < 0.4:
                copy = tmp_path / "copy.qcow2"
                shutil.copyfile(image, copy)
                carry_out(copy, dict.fromkeys(results, (policy, terms)))
                require_as_salvaged(copy, results, case.recording, digest, corrupt)


@pytest.mark.parametrize("seed", range(3 * ROUNDS))
def test_a_salvaged_bitmap_goes_on_recording(seed: int, tmp_path: Path) -> None:
    """A session after the salvage adds to it what it writes, and the whole is still all that has changed."""
    chance = random.Random(1000 + seed)
    case = run(chance, tmp_path)
    carry_out(case.image, dict.fromkeys(case.recording, (Salvage.REBUILD, Terms(base=case.before, base_format="raw"))))
    with StorageDaemon(case.image) as vm:
        assert not any(entry.get("inconsistent") for entry in vm.bitmaps().values())
        vm.write(64 * KIB, 5000, pattern=0x77)
    after = raw_copy(case.image, tmp_path / "later.raw")
    with qcow2bm.open(case.image) as image:
        for bitmap in image.bitmaps:
            assert changed(case.before.read_bytes(), after, bitmap.granularity) <= marked(bitmap.stored.bits)
            assert bitmap.recording


# ---- why a policy asks for what it asks for ----


def in_use(
    folder: Path, *, granularity: int = 64 * KIB, lost: tuple[str, ...] = (), kept: tuple[str, ...] = ()
) -> Path:
    """An image of folder/image.qcow2 with a bitmap b: a session that ends well, and one that is killed."""
    image = folder / "image.qcow2"
    with StorageDaemon(image) as vm:
        if not vm.bitmaps():
            vm.add_bitmap("b", granularity)
        vm.io(*kept) if kept else None
    vm = StorageDaemon(image)
    vm.start()
    try:
        vm.io(*lost, "flush")
    finally:
        vm.kill()
    return image


def create(folder: Path, size: str = "4M", *more: str | Path) -> Path:
    image = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *more, image, size)
    return image


def test_after_an_older_snapshot_zeroes_prove_nothing(tmp_path: Path) -> None:
    """Written before the bitmap began and zeroed since: the cluster is as in the snapshot, and yet it has changed."""
    image = create(tmp_path)
    qemu_io(image, "write -z 0 64k", "write -P 1 1M 64k")
    qemu_img("snapshot", "-c", "older", image)
    qemu_io(image, "write -P 2 0 64k")
    before = raw_copy(image, tmp_path / "before")
    in_use(tmp_path, lost=("write -z -u 0 64k",))
    after = raw_copy(image, tmp_path / "after")
    assert changed(before, after, 64 * KIB) == {0}
    # Who says that it was taken when the bitmap began says something wrong, and gets what follows from it.
    assert salvage(image, "b", Salvage.SNAPSHOT, Terms(snapshot="older", snapshot_is_start=True))[1] == set()
    found, granules = salvage(image, "b", Salvage.SNAPSHOT, Terms(snapshot="older"))
    assert found.proof is Proof.SUPERSET
    assert granules == set(range(64)) - {16}


def test_what_was_committed_down_is_in_the_stale_bits(tmp_path: Path) -> None:
    """An overlay that was emptied holds nothing of what was written to it. The bits of the last clean close do."""
    base = tmp_path / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "4M")
    image = create(tmp_path, "4M", "-F", "qcow2", "-b", base)
    before = raw_copy(image, tmp_path / "before")
    with StorageDaemon(image) as vm:
        vm.add_bitmap("b")
        vm.write(1 * MIB, 4 * KIB)
    qemu_img("commit", "-q", image)
    in_use(tmp_path, lost=("write -P 3 2M 4k",))
    truth = changed(before, raw_copy(image, tmp_path / "after"), 64 * KIB)
    assert truth == {16, 32}
    assert salvage(image, "b", Salvage.ALLOCATED, Terms(layer_is_newer=True))[1] == truth
    assert salvage(image, "b", Salvage.ALLOCATED, Terms(layer_is_newer=True, keep_stale=False))[1] == {32}


def test_allocated_is_refused_without_the_users_word(tmp_path: Path) -> None:
    create(tmp_path)
    found, _ = salvage(in_use(tmp_path, lost=("write 0 4k",)), "b", Salvage.ALLOCATED)
    assert found.bits is None
    assert found.proof is Proof.UNKNOWN
    assert "no backing file" in found.reason
    base = tmp_path / "image.qcow2"
    base.rename(tmp_path / "base.qcow2")
    create(tmp_path, "4M", "-F", "qcow2", "-b", tmp_path / "base.qcow2")
    found, _ = salvage(in_use(tmp_path, lost=("write 0 4k",)), "b", Salvage.ALLOCATED)
    assert found.proof is Proof.UNKNOWN
    assert "overlay" in found.reason
    with Qcow2Image.open(base, writable=True) as image, pytest.raises(BitmapError, match="cannot be salvaged"):
        apply_salvage(image.file, [found])


def test_a_discarded_cluster_of_a_newer_layer_counts(tmp_path: Path) -> None:
    """Discarded over a backing file it reads as zeroes; that is a change, and the zero cluster tells of it."""
    base = tmp_path / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "4M")
    qemu_io(base, "write -P 1 0 4M")
    image = create(tmp_path, "4M", "-F", "qcow2", "-b", base)
    in_use(tmp_path, lost=("discard 1M 64k", "write -P 2 2M 4k", "discard 2M 64k", "write -z 3M 64k"))
    found, granules = salvage(image, "b", Salvage.ALLOCATED, Terms(layer_is_newer=True, keep_stale=False))
    assert granules == {16, 32, 48}
    assert found.proof is Proof.SUPERSET


def test_a_growth_since_the_snapshot_is_a_change(tmp_path: Path) -> None:
    image = create(tmp_path, "1M")
    qemu_io(image, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "start", image)
    qemu_img("resize", "-q", image, "2M")
    in_use(tmp_path, lost=("write -P 2 64k 4k",))
    _, granules = salvage(image, "b", Salvage.SNAPSHOT, Terms(snapshot="start", snapshot_is_start=True))
    assert granules == {1, *range(16, 32)}


def test_a_cluster_that_may_have_been_written_to_in_place_counts(tmp_path: Path) -> None:
    """The copied flag on a cluster that a snapshot has too: damage, and the snapshot protected nothing there.

    A repair clears the flag, so what it has seen before is looked at as well.
    """
    image = create(tmp_path, "4M", "-o", "cluster_size=64k")
    qemu_io(image, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "start", image)
    in_use(tmp_path, lost=("write -P 2 64k 4k",))  # the L2 table is the active disk's own now
    repaired = tmp_path / "repaired.qcow2"
    shutil.copyfile(image, repaired)
    raw = Raw.load(image)
    place = raw.l2_entry(5)
    raw.put(place, raw.number(place) | 1 << 63)
    raw.save(image)
    terms = Terms(snapshot="1", snapshot_is_start=True)
    assert salvage(image, "b", Salvage.SNAPSHOT, terms)[1] == {1, 5}
    assert salvage(repaired, "b", Salvage.SNAPSHOT, terms)[1] == {1}
    with Qcow2Image.open(image) as found:
        both = Terms(snapshot="1", snapshot_is_start=True, as_found=found)
        assert salvage(repaired, "b", Salvage.SNAPSHOT, both)[1] == {1, 5}
    raw = Raw.load(repaired)
    table = raw.number(40)
    raw.put(table, raw.number(raw.number(64)) | 1 << 63)  # the snapshot's own table, with the flag
    raw.put(table, raw.number(int(raw.number(raw.number(64)))) | 1 << 63)
    raw.save(repaired)
    assert salvage(repaired, "b", Salvage.SNAPSHOT, terms)[1] == set(range(64))


def test_a_bitmap_that_does_not_record_keeps_its_bits(tmp_path: Path) -> None:
    """It stands for a time that is over; what was changed back since is no difference any more."""
    image = create(tmp_path)
    before = tmp_path / "before"
    raw_copy(image, before)
    with StorageDaemon(image) as vm:
        vm.add_bitmap("b")
        vm.write(1 * MIB, 4 * KIB)
        vm.disable_bitmap("b")
    in_use(tmp_path, lost=("write -z 1M 4k", "write -P 1 2M 4k"))
    found, granules = salvage(image, "b", Salvage.REBUILD, Terms(base=before, base_format="raw"))
    assert granules == {16, 32}
    assert found.proof is Proof.SUPERSET
    found, granules = salvage(image, "b", Salvage.REBUILD, Terms(base=before, base_format="raw", keep_stale=False))
    assert granules == {32}
    carry_out(image, {"b": (Salvage.REBUILD, Terms(base=before))})
    assert bitmap_info(image) == [{"name": "b", "granularity": 65536, "flags": []}]


# ---- what is refused ----


def test_what_needs_no_salvage_or_cannot_have_one(tmp_path: Path) -> None:
    image = create(tmp_path)
    with StorageDaemon(image) as vm:
        vm.add_bitmap("b")
    with pytest.raises(BitmapError, match="good order"):
        salvage(image, "b", Salvage.ALL_DIRTY)
    with StorageDaemon(image) as vm, qcow2bm.open(image, force_share=True) as ours:
        bitmap = BitmapDirectory(ours.qcow2).find("b")
        assert bitmap.state is State.ACTIVE
        with pytest.raises(BitmapInconsistentError, match="running VM"):
            salvaged(ours.qcow2, bitmap, Salvage.ALL_DIRTY)


def test_terms_that_lack_what_is_needed(tmp_path: Path) -> None:
    create(tmp_path)
    image = in_use(tmp_path)
    with pytest.raises(UsageError, match="needs the disk"):
        salvage(image, "b", Salvage.REBUILD)
    with pytest.raises(UsageError, match="snapshot is needed"):
        salvage(image, "b", Salvage.SNAPSHOT)
    with pytest.raises(UsageError, match="no internal snapshot"):
        salvage(image, "b", Salvage.SNAPSHOT, Terms(snapshot="nosuch"))


def test_two_snapshots_of_one_name(tmp_path: Path) -> None:
    image = create(tmp_path)
    for _ in range(2):
        qemu_img("snapshot", "-c", "same", image)
    in_use(tmp_path)
    with pytest.raises(UsageError, match="2 internal snapshots"):
        salvage(image, "b", Salvage.SNAPSHOT, Terms(snapshot="same"))
    assert salvage(image, "b", Salvage.SNAPSHOT, Terms(snapshot="2", snapshot_is_start=True))[1] == set()


def test_the_image_itself_is_no_older_copy(tmp_path: Path) -> None:
    create(tmp_path)
    image = in_use(tmp_path)
    (tmp_path / "link").hardlink_to(image)
    for base in (image, tmp_path / "link"):
        with pytest.raises(UsageError, match="very image"):
            carry_out(image, {"b": (Salvage.REBUILD, Terms(base=base, base_format="qcow2"))})


def test_encrypted_data_cannot_be_compared_but_the_rest_works(tmp_path: Path) -> None:
    image = unpack("luks", tmp_path)
    raw = Raw.load(image)
    at, _, _ = raw.directory
    raw.put(at + 12, raw.number(at + 12, 4) | 1, 4)
    raw.save(image)
    with qcow2bm.open(image) as ours:
        name = ours.bitmaps.names[0]
    (tmp_path / "base").write_bytes(bytes(1024))
    with pytest.raises(UnsupportedImageError, match="encrypted"):
        salvage(image, name, Salvage.REBUILD, Terms(base=tmp_path / "base"))
    assert salvage(image, name, Salvage.ALL_DIRTY)[0].proof is Proof.SUPERSET
    assert salvage(image, name, Salvage.ALLOCATED, Terms(layer_is_newer=True))[1]


def test_a_data_file_is_read_by_the_users_word_alone(tmp_path: Path) -> None:
    image = create(tmp_path, "4M", "-o", f"data_file={tmp_path / 'data'}")
    before = tmp_path / "before"
    before.write_bytes(bytes(4 * MIB))
    with StorageDaemon(image, data_file=tmp_path / "data") as vm:
        vm.add_bitmap("b")
    vm = StorageDaemon(image, data_file=tmp_path / "data")
    vm.start()
    vm.io("write -P 1 1M 4k", "flush")
    vm.kill()
    with pytest.raises(UnsupportedImageError, match="external data file"):
        salvage(image, "b", Salvage.REBUILD, Terms(base=before))
    rules = Rules(data_files={image: tmp_path / "data"})
    assert salvage(image, "b", Salvage.REBUILD, Terms(base=before, rules=rules))[1] == {16}
    assert salvage(image, "b", Salvage.ALLOCATED, Terms(layer_is_newer=True))[1] == {16}


@pytest.mark.parametrize("where", ["table", "twice"])
def test_a_damaged_mapping_proves_nothing(where: str, tmp_path: Path) -> None:
    image = create(tmp_path, "4G")
    qemu_io(image, "write -P 1 0 64k", "write -P 1 1G 64k")
    qemu_img("snapshot", "-c", "start", image)
    in_use(tmp_path, lost=("write 2G 4k",))
    raw = Raw.load(image)
    table = raw.number(40)
    raw.put(table, 1 << 50 if where == "table" else raw.number(table + 16))
    raw.save(image)
    (tmp_path / "base").write_bytes(bytes(1024))
    for policy, terms in (
        (Salvage.ALLOCATED, Terms(layer_is_newer=True)),
        (Salvage.SNAPSHOT, Terms(snapshot="start")),
        (Salvage.REBUILD, Terms(base=tmp_path / "base")),
    ):
        with pytest.raises(CorruptImageError):
            salvage(image, "b", policy, terms)
    assert salvage(image, "b", Salvage.ALL_DIRTY)[0].proof is Proof.SUPERSET


# ---- detached and broken ones, several at once ----


def two_in_use(folder: Path) -> Path:
    image = create(folder)
    with StorageDaemon(image) as vm:
        vm.add_bitmap("a", 4 * KIB)
        vm.add_bitmap("b")
        vm.write(1 * MIB, 4 * KIB)
    return in_use(folder, lost=("write -P 1 2M 4k",))


def test_one_of_two_is_salvaged_and_the_other_stays_as_it_is(tmp_path: Path) -> None:
    image = two_in_use(tmp_path)
    carry_out(image, {"b": (Salvage.ALL_DIRTY, Terms())})
    flags = {entry["name"]: entry["flags"] for entry in bitmap_info(image)}
    assert flags == {"a": ["in-use", "auto"], "b": ["auto"]}
    assert read_bitmap_nbd(image, "b") == [(0, 4 * MIB)]


def test_detached_bitmaps_count_again_only_all_together(tmp_path: Path) -> None:
    image = two_in_use(tmp_path)
    detach(image)
    before = image.read_bytes()
    with pytest.raises(BitmapInconsistentError, match="not all of them"):
        carry_out(image, {"b": (Salvage.ALL_DIRTY, Terms())})
    assert image.read_bytes() == before
    shutil.copyfile(image, tmp_path / "other.qcow2")
    carry_out(image, {"b": (Salvage.ALL_DIRTY, Terms())}, removed=("a",))
    assert bitmap_info(image) == [{"name": "b", "granularity": 65536, "flags": ["auto"]}]
    carry_out(tmp_path / "other.qcow2", dict.fromkeys("ab", (Salvage.ALLOCATED, Terms(layer_is_newer=True))))
    digest = guest_digest(image)
    expected = {"a": {256, 512, *range(512, 528), *range(256, 272)}, "b": {16, 32}}
    require_as_salvaged(tmp_path / "other.qcow2", expected, dict.fromkeys("ab", True), digest, 0)
    assert check(tmp_path / "other.qcow2")["returncode"] == 0


def broken(image: Path, name: str, place: int, value: int, length: int = 4) -> None:
    """Overwrite part of a directory entry."""
    raw = Raw.load(image)
    raw.put(entries(raw)[name][0] + place, value, length)
    raw.save(image)


def taken_out(image: Path, name: str) -> None:
    """Cut an entry out of the directory; what it used becomes a leak."""
    raw = Raw.load(image)
    start, size, count = raw.directory
    at, length = entries(raw)[name]
    raw.data[at : start + size - length] = raw.data[at + length : start + size]
    pointer = raw.extensions()[BITMAPS][0]
    raw.put(pointer, count - 1, 4)
    raw.put(pointer + 8, size - length)
    raw.save(image)


def test_a_broken_bitmap_can_be_all_dirty_or_rebuilt(tmp_path: Path) -> None:
    """Its bits are not read, its table is not followed. If that cannot be given back either, somebody must take it out.

    Once it is out of the directory, the salvage puts it back.
    """
    image = two_in_use(tmp_path)
    (tmp_path / "before").write_bytes(bytes(4 * MIB))
    terms = Terms(base=tmp_path / "before", base_format="raw")
    broken(image, "a", 12, 3 | 1 << 9)  # a flag that nobody knows
    truth = {256, 512}
    found, granules = salvage(image, "a", Salvage.REBUILD, terms)
    assert (found.proof, granules) == (Proof.EXACT, truth)
    carry_out(image, {"a": (Salvage.REBUILD, terms)})
    assert read_bitmap_nbd(image, "a") == [(1 * MIB, 4 * KIB), (2 * MIB, 4 * KIB)]
    assert check(image)["returncode"] == 0


def test_a_broken_bitmap_that_was_taken_out_is_put_back(tmp_path: Path) -> None:
    image = two_in_use(tmp_path)
    broken(image, "a", 0, 1 << 40, 8)  # a table outside the file
    with Qcow2Image.open(image) as opened:
        found = salvaged(opened, BitmapDirectory(opened).find("a"), Salvage.ALL_DIRTY)
    with Qcow2Image.open(image, writable=True) as opened, pytest.raises(BitmapBrokenError):
        apply_salvage(opened.file, [found])
    taken_out(image, "a")
    with Qcow2Image.open(image, writable=True) as opened:
        commit(opened, apply_salvage(opened.file, [found]))
    flags = {entry["name"]: (entry["granularity"], entry["flags"]) for entry in bitmap_info(image)}
    assert flags == {"b": (64 * KIB, ["in-use", "auto"]), "a": (4 * KIB, ["auto"])}
    assert read_bitmap_nbd(image, "a") == [(0, 4 * MIB)]


def test_a_bitmap_without_a_granularity_is_beyond_salvage(tmp_path: Path) -> None:
    image = two_in_use(tmp_path)
    broken(image, "a", 17, 60, 1)
    with pytest.raises(BitmapBrokenError, match="beyond salvage"):
        salvage(image, "a", Salvage.ALL_DIRTY)


# ---- in the middle of a repair ----


def test_in_a_file_as_it_would_be(tmp_path: Path) -> None:
    """A repair works on an overlay: what it changes of the disk is a difference, and the image stays as it is."""
    image = two_in_use(tmp_path)
    before = tmp_path / "before"
    raw_copy(image, before)
    sound = image.read_bytes()
    file = ImageFile.open(image, writable=True)
    overlay = OverlayFile(file)
    host = Raw(sound).number(Raw(sound).l2_entry(16)) & 0x00FF_FFFF_FFFF_FE00
    overlay.write_at(host + 8 * KIB, b"changed by the repair")
    opened = Qcow2Image(overlay, *read_head(overlay), locked=True)
    terms = Terms(base=before, base_format="raw", rules=Rules(use_locks=False))
    found = salvaged(opened, BitmapDirectory(opened).find("a"), Salvage.REBUILD, terms)
    assert found.bits is not None
    assert marked(found.bits) == {258}
    plan = apply_salvage(overlay, [found])
    for write in plan.writes():
        overlay.write_at(write.offset, write.read())
    after = BitmapDirectory(Qcow2Image(overlay, *read_head(overlay), locked=True)).find("a")
    assert after.state is State.READY
    assert marked(after.bits) == {258}
    assert image.read_bytes() == sound
    overlay.close()
    file.close()
