"""Damaged images, and the states in which a crash leaves them in the middle of a command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qcow2bm.__main__ import main
from tests.crash.disk import Folder
from tests.crash.recorder import recorded
from tests.support.qemu import qemu_img, qemu_io
from tests.support.raw import OFFSET, Raw
from tests.support.scenes import three

JOURNAL = "image.qcow2.qcow2bm-journal"


def damage(image: Path) -> None:
    """Refcounts and a flag are missing: mending them is a change in place, in more than one sector."""
    raw = Raw.load(image)
    for offset in (raw.number(40), raw.number(raw.number(40)) & OFFSET):
        raw.set_refcount(offset, 0)
    raw.put(raw.number(40), raw.number(raw.number(40)) & OFFSET)
    raw.save(image)


def damaged(folder: Path, version: int = 3) -> Path:
    """A damaged image: with three bitmaps, or of version 2, which has none."""
    if version == 3:
        image = three(folder)
    else:
        image = folder / "image.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", image, "4M")
        qemu_io(image, "write -P 1 1M 128k")
    damage(image)
    return image


def cut_short(image: Path, *words: str) -> Iterator[Folder]:
    """The folder after each write of a command to the image, as long as it is in progress."""
    before = Folder.read(image.parent)
    with recorded(image.parent) as ops:
        assert main([words[0], str(image), *words[1:]]) in (0, 3)
    own = before.names[image.name]
    places = [place + 1 for place, op in enumerate(ops) if op.kind == "write" and op.file == own]
    for place in places:
        yield before.after(ops[:place])


def is_open_to_qemu(image: Path) -> bool:
    return not Raw.load(image).is_marked
