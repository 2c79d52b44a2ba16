"""Exported bitmaps beside real QEMU: it records them, they leave the image and come back, and it reads the same.

QCOW2BM_ROUNDS multiplies the random disks.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.bitmap.sidecar_lineage import image_id
from tests.support.exports import exported, reread
from tests.support.images import FIXTURES, Fixture, all_fixtures, unpack
from tests.support.qemu import (
    Ranges,
    StorageDaemon,
    bitmap_info,
    check,
    guest_digest,
    qemu_img,
    qemu_io,
    read_bitmap_nbd,
    read_bitmaps,
)

ROOT = FIXTURES.parent
ROUNDS = int(os.environ.get("QCOW2BM_ROUNDS", "1"))
SIZE = (256 << 20) + 5 * 512
PROGRAM = [sys.executable, "-m", "qcow2bm"]


def qcow2bm_run(*words: str | Path, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """The program, as users start it, with bytes on standard input."""
    argv = [*PROGRAM, *map(str, words)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, check=False, input=b"" if data is None else data)


def done(*words: str | Path, data: bytes | None = None) -> bytes:
    """The output of a command that must succeed."""
    finished = qcow2bm_run(*words, data=data)
    assert finished.returncode == 0, finished.stderr.decode()
    return finished.stdout


def id_of(image: Path) -> bytes:
    with qcow2bm.open(image) as opened:
        return image_id(opened.qcow2)


def recorded(folder: Path, seed: int, *options: str, size: int = SIZE) -> Path:
    """An image whose bitmaps a daemon has recorded random writes in, one of them disabled half-way."""
    rng = random.Random(seed)
    image = folder / "image.qcow2"
    settings = ("-o", ",".join(options)) if options else ()
    qemu_img("create", "-q", "-f", "qcow2", *settings, image, str(size))

    def writes() -> list[str]:
        places = [(rng.randrange(size // 512) * 512, 512 << rng.randrange(12)) for _ in range(8)]
        return [f"write {at} {min(length, size - at)}" for at, length in places]

    with StorageDaemon(image) as vm:
        vm.add_bitmap("fine", granularity=512)
        vm.add_bitmap("week", granularity=1 << 20)
        vm.io(*writes())
        vm.disable_bitmap("week")
        vm.io(*writes())
    return image


def flags(image: Path) -> dict[str, tuple[int, list[str]]]:
    return {one["name"]: (one["granularity"], one["flags"]) for one in bitmap_info(image)}


# ---- round trips ----


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("options", [(), ("cluster_size=512",), ("cluster_size=2M",), ("extended_l2=on",)], ids=str)
def test_what_qemu_recorded_goes_out_and_comes_back(options: tuple[str, ...], seed: int, tmp_path: Path) -> None:
    image, file = recorded(tmp_path, seed, *options), tmp_path / "file"
    before, were = read_bitmaps(image), flags(image)
    guest = guest_digest(image) if not options else None
    done("export", image, file)
    done("remove", image, "fine", "week")
    done("import", image, file)
    assert read_bitmaps(image) == before
    assert {name: read_bitmap_nbd(image, name) for name in before} == before
    assert flags(image) == were
    assert check(image)["returncode"] == 0
    assert guest is None or guest_digest(image) == guest
    # The bitmaps that came back record on.
    qemu_io(image, "write 77M 64k")
    after = read_bitmaps(image)
    assert covers(after["fine"], [(77 << 20, 64 << 10)])
    assert after["week"] == before["week"]


def covers(ranges: Ranges, wanted: Ranges) -> bool:
    return all(any(at <= offset and offset + length <= at + size for at, size in ranges) for offset, length in wanted)


@pytest.mark.parametrize("granularity", [4096, 1 << 24])
def test_another_granularity_is_what_qemu_makes_of_it(granularity: int, tmp_path: Path) -> None:
    image, file = recorded(tmp_path, 3), tmp_path / "file"
    done("export", image, file)
    done("import", image, file, "fine", "--as", "ours", "-g", str(granularity), "--disabled")
    done("import", image, file, "week", "--as", "too", "-g", str(granularity), "--disabled")
    for ours, source, theirs in (("ours", "fine", "qemu-1"), ("too", "week", "qemu-2")):
        qemu_img("bitmap", "--add", "--disable", "--merge", source, "-g", str(granularity), image, theirs)
        found = read_bitmaps(image, [ours, theirs])
        assert found[ours] == found[theirs]


def test_merging_is_what_qemu_makes_of_it(tmp_path: Path) -> None:
    image, file = recorded(tmp_path, 4), tmp_path / "file"
    done("export", image, file)
    for name in ("ours", "theirs"):
        qemu_img("bitmap", "--add", "--disable", "-g", "64k", image, name)
    done("set", image, "ours", "--range", "5M+1M")
    done("set", image, "theirs", "--range", "5M+1M")
    done("import", image, file, "fine", "--as", "ours", "--merge")
    done("import", image, file, "week", "--as", "ours", "--merge")
    qemu_img("bitmap", "--merge", "fine", "--merge", "week", image, "theirs")
    found = read_bitmaps(image, ["ours", "theirs"])
    assert found["ours"] == found["theirs"]


def test_through_a_pipe_from_image_to_image(tmp_path: Path) -> None:
    """A copy of the file is the same disk, as long as no guest has written to either."""
    image = recorded(tmp_path, 5)
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "other.qcow2"
    copy.write_bytes(image.read_bytes())
    before = read_bitmaps(image)
    done("remove", copy, "fine", "week")
    with subprocess.Popen([*PROGRAM, "export", image, "-"], cwd=ROOT, stdout=subprocess.PIPE) as out:
        assert out.stdout is not None
        into = subprocess.run(
            [*PROGRAM, "import", copy, "-"], cwd=ROOT, stdin=out.stdout, check=False, capture_output=True
        )
    assert (out.returncode, into.returncode) == (0, 0), into.stderr
    assert read_bitmaps(copy) == before
    data = done("export", image, "fine", "-")
    cut = qcow2bm_run("import", copy, "-", "--replace", data=data[: len(data) // 2])
    assert (cut.returncode, b"cut short in" in cut.stderr) == (1, True)
    assert read_bitmaps(copy) == before


def test_whoever_reads_may_leave_early(tmp_path: Path) -> None:
    image = recorded(tmp_path, 6)
    with subprocess.Popen(
        [*PROGRAM, "export", image, "-"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as out:
        assert out.stdout is not None
        assert out.stderr is not None
        out.stdout.close()
        assert out.stderr.read() == b""
    assert out.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("form", ["json", "csv", "raw"])
def test_other_forms_there_and_back(form: str, tmp_path: Path) -> None:
    image, file = recorded(tmp_path, 7), tmp_path / "file"
    wanted = read_bitmaps(image)["fine"]
    done("export", image, "fine", file, "--format", form)
    if form == "raw":
        text = "".join(f"{byte:08b}"[::-1] for byte in file.read_bytes())
        assert {place for place, bit in enumerate(text) if bit == "1"} == {
            block for at, length in wanted for block in range(at // 512, -(-(at + length) // 512))
        }
    done("import", image, file, "--format", form, "--as", "back", "-g", "512", "--force-lineage")
    assert read_bitmaps(image, ["back"])["back"] == wanted


def test_lists_of_other_programs_become_bitmaps(tmp_path: Path) -> None:
    """What is allocated, by qemu-img map, as a bitmap: all that was ever written."""
    image, file = recorded(tmp_path, 8), tmp_path / "file"
    file.write_bytes(qemu_img("map", "--output=json", image).stdout.encode())
    done(
        "import",
        image,
        file,
        "--format",
        "json",
        "--as",
        "allocated",
        "-g",
        "64k",
        "--force-lineage",
        "--where",
        "allocated",
    )
    found = read_bitmaps(image)
    assert covers(found["allocated"], found["fine"][:-1])


def test_zeroes_written_over_the_backing_file_are_not_left_out(tmp_path: Path) -> None:
    """`qemu-img map IMAGE | qcow2bm import IMAGE -`: both have the image open in turn."""
    base, image = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "64M")
    qemu_io(base, "write -P 1 0 64M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    qemu_io(image, "write -P 2 0 1M", "write -z 8M 4M")
    listed = qemu_img("map", "--output=json", image).stdout.encode()
    words = ("import", image, "-", "--format", "json", "--as", "here", "-g", "64k", "--force-lineage")
    refused = qcow2bm_run(*words, data=listed)
    assert (refused.returncode, b"--where allocated" in refused.stderr) == (64, True)
    line = f"sleep 1; qemu-img map --output=json '{image}'"
    program = [sys.executable, "-m", "qcow2bm", *map(str, words), "--where", "allocated"]
    with subprocess.Popen(["sh", "-c", line], stdout=subprocess.PIPE) as late:
        subprocess.run(program, stdin=late.stdout, check=True)
    assert late.returncode == 0
    assert read_bitmaps(image)["here"] == [(0, 1 << 20), (8 << 20, 4 << 20)]


@pytest.mark.parametrize("sample", [one for one in all_fixtures() if one.bitmaps], ids=lambda sample: sample.name)
def test_bitmaps_of_every_kind_of_image(sample: Fixture, tmp_path: Path) -> None:
    """Encrypted, with a data file, with a backing chain, with snapshots: bits are not guest data."""
    image, file = sample.unpack(tmp_path), tmp_path / "file"
    with qcow2bm.open(image) as opened:
        stored = [bitmap for bitmap in opened.bitmaps if bitmap.state is qcow2bm.State.READY]
        names = [bitmap.name for bitmap in stored]
    if not names:
        refused = qcow2bm_run("export", image, file)
        assert (refused.returncode, b"--stale exports what is stored" in refused.stderr) == (4, True)
        return
    before = read_bitmaps(image, names, secret=sample.secret)
    with qcow2bm.open(image) as opened, file.open("wb") as stream:
        qcow2bm.export_bitmaps(opened, [], stream)
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.remove(*names)
    with qcow2bm.open(image, writable=True) as opened, qcow2bm.read_export(file) as held, opened.edit() as edit:
        qcow2bm.import_bitmaps(edit, held)
    assert read_bitmaps(image, names, secret=sample.secret) == before


# ---- lineage ----


def test_the_id_of_an_image_stays_as_long_as_no_guest_writes(tmp_path: Path) -> None:
    image = recorded(tmp_path, 9)
    before = id_of(image)
    done("add", image, "new", "-g", "4k", "--all-dirty")
    done("clear", image, "fine")
    done("merge", image, "new", "week")
    done("remove", image, "week")
    qemu_img("bitmap", "--add", image, "theirs")
    qemu_img("bitmap", "--remove", image, "fine")
    assert id_of(image) == before
    with StorageDaemon(image) as vm:  # a VM that only starts and stops
        vm.dirty()
    assert id_of(image) == before
    qemu_img("check", "-q", "-r", "all", image)
    for bitmap in bitmap_info(image):
        qemu_img("bitmap", "--remove", image, bitmap["name"])
    qemu_img("snapshot", "-c", "one", image)  # clears every copied flag
    assert id_of(image) == before
    qemu_img("snapshot", "-d", "one", image)
    assert id_of(image) == before


@pytest.mark.parametrize("options", [(), ("cluster_size=4k",), ("extended_l2=on",)], ids=str)
@pytest.mark.parametrize("command", ["write 200M 512", "write -z 200M 64k", "write -c 200M 64k", "discard 0 64k"])
def test_the_id_changes_with_what_a_guest_allocates_or_discards(
    command: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(["compat=1.1", *options]), image, "256M")
    qemu_io(image, "write 0 1M")
    before = id_of(image)
    qemu_io(image, command, options=("-d", "unmap"))
    assert id_of(image) != before


def test_the_id_is_that_of_the_disk_and_of_what_lies_beneath_it(tmp_path: Path) -> None:
    """Empty images differ by their size, their cluster size, and their backing file; else they are the same."""
    found = {}
    for number, options in enumerate(
        (
            ("64M",),
            ("65M",),
            ("-o", "cluster_size=4k", "64M"),
            ("-o", "extended_l2=on", "64M"),
            ("-u", "-b", "base", "-F", "raw", "64M"),
            ("-u", "-b", "other", "-F", "raw", "64M"),
        )
    ):
        image = tmp_path / f"{number}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", *options[:-1], image, options[-1])
        found[number] = id_of(image)
    assert len(set(found.values())) == len(found)
    again = tmp_path / "again.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", again, "64M")
    assert id_of(again) == found[0]


def test_a_rewrite_in_place_is_not_noticed_but_the_file_is_known_to_be_written(tmp_path: Path) -> None:
    """What the document owns up to."""
    image, file = recorded(tmp_path, 10), tmp_path / "file"
    qemu_io(image, "write 10M 64k")
    done("export", image, "week", file)
    before = id_of(image)
    qemu_io(image, "write -P 9 10M 64k")
    assert id_of(image) == before
    told = qcow2bm_run("import", image, file, "--as", "back")
    assert (told.returncode, b"rewritten clusters in place" in told.stderr) == (0, True)


def test_a_converted_copy_is_another_image(tmp_path: Path) -> None:
    image = recorded(tmp_path, 11)
    copy = tmp_path / "copy.qcow2"
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", "-S", "0", image, copy)
    refused = qcow2bm_run("import", copy, "-", data=exported(image))
    assert (refused.returncode, b"--force-lineage" in refused.stderr) == (1, True)


# ---- running VMs, signals ----


def test_neither_works_on_an_image_that_a_vm_has_open(tmp_path: Path) -> None:
    image, file = recorded(tmp_path, 12), tmp_path / "file"
    data = exported(image)
    with StorageDaemon(image):
        refused = qcow2bm_run("export", image, file)
        assert (refused.returncode, b" -U" in refused.stderr) == (75, False)
        assert qcow2bm_run("import", image, "-", "--replace", data=data).returncode == 75
    assert not file.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.qcow2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    """The export waits for a bitmap's data in the middle of its file."""
    image = recorded(tmp_path, 13)
    slow = (
        "import signal, time, sys; from qcow2bm.bitmap import sidecar; from qcow2bm import __main__\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which what runs in the background ignores
        "old = sidecar._chunks\n"
        "def slowly(*words):\n    print('now', flush=True); time.sleep(60)\n    return old(*words)\n"
        "sidecar._chunks = slowly; sys.exit(__main__.main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", slow, "export", str(image), str(tmp_path / "file")]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        start = time.monotonic()
        process.wait(30)
        assert time.monotonic() - start < 20
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == [image]


def test_an_export_outlives_its_image(tmp_path: Path) -> None:
    """What is in the file does not hang on the image: it can be looked at when that is gone."""
    image = unpack("office-week", tmp_path)
    days = read_bitmaps(image)
    data = exported(image)
    image.unlink()
    with reread(data) as held:
        assert {one.name: one.dirty_bytes for one in held.bitmaps} == {
            name: sum(length for _, length in ranges) for name, ranges in days.items()
        }
