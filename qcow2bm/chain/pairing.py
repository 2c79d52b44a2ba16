"""Two disks that are to be compared: that they are two, and that the data files the user names are theirs.

A disk that is compared with itself by another name differs nowhere: a bitmap that misses everything would be proved,
and a rebuilt one would be empty. So an older disk is refused if any of its files is one of those that the disk as it
is now is written to. Files that both only stand on are shared by right: nobody writes to them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path

from ..errors import UsageError
from ..image.file import ImageFile
from ..image.image import Qcow2Image
from ..image.loop import looped_file
from .disk import Disk
from .layers import Qcow2Layer, file_identity


def identities(file: ImageFile) -> frozenset[Hashable]:
    """Two open files that have one of these in common are one, whatever their names and the changes over them.

    A loop device is the file behind it, too.
    """
    plain = getattr(file, "base", file)
    found = {file_identity(plain)}
    if plain.is_device:
        found |= _behind_loop(os.fstat(plain.fd).st_rdev)
    return frozenset(found)


def _of_path(path: Path) -> frozenset[Hashable]:
    """The same of a file that is not open; nothing if there is none."""
    with contextlib.suppress(OSError):
        status = path.stat()
        if stat.S_ISBLK(status.st_mode):
            return frozenset({("device", status.st_rdev)} | _behind_loop(status.st_rdev))
        return frozenset({(status.st_dev, status.st_ino)})
    return frozenset()


def _behind_loop(device: int) -> set[Hashable]:
    """The file of a loop device, as far as the kernel tells it by a name that leads there."""
    path = looped_file(device)
    return set() if path is None else set(_of_path(path))


def shared_file(
    old: Disk, new: Disk, *, image: Qcow2Image | None = None, data_files: Mapping[Path, Path] | None = None
) -> Path | None:
    """A file of the older disk that the newer one, or an image, is written to; None if there is none.

    Args:
        image: the image that the bitmap is of, where `new` is only a view of its disk.
        data_files: those that are named; the image's own is one that it is written to, open or not.
    """
    now = set[Hashable]()
    for file in new.layers[0].files:
        now |= identities(file)
    if image is not None:
        now |= identities(image.file)
        for name, path in (data_files or {}).items():
            now |= _of_path(path) if is_same(name, image.file.path) else set()
    files = (file for layer in old.layers for file in layer.files)
    return next((file.path for file in files if identities(file) & now), None)


def require_apart(
    old: Disk, new: Disk, *, image: Qcow2Image | None = None, data_files: Mapping[Path, Path] | None = None
) -> None:
    """Raise UsageError if there is such a file."""
    shared = shared_file(old, new, image=image, data_files=data_files)
    if shared is not None:
        raise nothing_differs(shared, old.layers[0].path)


def nothing_differs(shared: Path, old: Path) -> UsageError:
    """The error about a file that both disks have."""
    return UsageError(
        f"{shared} belongs to the disk as it is now: nothing differs from itself, and that proves nothing",
        hint="name a copy of the disk from when the bitmap began, with a data file of its own",
        image=old,
    )


def require_owners(data_files: Mapping[Path, Path], *disks: Disk, image: Qcow2Image | None = None) -> None:
    """Raise UsageError if a data file is named for what is no image of these disks, or has its data in itself.

    Args:
        image: one that may have a data file too, although it is in none of the disks.
    """
    owners = list(_owners(disks))
    if image is not None and image.header.has_data_file:
        owners.append(image.file.path)
    for name, path in data_files.items():
        if not any(is_same(name, owner) for owner in owners):
            raise UsageError(
                f"the data file {path} is named for {name}, and no image of that name here has one",
                hint="write --data-file IMAGE=PATH, where IMAGE is an image of one of the chains",
            )


def _owners(disks: tuple[Disk, ...]) -> Iterator[Path]:
    for disk in disks:
        for layer in disk.layers:
            if isinstance(layer, Qcow2Layer) and layer.image.header.has_data_file:
                yield layer.path


def is_same(left: Path, right: Path) -> bool:
    """True if both names lead to one file, or are one name."""
    try:
        return left.samefile(right)
    except OSError:
        return left.absolute() == right.absolute()
