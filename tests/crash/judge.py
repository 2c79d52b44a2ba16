"""What a folder is worth after a power cut: the old state, the new one, or something that must not be."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import qcow2bm
from qcow2bm.errors import Qcow2bmError
from qcow2bm.format.header import Autoclear
from qcow2bm.image.file import ImageFile
from qcow2bm.image.image import settle_interrupted
from tests.support.qemu import QemuError, check, guest_digest, qemu_io, read_bitmaps
from tests.support.raw import Raw
from tests.support.states import Bitmaps, bitmaps

SOUND = (0, 3)
"""What `qemu-img check` may say of an image that was sound: nothing wrong, or leaked clusters."""

_REFUSED = 1
HARMLESS = ("leak", "bitmap-detached")
"""What a power cut may leave: clusters that nobody uses, the extension of bitmaps that do not count yet or any more."""


@dataclass(frozen=True)
class Truth:
    """All about an image that a change must keep or turn into what it is to be.

    Attributes:
        bitmaps: as qcow2bm reads them, or why it cannot.
        disk: digest of the disk as the mapping has it.
        damage: codes of what a check finds, but for what is harmless.
        status: what `qemu-img check` ends with.
        read: digest of the disk as QEMU reads it; only of the states before and after.
    """

    bitmaps: Bitmaps | str
    disk: str
    damage: frozenset[str]
    status: int
    read: str = ""

    @classmethod
    def of(cls, image: Path, secret: str | None, *, by_qemu: bool = False) -> Truth:
        """Read it all."""
        report = qcow2bm.check(image)
        damage = frozenset(finding.code for finding in report.findings if not finding.code.startswith(HARMLESS))
        status = check(image, secret)["returncode"]
        read = guest_digest(image, secret) if by_qemu and status != _REFUSED else ""
        return cls(_bitmaps(image), _disk(image), damage, status, read)


def _bitmaps(image: Path) -> Bitmaps | str:
    try:
        return bitmaps(image)
    except (Qcow2bmError, AssertionError) as error:
        return str(error)


def _disk(image: Path) -> str:
    """A digest of the disk, encrypted or not: what each range holds, not where."""
    digest = hashlib.sha256()
    try:
        with qcow2bm.open(image) as opened:
            size = opened.virtual_size
            digest.update(size.to_bytes(8, "big"))
            data = None if opened.data_file is None else image.with_name(opened.data_file).read_bytes()
            if data is not None:
                digest.update(data[:size].ljust(size, b"\0"))
                if opened.qcow2.header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA and len(data) < size:
                    return "the raw data file is shorter than the disk"
            for run in opened.runs():
                digest.update(f"{run.kind} {run.guest_offset} {run.length}".encode())
                if run.host_offset is not None and data is None:
                    digest.update(opened.qcow2.file.read_padded(run.host_offset, run.length))
    except Qcow2bmError as error:
        return str(error)
    return digest.hexdigest()


def settle(image: Path) -> None:
    """What the next command that opens the image for writing does first."""
    file = ImageFile.open(image, writable=True)
    try:
        settle_interrupted(file, writable=True)
    finally:
        file.close()
    assert not file.journal.exists()


class Judge:
    """Looks at what power cuts leave of one command on one image.

    Attributes:
        new: what the command makes of it.
    """

    def __init__(self, image: Path, secret: str | None, old: Truth, new: Truth) -> None:
        self._image = image
        self._secret = secret
        self._old = old
        self.new = new

    def verdict(self) -> str | None:
        """What is wrong with the image as it is in its folder now, after the next command has settled it; or None."""
        try:
            settle(self._image)
            found = Truth.of(self._image, self._secret)
        except Qcow2bmError as error:
            return f"cannot be opened: {error}"
        both = (self._old, self.new)
        if found.status not in (*SOUND, *(one.status for one in both)):
            return f"qemu-img check ends with {found.status}"
        if damage := found.damage - self._old.damage - self.new.damage:
            return f"damaged: {', '.join(sorted(damage))}"
        if (found.bitmaps, found.disk) not in [(one.bitmaps, one.disk) for one in both]:
            return "bitmaps and disk are not both old or both new"
        return None

    def verdict_of_qemu(self) -> str | None:
        """The same by QEMU's own reading, for a sample: it takes a hundred times as long."""
        if isinstance(self.new.bitmaps, str) or isinstance(self._old.bitmaps, str):
            return None  # QEMU cannot read those either
        ours = bitmaps(self._image)
        if read_bitmaps(self._image, secret=self._secret) != {name: list(ranges) for name, _, _, _, ranges in ours}:
            return "QEMU reads other bits"
        if guest_digest(self._image, self._secret) not in (self._old.read, self.new.read):
            return "QEMU reads another disk"
        return None

    def verdict_with_a_vm(self) -> str | None:
        """What is wrong if a VM uses what the power cut has left, before the next command of ours comes.

        QEMU must refuse it by the mark, or the next command must leave what the guest has made of it.
        """
        try:
            qemu_io(self._image, "write -P 119 32k 4k", secret=self._secret)
        except QemuError as error:
            raw = Raw.load(self._image)
            refuses = raw.is_marked or raw.number(72) & 2 or _REFUSED in (self._old.status, self.new.status)
            return None if refuses else f"a VM does not start: {error}"
        if Raw.load(self._image).number(72) & 2:
            return None  # damaged from the start: QEMU has found that out by itself, and says so by the same bit
        try:
            used = Truth.of(self._image, self._secret, by_qemu=True)
            settle(self._image)
            found = Truth.of(self._image, self._secret, by_qemu=True)
        except Qcow2bmError as error:
            return f"cannot be opened after a VM has used it: {error}"
        if found != used:
            return "the next command changes what a VM has left"
        if not (self._old.damage or self.new.damage) and found.status not in SOUND:
            return f"qemu-img check ends with {found.status} after a VM has used it"
        return None
