"""`qcow2bm check` as a user sees it: verdict, exit status, what is printed, and that nothing is written."""

from __future__ import annotations

import hashlib
import json
import os
from itertools import pairwise, permutations
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.checks.model import Severity
from qcow2bm.checks.problems import PROBLEMS
from tests.support.images import unpack
from tests.support.raw import Raw

CLUSTER = 64 << 10
LEAKS = 5


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack("office-week", tmp_path)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Of everything something: a corruption, an unusable bitmap, five leaks apart from each other, a warning."""
    path = unpack("corrupt/bitmap-inconsistent", tmp_path)
    raw = Raw.load(path)
    raw.put(raw.l2_entry(4), raw.number(raw.l2_entry(4)) & ~(1 << 63))  # the copied flag
    end = append_clusters(raw, 2 * LEAKS)
    for number in range(LEAKS):
        raw.set_refcount(end + 2 * number * CLUSTER, 1)
    raw.put(88, raw.number(88) | 1 << 40)  # an autoclear bit that nobody knows
    raw.save(path)
    return path


DAMAGE = {"copied-l2": 1, "bitmap-inconsistent": 1, "leak-unproven": LEAKS, "unknown-autoclear": 1}
"""What `damaged` has, the worst first."""


def append_clusters(raw: Raw, count: int) -> int:
    """Make the file longer by whole clusters; where the first of them begins."""
    raw.data += bytes(-len(raw.data) % CLUSTER)
    end = len(raw.data)
    raw.data += bytes(count * CLUSTER)
    return end


def checked(run, *words: str | Path) -> list[dict]:
    """The images of the JSON document."""
    images: list[dict] = json.loads(run("check", "--output", "json", *words)[1])["images"]
    return images


# ---- verdict and exit status ----


@pytest.mark.parametrize(
    ("name", "status", "verdict"),
    [
        ("office-week", 0, "clean"),
        ("corrupt/bitmaps-not-nested", 0, "clean"),
        ("corrupt/unknown-autoclear", 0, "clean"),
        ("corrupt/unknown-incompatible", 1, "cannot be judged"),
        ("corrupt/clusters-shared", 2, "corrupt"),
        ("corrupt/header-cluster-bits", 2, "corrupt"),
        ("corrupt/leak", 3, "leaked clusters, no harm to data"),
        ("corrupt/bitmap-inconsistent", 4, "a bitmap cannot be relied on; data and refcounts are fine"),
    ],
)
def test_verdict_and_exit_status(name: str, status: int, verdict: str, tmp_path: Path, run) -> None:
    path = unpack(name, tmp_path)
    got, out, err = run("check", path)
    assert (got, err) == (status, "")
    assert out.splitlines()[0] == f"{path}: {verdict}"
    assert out.endswith("\n")
    assert not out.endswith("\n\n")
    [document] = checked(run, path)
    assert document["status"] == status
    assert qcow2bm.check(path).exit_status == status


def test_what_is_no_qcow2_image(tmp_path: Path, run) -> None:
    (tmp_path / "raw").write_bytes(b"raw" * 1000)
    status, out, err = run("check", tmp_path / "raw")
    assert (status, out) == (63, "")
    assert err == f"qcow2bm: {tmp_path}/raw: not a qcow2 image; qcow2bm reads qcow2 and nothing else\n"
    assert run("check", tmp_path)[0] == 63
    assert run("check", "-f", "raw", tmp_path / "raw")[0] == 63


def test_an_image_in_use(image: Path, run) -> None:
    with qcow2bm.open(image, writable=True):
        status, out, err = run("check", image)
        assert (status, out) == (75, "")
        assert f"{image}: in use: " in err
    with qcow2bm.open(image):  # another reader is in nobody's way
        assert run("check", image)[0] == 0


def test_what_may_be_stale_is_said(image: Path, run) -> None:
    status, out, err = run("check", "-U", image)
    assert status == 0
    assert out.startswith(f"{image}: clean\n")
    assert err == f"qcow2bm: {image}: warning: read without keeping writers out: what is found may be stale\n"
    assert [checked(run, *words, image)[0]["stale"] for words in (["-U"], [])] == [True, False]


def test_usage(image: Path, run) -> None:
    assert run("check")[0] == 64
    assert run("check", image, "--max-findings", "-1")[0] == 64
    assert run("check", image, "--output", "yaml")[0] == 64


@pytest.fixture
def by_status(tmp_path: Path):
    """An image for each exit status, from good to bad; one of them is in use."""
    (tmp_path / "raw").write_bytes(b"raw" * 1000)
    images = {
        0: unpack("office-week", tmp_path / "0"),
        3: unpack("corrupt/leak", tmp_path / "3"),
        4: unpack("corrupt/bitmap-inconsistent", tmp_path / "4"),
        75: unpack("no-bitmaps", tmp_path / "75"),
        63: tmp_path / "raw",
        1: unpack("corrupt/unknown-incompatible", tmp_path / "1"),
        2: unpack("corrupt/clusters-shared", tmp_path / "2"),
    }
    with qcow2bm.open(images[75], writable=True):
        yield images


def test_of_several_images_the_worst_counts(by_status: dict[int, Path], run) -> None:
    for good, bad in pairwise(by_status):
        for pair in permutations((good, bad)):
            assert run("check", *(by_status[status] for status in pair))[0] == bad, pair


def test_each_image_is_judged_by_itself(by_status: dict[int, Path], run) -> None:
    """Those that cannot be checked hide nothing of the others, and each has its place in the document."""
    status, out, err = run("check", *by_status.values())
    assert status == 2
    for number, path in by_status.items():
        assert (f"\n{path}: " in f"\n{out}") == (number not in (75, 63))
        assert (f"qcow2bm: {path}: " in err) == (number in (75, 63))
    documents = checked(run, *by_status.values())
    assert [(one["image"], one["status"]) for one in documents] == [(str(p), s) for s, p in by_status.items()]
    assert [one["status"] for one in documents if "error" in one] == [75, 63]


# ---- for reading ----


def test_worst_first_with_meaning_and_advice(damaged: Path, run) -> None:
    status, out, err = run("check", damaged)
    assert (status, err) == (2, "")
    places = []
    for code, count in DAMAGE.items():
        problem = PROBLEMS[code]
        head = f"\n  {problem.severity.value} {code}" + (f" ({count})" if count > 1 else "") + f": {problem.title}\n"
        places.append(out.index(head))
        section = out[places[-1] :].split("\n\n")[0]
        assert f"\n    means: {problem.meaning}\n    do:    {problem.advice}" in section
    assert places == sorted(places)
    assert "\n  allocated      2 of 16 clusters (12.5 %), 0 % fragmented, 0 % compressed\n" in out
    assert "\n    daily        128 KiB\n" in out


def test_of_many_findings_three_are_shown_and_all_are_counted(damaged: Path, run) -> None:
    section = (
        run("check", damaged)[1]
        .partition("  leak leak-unproven (5): unreferenced clusters while part of the image cannot be followed\n")[2]
        .splitlines()
    )
    shown = [line for line in section if "refcount 1, but 0 references" in line]
    assert section[:3] == shown
    assert section[3] == "    and 2 more"


def test_a_run_of_clusters_is_one_finding(tmp_path: Path, run) -> None:
    """Its clusters are shown, so none of them is left over."""
    path = unpack("corrupt/leak", tmp_path)
    raw = Raw.load(path)
    end = append_clusters(raw, 7)
    for number in range(7):
        raw.set_refcount(end + number * CLUSTER, 1)
    raw.save(path)
    out = run("check", path)[1]
    assert "leak leak (8): leaked clusters\n    8 clusters at 0x70000: refcount 1" in out
    assert "more" not in out
    assert [finding["count"] for finding in checked(run, path)[0]["findings"]] == [8]


def test_owners(tmp_path: Path, run) -> None:
    """Of clusters with two owners they are always told, of others if asked for."""
    shared = unpack("corrupt/bitmap-clusters-shared", tmp_path / "shared")
    out = run("check", shared)[1]
    assert "      used by the data of bitmap 'monday'\n      used by the data of bitmap 'friday'\n" in out
    low = unpack("corrupt/refcount-too-low", tmp_path / "low")
    assert "used by" not in run("check", low)[1]
    out = run("check", "--owners", low)[1]
    assert [line.strip() for line in out.splitlines() if "used by" in line] == [
        f"used by guest data at {place:#x}" for place in (0x40000, 0x50000, 0x60000)
    ]
    assert [finding["owners"] for finding in checked(run, low)[0]["findings"]] == [None]
    assert [len(finding["owners"]) for finding in checked(run, "--owners", low)[0]["findings"]] == [3]


def test_what_could_not_be_checked_is_said(tmp_path: Path, run) -> None:
    path = unpack("corrupt/snapshot-table-size", tmp_path)
    assert "\n  part of the image could not be checked: see below\n" in run("check", path)[1]
    assert not checked(run, path)[0]["complete"]


# ---- how many findings ----


def test_json_counts_everything(damaged: Path, run) -> None:
    [document] = checked(run, damaged)
    assert document["counts"] == DAMAGE
    assert document["severities"] == {
        "corruption": 1, "unknown": 0, "bitmap": 1, "leak": LEAKS, "warning": 1, "hint": 0,
    }  # fmt: skip
    assert document["verdict"] == "corruption"
    assert sorted({finding["code"] for finding in document["findings"]}) == sorted(DAMAGE)
    assert document["findings-dropped"] == 0


def test_no_findings_but_all_counts(damaged: Path, run) -> None:
    [document] = checked(run, "--max-findings", "0", damaged)
    assert document["findings"] == []
    assert document["counts"] == DAMAGE
    assert document["findings-dropped"] == sum(DAMAGE.values())
    assert document["status"] == 2
    status, out, _ = run("check", "--max-findings", "0", damaged)
    assert status == 2
    assert (
        "  leak leak-unproven (5): unreferenced clusters while part of the image cannot be followed\n"
        "    and 5 more\n    means: " in out
    )


def test_one_finding_of_each_problem(damaged: Path, run) -> None:
    """A flood of one problem does not push the others out, whatever comes first in the check."""
    [document] = checked(run, "--max-findings", "1", damaged)
    assert sorted(finding["code"] for finding in document["findings"]) == sorted(DAMAGE)
    assert document["counts"] == DAMAGE
    assert document["findings-dropped"] == LEAKS - 1
    out = run("check", "--max-findings", "1", damaged)[1]
    assert out.count("refcount 1, but 0 references") == 1
    assert "\n    and 4 more\n" in out


@pytest.mark.parametrize("name", ["internal-snapshots", "luks", "granularities", "corrupt/bitmap-name-duplicate"])
def test_clusters_of_each_kind_are_those_of_info(name: str, tmp_path: Path, run) -> None:
    path = unpack(name, tmp_path)
    usage = json.loads(run("info", "--output", "json", path)[1])["usage"]
    assert {kind: size for kind, size in checked(run, path)[0]["allocation"]["bytes"].items() if size} == {
        kind: size for kind, size in usage.items() if size
    }


# ---- names ----


def rename_first_bitmap(path: Path, old: bytes, new: bytes) -> None:
    """Overwrite a name by another one of the same length."""
    raw = Raw.load(path)
    name = slice(raw.directory[0] + 24, raw.directory[0] + 24 + len(new))
    assert raw.data[name] == old
    raw.data[name] = new
    raw.save(path)


def test_names_are_escaped_and_survive_json(tmp_path: Path, run) -> None:
    """A bitmap's name, a snapshot's and the image's own could otherwise drive the terminal."""
    path = unpack("corrupt/bitmap-inconsistent", tmp_path).rename(tmp_path / "\x1b]2;x\n.qcow2")
    rename_first_bitmap(path, b"daily", b"\x1b[2J\xff")
    out = run("check", path)[1]
    assert "\x1b" not in out
    assert out.startswith(f"{tmp_path}/\\x1b]2;x\\n.qcow2: a bitmap cannot be relied on")
    assert "bitmap '\\x1b[2J\\xff' is marked in use" in out
    assert "\n    \\x1b[2J\\xff  128 KiB\n" in out
    status, out, _ = run("check", "--output", "json", path)
    assert status == 4
    assert out.isascii()
    [document] = json.loads(out)["images"]
    assert document["image"] == str(path)
    assert document["findings"][0]["location"]["bitmap"] == "\x1b[2J\udcff"
    assert document["allocation"]["bitmaps"] == [{"name": "\x1b[2J\udcff", "bytes": 2 * CLUSTER}]


def test_owners_are_escaped(tmp_path: Path, run) -> None:
    path = unpack("corrupt/bitmap-clusters-shared", tmp_path)
    rename_first_bitmap(path, b"monday", b"\x1b[31m\n")
    status, out, _ = run("check", path)
    assert status == 2
    assert "\x1b" not in out
    assert "used by the data of bitmap '\\x1b[31m\\n'\n" in out


def test_a_snapshots_name_is_escaped(tmp_path: Path, run) -> None:
    path = unpack("corrupt/snapshot-id", tmp_path)
    raw = Raw.load(path)
    entry = raw.number(64)
    for _ in range(2):  # both have the same id
        extra, identity, name = raw.number(entry + 36, 4), raw.number(entry + 12, 2), raw.number(entry + 14, 2)
        raw.data[entry + 40 + extra] = 0x1B
        entry += -(-(40 + extra + identity + name) // 8) * 8
    raw.save(path)
    status, out, _ = run("check", path)
    assert status == PROBLEMS["snapshot-id"].severity.exit_status
    assert "snapshot 1 has the id \\x1b of another" in out


# ---- progress ----


def test_progress_goes_to_stderr_if_asked_for(image: Path, run) -> None:
    quiet = run("check", image)
    assert quiet[2] == ""  # no terminal
    assert run("check", "--no-progress", image) == quiet
    status, out, err = run("check", "--progress", image)
    assert (status, out) == quiet[:2]
    assert err.startswith("\r[")
    assert "100%" in err
    assert err.endswith("\r\x1b[K")  # it clears itself
    _, out, _ = run("check", "--progress", "--output", "json", image)
    assert json.loads(out)["images"][0]["verdict"] == "clean"


# ---- read-only ----


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Of every file: digest, time of the last write, mode."""
    return {
        file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns, file.stat().st_mode)
        for file in folder.iterdir()
    }


@pytest.mark.parametrize(
    "name",
    [
        *("office-week", "luks", "backing-chain", "data-file", "detached", "in-use"),
        *("corrupt/marked-dirty", "corrupt/marked-corrupt", "corrupt/leak", "corrupt/copied-l2"),
    ],
)
def test_nothing_is_written_and_nothing_else_is_opened(name: str, tmp_path: Path, run, monkeypatch) -> None:
    """Not a byte, not a flag, no file beside it; of a write-protected file too."""
    path = unpack(name, tmp_path)
    path.chmod(0o444)
    before = state(tmp_path)
    opened: list[tuple[str, int]] = []
    real_open = os.open

    def spy(file, flags, *rest, **options) -> int:
        opened.append((os.fspath(file), flags & os.O_ACCMODE))
        return real_open(file, flags, *rest, **options)

    monkeypatch.setattr(os, "open", spy)
    for words in (["check"], ["check", "--owners", "-U"], ["qemu-img", "check"]):
        assert run(*words, path)[0] in range(5)
    assert opened == [(str(path), os.O_RDONLY)] * 3
    assert state(tmp_path) == before


# ---- the Python API ----


def test_the_api_says_what_the_command_says(damaged: Path, run) -> None:
    [document] = checked(run, damaged)
    report = qcow2bm.check(damaged, limit=None)
    assert dict(report.counts) == document["counts"]
    assert report.worst is Severity.CORRUPTION
    assert [finding.message for finding in report.findings] == [one["message"] for one in document["findings"]]
    assert report.complete
    assert report.locked
    assert report.dropped == 0
