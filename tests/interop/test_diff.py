"""`diff` and `rebuild` beside real QEMU writes, and beside a comparison of both disks block by block.

QCOW2BM_ROUNDS multiplies the random disks.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import qcow2bm
from qcow2bm import __main__
from qcow2bm.chain.batches import BATCH
from qcow2bm.chain.compare import compare
from qcow2bm.chain.opening import open_disk
from qcow2bm.errors import CorruptImageError, UnsupportedImageError
from tests.support.daemon import StorageDaemon
from tests.support.disks import KIB, MIB, STEP, Made, converted, random_chain, random_layer
from tests.support.qemu import Ranges, bitmap_info, create_luks, qemu_img, qemu_io, read_bitmaps, run

ROUNDS = int(os.environ.get("QCOW2BM_ROUNDS", "1"))


def truth(old: bytes, new: bytes, granularity: int) -> Ranges:
    """The ranges of granules of `new` that differ, by comparing all of both; what only `new` has differs."""
    left = np.frombuffer(old[: len(new)].ljust(len(new), b"\0"), np.uint8)
    unequal = left != np.frombuffer(new, np.uint8)
    unequal[len(old) :] = True
    unequal = np.append(unequal, np.zeros(-len(unequal) % granularity, np.bool_)).reshape(-1, granularity).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], unequal, [False]])))
    runs = [(int(first) * granularity, int(stop) * granularity) for first, stop in edges.reshape(-1, 2)]
    return [(first, min(stop, len(new)) - first) for first, stop in runs]


def document(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> dict[str, object]:
    """Run a command with --output json."""
    said = [str(word) for word in words]
    assert __main__.main([said[0], "--output", "json", *said[1:]]) == status
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def data_file_words(*disks: Made) -> list[str]:
    return [
        word for made in disks for image, path in made.data_files.items() for word in ("--data-file", f"{image}={path}")
    ]


# ---- the truth ----


@pytest.mark.parametrize("seed", range(8 * ROUNDS))
def test_diff_is_the_truth_block_by_block(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two disks of any kind, of one size or not, at all granularities; as a list and as a bitmap that QEMU reads."""
    chance = random.Random(seed)
    size = chance.randrange(64 * KIB, 4 * MIB, STEP)
    old = random_chain(chance, tmp_path, "old", size)
    if chance.random() < 0.6 and not old.data_files:
        new = random_layer(chance, tmp_path / "new", chance.choice((size, size + 3 * STEP)), old, last=True)
    else:
        new = random_chain(chance, tmp_path, "new", chance.choice((size, size // 2 // STEP * STEP + STEP)))
    before, after = converted(old, tmp_path), converted(new, tmp_path)
    files = {**old.data_files, **new.data_files}
    for granularity in (512, 4 * KIB, 64 * KIB, 2 * MIB):
        found = qcow2bm.diff(
            old.path, new.path, granularity=granularity, old_format=old.format, new_format=new.format, data_files=files
        )
        expected = truth(before, after, granularity)
        assert list(found.extents()) == expected
        assert found.differing_bytes == sum(length for _, length in expected)

    words = ["--format-a", old.format, "--format-b", new.format, *data_file_words(old, new)]
    told = document(capsys, "diff", old.path, new.path, "-g", "4k", "--extents", "--dirty-only", *words)
    assert [(row["offset"], row["length"]) for row in told["extents"]] == truth(before, after, 4 * KIB)
    holder = tmp_path / "holder.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", holder, str(len(after)))
    document(capsys, "diff", old.path, new.path, "-g", "4k", "--into", f"{holder}#kept", *words)
    assert read_bitmaps(holder) == {"kept": truth(before, after, 4 * KIB)}


SHAPES: dict[str, tuple[str, ...]] = {
    "plain": ("cluster_size=64k",),
    "small clusters": ("cluster_size=512",),
    "large clusters": ("cluster_size=2M",),
    "extended L2": ("cluster_size=32k", "extended_l2=on"),
    "zstd": ("compression_type=zstd",),
    "data file": ("data_file=image.data",),
    "raw data file": ("data_file=image.data", "data_file_raw=on"),
    "backing": ("backing_file=base", "backing_fmt=raw"),
}


def writes(chance: random.Random, size: int, count: int) -> list[str]:
    """Guest writes; some of them write what is there."""
    said = []
    for _ in range(count):
        length = chance.choice((STEP, 4 * KIB, 100 * STEP, 256 * KIB))
        offset = chance.randrange(0, size - length, STEP)
        said.append(
            f"{chance.choice(('write -P 1', f'write -P {chance.randrange(2, 256)}', 'write -z'))} {offset} {length}"
        )
    return said


def inside(ranges: Ranges, outer: Ranges) -> bool:
    return all(any(at <= start and start + length <= at + width for at, width in outer) for start, length in ranges)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.replace(" ", "-"))
def test_what_qemu_recorded_contains_what_changed(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """QEMU records in bitmaps of several granularities; the difference lies in them, and a rebuilt one is exact."""
    chance = random.Random(shape)
    size = 5 * MIB + 3 * STEP
    image, older = tmp_path / "image.qcow2", tmp_path / "older.raw"
    (tmp_path / "base").write_bytes(chance.randbytes(3 * MIB))
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(SHAPES[shape]), image.name, str(size), cwd=tmp_path)
    qemu_io(image, "write -P 1 0 1M", "write -P 1 2M 512k")
    for granularity in (512, 4 * KIB, 64 * KIB, MIB):
        qemu_img("bitmap", "--add", "-g", str(granularity), image.name, f"b{granularity}", cwd=tmp_path)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.name, older, cwd=tmp_path)
    qemu_io(image, *writes(chance, size, 25))
    made = Made(image, "qcow2", {image: tmp_path / "image.data"} if "data_file" in SHAPES[shape][0] else {})
    before, after = older.read_bytes(), converted(made, tmp_path)
    with qcow2bm.open(image) as opened:
        recorded = {one.name: [(run.offset, run.length) for run in one.extents()] for one in opened.bitmaps}
    words = data_file_words(made)
    for name, marked in recorded.items():
        granularity = int(name[1:])
        expected = truth(before, after, granularity)
        assert expected
        assert inside(expected, marked)
        proof = qcow2bm.prove(image, name, older, data_files=made.data_files)
        assert proof.is_covered
        changed, excess = sum(length for _, length in expected), sum(length for _, length in marked)
        assert (proof.changed_bytes, proof.excess_bytes) == (changed, excess - changed)
        document(capsys, "rebuild", image, name, "--against", older, *words)
        again = qcow2bm.prove(image, name, older, data_files=made.data_files)
        assert (again.is_covered, again.excess_bytes) == (True, 0)
    if not made.data_files:
        assert read_bitmaps(image) == {name: truth(before, after, int(name[1:])) for name in recorded}


# ---- rebuilding ----


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An image with a recording bitmap, a disabled one, and a raw copy from when both began."""
    image, older = tmp_path / "image.qcow2", tmp_path / "older.raw"
    qemu_img("create", "-q", "-f", "qcow2", image, "8M")
    qemu_io(image, "write -P 1 0 4M")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, older)
    qemu_img("bitmap", "--add", image, "daily")
    qemu_img("bitmap", "--add", "--disable", image, "frozen")
    qemu_io(image, "write -P 2 1M 64k", "write -P 1 2M 64k")
    return image, older


def test_a_bitmap_whose_writer_died_is_rebuilt(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    image, older = pair
    writer = StorageDaemon(image)
    writer.start()
    writer.io("write -P 3 5M 64k", "flush")
    writer.kill()
    assert "in-use" in bitmap_info(image)[0]["flags"]
    document(capsys, "rebuild", image, "daily", "--against", older)
    document(capsys, "rebuild", image, "frozen", "--against", older, "--no-union")
    expected = [(MIB, 64 * KIB), (5 * MIB, 64 * KIB)]
    assert read_bitmaps(image) == {"daily": expected, "frozen": expected}
    assert [bitmap["flags"] for bitmap in bitmap_info(image)] == [["auto"], []]


def test_a_bitmap_that_does_not_record_keeps_what_it_marks(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image, older = pair
    document(capsys, "set", image, "frozen", "--range", "7M+64k")
    document(capsys, "rebuild", image, "frozen", "--against", older)
    assert read_bitmaps(image, ["frozen"]) == {"frozen": [(MIB, 64 * KIB), (7 * MIB, 64 * KIB)]}
    assert __main__.main(["rebuild", str(image), "frozen", "--against", str(older), "--no-union"]) == 0
    assert "does not record" in capsys.readouterr().err
    assert read_bitmaps(image, ["frozen"]) == {"frozen": [(MIB, 64 * KIB)]}
    document(capsys, "rebuild", image, "daily", "--against", older, "--union")
    assert read_bitmaps(image, ["daily"]) == {"daily": [(MIB, 64 * KIB), (2 * MIB, 64 * KIB)]}


def test_a_missing_bitmap_is_added_if_wanted(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    image, older = pair
    before = digest(image)
    assert __main__.main(["rebuild", str(image), "new", "--against", str(older)]) == 1
    assert __main__.main(["rebuild", str(image), "daily", "--against", str(older), "-g", "4k"]) == 64
    assert __main__.main(["rebuild", str(image), "daily", "--against", str(image)]) == 64
    document(capsys, "rebuild", image, "new", "--against", older, "--create", "-g", "4k", "--dry-run")
    assert digest(image) == before
    document(capsys, "rebuild", image, "new", "--against", older, "--create", "-g", "4k")
    found = {bitmap["name"]: bitmap for bitmap in bitmap_info(image)}["new"]
    assert (found["granularity"], found["flags"]) == (4 * KIB, ["auto"])
    assert read_bitmaps(image, ["new"]) == {"new": [(MIB, 64 * KIB)]}


def test_what_cannot_end_well_is_not_begun(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A comparison may take hours: what is in the way of its result is told before."""
    image, older = pair
    before = digest(image)
    (tmp_path / "there").touch()

    def compared(*_: object, **__: object) -> None:
        raise AssertionError("it was begun")

    monkeypatch.setattr("qcow2bm.chain.compare.differing", compared)
    for undo, words in ((tmp_path / "there", "File exists"), (tmp_path / "no" / "file", "No such file")):
        for command in (
            ["rebuild", str(image), "daily", "--against", str(older)],
            ["diff", str(older), str(image), "--into", f"{image}#new"],
        ):
            assert __main__.main([*command, "--undo", str(undo)]) == 1
            assert words in capsys.readouterr().err
    detach(image)
    assert __main__.main(["rebuild", str(image), "daily", "--against", str(older)]) == 4
    assert "only all together" in capsys.readouterr().err
    detach(image, attached=True)
    assert digest(image) == before


def detach(image: Path, *, attached: bool = False) -> None:
    """What a program does to the autoclear bits that knows none of them."""
    with image.open("r+b") as file:
        file.seek(88)
        file.write(int(attached).to_bytes(8, "big"))


def test_the_command_for_detached_bitmaps_that_is_printed_works(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image, older = pair
    detach(image)
    assert __main__.main(["rebuild", str(image), "frozen", "--against", str(older)]) == 4
    command = shlex.split(capsys.readouterr().err.split("`")[1])
    assert command[0] == "qcow2bm"
    assert __main__.main([*command[1:], "--yes"]) == 0
    assert read_bitmaps(image) == {"daily": [(MIB, 64 * KIB)], "frozen": [(MIB, 64 * KIB)]}


def test_one_detached_bitmap_is_rebuilt_alone(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    image, older = pair
    assert __main__.main(["remove", str(image), "frozen"]) == 0
    detach(image)
    capsys.readouterr()
    document(capsys, "rebuild", image, "daily", "--against", older)
    assert read_bitmaps(image) == {"daily": [(MIB, 64 * KIB)]}


# ---- words that mean nothing ----


def test_a_data_file_is_for_an_image_that_has_one(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, older = pair
    for command in (
        ["diff", older, image, "--data-file", older],
        ["diff", older, image, "--data-file", f"{image}={older}", "--into", f"{image}#new"],
        ["diff", older, image, "--data-file", f"{tmp_path / 'nosuch'}={older}"],
        ["prove", image, "daily", "--against", older, "--data-file", older],
        ["rebuild", image, "daily", "--against", older, "--data-file", f"nosuch={older}"],
    ):
        assert __main__.main([str(word) for word in command]) == 64, command
        assert "data file" in capsys.readouterr().err
    odd = tmp_path / "e=1.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=d=1.raw", odd.name, "8M", cwd=tmp_path)
    for named in (tmp_path / "d=1.raw", f"{odd}={tmp_path / 'd=1.raw'}"):
        assert document(capsys, "diff", older, odd, "--data-file", named)["differing-bytes"] == 4 * MIB


def test_diff_has_two_formats_and_granularities_that_are_some(pair: tuple[Path, Path]) -> None:
    image, older = pair
    for words in (("-f", "raw"), ("-f", "qcow2"), ("-g", "0"), ("-g", "4G"), ("-g", "100"), ("-g", "256")):
        assert __main__.main(["diff", str(older), str(image), *words]) == 64, words


# ---- into an image ----


def test_the_image_that_gets_the_bitmap_may_be_the_newer_disk(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image, older = pair
    document(capsys, "diff", older, image, "--into", f"{image}#kept")
    document(capsys, "diff", older, image, "--into", f"{image}#daily", "--merge")
    found = read_bitmaps(image)
    assert found["kept"] == [(MIB, 64 * KIB)]
    assert found["daily"] == [(MIB, 64 * KIB), (2 * MIB, 64 * KIB)]
    assert "auto" in {bitmap["name"]: bitmap for bitmap in bitmap_info(image)}["kept"]["flags"]


def test_a_difference_that_cannot_be_kept_changes_nothing(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, older = pair
    other = tmp_path / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", other, "9M")
    before = digest(image), digest(other)
    for words, status in (
        ([older, image, "--into", f"{image}#daily"], 1),
        ([older, image, "--into", f"{other}#new"], 1),
        ([older, image, "--into", f"{image}#daily", "--merge", "-g", "4k"], 64),
        ([image, image, "--into", f"{image}#new"], 64),
        ([image, older, "--into", f"{image}#new"], 64),
        ([older, image, "--into", f"{image}#new", "--format-b", "raw"], 64),
        ([older, image, "--into", f"{image}"], 64),
        ([older, image, "--into", f"{image}#new", "--extents"], 64),
        ([older, image, "--into", f"{image}#new", "-g", "1000"], 64),
        ([older, image, "--merge"], 64),
        ([older, image, "--output", "csv"], 64),
    ):
        assert __main__.main(["diff", *(str(word) for word in words)]) == status, words
    capsys.readouterr()
    assert (digest(image), digest(other)) == before


def test_an_interrupted_comparison_leaves_nothing(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image, older = pair
    qemu_img("resize", "-q", "-f", "raw", older, "64M")
    qemu_img("resize", "-q", image, "64M")
    qemu_io(image, "write -P 9 0 48M")
    qemu_io(older, "write -P 8 0 48M", fmt="raw")
    before, threads = digest(image), threading.active_count()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcow2bm.cli.progress.ProgressBar.__call__", interrupt)
    assert __main__.main(["diff", str(older), str(image), "--into", f"{image}#kept"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert digest(image) == before
    assert threading.active_count() == threads


# ---- large, and in threads ----


def test_threads_give_what_one_gives(tmp_path: Path) -> None:
    """Data, compressed clusters and zeroes over many batches, with differences at the borders of batches."""
    chance = random.Random(5)
    old, new = tmp_path / "old.raw", tmp_path / "new.raw"
    data = bytearray(b"".join(chance.randbytes(64) * 1024 for _ in range(7 * BATCH // (64 * KIB) + 3)))
    old.write_bytes(data)
    for border in range(BATCH, len(data), BATCH):
        data[border - 1] ^= 1
        data[border + 5 * MIB // 2 % BATCH :][:1] = b"\0"
    data[-1] ^= 1
    new.write_bytes(data)
    images = []
    for path, options in ((old, ("-o", "cluster_size=2M")), (new, ("-o", "compression_type=zstd"))):
        images.append(path.with_suffix(".qcow2"))
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *options, path, images[-1])
    expected = truth(old.read_bytes(), new.read_bytes(), 512)
    for one, two in ((old, new), (images[0], images[1]), (old, images[1])):
        with open_disk(one, format=one.suffix[1:]) as left, open_disk(two, format=two.suffix[1:]) as right:
            found = [list(compare(left, right, granularity).runs()) for granularity in (512, 8 * BATCH)]
            left.is_shareable = False  # then one thread does it all
            assert found == [list(compare(left, right, granularity).runs()) for granularity in (512, 8 * BATCH)]
        assert [(first * 512, (stop - first) * 512) for first, stop in found[0]] == expected
    assert list(qcow2bm.diff(*images, granularity=512, old_format="qcow2", new_format="qcow2").extents()) == expected


def test_damage_that_a_thread_meets_is_an_error(tmp_path: Path) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "image.qcow2"
    raw.write_bytes(b"".join(random.Random(1).randbytes(64) * 1024 for _ in range(512)))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
    sound = image.read_bytes()
    at = len(sound) - 20_000  # the streams come last
    image.write_bytes(sound[:at] + b"\xff" * 3000 + sound[at + 3000 :])
    threads = threading.active_count()
    with pytest.raises(CorruptImageError, match=r"image\.qcow2: a compressed cluster") as caught:
        qcow2bm.diff(raw, image, new_format="qcow2")
    assert caught.value.exit_status == 2
    assert threading.active_count() == threads


def test_a_sparse_disk_of_a_tebibyte_takes_no_time(tmp_path: Path) -> None:
    old, new = tmp_path / "old.qcow2", tmp_path / "new.qcow2"
    for path in (old, new):
        qemu_img("create", "-q", "-f", "qcow2", path, "1T")
    qemu_io(new, *(f"write -P 1 {number * 100}G 64k" for number in range(10)))
    found = qcow2bm.diff(old, new, old_format="qcow2", new_format="qcow2")
    assert list(found.extents()) == [(number * 100 << 30, 64 * KIB) for number in range(10)]


# ---- encrypted images ----


SECRET = "seven dwarfs"


@pytest.fixture
def encrypted(tmp_path: Path) -> tuple[Path, Path, bytes, bytes]:
    """A LUKS image with a bitmap, a decrypted copy from when that began, and both disks as they are."""
    image, older = tmp_path / "vm, secret.qcow2", tmp_path / "older.raw"
    create_luks(image, "4M", SECRET)
    (tmp_path / "KEYFILE").write_text(SECRET, encoding="utf-8")
    qemu_io(image, "write -P 1 0 1M", secret=SECRET)
    assert __main__.main(["add", str(image), "daily"]) == 0
    decrypt(tmp_path, hint_of(image), older)
    qemu_io(image, "write -P 2 512k 64k", "write -P 3 2M 100k", secret=SECRET)
    after = older.read_bytes()
    changed = bytearray(after)
    changed[512 * KIB : 576 * KIB] = b"\2" * (64 * KIB)
    changed[2 * MIB : 2 * MIB + 100 * KIB] = b"\3" * (100 * KIB)
    return image, older, after, bytes(changed)


def hint_of(image: Path) -> str:
    """The command that the refusal names."""
    with pytest.raises(UnsupportedImageError, match="encrypted") as caught:
        qcow2bm.diff(image, image, old_format="qcow2", new_format="qcow2")
    hint = caught.value.hint
    assert hint is not None
    return hint.split("`")[1]


def decrypt(folder: Path, command: str, copy: Path) -> None:
    """Do what the hint says, word for word, in a folder where the file KEYFILE is."""
    words = shlex.split(command)
    assert words[-1] == "COPY"
    run(*words[:-1], copy, cwd=folder)


def test_the_way_that_is_named_for_an_encrypted_image_works(
    encrypted: tuple[Path, Path, bytes, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, older, before, after = encrypted
    now = tmp_path / "now.raw"
    decrypt(tmp_path, hint_of(image), now)
    assert now.read_bytes() == after
    expected = truth(before, after, 64 * KIB)
    assert __main__.main(["prove", str(image), "daily", "--against", str(older)]) == 1
    assert "older than" not in capsys.readouterr().err
    proof = document(capsys, "prove", image, "daily", "--against", older, "--disk", now)
    assert (proof["missed-bytes"], proof["changed-bytes"]) == (0, sum(length for _, length in expected))
    assert (document(capsys, "estimate", image)["estimates"][0]["copied-bytes"]) == proof["changed-bytes"]
    document(capsys, "clear", image, "daily")
    assert document(capsys, "prove", image, "daily", "--against", older, "--disk", now, status=2)["extents"] == [
        {"offset": offset, "length": length, "kind": "missed"} for offset, length in expected
    ]
    document(capsys, "rebuild", image, "daily", "--against", older, "--disk", now)
    document(capsys, "diff", older, now, "--into", f"{image}#kept")
    assert read_bitmaps(image, secret=SECRET) == {"daily": expected, "kept": expected}
    (tmp_path / "short").write_bytes(after[:-512])
    os.utime(tmp_path / "short", (0, 0))
    assert (
        __main__.main(["rebuild", str(image), "daily", "--against", str(older), "--disk", str(tmp_path / "short")]) == 1
    )
    assert "older than the image" in capsys.readouterr().err
    assert exported(image, tmp_path) == after


def exported(image: Path, folder: Path) -> bytes:
    """What comes out of the other way, which docs/diff-and-prove.md names: qemu-nbd, here on a socket."""
    page = Path(__file__).parents[2] / "docs" / "diff-and-prove.md"
    lines = [line.strip() for line in page.read_text(encoding="utf-8").splitlines()]
    command = next(line for line in lines if line.startswith("qemu-nbd "))
    assert "IMAGE" in command
    words = shlex.split(command.replace("IMAGE", "image").replace("--connect=/dev/nbd0", f"--socket={folder}/s"))
    shutil.copy(image, folder / "image")
    run(*words, "--fork", f"--pid-file={folder}/pid", cwd=folder)
    try:
        qemu_img("convert", "-f", "raw", "-O", "raw", f"nbd+unix:///?socket={folder}/s", folder / "out")
    finally:
        os.kill(int((folder / "pid").read_text(encoding="utf-8")), signal.SIGTERM)
    return (folder / "out").read_bytes()


# ---- hostile ----


def loop(folder: Path) -> Path:
    for name, backing in (("one", "two"), ("two", "one")):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, folder / name, "1M")
    return folder / "one"


def json_name(folder: Path) -> Path:
    name = 'json:{"driver":"file","filename":"/etc/passwd"}'
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name, folder / "json", "1M")
    return folder / "json"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "pipe", folder / "fifo", "1M")
    return folder / "fifo"


def bad_l2(folder: Path) -> Path:
    path = folder / "bad"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 1 0 64k")
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[int.from_bytes(data[40:48], "big") :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
    data[table : table + 8] = ((1 << 63) | (1 << 50)).to_bytes(8, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("make", "status"), [(loop, 1), (json_name, 1), (fifo, 1), (bad_l2, 2)])
def test_what_cannot_be_read_is_refused_in_words(
    make: Callable[[Path], Path], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plain = make(tmp_path), tmp_path / "plain.raw"
    plain.write_bytes(bytes(MIB))
    for words in ([plain, path, "--format-b", "qcow2"], [path, plain, "--format-a", "qcow2"]):
        assert __main__.main(["diff", *(str(word) for word in words)]) == status
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert said.err.startswith("qcow2bm: ")
        assert "internal error" not in said.err


def test_a_raw_disk_that_looks_like_an_image_is_not_taken_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guest can write whatever it likes to the beginning of its disk, but it does not name files."""
    inner = tmp_path / "inner.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", inner, "1M")
    raw = tmp_path / "disk"
    raw.write_bytes(inner.read_bytes().ljust(MIB // 4, b"\0"))
    assert __main__.main(["diff", str(raw), str(raw)]) == 64
    assert "begins like qcow2" in capsys.readouterr().err
    assert (
        document(capsys, "diff", raw, raw, "--format-a", "raw", "--format-b", "raw")["new-size"] == raw.stat().st_size
    )
    assert document(capsys, "diff", inner, inner)["new-size"] == MIB
