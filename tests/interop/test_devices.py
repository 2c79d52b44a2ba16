"""Images on block devices, as on an LVM volume: a file that never grows and is larger than the image in it.

The devices are real ones (loop devices, see tests/support/device.py). A machine without any fails here, loudly.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.errors import ImageIOError, InUseError, NoSpaceError, UndoError
from tests.support.device import loop_device
from tests.support.qemu import Ranges, bitmap_info, check, qemu_img, qemu_io, read_bitmap_nbd, same_guest_data

KIB, MIB = 1 << 10, 1 << 20

SIZE = 24 * MIB
WRITTEN: Ranges = [(1 * MIB, 64 * KIB), (20 * MIB, 4 * KIB)]


def create(image: Path, *options: str) -> None:
    """An image of 24 MiB with guest writes in a recording `fine` of 512 bytes and a disabled `off`."""
    qemu_img("create", "-q", "-f", "qcow2", *options, image, str(SIZE))
    qemu_img("bitmap", "--add", "-g", "512", "-f", "qcow2", image, "fine")
    qemu_img("bitmap", "--add", "--disable", "-f", "qcow2", image, "off")
    qemu_io(image, *(f"write -P 7 {offset} {length}" for offset, length in WRITTEN))


def read(device: Path) -> dict[str, Ranges]:
    """All bitmaps, by qemu-nbd: it opens a block device for what it is."""
    return {entry["name"]: read_bitmap_nbd(device, entry["name"]) for entry in bitmap_info(device)}


def digest(file: Path) -> str:
    """Of all bytes of a file, which is the device's other side."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file for a device of 64 MiB, much larger than the image."""
    return sparse(tmp_path / "disk", 64 * MIB)


def sparse(path: Path, size: int) -> Path:
    """A file that is one hole."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("cluster_size", ["512", "64k", "2M"])
def test_edits_on_a_device(cluster_size: str, disk: Path) -> None:
    """List, add, merge, set, rename and remove, each with a commit of its own; QEMU reads each result."""
    with loop_device(disk) as device:
        create(device, "-o", f"cluster_size={cluster_size}")
        original = shutil.copy(disk, disk.with_name("original.qcow2"))
        with qcow2bm.open(device) as ours:
            assert ours.qcow2.file.is_device
            assert ours.qcow2.file.size == 64 * MIB
            assert {bitmap.name: bitmap.recording for bitmap in ours.bitmaps} == {"fine": True, "off": False}
            assert [(extent.offset, extent.length) for extent in ours.bitmaps["fine"].extents()] == WRITTEN
        steps: list[tuple[Callable[[qcow2bm.Edit], None], dict[str, Ranges]]] = [
            (lambda edit: edit.add("new", granularity=64 * KIB), {"new": []}),
            (
                lambda edit: edit.merge("new", ["fine"]),
                {"new": [(1 * MIB, 64 * KIB), (20 * MIB, 64 * KIB)]},
            ),
            (lambda edit: edit.merge("off", ["fine"]), {}),
            (lambda edit: edit.add("all", all_dirty=True), {"all": [(0, SIZE)]}),
            (lambda edit: edit.set_range("fine", SIZE - 1, 1), {"fine": [*WRITTEN, (SIZE - 512, 512)]}),
            (lambda edit: edit.rename("new", "renamed"), {"renamed": [(1 * MIB, 64 * KIB), (20 * MIB, 64 * KIB)]}),
            (lambda edit: edit.clear("fine"), {"fine": []}),
        ]
        for step, expected in steps:
            with qcow2bm.open(device, writable=True) as ours, ours.edit() as edit:
                step(edit)
            assert check(device)["returncode"] == 0
            assert expected.items() <= read(device).items()
        assert same_guest_data(Path(original), device)
        with qcow2bm.open(device, writable=True) as ours, ours.edit() as edit:
            edit.remove(*edit.names("*"))
        assert check(device)["returncode"] == 0
        assert bitmap_info(device) == []
    assert disk.stat().st_size == 64 * MIB


def test_qemu_goes_on(disk: Path) -> None:
    """QEMU opens the device for writing after us, records, and stores everything."""
    with loop_device(disk) as device:
        create(device)
        with qcow2bm.open(device, writable=True) as ours, ours.edit() as edit:
            edit.add("ours", all_dirty=True, recording=False)
            edit.clear("fine")
        qemu_io(device, "write 3M 1k", "discard 5M 64k")
        assert read(device) == {
            "fine": [(3 * MIB, 1 * KIB), (5 * MIB, 64 * KIB)], "off": [], "ours": [(0, SIZE)],
        }  # fmt: skip
        assert check(device)["returncode"] == 0


def tight(tmp_path: Path, spare: int) -> Path:
    """An image's bytes up to its last cluster, and room for `spare` clusters of 512 bytes: a device for just that."""
    image = tmp_path / "image.qcow2"
    create(image, "-o", "cluster_size=512")
    end = check(image)["image-end-offset"]
    with image.open("r+b") as file:
        file.truncate(end + spare * 512)
    return image


def fill(edit: qcow2bm.Edit) -> None:
    """Bits in all 12 chunks of a bitmap, so at least as many clusters."""
    edit.add("big", granularity=512)
    for offset in range(0, SIZE, MIB):
        edit.set_range("big", offset, 512)


def clusters_needed(device: Path) -> int:
    """What the plan for `fill` would add past the image's end, from a device with room enough."""
    used = check(device)["image-end-offset"]
    with qcow2bm.open(device, writable=True) as ours:
        draft = ours.draft()
        fill(draft)
        return (max(write.end for write in draft.plan().writes()) - int(used)) // 512


def test_a_device_that_is_too_small(tmp_path: Path) -> None:
    """From no spare cluster up to one too few: refused, not a byte changed; with the last one it fits."""
    with loop_device(tight(tmp_path, 1024)) as device:
        needed = clusters_needed(device)
    assert needed > 3
    for spare in (0, 1, needed - 1, needed):
        image = tight(tmp_path, spare)
        before = digest(image)
        with loop_device(image) as device, qcow2bm.open(device, writable=True) as ours:
            if spare < needed:
                with pytest.raises(NoSpaceError, match="extend the device"), ours.edit() as edit:
                    fill(edit)
            else:
                with ours.edit() as edit:
                    fill(edit)
        if spare < needed:
            assert digest(image) == before
        else:
            assert check(image)["returncode"] == 0
            assert len(bitmap_info(image)) == 3
        image.unlink()


def test_what_needs_no_room_is_done_on_a_full_device(tmp_path: Path) -> None:
    """Flags are switched in place, and what is given back first is room for what comes after."""
    image = tight(tmp_path, 0)
    with loop_device(image) as device:
        with qcow2bm.open(device, writable=True) as ours, ours.edit() as edit:
            edit.disable("fine")
            edit.enable("off")
        assert [entry["flags"] for entry in sorted(bitmap_info(device), key=lambda one: str(one["name"]))] == [
            [],
            ["auto"],
        ]
        assert check(device)["returncode"] == 0


def test_a_change_that_needs_a_journal(disk: Path, tmp_path: Path) -> None:
    """Beside a device node there is no place for a journal, so one must be named; then it works, and can be undone.

    The backing file's name leaves no room for the bitmaps extension but in its own place.
    """
    folder = tmp_path / "/".join(["long-" * 20] * 4)
    folder.mkdir(parents=True)
    name = folder / "backing.qcow2"
    assert 450 < len(str(name)) < 850, "long enough not to fit twice into 1 KiB, short enough to fit once"
    qemu_img("create", "-q", "-f", "qcow2", name, str(SIZE))
    with loop_device(disk) as device:
        options = f"cluster_size=1024,backing_file={name},backing_fmt=qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, device)
        before = digest(disk)
        with qcow2bm.open(device, writable=True) as ours:
            with pytest.raises(UndoError, match="journal"), ours.edit() as edit:
                edit.add("first")
            assert digest(disk) == before
            with ours.edit(undo=tmp_path / "undo") as edit:
                edit.add("first")
        assert check(device)["returncode"] == 0
        assert [entry["name"] for entry in bitmap_info(device)] == ["first"]
        with pytest.raises(UndoError, match="nothing tells"):
            qcow2bm.undo(device, tmp_path / "undo")
        qcow2bm.undo(device, tmp_path / "undo", force=True)
        assert check(device)["returncode"] == 0
        assert bitmap_info(device) == []
    assert not list(Path("/dev").glob("*.qcow2bm-journal"))


def test_locks_on_a_device(disk: Path) -> None:
    """Writers, readers and we meet on a device as on a file."""
    with loop_device(disk) as device:
        create(device)
        with qcow2bm.open(device, writable=True):
            assert check(device)["returncode"] != 0
            done = qemu_img("bitmap", "--add", "-f", "qcow2", device, "x", check=False)
            assert 'Failed to get "' in done.stderr
        # A tool that has the device open and waits for its next command.
        argv = ["qemu-io", "-f", "qcow2", str(device)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.write("write 0 512\n")
            holder.stdin.flush()
            while "wrote 512/512" not in holder.stdout.readline():
                assert holder.poll() is None
            for writable in (True, False):
                with pytest.raises(InUseError, match=rf"pid {holder.pid} \(qemu-io\) has it open for writing"):
                    qcow2bm.open(device, writable=writable)
            holder.stdin.close()
            holder.stdout.read()
        with qcow2bm.open(device, writable=True):
            pass


def test_a_read_only_device(tmp_path: Path) -> None:
    """Reading works; opening for writing says why it does not."""
    image = tmp_path / "image.qcow2"
    create(image)
    with image.open("r+b") as file:
        file.truncate(-(-image.stat().st_size // 512) * 512)
    with loop_device(image, read_only=True) as device:
        with qcow2bm.open(device) as ours:
            assert [(extent.offset, extent.length) for extent in ours.bitmaps["fine"].extents()] == WRITTEN
        with pytest.raises(ImageIOError, match=f"{device}: the device is read-only"):
            qcow2bm.open(device, writable=True)
