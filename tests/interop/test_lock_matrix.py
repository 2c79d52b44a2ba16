"""The matrix of locks: each program of QEMU that has an image open, against each command as a user types it.

The rows are `HOLDERS`, with the bytes that each has locked, so that a QEMU that locks others shows here first. The
columns are the groups of commands below. Beside the drop-in stands the real qemu-img, in the same place.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

import qcow2bm
from qcow2bm import __main__
from qcow2bm.cli.app import COMMANDS
from tests.support.holders import HOLDERS, Holder, Kind, locked_bytes, unlocked_daemon, wait_for_locks
from tests.support.qemu import QemuError, qemu_img, qemu_io

IN_USE = 75

READING = (
    "info {image}",
    "list {image}",
    "show {image} weekly",
    "check {image}",
    "dump {image}",
    "estimate {image}",
    "export {image} {folder}/new-export",
    "why {image} weekly",
)
COMPARING = (
    "diff {folder}/older.raw {image}",
    "prove {image} weekly --against {folder}/older.raw",
    "resize {image} +1M --dry-run",
)
"""These read the guest's data, and so the backing chain."""

FORCED = (
    "info {image} -U",
    "list {image} -U",
    "show {image} weekly -U",
    "check {image} -U",
    "dump {image} -U",
    "estimate {image} -U",
)
CHANGING = (
    "add {image} new",
    "remove {image} weekly",
    "clear {image} weekly",
    "disable {image} weekly",
    "enable {image} weekly",
    "rename {image} weekly monthly",
    "set {image} weekly --range 0+64k",
    "unset {image} weekly --range 0+64k",
    "resample {image} weekly -g 128k",
    "invert {image} weekly",
    "merge {image} weekly daily",
    "copy {image}#weekly {image}#twin",
    "copy {folder}/other.qcow2#daily {image}#taken",
    "import {image} {folder}/exported --merge",
    "resize {image} +1M",
    "rebuild {image} weekly --against {folder}/older.raw",
    "diff {folder}/older.raw {image} --into {image}#differs",
    "repair {image} --yes",
    "check {image} -r all",
    "undo {image} {folder}/undo",
    "undo {image} {folder}/undo --bitmap weekly",
)
DRY = (
    "add {image} new --dry-run",
    "remove {image} weekly --dry-run",
    "repair {image} --dry-run",
    "copy {folder}/other.qcow2#daily {image}#taken --dry-run",
)
DROP_IN = (
    "check -f qcow2 {image}",
    "check --output=json -f qcow2 {image}",
    "check -U -f qcow2 {image}",
    "bitmap --merge daily -b {image} -F qcow2 -f qcow2 {folder}/{tool}.qcow2 daily",
    "check -U -r all -f qcow2 {image}",
    "bitmap --add -f qcow2 {image} {tool}",
    "bitmap --disable -f qcow2 {image} weekly",
    "bitmap --remove -f qcow2 {image} {tool}",
    "bitmap --merge daily -f qcow2 {image} weekly",
    "bitmap --merge daily -b {folder}/other.qcow2 -F qcow2 -f qcow2 {image} weekly",
    "check -r leaks -f qcow2 {image}",
    "check -r all -f qcow2 {image}",
)


class Said(NamedTuple):
    """What came of a command."""

    status: int
    out: str
    err: str


class Place:
    """A folder with an image in it, and what the commands want beside it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.image, self._capsys = folder, folder / "image.qcow2", capsys

    def fill(self) -> None:
        """Make everything."""
        for name in ("image", "other", "qcow2bm", "qemu-img"):
            path = self.folder / f"{name}.qcow2"
            qemu_img("create", "-q", "-f", "qcow2", path, "64M")
            qemu_img("bitmap", "--add", path, "daily")
        qemu_io(self.image, "write 1M 64k")
        with (self.folder / "older.raw").open("wb") as older:
            older.truncate(64 << 20)
        assert self.typed("export {image} {folder}/exported").status == 0
        assert self.typed("merge {image} weekly daily --create --undo {folder}/undo").status == 0

    def words(self, line: str, tool: str = "qcow2bm") -> list[str]:
        return [word.format(image=self.image, folder=self.folder, tool=tool) for word in line.split()]

    def typed(self, line: str) -> Said:
        """One command of ours."""
        self._capsys.readouterr()
        status = __main__.main(self.words(line))
        return Said(status, *self._capsys.readouterr())

    def dropped_in(self, line: str) -> tuple[Said, Said]:
        """One of the drop-in's, and of the real qemu-img, both under one name."""
        ours = self.typed(f"qemu-img {line}")
        done = qemu_img(*self.words(line, "qemu-img"), check=False)
        theirs = Said(done.returncode, done.stdout, done.stderr.replace("qemu-img: ", "qcow2bm: "))
        return ours, theirs


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all others are copies of."""
    return tmp_path_factory.mktemp("pattern")


@pytest.fixture
def place(pattern: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    def hand_over(*_: object) -> NoReturn:
        raise AssertionError("handed over to the real qemu-img")

    monkeypatch.setattr(os, "execv", hand_over)
    if not (pattern / "undo").exists():
        Place(pattern, capsys).fill()
    shutil.copytree(pattern, tmp_path, dirs_exist_ok=True)
    return Place(tmp_path, capsys)


def rows(*kinds: Kind, answering: bool = False) -> list[Holder]:
    """The holders of these kinds; `answering` leaves out those whose image has a backing file that never answers."""
    return [holder for holder in HOLDERS if holder.kind in kinds and not (answering and holder.waits_for_backing)]


def require_refused(said: Said, image: Path, pid: int, doing: str) -> None:
    """Status 75, nothing on stdout, and who it is."""
    assert said.status == IN_USE, said
    assert said.out == ""
    assert said.err.startswith(f"qcow2bm: {image}: in use: pid {pid} (qemu-")
    assert f") {doing}; " in said.err


def test_every_command_is_a_column() -> None:
    columns = {line.split()[0] for line in (*READING, *COMPARING, *CHANGING)}
    assert columns == set(COMMANDS) - {"explain"}, "which opens no image"


def test_there_is_a_row_of_each_kind() -> None:
    assert {holder.kind for holder in HOLDERS} == set(Kind) - {Kind.UNSEEN}


@pytest.mark.parametrize("holder", rows(Kind.WRITES), ids=str)
def test_beside_a_writer(holder: Holder, place: Place) -> None:
    """Nothing but -U gets in; every refusal names the writer, and leaves the file as it is."""
    with holder.has(place.image) as pid:
        wait_for_locks(pid, place.image, holder.kind.value)
        before = place.image.read_bytes()
        for line in (*READING, *COMPARING, *CHANGING, *DRY):
            said = place.typed(line)
            if line.startswith("why"):
                assert (said.status, f"pid {pid} (qemu-" in said.out) == (IN_USE, True)
            else:
                require_refused(said, place.image, pid, "has it open for writing")
        for line in FORCED:
            said = place.typed(line)
            assert (said.status, "may be stale" in said.err) == (0, True), said
        assert not (place.folder / "new-export").exists()
        assert place.image.read_bytes() == before
        assert locked_bytes(os.getpid(), place.image) == frozenset()
        assert locked_bytes(pid, place.image) == holder.kind.value
    assert place.typed("add {image} later").status == 0


@pytest.mark.parametrize("holder", rows(Kind.READS, Kind.LOOKS_IN), ids=str)
def test_beside_a_reader(holder: Holder, place: Place) -> None:
    """Readers get on with each other, by force or not; nobody writes under a reader's eyes."""
    with holder.has(place.image) as pid:
        wait_for_locks(pid, place.image, holder.kind.value)
        before = place.image.read_bytes()
        for line in (*READING, *DRY, *(() if holder.waits_for_backing else COMPARING), *FORCED):
            said = place.typed(line)
            assert said.status == 0, (line, said)
            assert ("may be stale" in said.err) == line.endswith("-U")
        for line in CHANGING:
            require_refused(place.typed(line), place.image, pid, "is reading it")
        assert place.image.read_bytes() == before
        assert locked_bytes(os.getpid(), place.image) == frozenset()
        assert locked_bytes(pid, place.image) == holder.kind.value
    assert place.typed("add {image} later").status == 0


@pytest.mark.parametrize("holder", rows(Kind.WRITES, Kind.READS, answering=True), ids=str)
def test_the_drop_in_gets_in_where_qemu_img_does(holder: Holder, place: Place) -> None:
    """Status and words are those of the real one."""
    with holder.has(place.image) as pid:
        wait_for_locks(pid, place.image, holder.kind.value)
        for line in DROP_IN:
            ours, theirs = place.dropped_in(line)
            assert ours == theirs, line
            gets_in = line.startswith("check -U -f") or (holder.kind is Kind.READS and line in DROP_IN[:4])
            assert (ours.status == 0) == gets_in, line


def test_the_drop_in_alone_differs_where_somebody_looks_in(place: Place) -> None:
    """QEMU writes while `check -U` reads, which then sees a change half done; ours waits until it is gone."""
    holder = next(holder for holder in HOLDERS if holder.name == "io -U")
    with holder.has(place.image) as pid:
        wait_for_locks(pid, place.image, holder.kind.value)
        for line in DROP_IN[:5]:
            ours, theirs = place.dropped_in(line)
            assert ours == theirs, line
        for line in DROP_IN[5:]:
            ours, theirs = place.dropped_in(line)
            assert (ours.status, theirs.status) == (1, 0), line
            assert ours.err.splitlines() == [
                f"qcow2bm: Could not open '{place.image}': Failed to get \"write\" lock",
                f"Is another process using the image [{place.image}]?",
            ]


@pytest.mark.parametrize("writable", [True, False])
def test_the_drop_in_beside_one_of_us(writable: bool, place: Place) -> None:
    """What keeps the real qemu-img out keeps the drop-in out, also by force."""
    with qcow2bm.open(place.image, writable=writable):
        for line in DROP_IN:
            ours, theirs = place.dropped_in(line)
            assert ours.status == theirs.status, line
            if ours.status:
                assert ("Failed to get " in ours.err) == ("Failed to get " in theirs.err), line


@pytest.mark.parametrize("holder", rows(Kind.WRITES, Kind.READS, Kind.LOOKS_IN, answering=True), ids=str)
def test_no_lock_asks_nobody(holder: Holder, place: Place) -> None:
    """The user answers for it: neither refused nor seen. What a VM makes of it at its end is its own."""
    with suppress(QemuError), holder.has(place.image) as pid:
        wait_for_locks(pid, place.image, holder.kind.value)
        for line in (
            "add {image} new --dry-run --no-lock",
            "add {image} new --no-lock",
            "repair {image} --yes --no-lock",
        ):
            said = place.typed(line)
            assert said.status in (0, 4), said
            assert "in use" not in said.err
            assert "no locks" not in said.err


def test_a_writer_without_locks_cannot_be_seen(place: Place) -> None:
    """`locking=off`: QEMU's own programs do not see it either, so this is said in the documents and nowhere else."""
    with suppress(QemuError), unlocked_daemon(place.image) as pid:
        assert locked_bytes(pid, place.image) == Kind.UNSEEN.value
        assert qcow2bm.who_holds(place.image) == []
        assert place.typed("info {image}").status == 0
        assert place.typed("add {image} unseen").status == 0
        for line in (
            "check -U -f qcow2 {image}",
            "bitmap --add -f qcow2 {image} {tool}",
            "check -r all -f qcow2 {image}",
        ):
            ours, theirs = place.dropped_in(line)
            assert (ours.status, theirs.status) == (0, 0), line


def test_the_documents_say_who_cannot_be_seen() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "how-it-writes.md").read_text()
    assert "locking=off" in text
