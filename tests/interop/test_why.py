"""`qcow2bm why` on what real QEMU wrote, left behind, or has open; and that the ways it names are there to be gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2bm import __main__
from tests.support.device import loop_device
from tests.support.images import unpack
from tests.support.qemu import QemuError, StorageDaemon, bitmap_info, qemu_img, qemu_io
from tests.support.raw import Raw

KIB, MIB = 1 << 10, 1 << 20

Document = dict[str, Any]
Asked = Callable[[Path, str], Document]


@pytest.fixture
def asked(capsys) -> Asked:
    """`qcow2bm why --output json`: what it says, its exit status among it."""

    def runner(image: Path, name: str) -> Document:
        status = __main__.main(["why", "--output", "json", str(image), name])
        out, err = capsys.readouterr()
        assert err == ""
        document: Document = json.loads(out)
        assert document["status"] == status
        return document

    return runner


def create(image: Path, *options: str, size: str = "64M", bitmaps: tuple[str, ...] = ("daily",)) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, image, size)
    for name in bitmaps:
        qemu_img("bitmap", "--add", image, name)
    return image


def killed(image: Path, offset: int = MIB) -> Path:
    """A VM writes to the image and dies."""
    daemon = StorageDaemon(image)
    daemon.start()
    try:
        daemon.write(offset, 64 * KIB)
        daemon.flush()
    finally:
        daemon.kill()
    return image


def codes(document: Document) -> list[str]:
    return [reason["code"] for reason in document["reasons"]]


def signs(document: Document) -> dict[str, str]:
    return {sign["kind"]: sign["text"] for sign in document["signs"]}


def ways(document: Document) -> dict[str, Document]:
    return {way["name"]: way for way in document["ways-out"]}


# ---- a writer that died ----


def test_a_vm_that_died(tmp_path: Path, asked: Asked) -> None:
    image = create(tmp_path / "vm.qcow2", bitmaps=("daily", "weekly"))
    assert asked(image, "daily")["usable"]
    killed(image)
    said = asked(image, "daily")
    assert (said["status"], said["state"], codes(said)) == (4, "inconsistent", ["bitmap-inconsistent"])
    assert signs(said)["in-use"].startswith("all 2 bitmaps are marked in use: a program that knows bitmaps")
    assert "nobody" in signs(said)
    assert said["holders"] == []
    assert list(ways(said)) == ["rebuild", "all-dirty", "remove"]
    assert {one["name"] for one in said["left-out"]} == {"snapshot", "allocated"}
    assert said["elsewhere"] == {"bitmap-inconsistent": 1}
    assert __main__.main(ways(said)["remove"]["command"][1:]) == 0
    assert [bitmap["name"] for bitmap in bitmap_info(image)] == ["weekly"]


def test_a_vm_that_died_before_others_that_closed_well(tmp_path: Path, asked: Asked) -> None:
    """QEMU leaves an inconsistent bitmap as it is; one that it adds later tells that others closed the image well."""
    image = killed(create(tmp_path / "vm.qcow2"))
    qemu_img("bitmap", "--add", image, "later")
    qemu_io(image, "write -P 1 2M 64k")
    said = asked(image, "daily")
    assert said["state"] == "inconsistent"
    assert signs(said)["in-use"].startswith("1 of 2 bitmaps are marked in use and the others are not")
    later = asked(image, "later")
    assert (later["status"], later["usable"], later["ways-out"]) == (0, True, [])


def test_lazy_refcounts_of_a_vm_that_died(tmp_path: Path, asked: Asked) -> None:
    said = asked(killed(create(tmp_path / "vm.qcow2", "-o", "lazy_refcounts=on")), "daily")
    assert "has not closed it" in signs(said)["dirty"]
    assert {"marked-dirty", "refcount-too-low"} <= set(said["elsewhere"])
    assert codes(said) == ["bitmap-inconsistent"]


def test_internal_snapshots_are_offered_by_name(tmp_path: Path, asked: Asked) -> None:
    image = create(tmp_path / "vm.qcow2")
    qemu_img("snapshot", "-c", "sunday", image)
    killed(image)
    said = asked(image, "daily")
    assert [(one["id"], one["name"]) for one in said["snapshots"]] == [("1", "sunday")]
    assert ways(said)["snapshot"]["command"][-2:] == ["--snapshot", "1"]
    qemu_img("snapshot", "-c", "monday", image)
    said = asked(image, "daily")
    assert [one["name"] for one in said["snapshots"]] == ["sunday", "monday"]
    assert ways(said)["snapshot"]["command"][-2:] == ["--snapshot", "ID"]


def test_snapshots_are_named_for_reading(tmp_path: Path, capsys) -> None:
    image = create(tmp_path / "vm.qcow2")
    for number in range(10):
        qemu_img("snapshot", "-c", f"day-{number}", image)
    killed(image)
    assert __main__.main(["why", str(image), "daily"]) == 4
    lines = capsys.readouterr().out.splitlines()
    named = [line.split("taken")[0].strip() for line in lines if line.strip().startswith("snapshot ")]
    assert named == [f"snapshot    ID {number + 1}, 'day-{number}'," for number in range(8)]
    assert "and 2 more: `qcow2bm info`" in "\n".join(lines)


def test_an_overlay_is_offered_its_own_allocation(tmp_path: Path, asked: Asked) -> None:
    create(tmp_path / "base.qcow2", bitmaps=())
    image = create(tmp_path / "vm.qcow2", "-b", "base.qcow2", "-F", "qcow2")
    said = asked(killed(image), "daily")
    assert list(ways(said)) == ["rebuild", "allocated", "all-dirty", "remove"]
    assert "nothing had been written to this overlay when the bitmap began" in ways(said)["allocated"]["condition"]
    (tmp_path / "base.qcow2").unlink()  # nothing but the image itself is looked at
    assert asked(image, "daily") == said


# ---- a writer at work ----


def test_a_running_vm(tmp_path: Path, asked: Asked, capsys) -> None:
    image = create(tmp_path / "vm.qcow2", bitmaps=("one", "two"))
    with StorageDaemon(image) as daemon:
        daemon.write(MIB, MIB)
        daemon.flush()
        before = image.read_bytes()
        said = asked(image, "one")
        assert (said["status"], said["running"], said["usable"], said["state"]) == (75, True, False, "active")
        assert codes(said) == ["bitmap-active"]
        assert said["holders"] == [f"pid {daemon.pid} (qemu-storage-da)"]
        assert signs(said)["holder"] == f"pid {daemon.pid} (qemu-storage-da) has it open for writing now"
        assert (said["ways-out"], said["left-out"], said["complete"]) == ([], [], False)
        assert __main__.main(["why", str(image), "two"]) == 75
        out = capsys.readouterr().out
        assert f"{image}: bitmap 'two' is in use by a running VM" in out
        assert "shut the VM down and ask again" in out
        assert image.read_bytes() == before
    assert asked(image, "one")["usable"]


def test_a_reader_at_work(tmp_path: Path, asked: Asked) -> None:
    image = create(tmp_path / "vm.qcow2")
    with StorageDaemon(image, writable=False) as daemon:
        said = asked(image, "daily")
        holder = f"pid {daemon.pid} (qemu-storage-da)"
    assert said["usable"]
    assert said["holders"] == [holder]
    assert signs(said)["holder"] == f"{holder} has it open now"


# ---- a foreign writer ----


def test_a_program_that_knows_no_bitmaps(tmp_path: Path, asked: Asked, capsys) -> None:
    """It clears the autoclear bit, as it must. The next QEMU drops the bitmaps, as `why` says that it would."""
    image = create(tmp_path / "vm.qcow2", bitmaps=("daily", "weekly"))
    qemu_io(image, "write -P 1 1M 64k")
    raw = Raw.load(image)
    raw.put(88, 0)
    raw.save(image)
    said = asked(image, "daily")
    assert (said["status"], said["state"], codes(said)) == (4, "detached", ["bitmap-detached"])
    assert "a program that knows no bitmaps wrote to the image" in signs(said)["autoclear-off"]
    assert list(ways(said)) == ["all-dirty", "remove"], "what a rebuild relies on is true of one of the two"
    assert all("--detached" in way["command"] for way in said["ways-out"])
    qemu_io(image, "write -P 1 2M 64k")
    assert bitmap_info(image) == []
    assert __main__.main(["why", str(image), "daily"]) == 1
    assert "no bitmap is called 'daily'" in capsys.readouterr().err


def test_an_image_brought_down_to_version_2(tmp_path: Path, asked: Asked, capsys) -> None:
    image = create(tmp_path / "vm.qcow2")
    qemu_io(image, "write -P 1 1M 64k")
    qemu_img("amend", "-f", "qcow2", "-o", "compat=0.10", image)
    said = asked(image, "daily")
    assert (said["status"], said["state"]) == (4, "detached")
    assert "version-2" in signs(said)
    assert list(ways(said)) == ["remove"]
    qemu_io(image, "write -P 1 2M 64k")
    assert __main__.main(["why", str(image), "daily"]) == 1
    assert "there was one: it is lost" in capsys.readouterr().err


# ---- damage ----


@pytest.fixture
def one_broken(tmp_path: Path) -> Path:
    """Two bitmaps, and the entry of the second has flags that nobody knows: QEMU refuses the image."""
    image = create(tmp_path / "vm.qcow2", bitmaps=("sound", "broken"))
    raw = Raw.load(image)
    at = raw.directory[0]
    size = -(-(24 + len("sound")) // 8) * 8
    raw.put(at + size + 12, 1 << 20 | 2, 4)
    raw.save(image)
    with pytest.raises(QemuError):
        bitmap_info(image)
    return image


def test_one_that_makes_qemu_refuse_the_image(one_broken: Path, asked: Asked) -> None:
    said = asked(one_broken, "broken")
    assert (said["status"], said["state"], codes(said)) == (4, "broken", ["bitmap-flags"])
    assert [way["next-backup"] for way in said["ways-out"]] == ["full"]


def test_one_beside_it(one_broken: Path, asked: Asked) -> None:
    """Its bits are fine, but QEMU opens nothing of this image; the rescue costs it nothing."""
    said = asked(one_broken, "sound")
    assert (said["status"], said["state"], codes(said)) == (4, "ready", ["bitmap-flags"])
    assert [(way["next-backup"], way["proof"]) for way in said["ways-out"]] == [("incremental", "untouched")]


def test_a_cluster_that_the_guest_uses_too(tmp_path: Path, asked: Asked) -> None:
    """Nothing in directory or table tells; the whole image has to be looked at."""
    image = create(tmp_path / "vm.qcow2", bitmaps=("daily", "weekly"))
    qemu_io(image, "write -P 1 1M 64k")
    raw = Raw.load(image)
    [entry] = raw.bitmap_data("daily")
    raw.put(raw.l2_entry(16), raw.number(entry))
    raw.set_refcount(raw.number(entry), 2)
    raw.save(image)
    assert bitmap_info(image)
    said = asked(image, "daily")
    assert (said["status"], said["state"], codes(said)) == (4, "ready", ["bitmap-clusters-shared"])
    assert ways(said)["repair"]["next-backup"] == "larger"
    assert asked(image, "weekly")["usable"]


def test_an_image_that_qemu_marked_corrupt(tmp_path: Path, asked: Asked) -> None:
    image = create(tmp_path / "vm.qcow2")
    raw = Raw.load(image)
    raw.put(72, raw.number(72) | 2)
    raw.save(image)
    said = asked(image, "daily")
    assert (said["status"], codes(said)) == (4, ["marked-corrupt"])
    assert "QEMU met damage" in signs(said)["corrupt"]
    assert ways(said)["repair"]["command"] == ["qcow2bm", "repair", str(image)]


def test_a_program_of_the_future(tmp_path: Path, asked: Asked) -> None:
    image = create(tmp_path / "vm.qcow2")
    raw = Raw.load(image)
    raw.put(88, raw.number(88) | 1 << 40)
    raw.save(image)
    said = asked(image, "daily")
    assert said["usable"]
    assert "a newer program than this" in signs(said)["unknown-autoclear"]


def test_a_block_device(tmp_path: Path, asked: Asked) -> None:
    image = killed(create(tmp_path / "vm.qcow2"))
    with loop_device(image) as device:
        said = asked(device, "daily")
    assert (said["status"], said["state"], said["modified"]) == (4, "inconsistent", None)
    assert "modified" not in signs(said)


# ---- the ways ----


def test_every_way_leads_out(tmp_path: Path, asked: Asked, capsys) -> None:
    """In use and detached, in an overlay with a snapshot: each command as it is printed, with BASE filled in."""
    create(tmp_path / "base.qcow2", bitmaps=())
    image = create(tmp_path / "vm.qcow2", "-b", "base.qcow2", "-F", "qcow2", bitmaps=("daily", "weekly"))
    qemu_img("snapshot", "-c", "before", image)
    qemu_img("convert", "-O", "raw", image, tmp_path / "old.raw")
    killed(image)
    raw = Raw.load(image)
    raw.put(88, 0)
    every = ["rebuild", "snapshot", "allocated", "all-dirty", "remove"]
    for data, policies in ((image.read_bytes(), every), (bytes(raw.data), every[3:])):
        image.write_bytes(data)
        offered = ways(asked(image, "daily"))
        assert list(offered) == policies
        for name, way in offered.items():
            image.write_bytes(data)
            words = [str(tmp_path / "old.raw") if word == "BASE" else word for word in way["command"][1:]]
            status = __main__.main([*words, "--yes"] if words[0] == "repair" else words)
            out = capsys.readouterr().out
            assert status in (0, 4), (words, out)  # 4: the other one is as it was
            assert f"{way['proof']}: " in out or name == "remove"
            status = __main__.main(["why", str(image), "daily"])
            capsys.readouterr()
            assert status == (1 if name == "remove" else 0), words


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("bitmap-flags", "daily"),
        ("bitmap-granularity", "daily"),
        ("bitmap-data-outside", "daily"),
        ("bitmap-clusters-shared", "monday"),
        ("bitmap-name-duplicate", "friday"),
        ("bitmap-directory-entries", "daily"),
        ("bitmap-directory-size", "daily"),
        ("bitmaps-extension-missing", "daily"),
        ("bitmaps-extension-reserved", "daily"),
    ],
)
def test_a_repair_costs_what_was_said(code: str, name: str, tmp_path: Path, asked: Asked, capsys) -> None:
    """Afterwards the bitmap is usable, or it is gone, as `next-backup` had it."""
    image = unpack(f"corrupt/{code}", tmp_path)
    [way] = asked(image, name)["ways-out"]
    assert __main__.main([*way["command"][1:], "--yes"]) in (0, 3)
    status = __main__.main(["why", str(image), name])
    err = capsys.readouterr().err
    assert status in {"incremental": {0}, "larger": {0}, "full": {1}, "undecided": {0, 1}}[way["next-backup"]]
    if way["next-backup"] == "full" and code != "bitmaps-extension-missing":
        assert "a repair has taken it out: `qcow2bm undo IMAGE " in err
