"""Repairs as users meet them, with real QEMU before and after."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import __main__
from qcow2bm.checks.model import RepairClass
from qcow2bm.repair.model import Scope
from tests.support.device import loop_device
from tests.support.qemu import StorageDaemon, bitmap_info, check, qemu_img, qemu_io, read_bitmaps, same_guest_data
from tests.support.raw import BITMAPS, Raw

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def create(path: Path, *bitmaps: str, size: int = 64 * MIB) -> Path:
    """An image with guest writes that recording bitmaps have seen, each bitmap some more than the one after it."""
    qemu_img("create", "-q", "-f", "qcow2", path, str(size))
    qemu_io(path, "write -P 1 0 1M", "write -P 2 20M 64k")
    for number, name in enumerate(bitmaps):
        qemu_img("bitmap", "--add", "-f", "qcow2", path, name)
        qemu_io(path, f"write -P {number + 3} {4 + number}M 64k")
    return path


def repaired(image: Path, **policy: object) -> qcow2bm.RepairPlan:
    with qcow2bm.repairing(image, qcow2bm.RepairPolicy(**policy)) as repair:  # type: ignore[arg-type]
        repair.commit(undo=image.with_name("undo"))
        return repair.plan


# ---- guest data ----


def test_clusters_copied_apart_are_apart_for_the_guest(tmp_path: Path) -> None:
    """The same bytes at both places as before, and a write to one no longer shows at the other."""
    image = create(tmp_path / "vm.qcow2")
    raw = Raw.load(image)
    raw.put(raw.l2_entry(20 * MIB // CLUSTER), raw.number(raw.l2_entry(0)))
    raw.save(image)
    plan = repaired(image)
    assert [step.kind for step in plan.steps] == [RepairClass.LOSSLESS] * len(plan.steps)
    qemu_io(image, "read -P 1 20M 64k", "read -P 1 0 64k", "write -P 9 0 64k", "read -P 1 20M 64k", "read -P 9 0 64k")
    assert check(image)["returncode"] in (0, 3)


def test_what_is_given_up_is_dirty_in_recording_bitmaps(tmp_path: Path) -> None:
    """The next incremental backup must copy what the guest reads now, and did not when the last one was made."""
    image = create(tmp_path / "vm.qcow2", "daily", "frozen")
    qemu_img("bitmap", "--disable", "-f", "qcow2", image, "frozen")
    before = read_bitmaps(image)
    raw = Raw.load(image)
    raw.put(raw.l2_entry(20 * MIB // CLUSTER), (1 << 63) | 0x1234200)  # not aligned: QEMU reads an error there
    raw.save(image)
    repaired(image, allow=RepairClass.LOSSY)
    after = read_bitmaps(image)
    assert after["frozen"] == before["frozen"]
    assert (20 * MIB, CLUSTER) in after["daily"]
    assert set(before["daily"]) <= set(after["daily"])
    qemu_io(image, "read -P 0 20M 64k")
    assert check(image)["returncode"] in (0, 3)


def test_a_lost_refcount_table_is_rebuilt_where_nothing_is(tmp_path: Path) -> None:
    image = create(tmp_path / "vm.qcow2", "daily")
    copy, before = Path(shutil.copy(image, tmp_path / "copy.qcow2")), read_bitmaps(image)
    raw = Raw.load(image)
    raw.put(48, 1 << 40)  # refcount_table_offset, far outside
    raw.save(image)
    size = image.stat().st_size
    repaired(image)
    assert check(image)["returncode"] == 0
    assert image.stat().st_size <= size + 4 * CLUSTER, "no pointer of a damaged image makes the file grow"
    assert same_guest_data(image, copy)
    assert read_bitmaps(image) == before
    qemu_io(image, "write -P 8 40M 8M")
    assert check(image)["returncode"] == 0


# ---- bitmaps ----


@pytest.mark.parametrize(
    "damage",
    [
        "granularity", "type", "flags", "name-size", "extra-data", "table-offset", "table-entry",
        "count", "directory-size", "directory-offset", "extension-length",
    ],
)  # fmt: skip
def test_boot_rescue_leaves_the_other_bitmaps_as_they_are(damage: str, tmp_path: Path) -> None:
    """QEMU refuses the image, then opens it, and every undamaged bitmap has name, flags, granularity and bits."""
    image = create(tmp_path / "vm.qcow2", "mon", "tue", "wed")
    copy = Path(shutil.copy(image, tmp_path / "copy.qcow2"))
    bits = read_bitmaps(image)
    flags = {entry["name"]: entry for entry in bitmap_info(image)}
    raw = Raw.load(image)
    pointer = raw.extensions()[BITMAPS][0]
    directory = raw.number(pointer + 16)
    entry = directory + 32  # the second: each takes 24 bytes and a name, rounded up to 8
    match damage:
        case "granularity":
            raw.put(entry + 17, 60, 1)
        case "type":
            raw.put(entry + 16, 9, 1)
        case "flags":
            raw.put(entry + 12, 0x80000002, 4)
        case "name-size":
            raw.put(entry + 18, 11, 2)
        case "extra-data":
            raw.put(entry + 20, 8, 4)
        case "table-offset":
            raw.put(entry, 0x10001)
        case "table-entry":
            raw.put(raw.number(entry), 0x3F00000000000001)
        case "count":
            raw.put(pointer, 7, 4)
        case "directory-size":
            raw.put(pointer + 8, 1 << 40)
        case "directory-offset":
            raw.put(pointer + 16, 0x12345)
        case "extension-length":
            raw.put(pointer - 4, 16, 4)
    raw.save(image)
    assert check(image)["returncode"] == 1, "QEMU refuses it"
    before = digest(image)
    plan = repaired(image, only=frozenset({Scope.BITMAPS}))
    assert all(step.kind is RepairClass.LOSSLESS for step in plan.steps)
    lost = set(bits) - set(read_bitmaps(image))
    assert lost <= (
        {"tue"} if damage not in ("count", "directory-size", "directory-offset", "extension-length") else set()
    )
    assert {name: read_bitmaps(image)[name] for name in set(bits) - lost} == {n: bits[n] for n in set(bits) - lost}
    assert {entry["name"]: entry for entry in bitmap_info(image)} == {n: flags[n] for n in set(flags) - lost}
    assert check(image)["returncode"] in (0, 3)
    assert same_guest_data(image, copy)
    qcow2bm.undo(image, image.with_name("undo"), force=True)  # QEMU has only read it since
    assert digest(image) == before


@pytest.mark.parametrize("behind", [0, 600], ids=["the last extension", "another one behind it"])
def test_a_bitmaps_extension_of_version_2_goes_and_the_others_stay(behind: int, tmp_path: Path) -> None:
    """Where a version 3 header has its feature bits, one of version 2 has extensions already."""
    image, base = tmp_path / "vm.qcow2", tmp_path / "base.raw"
    base.write_bytes(bytes(MIB))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat=0.10,backing_file={base},backing_fmt=raw", image, "1M")
    raw = Raw.load(image)
    at, length = raw.number(8), raw.number(16, 4)
    raw.put(8, 4096)
    raw.data[4096 : 4096 + length] = raw.data[at : at + length]
    raw.insert_extension(bytes(16), kind=BITMAPS)
    if behind:
        raw.insert_extension(bytes(range(200)) * (behind // 200))
    raw.save(image)
    assert check(image)["returncode"] == 1, "QEMU refuses it"
    extensions = Raw.load(image).extensions()
    repaired(image)
    found = Raw.load(image).extensions()
    assert found.keys() == extensions.keys() - {BITMAPS}
    assert "backing file format: raw" in qemu_img("info", image).stdout
    assert not behind or bytes(range(200)) * (behind // 200) in image.read_bytes()


def test_a_quarantined_bitmap_comes_back(tmp_path: Path, capsys) -> None:
    image = create(tmp_path / "vm.qcow2", "mon", "tue")
    bits = read_bitmaps(image)
    raw = Raw.load(image)
    entry = raw.number(raw.extensions()[BITMAPS][0] + 16) + 32
    raw.put(entry + 12, 0x2 | 0x4, 4)  # a flag that QEMU refuses where there is no extra data
    raw.save(image)
    repaired(image, only=frozenset({Scope.BITMAPS}))
    assert set(read_bitmaps(image)) == {"mon"}
    undo = str(image.with_name("undo"))
    assert __main__.main(["undo", str(image), undo, "--bitmap", "tue", "--stale"]) == 0
    capsys.readouterr()
    assert read_bitmaps(image)["tue"] == bits["tue"]
    assert check(image)["returncode"] == 0


# ---- power loss ----


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_repair_is_rolled_back_by_the_next_command(seed: int, tmp_path: Path) -> None:
    """Killed at a random moment; then the image is the old or the new one, byte for byte, and the command says so."""
    image = create(tmp_path / "vm.qcow2", "daily", size=1 << 30)
    raw = Raw.load(image)
    raw.put(48, 0)  # no refcount table
    raw.put(56, 0, 4)
    raw.save(image)
    old, undo = digest(image), tmp_path / "undo"
    finished = Path(shutil.copy(image, tmp_path / "finished.qcow2"))
    command = [sys.executable, "-m", "qcow2bm", "repair", "--yes", "--undo"]
    began = time.monotonic()
    subprocess.run([*command, tmp_path / "other", finished], check=False, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - began
    process = subprocess.Popen([*command, undo, image], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(random.Random(seed).uniform(0.6, 1.0) * whole)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(
        [sys.executable, "-m", "qcow2bm", "repair", image, "--only", "leaks", "--yes", "--no-undo"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in again.stderr
    assert digest(image) in (old, digest(finished))
    assert not list(tmp_path.glob("*.qcow2bm-journal"))


def test_an_image_that_a_vm_has_open_is_refused(tmp_path: Path, capsys) -> None:
    image = create(tmp_path / "vm.qcow2", "daily")
    with StorageDaemon(image):
        assert __main__.main(["repair", str(image), "--yes"]) == 75
        assert __main__.main(["repair", str(image), "--dry-run"]) == 75
    assert "in use" in capsys.readouterr().err


def test_on_a_device_the_undo_file_is_the_journal_and_must_be_named(tmp_path: Path, capsys) -> None:
    image = create(tmp_path / "vm.qcow2", "daily")
    raw = Raw.load(image)
    raw.put(48, 0)
    raw.put(56, 0, 4)
    raw.save(image)
    with image.open("r+b") as file:
        file.truncate(32 * MIB)
    before = digest(image)
    with loop_device(image) as device:
        assert __main__.main(["repair", str(device), "--yes"]) == 1
        assert "--undo" in capsys.readouterr().err
        assert __main__.main(["repair", str(device), "--yes", "--undo", str(tmp_path / "undo")]) == 0
        assert check(device)["returncode"] == 0
        assert __main__.main(["undo", str(device), str(tmp_path / "undo")]) == 1
        assert "--force" in capsys.readouterr().err
        assert __main__.main(["undo", str(device), str(tmp_path / "undo"), "--force"]) == 0
    assert digest(image) == before


@pytest.mark.parametrize("command", ["add", "repair"])
def test_what_a_crash_left_is_not_put_back_over_newer_data(command: str, tmp_path: Path, monkeypatch) -> None:
    """Killed before the first write; then QEMU hands out the very clusters that the change would have filled."""

    class PowerCutError(BaseException):
        pass

    def cut(_: object) -> None:
        raise PowerCutError

    image, undo = create(tmp_path / "vm.qcow2"), tmp_path / "undo"
    if command == "repair":
        raw = Raw.load(image)
        raw.put(raw.l2_entry(20 * MIB // CLUSTER), raw.number(raw.l2_entry(0)))
        raw.save(image)
    words = {"add": ["add", str(image), "new"], "repair": ["repair", str(image), "--yes"]}[command]
    with monkeypatch.context() as patched:
        patched.setattr("qcow2bm.image.commit._Engine.run", cut)
        __main__.main([*words, "--undo", str(undo)])
    qemu_io(image, "write -P 9 40M 256k")
    before = digest(image)
    assert __main__.main(["undo", str(image), str(undo)]) == 1
    assert digest(image) == before
    qemu_io(image, "read -P 9 40M 256k")
