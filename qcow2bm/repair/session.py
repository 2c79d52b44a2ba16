"""A repair as the command line and the API see it: open, plan, write."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks.model import Report
from ..checks.runner import check_file
from ..checks.view import Progress
from ..errors import naming
from ..image.commit import carry_out
from ..image.file import UNDO_SUFFIX, ImageFile
from ..image.image import settle_interrupted, take_locks
from ..image.overlay import OverlayFile
from ..image.plan import Plan
from .model import RepairPlan, RepairPolicy
from .runner import Ask, work_out

if TYPE_CHECKING:
    from ..image.undo import Settled


@dataclass(slots=True)
class Repair:
    """An image that is open for repair, and the plan.

    Attributes:
        settled: what opening did with the journal that a crash had left; None if there was none.
        locked: False if no lock protects what is read: it may be stale.
    """

    file: ImageFile
    plan: RepairPlan
    settled: Settled | None
    locked: bool

    @property
    def rolled_back(self) -> bool:
        """True if a change that a crash had cut short was undone first."""
        return self.settled is not None and self.settled.rolled_back

    def commit(self, *, undo: str | os.PathLike[str] | None, progress: Progress | None = None) -> Report:
        """Carry the plan out, all of it or nothing; returns what a check of the image finds then.

        Args:
            undo: keep what is replaced in this file, which must not exist yet.

        Raises:
            Qcow2bmError: as `qcow2bm.image.commit.commit`.
        """
        if not self.plan.plan:
            return self.plan.after
        with naming(self.file.path):
            carry_out(self.file, self.plan.plan, undo=None if undo is None else Path(undo), progress=progress)
            return check_file(self.file)

    @property
    def fingerprint(self) -> str:
        """What tells this plan for this state of the image from any other: SHA-256 over both."""
        with naming(self.file.path):
            status = os.fstat(self.file.fd)
            state = f"{self.file.size} {0 if self.file.is_device else status.st_mtime_ns}"
            return _fingerprint(self.plan.plan, state)


def _fingerprint(plan: Plan, state: str) -> str:
    digest = hashlib.sha256(f"{state} {plan.size_before} {plan.size_after}".encode())
    for write in plan.writes():
        digest.update(f"\n{write.offset} {write.length}\n".encode())
        digest.update(write.old or b"")
        digest.update(write.read())
    return digest.hexdigest()


@contextlib.contextmanager
def repairing(
    path: str | os.PathLike[str],
    policy: RepairPolicy | None = None,
    *,
    writable: bool = True,
    use_locks: bool = True,
    ask: Ask = lambda _: True,
    progress: Progress = lambda _done, _total: None,
) -> Iterator[Repair]:
    """Open an image for repair and work the repair out; nothing is written before `Repair.commit`.

    Args:
        policy: what the repair may do; all that is lossless if there is none.
        writable: False opens the image as a reader, to see what would be done.
        use_locks: False takes no locks: the caller knows that no VM runs.
        ask: is asked about every step that the policy allows.

    Raises:
        NotQcow2Error, UnsupportedVersionError: nothing that can be repaired here.
        InUseError: another process has the image open.
        LockingUnavailableError: the file system has no locks.
        InterruptedChangeError: a change was cut short, and the image is opened as a reader's.
        UndoError: the journal of such a change is damaged, or the image is not as the crash left it.
    """
    with contextlib.closing(ImageFile.open(path, writable=writable)) as file:
        with naming(file.path):
            locked = use_locks and take_locks(file, writable=writable, force_share=False)
            settled = settle_interrupted(file, writable=writable)
        with contextlib.closing(OverlayFile(file)) as overlay:
            with naming(file.path):
                plan = work_out(overlay, policy or RepairPolicy(), ask=ask, progress=progress)
            yield Repair(file, plan, settled, locked)  # what fails with the caller is not about the image


def plan_repair(path: str | os.PathLike[str], policy: RepairPolicy | None = None) -> RepairPlan:
    """What a repair would do, for reading: nothing is written. Raises as `repairing`."""
    with repairing(path, policy, writable=False) as session:
        return session.plan


def default_undo(path: Path) -> Path:
    """A name for the undo file beside an image that no file has yet."""
    real = path.resolve()
    candidate = real.with_name(real.name + UNDO_SUFFIX)
    number = 1
    while os.path.lexists(candidate):
        number += 1
        candidate = real.with_name(f"{real.name}{UNDO_SUFFIX}-{number}")
    return candidate
