"""Images and files made to do harm, each by name, against the commands in processes of their own.

The promise: a documented status, a message that names the image, no traceback, ten seconds of work, 256 MiB and twice
the metadata, and not a byte written by a command that reads or refuses. Each monster meets a few of the commands, ever
others as the monsters go by; `MONSTERS=all` lets each meet all, with tables as large as the limits allow.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.alone import HANDED_OVER, WORK, Alone, Ended
from tests.fuzz.monsters import ALL, MONSTERS, Monster, directory_of, sound_image
from tests.fuzz.running import CHANGING, MEMORY, READING, STATUSES
from tests.support.qemu import qemu_img
from tests.support.raw import OFFSET, Raw

LINES = READING + CHANGING
AT_A_TIME = len(LINES) if ALL else 2
FILLS_A_DISK = 450 << 20
"""Bytes that a repair of these small images may take: their disk of 64 MiB twice, 4096 clusters, an undo file."""


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    with Alone() as server:
        yield server


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sound_image(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the longest files may be: in memory if that can be written to."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as path:
        (Path(path) / "zeroes").write_bytes(bytes(1 << 20))
        yield Path(path)


def state(image: Path) -> tuple[int, int, str]:
    """Time stamp, length, and a digest of the first and last MiB: of a file of exabytes more is a hole."""
    status = image.stat()
    with image.open("rb") as file:
        start = file.read(1 << 20)
        file.seek(max(0, status.st_size - (1 << 20)))
        return status.st_mtime_ns, status.st_size, hashlib.sha256(start + file.read()).hexdigest()


def held(alone: Alone, image: Path, line: str, *, reads: bool, names: bool = True) -> Ended:
    """Run a command on an image and see that it keeps the promise; `names`: what is wrong is the image itself."""
    before, present = state(image), image.stat().st_blocks * 512
    words = [word.format(image=image, name="a", other="b", folder=image.parent, size="64M") for word in line.split()]
    ended = alone.run(*words, work=WORK + (4 * min(present, 32 << 20) >> 20))  # and four seconds for each MiB
    assert ended.status in STATUSES | {HANDED_OVER}, (line, ended.status, ended.said[-500:])
    assert "Traceback" not in ended.said, (line, ended.said[-2000:])
    assert "internal error" not in ended.said, (line, ended.said[-2000:])
    assert ended.memory < MEMORY + 2 * present, (line, ended.memory >> 20)
    if names and ended.status not in (0, 3, 4, HANDED_OVER) and not line.startswith("qemu-img"):
        assert ".qcow2: " in ended.said or str(image) in ended.said, (line, ended.said)
    if reads or (ended.status not in (0, 3, 4) and not line.startswith(("repair", "check", "qemu-img"))):
        assert state(image) == before, line
    assert image.stat().st_blocks * 512 < present + FILLS_A_DISK, line
    return ended


@pytest.mark.parametrize("number", range(len(MONSTERS)), ids=[f"{m.name}{'-sparse' * m.holes}" for m in MONSTERS])
def test_a_monster_ends_no_command_badly(alone: Alone, sound: bytes, folder: Path, number: int) -> None:
    monster: Monster = MONSTERS[number]
    image = folder / "image.qcow2"
    monster.lay_out(sound, image)
    always = () if ALL else ("check {image}", "repair {image} --yes")
    chosen = [LINES[(number * AT_A_TIME + at) * 7 % len(LINES)] for at in range(AT_A_TIME)]
    for line in dict.fromkeys((*always[:1], *(chosen if not ALL else LINES), *always[1:])):
        held(alone, image, line, reads=line in READING)
        if line not in READING:
            for file in folder.glob("image.qcow2*"):
                file.unlink()
            monster.lay_out(sound, image)
        for file in folder.glob("exported*"):
            file.unlink()


# ---- names ----

NAMES = {
    "escape sequences": b"\x1b]0;owned\x07\x1b[2J\x1b[31m",
    "newlines": b"one\ntwo\r\nqcow2bm: all is well",
    "no utf-8": b"\xff\xfe\x80\xc0\xaf",
    "bidi overrides": "\u202egnirts\u202c\u2066x\u2069".encode(),
    "C1 controls": "\x9b31m\x85".encode(),
    "surrogates": b"\xed\xa0\x80\xed\xbf\xbf",
    "as long as may be": b"n" * 1023,
    "zero bytes": b"a\0b\0",
    "an option": b"--yes",
    "a path": b"../../../etc/passwd",
    "empty": b"",
}
NASTY = "".join(map(chr, (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))).replace(
    "\n", ""
)


def with_name(sound: bytes, name: bytes) -> Raw:
    """An image where bitmaps (two of them the same), snapshots, backing file and data file have this name."""
    raw = Raw(sound)
    entry, number = raw.directory[0], raw.number
    table, entries = number(entry), number(entry + 8, 4)
    row = struct.pack(">QIIBBHI", table, entries, 2, 1, 16, len(name), 0) + name
    directory_of(raw, [row + bytes(-len(row) % 8)] * 2)
    at = number(64)
    snapshot = raw.data[at : at + 40]
    snapshot[12:16] = struct.pack(">HH", len(name), len(name))
    snapshot[36:40] = bytes(4)
    raw.data[at : at + 4096] = (snapshot + name + name).ljust(4096, b"\0")
    raw.insert_extension(name, kind=0xE2792ACA)
    raw.insert_extension(name, kind=0x44415441)
    end = number(20, 4) and raw.cluster_size - len(name) - 8
    raw.data[end : end + len(name)] = name
    raw.put(8, end)
    raw.put(16, len(name), 4)
    return raw


@pytest.mark.parametrize("name", NAMES)
def test_a_name_does_nothing_to_a_terminal(alone: Alone, sound: bytes, folder: Path, name: str) -> None:
    """Not in the drop-in, which prints names byte for byte, as qemu-img does."""
    image = folder / "image.qcow2"
    with_name(sound, NAMES[name]).save(image)
    for line in ("info {image}", "list {image}", "dump {image}", "check {image}", "repair {image} --dry-run",
                 "info {image} --output json"):  # fmt: skip
        said = held(alone, image, line, reads=True).said
        assert not set(said) & set(NASTY), (line, sorted(set(said) & set(NASTY)))


# ---- what is no image ----


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def make_vmdk(path: Path) -> None:
    qemu_img("create", "-q", "-f", "vmdk", path, "1M")


NO_IMAGES = {
    "fifo": make_fifo,
    "socket": make_socket,
    "vmdk": make_vmdk,
    "directory": Path.mkdir,
    "null": lambda path: path.symlink_to("/dev/null"),
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"Q"),
    "magic alone": lambda path: path.write_bytes(b"QFI\xfb"),
    "raw": lambda path: path.write_bytes(bytes(1 << 20)),
    "text": lambda path: path.write_text("QFI"),
}
"""How to make what is no image; `magic alone` is one that is cut short."""


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_image_is_refused_by_name(alone: Alone, folder: Path, kind: str) -> None:
    path = folder / "image.qcow2"
    NO_IMAGES[kind](path)
    lines = [*READING[::4], *CHANGING[::4], "copy {folder}/zeroes#a {image}#b", "undo {image} {folder}/zeroes"]
    if kind != "fifo":  # a FIFO is a pipe that an export may come through: whoever names one waits for it
        lines += ["import {folder}/zeroes {image}", "undo {folder}/zeroes {image}"]
    for line in lines:
        words = [word.format(image=path, name="a", other="b", folder=folder) for word in line.split()]
        ended = alone.run(*words)
        assert ended.status in STATUSES - {0} | {HANDED_OVER}, (line, ended)
        assert ended.status == HANDED_OVER or path.name in ended.said or "zeroes" in ended.said, (line, ended)
        assert "Traceback" not in ended.said, ended.said
        assert ended.seconds < 30, line


def test_an_image_that_may_not_be_read_is_refused(alone: Alone, sound: bytes, folder: Path) -> None:
    """Root may read everything, so the process asks as nobody."""
    image = folder / "image.qcow2"
    image.write_bytes(sound)
    image.chmod(0)
    ended = alone.run("info", image, work=-WORK)
    assert ended.status == 1, ended
    assert f"{image}: Permission denied" in ended.said


# ---- guest data ----


def test_a_compressed_cluster_that_is_a_bomb_makes_a_cluster_and_no_more(
    alone: Alone, sound: bytes, folder: Path
) -> None:
    """A stream of a few KiB that would unpack to a GiB."""
    raw, packer = Raw(sound), zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(60)) + packer.flush()
    assert len(bomb) < 1 << 16
    place = len(raw.data) + -len(raw.data) % raw.cluster_size
    raw.data += bytes(place - len(raw.data)) + bomb + bytes(-len(bomb) % raw.cluster_size)
    raw.set_refcount(place, 128)
    table = raw.number(raw.number(40)) & OFFSET
    for at in range(table, table + 8 * 128, 8):
        raw.put(at, 1 << 62 | (len(bomb) // 512) << 54 | place)
    image = folder / "image.qcow2"
    raw.save(image)
    for line in READING:
        held(alone, image, line, reads=True)


# ---- backing chains ----


def chain(folder: Path, layers: int, *, last: str | None) -> Path:
    """Images one on top of the other; the lowest names `last`."""
    template = folder / "template"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", "backing_file=0123456789,backing_fmt=qcow2", template, "64M")
    data = template.read_bytes()
    at = Raw(data).number(8)
    for number in range(layers):
        name = f"{number + 1}.qcow2" if number + 1 < layers else last
        raw = Raw(data)
        raw.data[at : at + 10] = (name or "").encode().ljust(10, b"\0")
        raw.put(16, len(name or ""), 4)
        raw.data[at : at + 10] = (name or "").encode().ljust(10, b"\0")
        raw.save(folder / f"{number}.qcow2")
    return folder / "0.qcow2"


@pytest.mark.parametrize("last", ["0.qcow2", "2.qcow2", "/dev/zero", "fifo", ".", "json:{}", "nbd://127.0.0.1:1/"])
def test_a_chain_that_leads_round_or_nowhere_is_refused(alone: Alone, folder: Path, last: str) -> None:
    os.mkfifo(folder / "fifo")
    image = chain(folder, 3, last=last[:10])
    for line in ("diff {folder}/zeroes {image}", "diff {image} {image}", "info {image}", "check {image}"):
        ended = held(alone, image, line, reads=True, names=False)  # the layer that is wrong, or what that names
        assert ended.status in ((0, 3) if line.startswith(("info", "check")) else (1, 2, 63)), (line, ended)


def test_a_chain_of_a_thousand_layers_is_read_or_refused(alone: Alone, folder: Path) -> None:
    image = chain(folder, 1000, last=None)
    assert held(alone, image, "diff {folder}/zeroes {image}", reads=True).status in (0, 1)
