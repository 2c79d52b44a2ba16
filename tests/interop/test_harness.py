"""The harness against real QEMU: does it report what a guest did, and does it leave nothing behind?

Every other interop test believes the harness, so here each of its answers is held against something known beforehand:
guest writes chosen by the test, or a second, independent way to read the same thing.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from tests.support.images import fixture, unpack
from tests.support.qemu import (
    QemuError,
    StorageDaemon,
    bitmap_info,
    check,
    create_luks,
    describe,
    guest_digest,
    qemu_img,
    qemu_io,
    read_bitmap_nbd,
    read_bitmaps,
    run,
    same_guest_data,
)

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty 256 MiB image with 64 KiB clusters."""
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "256M")
    return path


def alive(pid: int) -> bool:
    """Whether a process still runs. A zombie that only waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def folder_of(uri: str) -> Path:
    """The folder of a daemon's sockets."""
    return Path(uri.partition("socket=")[2]).parent


# ---- what the guest did is what the bitmaps say ----


def test_guest_requests_become_dirty_ranges(image: Path) -> None:
    with StorageDaemon(image) as vm:
        vm.write(5 * MIB, 4 * KIB)
        vm.add_bitmap("clusters")
        vm.add_bitmap("sectors", granularity=512)
        vm.add_bitmap("idle", recording=False)
        vm.write(1 * MIB, 1 * KIB, pattern=7)
        vm.write_zeroes(8 * MIB, 1 * MIB)
        vm.discard(64 * MIB, 128 * KIB)
        vm.flush()
        vm.expect(1 * MIB, 1 * KIB, 7)
    expected = {
        "clusters": [(1 * MIB, 64 * KIB), (8 * MIB, 1 * MIB), (64 * MIB, 128 * KIB)],
        "sectors": [(1 * MIB, 1 * KIB), (8 * MIB, 1 * MIB), (64 * MIB, 128 * KIB)],
        "idle": [],
    }
    assert read_bitmaps(image) == expected
    assert {name: read_bitmap_nbd(image, name) for name in expected} == expected


def test_a_running_daemon_tells_its_bitmaps_and_goes_on_recording(image: Path) -> None:
    with StorageDaemon(image) as vm:
        vm.add_bitmap("daily")
        vm.write(0, 1)
        assert vm.dirty() == {"daily": [(0, 64 * KIB)]}
        vm.write(64 * KIB, 1)
        assert vm.dirty(["daily"]) == {"daily": [(0, 128 * KIB)]}
        assert vm.bitmaps()["daily"]["count"] == 128 * KIB
        vm.remove_bitmap("daily")  # not busy any more: its export is gone
        assert vm.dirty() == {}
    assert bitmap_info(image) == []


def test_bitmap_commands(image: Path) -> None:
    with StorageDaemon(image) as vm:
        for name in ("mon", "tue", "gone", "week"):
            vm.add_bitmap(name, recording=False)
        vm.enable_bitmap("mon")
        vm.write(0, 1)
        vm.disable_bitmap("mon")
        vm.enable_bitmap("tue")
        vm.write(1 * MIB, 1)
        vm.merge_bitmaps("week", ["mon", "tue"])
        vm.clear_bitmap("tue")
        vm.remove_bitmap("gone")
    assert read_bitmaps(image) == {"mon": [(0, 64 * KIB)], "tue": [], "week": [(0, 64 * KIB), (1 * MIB, 64 * KIB)]}
    flags = {bitmap["name"]: bitmap["flags"] for bitmap in bitmap_info(image)}
    assert flags == {"mon": [], "tue": ["auto"], "week": []}


def test_ranges_longer_than_nbd_can_say_in_one_piece_are_joined(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64G")
    with StorageDaemon(image) as vm:
        vm.add_bitmap("daily")
        vm.discard(1 * MIB, 20 << 30)
    assert read_bitmaps(image) == {"daily": [(1 * MIB, 20 << 30)]}


# ---- both ways of reading, on everything that could get in their way ----


@pytest.mark.parametrize(
    "name", ["recording", "unusual-names", "backing-chain", "extended-l2", "luks", "data-file", "data-file-raw", "v2"]
)
def test_both_ways_of_reading_agree(name: str, tmp_path: Path) -> None:
    image, secret = unpack(name, tmp_path), fixture(name).secret
    bitmaps = read_bitmaps(image, secret=secret)
    assert set(bitmaps) == {bitmap["name"] for bitmap in bitmap_info(image)}
    assert {bitmap: read_bitmap_nbd(image, bitmap, secret=secret) for bitmap in bitmaps} == bitmaps


@pytest.mark.parametrize("name", ["with space.qcow2", "comma,key=value.qcow2", "50%.qcow2", "größe.qcow2", "a:b.qcow2"])
def test_any_file_name_will_do(name: str, tmp_path: Path) -> None:
    image = tmp_path / name
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    with StorageDaemon(image) as vm:
        vm.add_bitmap("daily")
        vm.write(0, 1)
    assert read_bitmaps(image) == {"daily": read_bitmap_nbd(image, "daily")} == {"daily": [(0, 64 * KIB)]}
    assert check(image)["returncode"] == 0
    assert guest_digest(image)


def test_luks_from_creation_to_digest(tmp_path: Path) -> None:
    image, plain = tmp_path / "image.qcow2", tmp_path / "plain.qcow2"
    create_luks(image, "64M", "open sesame")
    qemu_img("create", "-q", "-f", "qcow2", plain, "64M")
    with StorageDaemon(image, secret="open sesame") as vm:
        vm.write(0, 64 * KIB, 9)
    qemu_io(plain, "write -P 9 0 64k")
    qemu_io(image, "read -P 9 0 64k", secret="open sesame", options=("-r",))
    assert guest_digest(image, secret="open sesame") == guest_digest(plain)
    assert check(image, "open sesame")["returncode"] == 0
    with pytest.raises(QemuError, match="Invalid password"), StorageDaemon(image, secret="wrong"):
        pass


def test_qemu_looks_for_a_relative_data_file_in_the_working_directory(tmp_path: Path) -> None:
    """The reason why the harness runs every tool in the image's folder, and why a data file can be given by hand."""
    image = unpack("data-file", tmp_path / "image")
    refused = qemu_img("check", image, check=False, cwd=tmp_path)
    assert refused.returncode == 1
    assert "Could not open 'data.raw'" in refused.stderr
    assert check(image)["returncode"] == 0
    elsewhere = (image.parent / "data.raw").rename(tmp_path / "elsewhere.raw")
    with StorageDaemon(image, data_file=elsewhere) as vm:
        vm.write(0, 1)
        assert vm.dirty(["daily"])["daily"][0] == (0, 64 * KIB)


def test_qemu_exports_a_recording_bitmap_only_where_it_may_change(image: Path) -> None:
    """The rule behind StorageDaemon.dirty: a recording bitmap of a writable node can't go on a read-only export."""
    with StorageDaemon(image) as vm:
        vm.add_bitmap("daily")
        with pytest.raises(QMPError, match="Enabled bitmap 'daily' incompatible with readonly export"):
            vm.qmp("block-export-add", type="nbd", id="x", node_name="q", name="x", bitmaps=["daily"])
    with StorageDaemon(image, writable=False) as reader:
        reader.qmp("block-export-add", type="nbd", id="x", node_name="q", name="x", bitmaps=["daily"])


# ---- the end of a daemon ----


def test_kill_leaves_bitmaps_in_use(image: Path) -> None:
    with StorageDaemon(image) as vm:
        vm.add_bitmap("daily")
    with StorageDaemon(image) as vm:
        vm.add_bitmap("late")
        vm.write(0, 1)
        vm.kill()
    assert bitmap_info(image) == [{"name": "daily", "granularity": 64 * KIB, "flags": ["in-use", "auto"]}]
    assert read_bitmaps(image) == {}
    assert [bitmap["state"] for bitmap in describe(image)["bitmaps"]] == ["inconsistent"]
    with pytest.raises(QMPError, match="inconsistent"):
        read_bitmaps(image, ["daily"])
    with pytest.raises(QemuError, match="inconsistent"):
        read_bitmap_nbd(image, "daily")


def test_a_read_only_daemon_changes_nothing(image: Path) -> None:
    with StorageDaemon(image) as vm:
        vm.add_bitmap("daily")
    before = image.read_bytes()
    read_bitmaps(image)
    read_bitmap_nbd(image, "daily")
    with StorageDaemon(image, writable=False) as reader:
        reader.kill()
    assert image.read_bytes() == before


def test_force_share_reads_next_to_a_writer(image: Path) -> None:
    with StorageDaemon(image) as vm:
        vm.add_bitmap("daily")
        with pytest.raises(QemuError, match="Failed to get"):
            read_bitmaps(image)
        with StorageDaemon(image, writable=False, force_share=True) as reader:
            assert reader.bitmaps() == {}


def test_a_failing_test_leaves_no_process_and_no_folder(image: Path) -> None:
    vm = StorageDaemon(image)
    with pytest.raises(QemuError), vm:  # noqa: PT012 (only the last line raises)
        pid, folder = vm.pid, folder_of(vm.uri())
        assert alive(pid)
        assert folder.is_dir()
        vm.write(1 * TIB, 1)
    assert not alive(pid)
    assert not folder.exists()


def test_a_killed_test_run_leaves_no_process(image: Path) -> None:
    program = (
        "import sys, time, pathlib; from tests.support.qemu import StorageDaemon\n"
        "vm = StorageDaemon(pathlib.Path(sys.argv[1])); vm.start(); print(vm.pid, vm.uri(), flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program, str(image)], stdout=subprocess.PIPE, cwd=root) as runner:
        assert runner.stdout is not None
        words = runner.stdout.readline().decode().split()
        runner.kill()
    pid = int(words[0])
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    shutil.rmtree(folder_of(words[1]))  # which a process that was killed can't do itself
    assert not alive(pid)


def test_a_daemon_that_dies_by_itself_is_an_error(image: Path) -> None:
    vm = StorageDaemon(image)
    vm.start()
    os.kill(vm.pid, signal.SIGKILL)
    with pytest.raises(QemuError, match="exit status -9"):
        vm.quit()
    with pytest.raises(QemuError, match="not running"):
        vm.bitmaps()


def test_bitmaps_that_could_not_be_stored_are_an_error(image: Path) -> None:
    """QEMU says "Lost persistent bitmaps" and exits with 0. A test that went on would not have the image it means."""
    vm = StorageDaemon(image)
    vm.start()
    vm.add_bitmap("daily")
    vm.write(0, 1)
    vm.fill_disk()
    with pytest.raises(QemuError, match="Lost persistent bitmaps") as lost:
        vm.quit()
    assert lost.value.returncode == 0


def test_a_failed_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="No such file or directory"):
        StorageDaemon(tmp_path / "missing.qcow2").start()
    (tmp_path / "junk.qcow2").write_bytes(b"junk" * 1000)
    with pytest.raises(QemuError, match="not in qcow2 format"):
        StorageDaemon(tmp_path / "junk.qcow2").start()


# ---- the tools ----


def test_a_missing_tool_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(FileNotFoundError):
        run("qemu-img", "--version")


def test_a_failing_qemu_io_command_is_a_failure(image: Path) -> None:
    with pytest.raises(QemuError, match="write failed"):
        qemu_io(image, "write 0 512", "write 1T 512")
    with pytest.raises(QemuError, match="Pattern verification failed"), StorageDaemon(image) as vm:
        vm.expect(0, 512, 1)


def test_check_tells_leaks_and_refusals(image: Path) -> None:
    assert check(image)["returncode"] == 0
    image.write_bytes(b"QFI\xfb" + bytes(60))
    refused = check(image)
    assert refused["returncode"] == 1
    assert "Could not open" in refused["error"]
    assert check(unpack("detached", image.parent / "detached"))["leaks"] > 0


def test_guest_digest_is_of_what_the_guest_sees(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,extended_l2=off", other, "256M")
    qemu_io(image, "write -P 1 0 64k", "write -P 2 255M 4k")
    qemu_io(other, "write -z 100M 64k", "write -P 2 255M 4k", "write -P 1 0 64k", "write -P 0 8M 1M")
    assert guest_digest(image) == guest_digest(other)
    assert same_guest_data(image, other)
    qemu_io(other, "write -P 1 200M 1")
    assert guest_digest(image) != guest_digest(other)
    assert not same_guest_data(image, other)
    qemu_io(image, "write -P 1 200M 1")
    qemu_img("resize", "-q", "-f", "qcow2", image, "257M")
    assert guest_digest(image) != guest_digest(other)


def test_guest_digest_of_a_huge_disk_costs_what_it_holds(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(4 * TIB))
    empty = guest_digest(image)
    qemu_io(image, f"write -P 1 {4 * TIB - 512} 512")
    assert guest_digest(image) != empty
