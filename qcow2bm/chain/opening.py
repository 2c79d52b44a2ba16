"""Opening a disk with all it stands on, and nothing else: names in an image are followed by rule.

A backing file's format is what the image says. Where it says nothing QEMU would guess by the first bytes, which a
guest that owns a raw disk can write. So here such a file is raw, unless it begins like something else; then it is
refused, but for qcow2 where the user asked for a guess. What QEMU would not take for raw is never read as raw.

A relative name counts from the directory of the name by which the image that has it was opened, links not followed, as
in QEMU. Anything but the name of a file is refused: `json:`, `nbd:` and all other protocols. An external data file is
never opened by the name in the image: its path comes from the user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import (
    BitmapSizeMismatchError,
    CorruptImageError,
    ImageIOError,
    NotQcow2Error,
    Qcow2bmError,
    UnsupportedImageError,
    UsageError,
    naming,
)
from ..format.extensions import ExtensionType
from ..format.header import ENCRYPTION, MAGIC
from ..image.file import ImageFile
from ..image.image import Qcow2Image, take_locks
from .disk import Disk
from .encrypted import LUKS, EncryptedDiskError, decrypting, refusal
from .layers import Layer, Qcow2Layer, RawLayer
from .pairing import identities, is_same

MAX_DEPTH = 256
"""Files of a chain; libvirt takes 200."""

_FORMATS = ("raw", "qcow2")

_NAMED = "this file"
"""One that the user names, unlike those that an image does."""

_SIGNATURES = (
    (0, MAGIC, "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
)
"""Offset and bytes by which QEMU knows a format."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be opened, and how.

    Attributes:
        data_files: the external data file of each image that has one, as the user names it.
        guess: take a file whose format nobody says for qcow2 if it begins as one.
        use_locks: False takes no locks at all.
        force_share: read files that another process writes to.
        held: files that are open already, for writing: none of them can be part of the disk.
        on_unlocked: called with each file that is read without the locks that were wanted: its file system has none.
    """

    data_files: Mapping[Path, Path] = field(default_factory=dict)
    guess: bool = False
    use_locks: bool = True
    force_share: bool = False
    held: tuple[ImageFile, ...] = ()
    on_unlocked: Callable[[Path], object] = lambda _: None


def open_disk(path: str | os.PathLike[str], *, format: str | None = None, rules: Rules = Rules()) -> Disk:  # noqa: A002 - QEMU's word
    """Open a raw file or a qcow2 image with its backing chain, as a reader.

    Args:
        format: "raw" or "qcow2"; None for what the file is by its first bytes, see `Rules.guess`.

    Raises:
        UsageError: another format, or one that must be named.
        EncryptedDiskError: one of its files is encrypted.
        UnsupportedImageError: a chain that is not made of files, a loop, a data file that nobody named.
        NotQcow2Error, CorruptImageError, InUseError, ImageIOError: as `Qcow2Image.open`.
    """
    return _Opening(rules).disk(Path(path), format)


def disk_of(image: Qcow2Image, *, rules: Rules = Rules()) -> Disk:
    """The disk of an open image, which stays open when the disk is closed. Raises as `open_disk`."""
    return _Opening(rules).disk_of(image)


def view_of(image: Qcow2Image, disk: str | os.PathLike[str] | None, *, rules: Rules) -> Disk:
    """What a guest finds on an image, or the raw view of it that the user has, for want of a key.

    Raises:
        UsageError: there is a view, and the image's own disk can be read.
        BitmapSizeMismatchError: the view is of another size.
        UnsupportedImageError, CorruptImageError, InUseError, ImageIOError: as `open_disk`.
    """
    if disk is None:
        return disk_of(image, rules=rules)
    _require_encrypted(image, rules)
    view = open_disk(disk, format="raw", rules=rules)
    size = image.geometry.virtual_size
    if view.size != size:
        view.close()
        raise BitmapSizeMismatchError(
            f"it has {view.size} bytes, and the disk of {image.file.path} has {size}", image=Path(disk)
        )
    return view


def _require_encrypted(image: Qcow2Image, rules: Rules) -> None:
    """Raise UsageError if the image's own disk can be read: a copy of it may be older, or of another disk.

    Why else it cannot be read is raised as it is.
    """
    try:
        disk_of(image, rules=rules).close()
    except EncryptedDiskError:
        return
    raise UsageError(
        "nothing of its disk is encrypted, so it is read as it is", hint="leave --disk out", image=image.file.path
    )


class _Opening:
    """A chain as it is being opened."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._files: list[ImageFile] = []
        self._layers: list[Layer] = []
        self._seen: set[Hashable] = set()
        self._held = {one for file in rules.held for one in identities(file)}
        self._encrypted: list[tuple[int, Path, str]] = []  # depth, path and format of what is

    def disk(self, path: Path, said: str | None) -> Disk:
        try:
            self._add(path, said, _NAMED)
            return self._finished()
        except BaseException:
            self._close()
            raise

    def disk_of(self, image: Qcow2Image) -> Disk:
        try:
            self._seen |= identities(image.file)
            with naming(image.file.path):
                self._add_image(image)
            return self._finished()
        except BaseException:
            self._close()
            raise

    def _finished(self) -> Disk:
        """Follow the backing names to the end; raises EncryptedDiskError if anything on the way is encrypted."""
        try:
            self._follow()
        except Qcow2bmError:
            if not self._encrypted:
                raise
        if self._encrypted:
            top = self._layers[0]
            raise refusal(top.path, "qcow2" if isinstance(top, Qcow2Layer) else LUKS, self._encrypted)
        first = self._layers[0]
        size = first.image.geometry.virtual_size if isinstance(first, Qcow2Layer) else first.size
        return Disk(self._layers, size, self._files)

    def _follow(self) -> None:
        while isinstance(top := self._layers[-1], Qcow2Layer) and (name := top.image.backing_file) is not None:
            with naming(top.path):
                if len(self._layers) >= MAX_DEPTH:
                    raise UnsupportedImageError(f"its backing chain has more than {MAX_DEPTH} files")
                said = (top.image.extensions.text(ExtensionType.BACKING_FORMAT) or "").partition("\0")[0] or None
                path = backing_path(top.path, name)
                if said is not None and said not in (*_FORMATS, LUKS):
                    raise UnsupportedImageError(
                        f"its backing file '{name}' has format '{said}'", hint="only raw and qcow2 files are read"
                    )
            self._add(path, said, f"the backing file of {top.path}")

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def _add(self, path: Path, said: str | None, what: str) -> None:
        """Open one more layer."""
        if said is not None and said not in _FORMATS and (said != LUKS or what == _NAMED):
            raise UsageError(f"format '{said}' is not known, only raw and qcow2 are")
        file = self._open(path)
        with naming(path):
            kind = said or self._guess(file, what)
            if kind != "qcow2":
                if kind == LUKS:
                    self._encrypted.append((len(self._layers), path, LUKS))
                self._layers.append(RawLayer(file))
                return
            image = Qcow2Image.open(path, use_locks=False, open_file=lambda *_, **__: file)
            self._add_image(image)

    def _open(self, path: Path) -> ImageFile:
        """Open and lock a file that is not part of the chain yet."""
        try:
            file = ImageFile.open(path)
        except NotQcow2Error as error:  # said of what is no file, whatever its format
            raise ImageIOError(error.message.removesuffix(", not a qcow2 image"), image=path) from error
        self._files.append(file)
        with naming(path):
            known = identities(file)
            if known & self._held:
                raise UsageError("it is the very image that is being changed: name a copy of it from before")
            if known & self._seen:
                raise UnsupportedImageError("it comes twice in one chain: the chain is a loop")
            self._seen |= known
            if self._rules.use_locks and not take_locks(file, writable=False, force_share=self._rules.force_share):
                self._rules.on_unlocked(path)
        return file

    def _guess(self, file: ImageFile, what: str) -> str:
        """The format of a file that nobody has said; see the module's text."""
        start = file.read_padded(0, 4 << 10)
        found = next((name for at, magic, name in _SIGNATURES if start[at : at + len(magic)] == magic), None)
        if found is None and file.path.suffix == ".dmg":
            found = "dmg"
        if found is None or (found == "qcow2" and self._rules.guess):
            return found or "raw"
        if found == LUKS:
            raise UsageError(
                f"nobody says which format {what} has, and it begins like LUKS",
                hint="if it is, it is encrypted, and only a decrypted copy can be read: "
                f"`{decrypting(file.path, LUKS, [(0, LUKS)])}`; if a guest encrypts a raw disk itself, "
                "say that it is raw with --format-a, --format-b or --against-format",
            )
        option = "say so with --format-a, --format-b or --against-format"
        raise UsageError(
            f"nobody says which format {what} has, and it begins like {found}",
            hint="a guest can write such a beginning to a raw disk; "
            + (
                option
                if what == _NAMED
                else "name the format in the image, with `qemu-img rebase -u -F FORMAT -b NAME`"
            ),
        )

    def _add_image(self, image: Qcow2Image) -> None:
        is_encrypted = ENCRYPTION[image.header.crypt_method] != "none"
        if is_encrypted:
            self._encrypted.append((len(self._layers), image.file.path, "qcow2"))
        # Of what is encrypted only the backing file's name is of use: no data is read.
        self._layers.append(Qcow2Layer(image, None if is_encrypted else self._data_file(image)))

    def _data_file(self, image: Qcow2Image) -> ImageFile | None:
        if not image.header.has_data_file:
            return None
        path = next((data for name, data in self._rules.data_files.items() if is_same(name, image.file.path)), None)
        if path is None:
            name = image.extensions.text(ExtensionType.DATA_FILE) or ""
            raise UnsupportedImageError(
                f"its guest data lies in an external data file, which it calls '{name}'",
                hint="say where that is with --data-file: no name in an image is believed for it",
            )
        return self._open(path)


def backing_path(image: Path, name: str) -> Path:
    """The path that a backing file's name means in an image at `image`.

    Raises:
        UnsupportedImageError: not the name of a file.
        CorruptImageError: a name that no file can have.
    """
    if "\0" in name:
        raise CorruptImageError("its backing file's name has a zero byte in it")
    plain = name.removeprefix("file:")
    before = plain.partition("/")[0]
    if plain != name and not plain.startswith("/"):
        raise UnsupportedImageError(
            f"its backing file is called '{name}', which QEMU looks up where it happens to be started",
            hint="a name without `file:` counts from the image's directory",
        )
    if ":" in before:
        raise UnsupportedImageError(
            f"its backing file is called '{name}', which is not the name of a file",
            hint="only files are read: convert the disk to one with `qemu-img convert`",
        )
    return image.parent / plain
