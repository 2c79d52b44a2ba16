"""`qcow2bm check` on what real QEMU wrote, left behind or holds open: what qemu-img says of it, and what it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2bm import __main__
from tests.support.device import loop_device
from tests.support.images import fixture, unpack
from tests.support.qemu import StorageDaemon, bitmap_info, check, qemu_img, qemu_io
from tests.support.raw import OFFSET, Raw

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

Document = dict[str, Any]
Checked = Callable[..., Document]


@pytest.fixture
def checked(capsys) -> Checked:
    """`qcow2bm check --output json` of one image: what it says, with what it printed on stderr as `stderr`."""

    def runner(image: Path, *options: str) -> Document:
        status = __main__.main(["check", "--output", "json", *options, str(image)])
        out, err = capsys.readouterr()
        [document] = json.loads(out)["images"]
        assert document["status"] == status
        return {**document, "stderr": err}

    return runner


def create(image: Path, size: str = "64M", *options: str) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, image, size)
    return image


def add(image: Path, *names: str, options: tuple[str, ...] = ()) -> None:
    for name in names:
        qemu_img("bitmap", "--add", *options, image, name)


def messages(document: Document, code: str) -> list[str]:
    return [finding["message"] for finding in document["findings"] if finding["code"] == code]


# ---- a VM ----


def test_while_a_vm_runs_and_after_it_died(tmp_path: Path, checked: Checked) -> None:
    """In use: not checked. With -U its bitmaps are active, no fault. Once it is dead they are inconsistent."""
    image = create(tmp_path / "vm.qcow2")
    add(image, "one", "two")
    daemon = StorageDaemon(image)
    daemon.start()
    try:
        daemon.write(1 * MIB, 1 * MIB)
        daemon.flush()
        refused = checked(image)
        assert refused["status"] == 75
        assert f"pid {daemon.pid} (qemu-storage-da) has it open for writing" in refused["error"]["message"]
        seen = checked(image, "-U")
        assert (seen["status"], seen["counts"], seen["stale"]) == (0, {"bitmap-active": 2}, True)
        assert "warning: read without keeping writers out: what is found may be stale" in seen["stderr"]
        assert [finding["location"]["bitmap"] for finding in seen["findings"]] == ["one", "two"]
    finally:
        daemon.kill()
    after = checked(image)
    assert (after["status"], after["counts"], after["stale"]) == (4, {"bitmap-inconsistent": 2}, False)
    assert [set(entry["flags"]) for entry in bitmap_info(image)] == [{"in-use", "auto"}] * 2


def test_a_vm_that_closes_well_leaves_nothing_to_find(tmp_path: Path, checked: Checked) -> None:
    image = create(tmp_path / "vm.qcow2")
    add(image, "one")
    with StorageDaemon(image) as daemon:
        daemon.write(1 * MIB, 1 * MIB)
        daemon.discard(1 * MIB, 64 * KIB)
        assert checked(image, "-U")["counts"] == {"bitmap-active": 1}
    after = checked(image)
    assert (after["status"], after["counts"], after["verdict"]) == (0, {}, "clean")


def test_lazy_refcounts_of_a_vm_that_died(tmp_path: Path, checked: Checked) -> None:
    """The refcounts are too low by all that it wrote: as many corruptions as qemu-img counts, and the mark."""
    image = create(tmp_path / "vm.qcow2", "64M", "-o", "lazy_refcounts=on")
    daemon = StorageDaemon(image)
    daemon.start()
    try:
        daemon.write(0, 4 * MIB)
        daemon.flush()
    finally:
        daemon.kill()
    found = checked(image)
    assert found["counts"] == {"marked-dirty": 1, "refcount-too-low": 64, "copied-l2": 64}
    assert found["severities"]["corruption"] == check(image)["corruptions"]
    qemu_img("check", "-q", "-r", "all", image)  # as its advice says
    assert checked(image)["counts"] == {}


# ---- what is not there, and not needed ----


def test_luks_without_the_key(tmp_path: Path, checked: Checked) -> None:
    image = unpack("luks", tmp_path)
    found = checked(image)
    assert (found["status"], found["counts"]) == (0, {})
    assert found["allocation"]["bytes"]["encryption-header"] > 512 * KIB
    said = check(image, fixture("luks").secret)
    assert (said["returncode"], said["allocated-clusters"]) == (0, found["allocation"]["allocated-clusters"])
    assert check(image)["returncode"] == 1  # qemu-img wants the key
    raw = Raw.load(image)
    raw.set_refcount(0, 0)
    raw.save(image)
    assert checked(image)["counts"] == {"refcount-too-low": 1}


@pytest.mark.parametrize(("name", "sidecar"), [("backing-chain", "backing.qcow2"), ("data-file", "data.raw")])
def test_neither_a_backing_file_nor_a_data_file_is_needed(name: str, sidecar: str, tmp_path: Path, checked) -> None:
    image = unpack(name, tmp_path)
    before = checked(image)
    assert before["status"] == 0
    assert before["allocation"]["allocated-clusters"] == check(image)["allocated-clusters"] > 0
    (tmp_path / sidecar).unlink()
    assert checked(image) == before
    assert check(image)["returncode"] == 1


# ---- where it lies, and how large it is ----


def test_a_block_device(tmp_path: Path, checked: Checked) -> None:
    """The same as of the file that is the device's other side, with leaks and a corruption in it."""
    image = unpack("corrupt/bitmap-inconsistent", tmp_path)
    raw = Raw.load(image)
    raw.data += bytes(64 * MIB - len(raw.data))
    for cluster in (100, 200, 201):
        raw.set_refcount(cluster * raw.cluster_size, 1)
    raw.put(raw.l2_entry(4), raw.number(raw.l2_entry(4)) & OFFSET)  # without the copied flag
    raw.save(image)
    file = checked(image, "--owners")
    assert file["counts"] == {"copied-l2": 1, "bitmap-inconsistent": 1, "leak": 3}
    with loop_device(image) as device:
        assert checked(device, "--owners") == {**file, "image": str(device)}
        with loop_device(image, read_only=True) as protected:
            assert checked(protected, "--owners") == {**file, "image": str(protected)}


def test_more_clusters_than_qemu_img_counts(tmp_path: Path, checked: Checked, capsys) -> None:
    """qemu-img's counters end at 2^31 clusters; ours go on, in the drop-in too."""
    image = create(tmp_path / "large.qcow2", "1M", "-o", "cluster_size=512")
    qemu_io(image, "write -P 1 0 64k")
    with image.open("r+b") as file:
        file.truncate(TIB + 512)
    refused = qemu_img("check", image, check=False)
    assert (refused.returncode, refused.stderr) == (1, "qemu-img: Check failed: File too large\n")
    found = checked(image)
    assert (found["status"], found["counts"]) == (0, {})
    assert found["allocation"]["allocated-clusters"] == 128
    assert __main__.main(["qemu-img", "check", str(image)]) == 0
    assert capsys.readouterr().out.startswith("No errors were found on the image.\n128/2048 = 6.25% allocated")
    with image.open("r+b") as file:
        raw = Raw(file.read(MIB))
        at = raw.l2_entry(5)
        file.seek(at)
        file.write((raw.number(at) & OFFSET).to_bytes(8, "big"))
    assert checked(image)["counts"] == {"copied-l2": 1}
    assert image.stat().st_blocks * 512 < MIB  # still a file of holes


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_every_width(order: int, tmp_path: Path, checked: Checked) -> None:
    """A sound image with a bitmap; a leak with the highest refcount; a cluster in use with none."""
    image = create(tmp_path / "image.qcow2", "16M", "-o", f"refcount_bits={1 << order}")
    add(image, "b")
    qemu_io(image, "write -P 1 1M 128k")
    found = checked(image)
    assert (found["status"], found["counts"]) == (0, {})
    end = found["allocation"]["image-end-offset"]
    assert end == check(image)["image-end-offset"]
    raw, highest = Raw.load(image), (1 << (1 << order)) - 1
    raw.data += bytes(end + raw.cluster_size - len(raw.data))
    raw.set_refcount(end, highest)
    raw.set_refcount(raw.number(raw.l2_entry(16)) & OFFSET, 0)
    raw.save(image)
    found, said = checked(image), check(image)
    assert found["counts"] == {"leak-doubtful": 1, "refcount-too-low": 1, "copied-l2": 1}
    assert (said["leaks"], said["corruptions"]) == (1, 2)
    assert (
        f"refcount {highest}, but 0 references; a cluster that is referred to is not counted"
        in (messages(found, "leak-doubtful")[0])
    )


# ---- bitmaps that got lost ----


def test_bitmaps_lost_by_a_downgrade(tmp_path: Path, checked: Checked) -> None:
    """Version 2 has no autoclear bits: the bitmaps are void at once, and the next writer forgets them."""
    image = create(tmp_path / "image.qcow2")
    add(image, "daily", "weekly")
    qemu_io(image, "write -P 1 1M 1M")
    qemu_img("amend", "-f", "qcow2", "-o", "compat=0.10", image)
    found = checked(image)
    assert found["counts"] == {"bitmap-detached": 2, "leak-detached-bitmap": 5}
    assert found["status"] == 4
    leaks = check(image)
    assert (leaks["returncode"], leaks["leaks"]) == (3, 5)
    qemu_io(image, "write -P 1 3M 64k")
    found = checked(image)
    assert (found["status"], found["counts"]) == (3, {"leak-lost-bitmap": 5})
    owners = {message.rpartition(" (")[2] for message in messages(found, "leak-lost-bitmap")}
    assert owners == {"lost bitmap 'daily')", "lost bitmap 'weekly')", "a lost bitmap directory)"}
    qemu_img("check", "-q", "-r", "leaks", image)  # as its advice says
    assert checked(image)["counts"] == {}


def test_a_lost_directory_over_many_clusters(tmp_path: Path, checked: Checked) -> None:
    image = create(tmp_path / "image.qcow2", "1M", "-o", "cluster_size=512")
    names = [f"backup-{number:03}" for number in range(40)]
    add(image, *names)
    qemu_img("amend", "-f", "qcow2", "-o", "compat=0.10", image)
    qemu_io(image, "write -P 1 256k 512")
    found = checked(image, "--max-findings", "1000")
    assert set(found["counts"]) == {"leak-lost-bitmap"}
    assert {finding["location"].get("bitmap") for finding in found["findings"]} == {None, *names}


def test_what_a_bitmap_left_behind_is_not_lost_while_it_lives(tmp_path: Path, checked: Checked) -> None:
    """A change that was cut short leaks an earlier state of a bitmap: no loss, just leaks."""
    image = create(tmp_path / "image.qcow2")
    add(image, "daily")
    qemu_io(image, "write -P 1 1M 1M")
    raw = Raw.load(image)
    size, end = raw.cluster_size, len(raw.data) + -len(raw.data) % raw.cluster_size
    [entry] = raw.bitmap_data("daily")
    parts = [raw.directory[0], raw.tables()["daily"][0], raw.number(entry) & OFFSET]
    raw.data += bytes(end - len(raw.data))
    for place in parts:
        raw.data += raw.data[place : place + size]
    raw.put(end, end + size)  # directory to table to data
    raw.put(end + size, end + 2 * size)
    for place in range(end, end + 3 * size, size):
        raw.set_refcount(place, 1)
    raw.save(image)
    assert checked(image)["counts"] == {"leak": 3}


def test_bitmaps_that_a_foreign_writer_made_void(tmp_path: Path, checked: Checked) -> None:
    """Their clusters are told from those of nobody."""
    image = create(tmp_path / "image.qcow2")
    add(image, "daily")
    qemu_io(image, "write -P 1 1M 1M")
    raw = Raw.load(image)
    raw.put(88, 0)  # the autoclear features
    raw.data += bytes(-len(raw.data) % raw.cluster_size)
    raw.set_refcount(len(raw.data), 1)
    raw.data += bytes(raw.cluster_size)
    raw.save(image)
    found = checked(image)
    assert found["status"] == 4
    assert found["counts"] == {"bitmap-detached": 1, "leak-detached-bitmap": 3, "leak": 1}
    assert check(image)["leaks"] == 4
    assert "(detached bitmap 'daily')" in messages(found, "leak-detached-bitmap")[0]


# ---- what bitmaps tell about each other ----


@pytest.mark.parametrize(
    "granularities", [("64k", "64k", "64k"), ("4k", "64k", "1M"), ("1M", "64k", "512"), ("4k", "1M", "64k")]
)
def test_nested_bitmaps(granularities: tuple[str, str, str], tmp_path: Path, checked: Checked) -> None:
    """Of recording bitmaps the older holds the newer, of any granularity. A merge into the newer ends that."""
    oldest, middle, newest = granularities
    image = create(tmp_path / "image.qcow2")
    add(image, "off")
    qemu_io(image, "write -P 1 1M 64k")
    qemu_img("bitmap", "--disable", image, "off")
    add(image, "oldest", options=("-g", oldest))
    qemu_io(image, "write -P 1 8M 2M")
    add(image, "middle", options=("-g", middle))
    qemu_io(image, "write -P 1 16M 64k")
    add(image, "newest", options=("-g", newest))
    qemu_io(image, "write -P 1 32M 4k")
    assert checked(image)["counts"] == {}
    qemu_img("bitmap", "--merge", "off", image, "newest")
    found = checked(image)
    assert (found["status"], found["verdict"]) == (0, "hint")
    assert set(found["counts"]) == {"bitmaps-not-nested"}
    assert any("'newest'" in message for message in messages(found, "bitmaps-not-nested"))
    qemu_img("bitmap", "--disable", image, "newest")  # from now on nobody expects it to be inside the others
    assert checked(image)["counts"] == {}


def test_an_overlay_and_its_bitmaps(tmp_path: Path, checked: Checked) -> None:
    """Everything in an overlay is dirty in a bitmap of its age, however it came there; a later one misses it."""
    backing = create(tmp_path / "backing.qcow2", "8M")
    qemu_io(backing, "write -P 9 0 8M")
    image = create(tmp_path / "image.qcow2", "8M", "-b", str(backing), "-F", "qcow2")
    add(image, "same-age")
    add(image, "coarse", options=("-g", "1M"))
    add(image, "fine", options=("-g", "512"))
    with StorageDaemon(image) as daemon:
        daemon.write(1 * MIB, 4 * KIB)
        daemon.write_zeroes(3 * MIB, 1 * MIB, unmap=True)
        daemon.discard(5 * MIB, 1 * MIB)
    qemu_io(image, "write -c -P 3 6M 64k", "write -z 7M 100k")
    assert checked(image)["counts"] == {}
    add(image, "late")
    assert checked(image)["counts"] == {}, "of several the largest is the only one that can be of its age"
    for name in ("same-age", "coarse", "fine"):
        qemu_img("bitmap", "--remove", image, name)
    found = checked(image)
    assert (found["status"], found["counts"]) == (0, {"bitmap-misses-overlay": 1})
    [hint] = found["findings"]
    assert hint["location"]["bitmap"] == "late"
    assert hint["values"] == {"granules": 1 + 16 + 16 + 1 + 2}  # clusters, in the order they were written
    qemu_img("bitmap", "--disable", image, "late")
    assert checked(image)["counts"] == {}


# ---- the disk ----


def test_a_large_image_in_bulk(tmp_path: Path, checked: Checked) -> None:
    """More L2 entries than are counted one by one, in long runs and in short ones."""
    image = create(tmp_path / "image.qcow2", "2G", "-o", "preallocation=metadata")
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "write 100M 1M", "write 1500M 64k")
    found, theirs = checked(image), check(image)
    assert (found["status"], found["counts"]) == (0, {})
    keys = ("total-clusters", "allocated-clusters", "fragmented-clusters", "image-end-offset")
    assert {key: found["allocation"][key] for key in keys} == {key: theirs[key] for key in keys}


def test_vm_state_past_the_end_of_the_disk_is_no_fault(tmp_path: Path, checked: Checked) -> None:
    """QEMU keeps it behind what the disk needs of the L1 table, in the active one too after a snapshot is loaded."""
    image = create(tmp_path / "image.qcow2", "1M")
    qemu_io(image, "write -P 1 0 64k")
    raw = Raw.load(image)
    end = len(raw.data) + -len(raw.data) % raw.cluster_size
    raw.data += bytes(end - len(raw.data) + 2 * raw.cluster_size)
    table, state = end, end + raw.cluster_size
    raw.put(raw.number(40) + 8, table | 1 << 63)
    raw.put(table, state | 1 << 63)
    raw.put(table + 8, 1)  # discarded: reads as zeroes
    raw.put(36, 2, 4)
    for place in (table, state):
        raw.set_refcount(place, 1)
    raw.save(image)
    assert check(image)["returncode"] == 0
    assert checked(image)["counts"] == {}


# ---- the bits of a bitmap ----


def test_data_clusters_that_say_one_thing(tmp_path: Path, checked: Checked) -> None:
    """QEMU itself spends clusters on bits that are all one; all zero are those that somebody wrote over."""
    image = create(tmp_path / "image.qcow2", "8M", "-o", "cluster_size=512")
    add(image, "b", options=("-g", "512"))
    qemu_io(image, "write -P 1 0 4M", "write -P 1 5M 512")
    assert checked(image)["counts"] == {"bitmap-needless-clusters": 2}  # of 2 MiB each
    raw = Raw.load(image)
    places = raw.bitmap_data("b")
    assert len(places) == 3
    at = raw.number(places[2]) & OFFSET
    raw.data[at : at + 512] = bytes(512)
    raw.save(image)
    found = checked(image)
    assert (found["status"], found["verdict"], found["counts"]) == (0, "hint", {"bitmap-needless-clusters": 3})
    assert check(image)["returncode"] == 0


def test_bits_past_the_end_of_the_disk(tmp_path: Path, checked: Checked) -> None:
    """A last granule that is only half on the disk is no fault; a bit after it is."""
    size = 9 * 64 * KIB + 512
    image = create(tmp_path / "image.qcow2", str(size))
    add(image, "b")
    qemu_io(image, f"write -P 1 0 {size}")
    assert checked(image)["counts"] == {}
    raw = Raw.load(image)
    [place] = raw.bitmap_data("b")
    at = raw.number(place) & OFFSET
    assert raw.data[at : at + 2] == b"\xff\x03"
    raw.data[at + 1] |= 0x84
    raw.data[at + raw.cluster_size - 1] = 0x80
    raw.save(image)
    found = checked(image)
    assert (found["status"], found["verdict"], found["counts"]) == (0, "warning", {"bitmap-tail-bits": 1})
    assert "has 3 bits set past the end of the disk" in messages(found, "bitmap-tail-bits")[0]
    assert check(image)["returncode"] == 0
