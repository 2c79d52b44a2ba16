"""Files that commands read beside an image, made hostile: undo files, journals, exports, plans, lists, raw disks.

Most of what is wrong with a file that has checksums is found by the checksum. So half of them are damaged by those who
know them: fields become numbers from the borders and the checksums are made right again, which lets what is behind
them be tried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qcow2bm import __main__
from qcow2bm.image.plan import SECTOR
from qcow2bm.image.undo_layout import KEPT_SIZE, RECORD_SIZE, KeptHead, RecordHead, State, Summary, crc
from tests.support.exports import preamble, rebuilt, record
from tests.support.qemu import qemu_img
from tests.support.raw import Raw
from tests.support.scenes import three

Damage = Callable[[bytes, random.Random], bytes]

_STRUCTURES = 0.5
"""The share of files that are damaged by those who know them."""
JOURNAL = "image.qcow2.qcow2bm-journal"


class Side(NamedTuple):
    """A sound file, the image it belongs to, what it is called, the commands that read it, and how to damage it."""

    data: bytes
    image: bytes
    name: str
    reading: tuple[str, ...]
    changing: tuple[str, ...]
    damage: Damage


# ---- damages ----


def blindly(data: bytes, chance: random.Random) -> bytes:
    """Bytes overwritten, taken out, put in twice; or the end is cut off."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, length = chance.randrange(len(found) + 1), chance.choice((1, 2, 4, 8, 32))
        what = chance.choice("hhhhcir")
        if what == "h":
            found[at : at + length] = chance.choice((bytes(length), b"\xff" * length, chance.randbytes(length)))
        elif what == "c":
            del found[at:]
        elif what == "i":
            found[at:at] = found[at : at + chance.choice((8, 512, 4096))]
        else:
            del found[at : at + length]
    return bytes(found)


_BORDERS = (0, 1, 7, 8, 511, 512, 513, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def _another(chance: random.Random, old: int, bits: int = 64, *, signed: bool = False) -> int:
    new = chance.choice(
        (*_BORDERS, old + 1, old - 1, old * 2, old ^ 1 << chance.randrange(bits), chance.getrandbits(bits))
    )
    new &= (1 << bits) - 1
    return new - (1 << bits) if signed and new >> bits - 1 else new


def undo_file(data: bytes, chance: random.Random) -> bytes:
    """A field of the header, or of the head of a record or of what is kept, or its body; sealed again.

    Or all fields that say how much there is, so that none is out of proportion.
    """
    summary = Summary.parse(data[:SECTOR])
    assert summary is not None
    if chance.random() < 0.2:
        return _immense(summary, chance)
    if chance.random() < 0.4:
        name = chance.choice([field.name for field in dataclasses.fields(summary) if field.name != "version"])
        old = int(getattr(summary, name))
        bits, signed = (32, False) if name in ("state", "head_crc") else (64, name.endswith("_ns"))
        with contextlib.suppress(Exception):  # not every field is 64 bits wide
            return (
                dataclasses.replace(summary, **{name: _another(chance, old, bits, signed=signed)}).build()
                + data[SECTOR:]
            )
        return blindly(data, chance)
    kept = chance.random() < 0.5 and summary.kept > 0
    at, count = (summary.kept_at, summary.kept) if kept else (SECTOR, summary.records)
    parse, size = (KeptHead.parse, KEPT_SIZE) if kept else (RecordHead.parse, RECORD_SIZE)
    wanted = chance.randrange(max(1, count))
    for number in range(count):
        head = parse(data[at : at + size])
        assert head is not None, "it was sound"
        end = at + size + head.body
        if number == wanted:
            return data[:at] + _other_part(head, data[at + size : end], chance) + data[end:]
        at = end
    return blindly(data, chance)


def _immense(summary: Summary, chance: random.Random) -> bytes:
    """A record without bytes that fills very much of an image said to be as large; or very many of the same."""
    size, times = 1 << chance.randrange(30, 63), chance.choice((1, 1, 2, 5000))
    offset = chance.choice((0, SECTOR, 1 << 20, summary.size_before // SECTOR * SECTOR))
    head = RecordHead(0, offset, chance.choice((0, size)), 0, 0, size, 0, crc(b"")).build()
    sizes = {"size_after": 2 * size} | ({"size_before": 2 * size} if chance.random() < 0.5 else {})
    changed = dataclasses.replace(summary, records=times, kept=0, given_up=0, state=chance.choice(list(State)), **sizes)
    return changed.build() + times * head


def _other_part(head: RecordHead | KeptHead, body: bytes, chance: random.Random) -> bytes:
    if body and chance.random() < 0.3:
        body = blindly(body, chance)
    else:
        name = chance.choice(head._fields[:-1])
        bits = 32 if name in ("filled_crc", "kind") else 64
        head = head._replace(**{name: _another(chance, getattr(head, name), bits)})
    return head._replace(crc=crc(body)).build() + body


def export_file(data: bytes, chance: random.Random) -> bytes:
    """A field or a body of one record, or a record that is missing or comes twice; with right checksums."""
    wanted, seen = chance.randrange(12), -1

    def change(part: object, raw: bytes) -> list[bytes]:
        nonlocal seen
        seen += 1
        kind, start, body_at, _, encoding, first, chunks = part  # type: ignore[misc]
        if seen != wanted % 8:
            return [raw]
        body = raw[body_at - start :]
        what = chance.choice("fffbbdt")
        if what == "d":
            return []
        if what == "t":
            return [raw, raw]
        if what == "b" or seen == 0:
            body = blindly(body, chance)
        if seen == 0:
            return [preamble(body)]
        values = {"encoding": encoding, "first": first, "chunks": chunks}
        if what == "f":
            name = chance.choice([*values])
            values[name] = _another(chance, values[name], 16 if name == "encoding" else 64)
        return [record(kind, body, **values)]

    return rebuilt(data, change)  # type: ignore[arg-type]


_ODD = (None, True, -1, 0, 1, 1 << 63, 1 << 64, 10**400, 0.5, 1e308, "", "x", "\ud800", "1e9", [], {}, [[]], [None])


def json_text(data: bytes, chance: random.Random) -> bytes:
    """A value somewhere becomes another, or is gone, or the same member comes twice."""
    document = json.loads(data)
    places: list[tuple[dict[str, object] | list[object], str | int]] = []

    def walk(value: object) -> None:
        keys: list[str] | range = list(value) if isinstance(value, dict) else range(len(value))  # type: ignore[arg-type]
        for key in keys:
            places.append((value, key))  # type: ignore[arg-type]
            if isinstance(value[key], dict | list):  # type: ignore[index]
                walk(value[key])  # type: ignore[index]

    walk(document)
    for _ in range(chance.choice((1, 1, 3))):
        holder, key = chance.choice(places)
        with contextlib.suppress(KeyError, IndexError):  # gone with what it was in
            if chance.random() < 0.2:
                del holder[key]  # type: ignore[arg-type]
            else:
                old = holder[key]  # type: ignore[index]
                near = [old + 1, old - 1, -old, old * 2, str(old)] if isinstance(old, int) else []
                holder[key] = chance.choice((*near, *_ODD))  # type: ignore[index]
    text = json.dumps(document)
    if chance.random() < 0.05:
        text = "[" * chance.choice((1000, 100_000)) + text
    return text.encode("utf-8", "surrogatepass")


def csv_text(data: bytes, chance: random.Random) -> bytes:
    """A field becomes another one."""
    lines = data.decode().splitlines()
    at = chance.randrange(len(lines))
    fields = lines[at].split(",")
    fields[chance.randrange(len(fields))] = chance.choice(
        ("", "-1", "0x10", "1e3", "9" * 5000, str(1 << 63), "true", "\0", '"', "\u0661", "1 ", "nan", "1,1")
    )
    lines[at] = ",".join(fields)
    return "\n".join(lines).encode()


def raw_disk(data: bytes, chance: random.Random) -> bytes:
    """Something that looks like an image, or is none of the right length."""
    heads = (
        b"QFI\xfb\0\0\0\x03",
        b"QFI\xfb\0\0\0\x02",
        b"KDMV",
        b"COWD",
        b"conectix",
        b"vhdxfile",
        b"LUKS\xba\xbe",
        b"",
    )
    head = chance.choice(heads)
    found = bytearray(data)
    found[: len(head)] = head
    del found[chance.choice((0, 1, 511, 512, len(found) - 1, len(found), len(found))) :]
    return bytes(found)


# ---- sound files ----


def make_sides(folder: Path) -> list[Side]:
    """All kinds, made by the commands themselves."""
    return [*_undo_files(folder), *_exports(folder), *_others(folder)]


def _run(*words: str | Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert __main__.main([str(word) for word in words]) in (0, 2, 3, 4)


def _fresh(folder: Path, name: str) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    return three(place)


def _undo_files(folder: Path) -> list[Side]:
    image = _fresh(folder, "undo")
    before, undo = image.read_bytes(), image.with_name("undo")
    _run("merge", image, "c", "a", "b", "--undo", undo)
    changed, held = image.read_bytes(), undo.read_bytes()
    raw = Raw(before)
    at = raw.directory[0]
    raw.put(at + 12, 1 << 5, 4)  # a flag that nobody knows: its bits are as they were
    raw.save(image)
    undo.unlink()
    _run("repair", image, "--yes", "--allow", "lossy", "--undo", undo)
    repaired, quarantine = image.read_bytes(), undo.read_bytes()
    summary = Summary.parse(quarantine[:SECTOR])
    assert summary is not None
    journal = dataclasses.replace(summary, state=State.IN_PROGRESS).build() + quarantine[SECTOR:]
    torn = Raw(repaired)
    torn.put(72, torn.number(72) | 1 << 62)  # the mark, which is cleared last
    force, show = "undo {image} {side} --force", "undo {image} {side} --list"
    back = ("undo {image} {side} --bitmap a --stale", "undo {image} {side} --number 1 --as x --stale", force)
    writing = ("add {image} new", "repair {image} --yes", "clear {image} a")
    reading = ("check {image}", "why {image} a", "repair {image} --dry-run")
    return [
        Side(held, changed, "undo", (show,), (force,), undo_file),
        Side(quarantine, repaired, "undo", (f"{show} --output json",), back, undo_file),
        Side(journal, bytes(torn.data), JOURNAL, ("info {image}",), writing, undo_file),
        Side(held, changed, "image.qcow2.qcow2bm-undo", reading, (), undo_file),
    ]


def _exports(folder: Path) -> list[Side]:
    image = _fresh(folder, "export")
    data, out = image.read_bytes(), image.with_name("exported")
    _run("export", image, out)
    files = [
        Side(
            out.read_bytes(), data, "exported", ("import --list {side}", "import --list {image} {side} --output json"),
            ("import {image} {side} --merge", "import {image} {side} a --as new"), export_file,
        )
    ]  # fmt: skip
    for form, damage in (("json", json_text), ("csv", csv_text), ("raw", blindly)):
        out = image.with_name(f"exported.{form}")
        _run("export", image, "b", out, "--format", form)
        files.append(
            Side(
                out.read_bytes(), data, "exported", (),
                (f"import {{image}} {{side}} --format {form} --as new -g 4k --force-lineage",
                 f"import {{image}} {{side}} --format {form} --as other -g 4k --force-lineage"), damage,
            )
        )  # fmt: skip
    return files


def _others(folder: Path) -> list[Side]:
    image = _fresh(folder, "others")
    data = image.read_bytes()
    found = [
        Side(
            _printed("show", image, "b", "--extents", "--output", form), data, "extents", (),
            ("set {image} a --from-extents {side}", "set {image} c --from-extents {side} --where all",
             "unset {image} b --from-extents {side} --where dirty"), damage,
        )
        for form, damage in (("json", json_text), ("csv", csv_text))
    ]  # fmt: skip
    maps = qemu_img("map", "--output=json", image).stdout.encode()
    found.append(Side(maps, data, "extents", (), ("set {image} a --from-extents {side} --where data",), json_text))
    disk = bytearray(4 << 20)
    disk[1 << 20 : 1 << 21] = struct.pack(">Q", 1) * (1 << 17)
    base = ("prove {image} a --against {side}", "prove {image} a --against {side} --against-format qcow2",
            "diff {side} {image}", "diff {side} {image} --output json")  # fmt: skip
    into = ("rebuild {image} b --against {side}", "diff {side} {image} --into {image}#differs")
    found.append(Side(bytes(disk), data, "base", base, into, raw_disk))
    found.append(Side(data, data, "base.qcow2", base, into, blindly))
    raw = Raw(data)
    raw.set_refcount(raw.number(40), 0)
    raw.save(image)
    plan = image.with_name("plan")
    _run("repair", image, "--plan", plan)
    found.append(
        Side(plan.read_bytes(), bytes(raw.data), "plan", (), ("repair {image} --apply {side} --yes",), json_text)
    )
    return found


def _printed(*words: str | Path) -> bytes:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert __main__.main([str(word) for word in words]) == 0
    return out.getvalue().encode()


def hostile_side(sides: list[Side], chance: random.Random) -> tuple[Side, bytes]:
    """A file to read, damaged; now and then it is sound, and its image is not."""
    side = chance.choice(sides)
    damage = side.damage if chance.random() < _STRUCTURES else blindly
    return side, damage(side.data, chance)
