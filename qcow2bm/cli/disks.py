"""Disks on the command line that are only read: their formats, their data files, and a bar while they are compared."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ..errors import InUseError, UndoError, UsageError
from .output import warn
from .reading import warn_unlocked
from .references import same_file

if TYPE_CHECKING:
    from ..chain.disk import Disk  # loads numpy
    from ..chain.opening import Rules
    from ..image.image import Qcow2Image
    from .change import How


class DiskFormat(StrEnum):
    """Formats that are read."""

    RAW = "raw"
    QCOW2 = "qcow2"


class DataFile(NamedTuple):
    """An external data file, and the image it belongs to; None for the one that the command is about."""

    image: Path | None
    path: Path


def parse_data_file(text: str) -> DataFile:
    """`IMAGE=PATH`, or `PATH` alone. Names may hold a `=` themselves: what is there as files tells what is meant."""
    splits = [DataFile(Path(text[:place]), Path(text[place + 1 :])) for place, char in enumerate(text) if char == "="]
    alone = DataFile(None, Path(text))
    if not splits or (alone.path.exists() and not any(_exists(one) for one in splits)):
        return alone
    return next(
        (one for one in splits if _exists(one)), next((one for one in splits if _is_file(one.image)), splits[0])
    )


def _exists(file: DataFile) -> bool:
    return _is_file(file.image) and _is_file(file.path)


def _is_file(path: Path | None) -> bool:
    return path is not None and path.exists() and not path.is_dir()


AgainstOption = Annotated[
    Path,
    typer.Option(
        "--against", metavar="BASE", show_default=False,
        help="The disk exactly as it was when the bitmap began: raw, or qcow2 with its chain.",
    ),
]  # fmt: skip
AgainstFormatOption = Annotated[
    DiskFormat | None,
    typer.Option(
        "--against-format", show_default=False,
        help="The format of BASE. Only a name that ends in .qcow2, or what cannot be anything but raw, needs none.",
    ),
]  # fmt: skip
DataFilesOption = Annotated[
    list[DataFile] | None,
    typer.Option(
        "--data-file", metavar="IMAGE=PATH", parser=parse_data_file, show_default=False,
        help="The external data file of an image of either chain; without IMAGE= that of the image itself.",
    ),
]  # fmt: skip
DiskOption = Annotated[
    Path | None,
    typer.Option(
        "--disk", metavar="RAW", show_default=False,
        help="Where IMAGE or its backing file is encrypted: a decrypted raw copy or device of its disk, as it is now.",
    ),
]  # fmt: skip


def rules(files: list[DataFile] | None, image: Path, *, use_locks: bool) -> Rules:
    """How disks are to be opened; a data file that is nobody's by name is that of `image`."""
    from ..chain.opening import Rules

    return Rules(data_files=data_files(files, image), use_locks=use_locks, on_unlocked=warn_unlocked)


def data_files(files: list[DataFile] | None, image: Path) -> Mapping[Path, Path]:
    """The data file of each image.

    Raises:
        UsageError: one image has two.
    """
    found: dict[Path, Path] = {}
    for file in files or []:
        owner = image if file.image is None or same_file(file.image, image) else file.image
        if owner in found:
            raise UsageError(f"two data files are named for {owner}")
        found[owner] = file.path
    return found


def warn_if_outdated(disk: Path | None, image: Path) -> None:
    """Warn if a decrypted copy is older than its image: what a guest wrote in between would be missed.

    The copy may be right all the same, for what changes bitmaps touches the image too.
    """
    if disk is None or same_file(disk, image):
        return
    with contextlib.suppress(OSError):  # opening it will say so
        if disk.is_file() and disk.stat().st_mtime < image.stat().st_mtime:
            warn("older than the image: if a VM ran since it was made, make a new one", disk)


def require_place_for_undo(how: How) -> None:
    """Raise UndoError where no undo file can be made, before the long work and not after it."""
    if how.undo is None or how.dry_run:
        return
    if os.path.lexists(how.undo):
        raise UndoError(f"cannot create the undo file {how.undo}: {os.strerror(errno.EEXIST)}")
    if not how.undo.parent.is_dir():
        raise UndoError(f"cannot create the undo file {how.undo}: {os.strerror(errno.ENOENT)}")


@contextlib.contextmanager
def shut_down_first() -> Iterator[None]:
    """What is in use has to be left by its user: a comparison cannot look at a disk that is being written to."""
    try:
        yield
    except InUseError as error:
        if "-U" in (error.hint or ""):  # none of these commands has that
            error.hint = "shut the VM down first: a disk that changes meanwhile cannot be compared"
        raise


def format_of(path: Path, said: DiskFormat | None) -> str | None:
    """The format of a file: as the user says, be it in the file's name; None for what it cannot but be.

    The first bytes alone say nothing: a guest can write the beginning of a qcow2 image to its raw disk.
    """
    if said is not None:
        return said.value
    return DiskFormat.QCOW2.value if path.suffix == ".qcow2" else None


@dataclass(frozen=True, slots=True)
class TwoDisks:
    """The two disks as the user names them."""

    old: Path
    new: Path
    old_format: str | None
    new_format: str | None
    data_files: list[DataFile] | None
    use_locks: bool

    @contextlib.contextmanager
    def opened(self, target: Qcow2Image | None = None) -> Iterator[tuple[Disk, Disk]]:
        """Both of them, open; the newer one may be `target`, which is open already, and gets the result.

        Raises:
            UsageError: the result would be of a disk and itself, or a data file is named for none of the images.
            Qcow2bmError: as `open_disk`.
        """
        from ..chain.opening import disk_of, open_disk
        from ..chain.pairing import require_apart, require_owners

        chosen = rules(self.data_files, self.new, use_locks=self.use_locks)
        if target is not None:
            chosen = replace(chosen, held=(target.file,))
        is_target = target is not None and same_file(self.new, target.file.path)
        if is_target and self.new_format == DiskFormat.RAW:
            raise UsageError("an image that gets a bitmap is no raw disk", image=self.new)
        with open_disk(self.old, format=self.old_format, rules=chosen) as old:
            if target is not None and is_target:
                newer = disk_of(target, rules=chosen)
            else:
                newer = open_disk(self.new, format=self.new_format, rules=chosen)
            with newer as new:
                require_owners(chosen.data_files, old, new, image=target)
                if target is not None:
                    require_apart(old, new, image=target, data_files=chosen.data_files)
                yield old, new
