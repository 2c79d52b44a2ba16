"""`qcow2bm why` on the fixtures, sound and damaged: always an answer, never a write."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import qcow2bm
from qcow2bm.bitmap.store import State
from qcow2bm.checks.model import RepairClass, Severity
from qcow2bm.checks.problems import PROBLEMS
from qcow2bm.image.file import UNDO_SUFFIX, ImageFile
from qcow2bm.repair import session, signs
from qcow2bm.repair.model import Salvage
from qcow2bm.repair.ways_out import NextBackup, Proof
from tests.support.images import Fixture, all_fixtures, corrupt_fixtures, unpack
from tests.support.raw import Raw
from tests.unit.test_cli_json import SCHEMAS
from tests.unit.test_cli_json import check as check_schema

UNUSABLE = (Severity.CORRUPTION, Severity.UNKNOWN, Severity.BITMAP)


@pytest.fixture
def asked(run):
    """`why --output json`: exit status, document, and what it printed on stderr."""

    def runner(image: Path, name: str) -> tuple[int, dict[str, Any], str]:
        status, out, err = run("why", "--output", "json", "--", image, name)
        document = json.loads(out) if out else {}
        if document:
            check_schema("why", document)
            assert document["status"] == status
        return status, document, err

    return runner


def names_in(image: Path) -> list[str]:
    """The bitmaps as `list` has them; a name that nothing has where there are none."""
    with qcow2bm.open(image, use_locks=False) as opened:
        return opened.bitmaps.names or ["daily"]


def codes(document: dict[str, Any]) -> list[str]:
    return [reason["code"] for reason in document["reasons"]]


def signs_of(document: dict[str, Any]) -> dict[str, str]:
    return {sign["kind"]: sign["text"] for sign in document["signs"]}


def test_the_schema_knows_the_words_of_the_program() -> None:
    """Enumerations are written twice."""
    known = SCHEMAS["why.schema.json"]["properties"]
    way = known["ways-out"]["items"]["properties"]
    assert known["state"]["enum"] == [*(one.value for one in State), None]
    assert way["proof"]["enum"] == [one.value for one in Proof]
    assert way["next-backup"]["enum"] == [one.value for one in NextBackup]
    assert way["class"]["enum"] == [one.value for one in RepairClass]
    assert {policy.value for policy in Salvage} - {"keep"} <= set(way["name"]["enum"])
    for name in ("reasons", "remarks"):
        severities = known[name]["items"]["properties"]["severity"]["enum"]
        assert severities == [*(one.value for one in Severity), None]


# ---- all fixtures ----


@pytest.mark.parametrize("sample", all_fixtures(), ids=lambda sample: sample.name)
def test_a_bitmap_is_usable_exactly_if_it_is_ready(sample: Fixture, tmp_path: Path, asked) -> None:
    image = sample.unpack(tmp_path)
    for name, bitmap in list(sample.bitmaps.items())[:4]:
        status, document, err = asked(image, name)
        assert err == ""
        assert (status, document["usable"]) == ((0, True) if bitmap["state"] == "ready" else (4, False))
        assert document["state"] == bitmap["state"]
        assert bool(document["reasons"]) == bool(document["ways-out"]) == (status == 4)


@pytest.mark.parametrize("sample", corrupt_fixtures(), ids=lambda sample: sample.path.name)
def test_a_damaged_image_is_no_hindrance(sample: Fixture, tmp_path: Path, asked) -> None:
    """An answer about each bitmap, and never about one that is not there."""
    image = sample.unpack(tmp_path)
    found = {finding["code"] for finding in sample.origin["findings"]}
    try:
        names = names_in(image)
    except qcow2bm.Qcow2bmError:
        names = ["daily"]
    for name in names[:3]:
        status, document, err = asked(image, name)
        if not document:
            assert status in (1, 2)
            assert err.startswith(f"qcow2bm: {image}: ")
            continue
        assert err == ""
        assert status in (0, 4)
        assert document["usable"] == (status == 0) == (not document["reasons"])
        for reason in document["reasons"]:
            assert reason["code"] in found
            assert PROBLEMS[reason["code"]].severity in UNUSABLE
        assert set(document["elsewhere"]) <= found
        assert document["ways-out"] or document["left-out"] or status == 0


@pytest.mark.parametrize(
    ("code", "name", "next_backup"),
    [
        ("bitmap-granularity", "daily", "full"),
        ("bitmap-entry-reserved", "daily", "full"),
        ("bitmap-data-outside", "daily", "full"),
        ("bitmap-clusters-shared", "monday", "larger"),
        ("bitmap-clusters-shared", "friday", "larger"),
        ("bitmap-directory-size", "daily", "undecided"),
        ("bitmaps-extension-missing", "daily", "full"),
        ("bitmap-name-duplicate", "friday", "incremental"),
        ("bitmaps-extension-reserved", "daily", "incremental"),
        ("bitmap-directory-entries", "daily", "incremental"),
    ],
)
def test_what_the_rescue_costs(code: str, name: str, next_backup: str, tmp_path: Path, asked) -> None:
    image = unpack(f"corrupt/{code}", tmp_path)
    status, document, _ = asked(image, name)
    assert (status, codes(document)) == (4, [code])
    [way] = document["ways-out"]
    assert way["command"] == ["qcow2bm", "repair", str(image), "--only", "bitmaps"]
    assert (way["next-backup"], way["class"]) == (next_backup, "lossless")


def test_a_header_beyond_reading(tmp_path: Path, run) -> None:
    image = unpack("corrupt/header-cluster-bits", tmp_path)
    status, out, err = run("why", image, "daily")
    assert (status, out) == (2, "")
    assert "`qcow2bm explain header-cluster-bits` says what that means" in err
    Path(f"{image}.qcow2bm-journal").touch()
    status, out, err = run("why", image, "daily")
    assert (status, out) == (1, "")
    assert "a change was cut short by a crash" in err


def test_features_that_nobody_here_knows(tmp_path: Path, run) -> None:
    image = unpack("corrupt/unknown-incompatible", tmp_path)
    raw = Raw.load(unpack("office-week", tmp_path / "other"))
    raw.put(72, raw.number(72) | 1 << 40)
    raw.save(image)
    status, out, err = run("why", image, "mon")
    assert (status, out) == (1, "")
    assert "features that are not known here" in err


def test_what_is_no_qcow2_image(tmp_path: Path, run) -> None:
    (tmp_path / "raw").write_bytes(b"raw" * 1000)
    assert run("why", tmp_path / "raw", "x")[0] == 63
    assert run("why", tmp_path / "missing", "x")[0] == 1
    assert run("why", tmp_path / "raw")[0] == 64


# ---- names ----


def test_a_name_that_no_bitmap_has(tmp_path: Path, run) -> None:
    image = unpack("office-week", tmp_path)
    for name, hint in (
        ("mob", "there is 'mon'"),
        ("\x1b[2J", "`qcow2bm list` shows those there are"),
    ):
        status, out, err = run("why", image, name)
        assert (status, out) == (1, "")
        assert err.endswith(f"; {hint}\n")
        assert "\x1b" not in err


def test_one_that_is_lost_is_said_to_be(tmp_path: Path, run) -> None:
    status, _, err = run("why", unpack("corrupt/leak-lost-bitmap", tmp_path), "daily")
    assert status == 1
    assert "there was one: it is lost, only its clusters are left" in err


def test_one_that_may_lie_behind_damage(tmp_path: Path, run) -> None:
    status, _, err = run("why", unpack("corrupt/extension-too-long", tmp_path), "daily")
    assert status == 1
    assert "may be out of reach; `qcow2bm explain extension-too-long`" in err


def test_odd_bytes_are_escaped_and_the_command_can_be_pasted(tmp_path: Path, run, asked) -> None:
    image = unpack("corrupt/bitmap-inconsistent", tmp_path)
    raw, name = Raw.load(image), b"\x1b[2J\xff"
    at = raw.directory[0] + 24
    raw.data[at : at + len(name)] = name
    raw.save(image)
    text = name.decode("utf-8", "surrogateescape")
    status, out, _ = run("why", image, text)
    assert status == 4
    assert "\x1b" not in out
    assert "bitmap '\\x1b[2J\\xff' is not usable" in out
    [line] = [line.strip() for line in out.splitlines() if line.strip().startswith("qcow2bm remove ")]
    script = f"printf '%s\\0' {line}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.split(b"\0")[:-1]
    assert words == [b"qcow2bm", b"remove", str(image).encode(), name]
    _, document, _ = asked(image, text)
    assert document["bitmap"] == text
    assert document["ways-out"][-1]["command"] == ["qcow2bm", "remove", str(image), text]
    assert run("remove", image, text)[0] == 0  # what was printed is what works
    assert run("why", image, text)[0] == 1


# ---- for reading ----


def test_all_there_is_to_say(tmp_path: Path, run) -> None:
    image = unpack("in-use", tmp_path)
    status, out, err = run("why", image, "recording")
    assert (status, err) == (4, "")
    lines = out.splitlines()
    assert lines[0] == f"{image}: bitmap 'recording' is not usable"
    titles = [line.strip() for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert titles[:4] == ["why", "who wrote last", "ways out", "not here"]
    assert "    bitmap-inconsistent: bitmap 'recording' is marked in use, and nobody has the image open" in lines
    assert f"    qcow2bm repair {image} --in-use all-dirty --bitmap recording" in lines
    assert f"    qcow2bm remove {image} recording" in lines
    assert "      next backup a full one, with which a new bitmap starts" in lines
    assert "    - snapshot: the image has no internal snapshot" in lines


def test_a_bitmap_that_did_not_record(tmp_path: Path, asked) -> None:
    image = unpack("in-use", tmp_path)
    assert [one["message"] for one in asked(image, "kept")[1]["remarks"]] == [
        "it did not record when it was last stored"
    ]
    assert asked(image, "recording")[1]["remarks"] == []


def test_what_is_worth_knowing_about_a_usable_one(tmp_path: Path, run, asked) -> None:
    image = unpack("corrupt/bitmap-misses-overlay", tmp_path)
    status, document, _ = asked(image, "daily")
    assert (status, document["reasons"]) == (0, [])
    assert [one["code"] for one in document["remarks"]] == ["bitmap-misses-overlay"]
    out = run("why", image, "daily")[1]
    assert "bitmap 'daily' is usable\n\n  worth knowing\n    bitmap-misses-overlay: " in out


def test_other_problems_are_named(tmp_path: Path, run) -> None:
    image = unpack("office-week", tmp_path)
    raw = Raw.load(image)
    raw.data += bytes(-len(raw.data) % raw.cluster_size)
    raw.set_refcount(len(raw.data), 1)
    raw.data += bytes(raw.cluster_size)
    raw.save(image)
    status, out, _ = run("why", image, "mon")
    assert status == 0
    assert out.endswith("\n  elsewhere in the image (`qcow2bm check` has the details)\n    - leak\n")


# ---- what lies beside the image ----


def test_an_undo_file(tmp_path: Path, run, asked) -> None:
    """Of ours by its name: what it is good for, and whether anybody has written to the image since."""
    image = unpack("office-week", tmp_path)
    kept = tmp_path / "image.qcow2.qcow2bm-undo"
    assert run("remove", image, "mon", "--undo", kept)[0] == 0
    text = signs_of(asked(image, "tue")[1])["undo-file"]
    assert text.startswith("qcow2bm has changed the image, and nothing has written to it since: ")
    assert str(kept) in text
    os.utime(image)
    text = signs_of(asked(image, "tue")[1])["undo-file"]
    assert text.startswith("qcow2bm has changed the image: ")
    assert run("undo", image, kept, "--force")[0] == 0
    assert "put it back" in signs_of(asked(image, "tue")[1])["undo-file"]
    kept.write_bytes(b"something else")
    assert "cannot be used" in signs_of(asked(image, "tue")[1])["undo-file"]


def test_the_name_of_an_undo_file_is_the_one_that_a_repair_gives_it(tmp_path: Path) -> None:
    image = tmp_path / "vm[1]*.qcow2"
    image.touch()
    with closing(ImageFile.open(image)) as file:
        made = []
        for _ in range(3):
            made.append(session.default_undo(image))
            made[-1].touch()
        assert signs.undo_files(file) == sorted(made)


def test_a_journal(tmp_path: Path, asked) -> None:
    image = unpack("office-week", tmp_path)
    Path(f"{image}.qcow2bm-journal").touch()
    status, document, _ = asked(image, "mon")
    assert (status, document["state"], codes(document)) == (4, "ready", [None])
    assert "cut short" in signs_of(document)["journal"]
    assert [way["name"] for way in document["ways-out"]] == ["settle"]


# ---- read-only ----


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Of every file: digest, time of the last write, mode."""
    return {
        file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns, file.stat().st_mode)
        for file in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("name", "bitmap"),
    [
        ("office-week", "mon"),
        ("in-use", "kept"),
        ("detached", "full"),
        ("backing-chain", "daily"),
        ("data-file", "daily"),
        ("luks", "daily"),
        ("corrupt/bitmap-flags", "daily"),
    ],
)
def test_nothing_is_written_and_nothing_else_is_opened(
    name: str, bitmap: str, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = unpack(name, tmp_path)
    undo = path.with_name(path.name + UNDO_SUFFIX)
    assert run("disable", unpack("office-week", tmp_path / "other"), "sat", "--undo", tmp_path / "kept")[0] == 0
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "kept").rename(undo)
    path.chmod(0o444)
    undo.chmod(0o444)
    before = state(tmp_path)
    opened: set[tuple[str, int]] = set()
    real_open = os.open

    def spy(file, flags, *rest, **options) -> int:
        opened.add((os.fspath(file), flags & os.O_ACCMODE))
        return real_open(file, flags, *rest, **options)

    monkeypatch.setattr(os, "open", spy)
    assert run("why", path, bitmap)[0] in (0, 4)
    assert opened == {(str(path), os.O_RDONLY), (str(undo), os.O_RDONLY)}
    assert state(tmp_path) == before


def test_of_an_encrypted_image_nothing_can_be_compared(tmp_path: Path, asked) -> None:
    image = unpack("luks", tmp_path)
    raw = Raw.load(image)
    flags = raw.directory[0] + 12
    raw.put(flags, raw.number(flags, 4) | 1, 4)
    raw.save(image)
    document = asked(image, names_in(image)[0])[1]
    assert "encrypted" in {one["name"]: one["reason"] for one in document["left-out"]}["rebuild"]
    assert "rebuild" not in [way["name"] for way in document["ways-out"]]
