"""Images and files made to do harm, each by name, against the commands in processes of their own.

The promise: a documented status, a message that names the image, no traceback, ten seconds of work, 256 MiB and twice
the metadata, and not a byte written by a command that reads or refuses. Each monster meets one command, ever
others as the monsters go by; with `MONSTERS=all` tables are as large as the limits allow, and each meets nine.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from tests.fuzz.alone import HANDED_OVER, WORK, Alone, Ended
from tests.fuzz.monster_parts import (
    ALL,
    appended,
    directory_of,
    l1_at,
    l1_table,
    l2_table,
    snapshot_entry,
    snapshots_at,
    sound_image,
)  # fmt: skip
from tests.fuzz.monsters import MONSTERS, NOISE, Monster
from tests.fuzz.running import CHANGING, MEMORY, READING, STATUSES
from tests.support.qemu import qemu_img
from tests.support.raw import OFFSET, Raw

LINES = READING + CHANGING
HEAVY = ("check {image}", "repair {image} --yes --allow guess", "qemu-img check -r all -f qcow2 {image}")
TURNS = 8
"""So many monsters meet all the other commands between them."""
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
    # And a second for each MiB; where every entry is a line that QEMU prints there may be four times as many.
    each = 4 if line.startswith("qemu-img") else 1
    ended = alone.run(*words, work=WORK + (each * min(present, 32 << 20) >> 20))
    assert ended.status in STATUSES | {HANDED_OVER}, (line, ended.status, ended.said[-500:])
    assert "Traceback" not in ended.said, (line, ended.said[-2000:])
    assert "qcow2bm: internal error" not in ended.said, (line, ended.said[-2000:])
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
    chosen = ("check {image}", "repair {image} --yes", LINES[number * 7 % len(LINES)])[number % 3]
    for line in (*HEAVY, *LINES[number % TURNS :: TURNS]) if ALL else (chosen,):
        held(alone, image, line, reads=line in READING)
        if line not in READING:
            for file in folder.glob("image.qcow2*"):
                file.unlink()
            monster.lay_out(sound, image)
        for file in folder.glob("exported*"):
            file.unlink()


@pytest.mark.parametrize("line", ["check {image}", "repair {image} --yes --allow guess"], ids=["check", "repair"])
@pytest.mark.parametrize("monster", NOISE[::2], ids=[monster.name for monster in NOISE[::2]])
def test_a_table_of_nothing_but_different_nonsense_is_judged_and_mended_as_a_whole(
    alone: Alone, sound: bytes, folder: Path, monster: Monster, line: str
) -> None:
    """Entry by entry it takes several times as long as is allowed here."""
    image = folder / "image.qcow2"
    monster.lay_out(sound, image)
    ended = alone.run(*line.format(image=image).split(), work=WORK if ALL else WORK // 2)
    assert ended.status in ((0, 2, 3) if line.startswith("repair") else (2,)), ended.said[-500:]
    assert ended.memory < MEMORY + 2 * image.stat().st_blocks * 512


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
    lines = [*READING[::6], *CHANGING[::6], "copy {folder}/zeroes#a {image}#b", "undo {image} {folder}/zeroes"]
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


def zlib_bomb() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(60)) + packer.flush()


def zstd_bomb() -> bytes:
    """As a frame of unknown length, which is what QEMU writes."""
    packer = zstandard.ZstdCompressor(level=19).compressobj()
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(400)) + packer.flush()


@pytest.mark.parametrize(("kind", "bomb"), [("zlib", zlib_bomb), ("zstd", zstd_bomb)], ids=["zlib", "zstd"])
def test_a_compressed_cluster_that_is_a_bomb_makes_a_cluster_and_no_more(
    alone: Alone, tmp_path: Path, folder: Path, kind: str, bomb: Callable[[], bytes]
) -> None:
    """Every cluster is a stream of a few KiB that would unpack to hundreds of MiB in all."""
    raw, stream = Raw(sound_image(tmp_path, "-o", f"compression_type={kind}")), bomb()
    assert len(stream) < 1 << 16
    place = len(raw.data) + -len(raw.data) % raw.cluster_size
    raw.data += bytes(place - len(raw.data)) + stream + bytes(-len(stream) % raw.cluster_size)
    raw.set_refcount(place, 128)
    table = raw.number(raw.number(40)) & OFFSET
    for at in range(table, table + 8 * 128, 8):
        raw.put(at, 1 << 62 | (len(stream) // 512) << 54 | place)
    image = folder / "image.qcow2"
    raw.save(image)
    for line in READING if ALL else ("diff {folder}/zeroes {image}", "prove {image} {name} --against {folder}/zeroes",
                                     "estimate {image} {name}", "check {image}"):  # fmt: skip
        held(alone, image, line, reads=True)
    held(alone, image, "rebuild {image} {name} --against {folder}/zeroes", reads=False)


# ---- what is as long as it may be ----


@pytest.mark.parametrize("form", ["human", "json"])
def test_a_dump_of_a_quarter_of_a_million_entries_is_written_as_it_is_read(
    alone: Alone, sound: bytes, folder: Path, form: str
) -> None:
    """An L1 table of 2 MiB, which as objects would be ten times the memory that is allowed here."""
    raw, image = Raw(sound), folder / "image.qcow2"
    l1_at(raw, appended(raw, struct.pack(">Q", 1 << 63 | l2_table(raw)) * (1 << 18)), 1 << 18)
    raw.save(image)
    ended = held(alone, image, f"dump {{image}} --structure l1 --output {form}", reads=True)
    assert ended.status == 0
    assert ended.memory < 30 << 20
    assert "262144 of 262144 entries used" in ended.said
    assert "0x00001" in ended.said or '"name": "[0]"' in ended.said


def test_tables_that_lie_in_one_another_are_not_dumped_again_and_again(
    alone: Alone, sound: bytes, folder: Path
) -> None:
    """Of a thousand snapshots with one L1 table a few are shown, and the rest is told."""
    raw, image = Raw(sound), folder / "image.qcow2"
    l1_at(raw, appended(raw, struct.pack(">Q", l2_table(raw)) * (1 << 14)), 1 << 14)
    entries = b"".join(snapshot_entry(l1_table(raw), 1 << 14, number=number) for number in range(1000))
    snapshots_at(raw, appended(raw, entries), 1000)
    raw.save(image)
    ended = held(alone, image, "dump {image} --structure l1 --output json", reads=True)
    assert ended.status == 2
    assert "lie in the same place" in ended.said


@pytest.mark.parametrize(
    ("entry", "code"),
    [(0, "refcount-block-shared"), (1, "refcount-block-reserved"), (512, "refcount-block-unaligned"),
     (1 << 50, "refcount-block-outside")],
    ids=["shared", "reserved", "unaligned", "outside"],
)  # fmt: skip
def test_refcount_table_entries_that_are_all_the_same_are_one_finding_and_mended_at_once(
    alone: Alone, sound: bytes, folder: Path, entry: int, code: str
) -> None:
    raw, image = Raw(sound), folder / "image.qcow2"
    block, count = raw.number(raw.number(48)), 1 << 15
    rest = struct.pack(">Q", entry or block) * (count - 1)
    raw.put(48, appended(raw, struct.pack(">Q", block) + rest))
    raw.put(56, count * 8 // raw.cluster_size, 4)
    raw.save(image)
    ended = held(alone, image, "check {image} --output json", reads=True)
    findings = [row for row in json.loads(ended.said)["images"][0]["findings"] if row["code"] == code]
    assert [row["count"] for row in findings] == [count - 1]
    assert held(alone, image, "repair {image} --yes", reads=False).status in (0, 3)
    assert code not in held(alone, image, "check {image} --output json", reads=True).said


# ---- plans ----


WRITES: dict[str, dict[str, object]] = {
    "other places": {"offset": 0},
    "outside the file": {"offset": 1 << 62},
    "lengths": {"length": 1 << 60},
    "old bytes that lie": {"old": "ff" * 512},
    "other new bytes": {"new": "00" * 512},
    "no numbers": {"offset": None, "length": "x", "new": 7},
}
"""What somebody makes of every write of a saved plan; the fingerprint stays what it was."""


@pytest.mark.parametrize("kind", [*WRITES, "overlapping"])
def test_steps_that_somebody_wrote_into_a_plan_are_never_carried_out(
    alone: Alone, sound: bytes, folder: Path, kind: str
) -> None:
    """A plan is worked out again from its policy: the image comes to what the plan did that nobody has edited."""
    raw, image, plan = Raw(sound), folder / "image.qcow2", folder / "plan"
    raw.set_refcount(raw.number(raw.number(40)) & OFFSET, 7)
    raw.save(image)
    assert held(alone, image, "repair {image} --plan {folder}/plan", reads=True).status in (0, 3)
    document = json.loads(plan.read_text(encoding="ascii"))
    writes = [write for step in document["plan"]["steps"] for write in step["writes"]]
    assert writes
    for write in writes:
        write.update(WRITES.get(kind, {}))
    document["plan"]["steps"] *= 100 if kind == "overlapping" else 1
    plan.write_text(json.dumps(document), encoding="ascii")
    twin = folder / "twin.qcow2"
    twin.write_bytes(image.read_bytes())
    assert held(alone, twin, "repair {image} --yes --no-undo", reads=False).status in (0, 3)
    ended = held(alone, image, "repair {image} --apply {folder}/plan --yes", reads=False)
    assert ended.status in (0, 3)
    assert image.read_bytes() == twin.read_bytes()


POLICIES: dict[str, dict[str, object]] = {
    "another class": {"allow": "guess"},
    "no class": {"allow": "everything"},
    "a part that is none": {"only": ["everything"]},
    "another image": {"data-file": "/dev/zero"},
    "a base": {"in-use": "rebuild", "against": "/dev/zero"},
    "numbers": {"bitmaps": 1 << 70},
    "nothing": {"keeps-undo": None},
}


@pytest.mark.parametrize("kind", POLICIES)
def test_a_plan_whose_policy_was_edited_is_refused_and_the_image_left(
    alone: Alone, sound: bytes, folder: Path, kind: str
) -> None:
    """Under another policy the plan comes to something else than its fingerprint says."""
    raw, image, plan = Raw(sound), folder / "image.qcow2", folder / "plan"
    raw.set_refcount(raw.number(raw.number(40)) & OFFSET, 7)
    raw.put(raw.l2_entry(), 1 << 63 | 1 << 50)  # what only a riskier policy would take out, as the bitmap in use
    raw.put(raw.directory[0] + 12, 3, 4)
    raw.save(image)
    assert held(alone, image, "repair {image} --plan {folder}/plan", reads=True).status in (2, 3)
    document = json.loads(plan.read_text(encoding="ascii"))
    assert document["policy"].keys() >= POLICIES[kind].keys()
    document["policy"].update(POLICIES[kind])
    plan.write_text(json.dumps(document), encoding="ascii")
    before = image.read_bytes()
    ended = held(alone, image, "repair {image} --apply {folder}/plan --yes", reads=False, names=False)
    assert ended.status in (1, 2, 64), ended
    assert image.read_bytes() == before


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
