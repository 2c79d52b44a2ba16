"""What becomes of a damaged image in a repair of ours at each class of risk, and in `qemu-img check -r all`."""

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import qcow2bm
from qcow2bm.checks.model import RepairClass
from qcow2bm.checks.problems import NOT_ITS_OWN
from qcow2bm.errors import Qcow2bmError

CLASSES = (RepairClass.LOSSLESS, RepairClass.LOSSY, RepairClass.GUESS)
BADNESS = {0: 0, 3: 0, 2: 1, 1: 2, 63: 2}
"""Exit statuses of `qemu-img check` from good to bad; leaks harm nobody."""
GAVE_UP = 99
"""For a status: killed by a signal, or still at work after a minute."""

Bitmaps = dict[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Outcome:
    """An image after a repair.

    Attributes:
        status: of `qemu-img check`; `GAVE_UP` if the repair did not come to an end.
        data: digest of what the guest reads, if QEMU could read all of it.
        bitmaps: the dirty ranges of the bitmaps in good order.
        guest_concerned: the repair said that it gives up or guesses guest data.
        refused: why there was no repair.
    """

    status: int
    data: str | None
    bitmaps: Bitmaps | None
    guest_concerned: bool = False
    refused: str | None = None
    bitmaps_doubtful: bool = False

    def is_worse_than(self, before: "Outcome") -> bool:
        """True if QEMU thinks worse of it, or cannot read what it could."""
        worse = BADNESS.get(self.status, 3) > BADNESS.get(before.status, 3)
        return worse or (before.data is not None and self.data is None)

    def changed_data(self, before: "Outcome") -> bool:
        """True if the guest reads other data without having been told."""
        return None not in (before.data, self.data) and before.data != self.data and not self.guest_concerned

    def lost_bitmaps(self, before: "Outcome") -> list[str]:
        """Bitmaps that were in good order and are not what they were.

        Where something else uses a bitmap's clusters nobody knows its bits: there it may go, or say more is dirty.
        Where guest data was given up, a bitmap must say so.
        """
        if not before.bitmaps:
            return []
        now = self.bitmaps or {}
        gone = [] if before.bitmaps_doubtful else [name for name in before.bitmaps if name not in now]
        may_grow = before.bitmaps_doubtful or self.guest_concerned
        changed = [
            name
            for name, ranges in before.bitmaps.items()
            if name in now and now[name] != ranges and not (may_grow and _covers(now[name], ranges))
        ]
        return gone + changed


def _run(*argv: str | Path) -> int:
    try:
        done = subprocess.run(argv, capture_output=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return GAVE_UP
    return GAVE_UP if done.returncode < 0 else done.returncode


def _data(image: Path) -> str | None:
    raw = image.with_suffix(".raw")
    if _run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw):
        return None
    with raw.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bitmaps(image: Path) -> Bitmaps | None:
    try:
        with qcow2bm.open(image) as opened:
            ready = [bitmap for bitmap in opened.bitmaps if bitmap.state is qcow2bm.State.READY]
            return {bitmap.name: tuple((e.offset, e.length) for e in bitmap.extents()) for bitmap in ready}
    except Qcow2bmError:
        return None


def _covers(ranges: tuple[tuple[int, int], ...], wanted: tuple[tuple[int, int], ...]) -> bool:
    return all(
        any(start <= offset and offset + length <= start + extent for start, extent in ranges)
        for offset, length in wanted
    )


def look(image: Path, *, guest_concerned: bool = False, refused: str | None = None) -> Outcome:
    """An image as it is."""
    status = _run("qemu-img", "check", "-q", "-f", "qcow2", image)
    try:
        doubtful = not qcow2bm.check(image).counts.keys().isdisjoint(NOT_ITS_OWN)
    except Qcow2bmError:
        doubtful = False
    return Outcome(status, _data(image), _bitmaps(image), guest_concerned, refused, doubtful)


def ours(image: Path, allow: RepairClass) -> Outcome:
    """Repair a copy of an image."""
    copy = Path(shutil.copy(image, image.with_name("ours.qcow2")))
    before = hashlib.sha256(copy.read_bytes()).digest()
    try:
        with qcow2bm.repairing(copy, qcow2bm.RepairPolicy(allow=allow)) as repair:
            concerned = any(step.guest for step in repair.plan.steps)
            changed = bool(repair.plan.steps)
            report = repair.commit(undo=image.with_name("undo"))
    except Qcow2bmError as error:
        return look(copy, refused=error.message)
    assert dict(report.counts) == dict(repair.plan.after.counts), "the plan foretold something else"
    outcome = look(copy, guest_concerned=concerned)
    if changed:
        qcow2bm.undo(copy, image.with_name("undo"), force=True)  # QEMU's looking may have touched the time stamp
        image.with_name("undo").unlink()
    assert hashlib.sha256(copy.read_bytes()).digest() == before, "undo must bring back every byte"
    return outcome


def theirs(image: Path) -> Outcome:
    """Let QEMU repair a copy of an image, with what a process may take bounded."""
    copy = Path(shutil.copy(image, image.with_name("theirs.qcow2")))
    command = ("prlimit", "--fsize=1073741824", "qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", copy)
    gave_up = _run(*command) == GAVE_UP
    outcome = look(copy)
    return Outcome(GAVE_UP, outcome.data, outcome.bitmaps) if gave_up else outcome
