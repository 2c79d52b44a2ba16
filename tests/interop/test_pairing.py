"""A disk is never compared with itself by another name, where a bitmap would be proved or made by that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import __main__
from qcow2bm.errors import InUseError, UsageError
from qcow2bm.image.file import ImageFile
from tests.support.daemon import StorageDaemon
from tests.support.device import as_root, loop_device
from tests.support.disks import KIB, MIB
from tests.support.qemu import create_luks, qemu_img, qemu_io, read_bitmaps

SECRET = "pairing"


def lost(image: Path) -> None:
    """A guest wrote, and the bitmap has forgotten it: whatever proves it lies, and an empty one misses it."""
    qemu_io(image, "write -P 2 1M 64k")
    assert __main__.main(["clear", str(image), "daily"]) == 0


def begun(folder: Path, *options: str) -> Path:
    image = folder / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *options, image.name, "16M", cwd=folder)
    qemu_io(image, "write -P 1 0 4M")
    assert __main__.main(["add", str(image), "daily"]) == 0
    return image


def by_data_file(folder: Path) -> list[str]:
    image = begun(folder, "-o", "data_file=data.raw,data_file_raw=on")
    lost(image)
    return [str(folder / "data.raw"), "--data-file", str(folder / "data.raw")]


def by_another_name_of_the_data_file(folder: Path) -> list[str]:
    """Whoever copies such an image and not its data file has two images of one disk."""
    image = begun(folder, "-o", "data_file=data.raw")
    monday = folder / "monday.qcow2"
    shutil.copy(image, monday)
    (folder / "other.raw").hardlink_to(folder / "data.raw")
    lost(image)
    return [
        str(monday), "--data-file", str(folder / "data.raw"), "--data-file", f"{monday}={folder / 'other.raw'}",
    ]  # fmt: skip


def by_an_overlay(folder: Path) -> list[str]:
    image, overlay = begun(folder), folder / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, overlay)
    lost(image)
    return [str(overlay)]


def by_a_link(folder: Path) -> list[str]:
    image, link = begun(folder), folder / "link.qcow2"
    link.hardlink_to(image)
    lost(image)
    return [str(link)]


@pytest.mark.parametrize("way", [by_data_file, by_another_name_of_the_data_file, by_an_overlay, by_a_link])
def test_what_the_image_is_written_to_is_no_older_disk(
    way: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, *words = way(tmp_path)
    image = tmp_path / "vm.qcow2"
    before = image.read_bytes()
    named = ["--against", base, *words]
    for command in (
        ["prove", str(image), "daily", *named],
        ["prove", str(image), "daily", *named, "--sample", "1M"],
        ["rebuild", str(image), "daily", *named],
        ["rebuild", str(image), "new", "--create", *named],
        ["diff", base, str(image), "--into", f"{image}#new", *words],
        ["diff", base, str(image), "--into", f"{image}#daily", "--merge", *words],
    ):
        assert __main__.main(command) == 64, command
        assert "itself" in (said := capsys.readouterr().err) or "being changed" in said
    assert image.read_bytes() == before


def test_a_salvage_is_not_fooled_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, *words = by_data_file(tmp_path)
    image = tmp_path / "vm.qcow2"
    vm = StorageDaemon(image)
    vm.start()
    vm.io("write -P 3 2M 64k", "flush")
    vm.kill()
    capsys.readouterr()
    said = ["repair", str(image), "--in-use", "rebuild", "--bitmap", "daily", "--against", base, *words, "--yes"]
    assert __main__.main(said) == 64
    assert "itself" in capsys.readouterr().err
    with qcow2bm.open(image) as opened:
        assert opened.bitmaps["daily"].state is qcow2bm.State.INCONSISTENT


def test_a_view_of_an_encrypted_disk_is_no_older_disk(tmp_path: Path) -> None:
    image, view, older = tmp_path / "vm.qcow2", tmp_path / "view.raw", tmp_path / "older.raw"
    create_luks(image, "4M", SECRET)
    assert __main__.main(["add", str(image), "daily"]) == 0
    older.write_bytes(bytes(4 * MIB))
    view.write_bytes(b"\1" * MIB + bytes(3 * MIB))
    (tmp_path / "link").symlink_to(view)
    for against in (view, tmp_path / "link"):
        with pytest.raises(UsageError, match="itself"):
            qcow2bm.prove(image, "daily", against, disk=view)
        with pytest.raises(UsageError, match="itself"):
            qcow2bm.rebuild(image, "daily", against, disk=view)
        assert __main__.main(["diff", str(against), str(view), "--into", f"{image}#new"]) == 64
    assert qcow2bm.prove(image, "daily", older, disk=view).missed_bytes == MIB


def test_devices_are_told_by_their_number_and_by_what_is_behind_them(tmp_path: Path) -> None:
    image = begun(tmp_path)
    lost(image)
    os.truncate(image, -(-image.stat().st_size // 512) * 512)
    with loop_device(image) as device:
        with pytest.raises(UsageError, match="itself"):
            qcow2bm.prove(image, "daily", device, against_format="qcow2")
        with pytest.raises(UsageError, match="itself"):
            qcow2bm.prove(device, "daily", image, against_format="qcow2")
        node, number = tmp_path / "node", device.stat().st_rdev
        as_root("mknod", str(node), "b", str(os.major(number)), str(os.minor(number)))
        as_root("chmod", "a+rw", str(node))
        with pytest.raises(UsageError, match="itself"):
            qcow2bm.prove(device, "daily", node, against_format="qcow2")


def test_what_both_stand_on_is_shared_by_right(tmp_path: Path) -> None:
    base, older, image = (tmp_path / name for name in ("base.qcow2", "older.qcow2", "image.qcow2"))
    qemu_img("create", "-q", "-f", "qcow2", base, "8M")
    qemu_io(base, "write -P 1 0 4M")
    for overlay in (older, image):
        qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, overlay)
    qemu_img("bitmap", "--add", image, "daily")
    qemu_io(image, "write -P 2 1M 64k")
    for against in (base, older):
        assert qcow2bm.prove(image, "daily", against, against_format="qcow2").is_covered
        found = qcow2bm.rebuild(image, "daily", against, against_format="qcow2")
        assert (found.dirty_granules, found.recording, found.proof.value) == (1, True, "exact")
        assert read_bitmaps(image) == {"daily": [(MIB, 64 * KIB)]}
    assert __main__.main(["diff", str(image), str(image)]) == 0  # nothing is made of it


# ---- from Python ----


def test_a_difference_is_a_source_of_bitmaps(tmp_path: Path) -> None:
    image, older = begun(tmp_path), tmp_path / "older.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, older)
    qemu_io(image, "write -P 2 1M 64k")
    found = qcow2bm.diff(older, image, new_format="qcow2", granularity=4 * KIB)
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.copy(found.source, "since", granularity=64 * KIB)
    assert read_bitmaps(image, ["since"]) == {"since": [(MIB, 64 * KIB)]}
    with pytest.raises(UsageError, match="itself"):
        _ = qcow2bm.diff(image, image, old_format="qcow2", new_format="qcow2").source


def test_a_rebuild_from_python_is_one_change_with_undo(tmp_path: Path) -> None:
    image, older = begun(tmp_path), tmp_path / "older.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, older)
    lost(image)
    before = image.read_bytes()
    found = qcow2bm.rebuild(image, "daily", older, undo=tmp_path / "undo")
    assert (found.bitmap, found.granularity, found.dirty_granules) == ("daily", 64 * KIB, 1)
    assert read_bitmaps(image) == {"daily": [(MIB, 64 * KIB)]}
    qcow2bm.undo(image, tmp_path / "undo")
    assert image.read_bytes()[: len(before)] == before
    made = qcow2bm.rebuild(image, "fine", older, create=True, granularity=512)
    assert (made.granularity, made.dirty_granules) == (512, 128)
    vm = StorageDaemon(image)
    vm.start()
    with pytest.raises(InUseError):
        qcow2bm.rebuild(image, "daily", older)
    vm.kill()


def test_a_file_is_itself_whatever_is_over_it(tmp_path: Path) -> None:
    from qcow2bm.chain.pairing import identities
    from qcow2bm.image.overlay import OverlayFile

    path = tmp_path / "file"
    path.write_bytes(bytes(512))
    file, again = ImageFile.open(path), ImageFile.open(path)
    assert identities(OverlayFile(file)) == identities(again)
    file.close()
    again.close()
