"""The public face: images, edits, checks and repairs as `import qcow2bm` offers them. Thin: others do the work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from .bitmap.store import BitmapDirectory, State, StoredBitmap
from .errors import Qcow2bmError, naming
from .format.extensions import ExtensionType
from .format.snapshot_table import SnapshotEntry
from .image.file import ImageFile
from .image.image import OpenFile, Qcow2Image, settle_interrupted, take_locks
from .image.lock import holders
from .image.mapping import Run, runs
from .image.references import Kind, Reference

if TYPE_CHECKING:
    # Whoever only reads loads none of this: starting up is most of what a small command costs.
    from .bitmap.bring_back import Quarantine
    from .bitmap.draft import Source
    from .bitmap.edit import Edit
    from .image.commit import Progress
    from .image.plan import Plan


@dataclass(frozen=True, slots=True)
class Extent:
    """A dirty guest range, in bytes. It ends at the end of the disk at the latest."""

    offset: int
    length: int


class Bitmap:
    """One bitmap of an open image, read-only. Bits are read when they are asked for.

    Attributes:
        stored: the bitmap as `bitmap/` knows it: directory entry, table, bits.
    """

    def __init__(self, image: Qcow2Image, stored: StoredBitmap) -> None:
        self._image = image
        self.stored = stored

    @property
    def name(self) -> str:
        """Its name; bytes that are not UTF-8 as surrogates."""
        return self.stored.name

    @property
    def state(self) -> State:
        """What may be done with it."""
        return self.stored.state

    @property
    def fault(self) -> str | None:
        """Why it is broken, or None."""
        return self.stored.fault

    @property
    def recording(self) -> bool:
        """True if QEMU tracks writes in it."""
        return self.stored.recording

    @property
    def granularity(self) -> int:
        """Guest bytes one bit stands for."""
        return self.stored.granularity

    @property
    def bytes_on_disk(self) -> int:
        """Bytes its table and data take in the file."""
        return self.stored.bytes_on_disk

    @cached_property
    def dirty_bytes(self) -> int:
        """Guest bytes marked dirty, the part of the last bit past the end of the disk left out.

        Raises:
            BitmapInconsistentError, BitmapBrokenError: its bits are not to be relied on.
        """
        bits = self.stored.readable_bits()
        beyond = bits.length * self.granularity - self._image.geometry.virtual_size
        last_is_set = bits.slice(bits.length - 1, bits.length).any()
        return bits.count() * self.granularity - (beyond if last_is_set else 0)

    def extents(self, *, stale: bool = False) -> Iterator[Extent]:
        """The dirty ranges in order, as large as they come.

        Args:
            stale: read a bitmap that is in use or detached all the same; what it says may be wrong.

        Raises:
            BitmapInconsistentError, BitmapBrokenError: its bits are not to be relied on.
        """
        bits = self.stored.bits if stale else self.stored.readable_bits()
        end, granularity = self._image.geometry.virtual_size, self.granularity
        for first, stop in bits.runs():
            offset = first * granularity
            yield Extent(offset, min(stop * granularity, end) - offset)

    def density(self, cells: int) -> list[float]:
        """The dirty share, 0 to 1, of each of `cells` equal parts of the disk. Raises as `extents`."""
        bits = self.stored.readable_bits()
        edges = [index * bits.length // cells for index in range(cells + 1)]
        return [bits.density(start, max(stop, start + 1)) for start, stop in pairwise(edges)]

    @property
    def source(self) -> Source:
        """This bitmap as a source for `Edit.merge` and `Edit.copy` of another image.

        Keep this image open until the commit.
        """
        from .bitmap.draft import Source

        return Source.stored(self._image, self.name)


class Bitmaps(Collection[Bitmap]):
    """The bitmaps of an image in directory order; `bitmaps["name"]` gives one.

    Attributes:
        attached: False if the autoclear bit is off, so that none of them counts.
        damage: why the directory as a whole breaks the format, or None; what came before the damage is here.
    """

    def __init__(self, image: Qcow2Image) -> None:
        self._directory = BitmapDirectory(image)
        self._all = tuple(Bitmap(image, stored) for stored in self._directory.bitmaps)
        self.attached = self._directory.attached
        self.damage = self._directory.damage

    def __getitem__(self, name: str) -> Bitmap:
        """The bitmap of a name; raises BitmapNotFoundError if there is none."""
        stored = self._directory.find(name)
        return next(bitmap for bitmap in self._all if bitmap.stored is stored)

    def __contains__(self, name: object) -> bool:
        return any(bitmap.name == name for bitmap in self._all)

    def __iter__(self) -> Iterator[Bitmap]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def names(self) -> list[str]:
        """All names, in directory order."""
        return [bitmap.name for bitmap in self._all]

    def references(self) -> Iterator[Reference]:
        """The host ranges that directory, tables and data take."""
        return self._directory.references()


class Image:
    """An open image. Use `qcow2bm.open`, as a context manager.

    Attributes:
        qcow2: the open file with its header, extensions and geometry.
    """

    def __init__(self, qcow2: Qcow2Image) -> None:
        self.qcow2 = qcow2
        self._bitmaps: Bitmaps | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and drop the locks."""
        self.qcow2.close()

    @property
    def path(self) -> Path:
        """The name it was opened by."""
        return self.qcow2.file.path

    @property
    def virtual_size(self) -> int:
        """Size of the disk the guest sees, in bytes."""
        return self.qcow2.geometry.virtual_size

    @property
    def backing_file(self) -> str | None:
        """The backing file's name as the image has it; nothing opens it."""
        return self.qcow2.backing_file

    @property
    def backing_format(self) -> str | None:
        """The backing file's format as the image has it."""
        return self.qcow2.extensions.text(ExtensionType.BACKING_FORMAT)

    @property
    def data_file(self) -> str | None:
        """The external data file's name as the image has it; nothing opens it."""
        return self.qcow2.extensions.text(ExtensionType.DATA_FILE) if self.qcow2.header.has_data_file else None

    @property
    def bitmaps(self) -> Bitmaps:
        """The bitmaps as they are on disk; after a commit, as they are then."""
        if self._bitmaps is None:
            with naming(self.path):
                self._bitmaps = Bitmaps(self.qcow2)
        return self._bitmaps

    def snapshots(self) -> tuple[SnapshotEntry, ...]:
        """The internal snapshots.

        Raises:
            CorruptImageError: their table breaks the format.
        """
        with naming(self.path):
            return self.qcow2.snapshots().entries

    def runs(self) -> Iterator[Run]:
        """The guest's disk as runs of one kind each, in order.

        Raises:
            CorruptImageError: a mapping table cannot be read.
        """
        with naming(self.path):
            yield from runs(self.qcow2)

    def allocated(self, granularity: int) -> Source:
        """What the image itself holds and not its backing chain: data, compressed, zeroes. A source for `Edit.merge`.

        Raises:
            UsageError: the granularity is none that QEMU takes.
            CorruptImageError: a mapping table cannot be read.
            BitmapLimitError: there would be more bits than a bitmap may have.
        """
        from .bitmap.draft import Source, require_granularity
        from .repair.evidence import allocated

        require_granularity(granularity)
        with naming(self.path):
            bits = allocated(self.qcow2, granularity)
        return Source(f"the allocation of {self.path}", self.virtual_size, granularity, bits)

    def usage(self) -> dict[Kind, int]:
        """Bytes of the file per kind of cluster.

        Raises:
            CorruptImageError: a table cannot be read.
        """
        from .image.usage import usage

        with naming(self.path):
            return usage(self.qcow2, self.bitmaps.references())

    # Changing

    def draft(self) -> Edit:
        """A draft of the bitmaps to edit; nothing is written until its plan is committed.

        Raises:
            UnsupportedImageError, BitmapBrokenError: the image cannot take edits of its bitmaps.
        """
        from .bitmap.edit import Edit

        with naming(self.path):
            return Edit.of(self.qcow2)

    def commit(
        self, plan: Plan, *, undo: str | os.PathLike[str] | None = None, progress: Progress | None = None
    ) -> None:
        """Carry out a plan; raises as `qcow2bm.image.commit.commit`."""
        from .image.commit import commit

        if plan:
            commit(self.qcow2, plan, undo=Path(undo) if undo is not None else None, progress=progress)
            self._bitmaps = None

    @contextlib.contextmanager
    def edit(self, *, undo: str | os.PathLike[str] | None = None) -> Iterator[Edit]:
        """Edit bitmaps in a `with` block: one plan, one commit at its end, all or nothing.

        Args:
            undo: keep what is replaced in this file, which must not exist yet.

        Raises:
            Qcow2bmError: an edit is refused, or the commit fails; the image is as before.
        """
        draft = self.draft()
        try:
            yield draft
        except Qcow2bmError as error:  # what is refused is about this image; other errors are the caller's own
            error.image = self.path if error.image is None else error.image
            raise
        with naming(self.path):
            plan = draft.plan()
        self.commit(plan, undo=undo)


def open(  # noqa: A001 - `qcow2bm.open` is the name users look for
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    force_share: bool = False,
    use_locks: bool = True,
    open_file: OpenFile = ImageFile.open,
) -> Image:
    """Open a qcow2 image: a regular file or a block device. Read-only unless `writable`.

    Args:
        writable: take QEMU's locks as the only user; fails while a VM or a tool has the image open.
        force_share: read an image that a VM writes to; what is seen may be stale.
        use_locks: False takes no locks at all: the caller knows that no VM runs.
        open_file: opens the file; for tests and for files of an unusual kind.

    Raises:
        Qcow2bmError: see `Qcow2Image.open`.
    """
    return Image(
        Qcow2Image.open(path, writable=writable, force_share=force_share, use_locks=use_locks, open_file=open_file)
    )


def plan_resize(
    image: Image,
    size: int,
    *,
    shrink: bool = False,
    dirty_tail: bool | None = None,
    data_file: str | os.PathLike[str] | None = None,
) -> Plan:
    """Plan another virtual size for an image, with every bitmap following; `Image.commit` carries it out.

    With the size that the disk has, bitmaps that do not fit it are made to.

    Args:
        size: bytes, a multiple of 512.
        shrink: the end of the disk may be lost.
        dirty_tail: what bitmaps say of new bytes; None for clean, but dirty in bitmaps that had been left behind.
        data_file: where the external data file is, for an image that has one.

    Raises:
        Qcow2bmError: see `qcow2bm.resize.planning.plan_resize`; nothing was written.
    """
    from .resize import planning

    with naming(image.path):
        return planning.plan_resize(image.qcow2, size, shrink=shrink, dirty_tail=dirty_tail, data_file=data_file)


def undo(
    path: str | os.PathLike[str], undo_file: str | os.PathLike[str], *, force: bool = False, use_locks: bool = True
) -> None:
    """Put back what a change replaced: the image is then byte for byte what it was.

    Args:
        force: do it although a time stamp says that the image or its data file was touched since, or none tells: on a
            device, after a crash that cut the change short. Content that has changed is refused all the same.

    Raises:
        UndoError: the undo file is damaged or was used, or the image has changed since.
        InUseError: another process has the image open.
        LockingUnavailableError: the file system has no locks.
        ImageIOError: a read or write failed. What was begun is finished by doing it again, or by the next command.
        FlushError: what reached the disk is unknown.
    """
    from .checks.undoing import require_harmless
    from .image.undo import UndoFile  # its structures take time to declare

    file = ImageFile.open(path, writable=True)
    try:
        with naming(file.path):
            if use_locks:
                take_locks(file, writable=True, force_share=False)
            is_journal = _are_same(file.journal, Path(undo_file))
            # By force the journal of an image that nothing has protected is put back, which settling it does not do.
            settled = None if force and is_journal else settle_interrupted(file, writable=True)
            if settled is not None and settled.rolled_back and is_journal:
                return  # a crash had cut the change short, and what settles that is the undo file by its other name
            with UndoFile(Path(undo_file)) as old:
                old.restore(file, force=force, judge=require_harmless)
    finally:
        file.close()


def _are_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def open_undo(undo_file: str | os.PathLike[str]) -> Quarantine:
    """Open an undo file to see what it holds, and to bring back bitmaps that a repair has put into it.

    As a context manager: `with open_undo(file) as held`. Its `bitmaps` are the quarantined ones, its `undo` says what
    else there is, and `bring_back` drafts one of them in an `Image.edit`, which must end before `held` does.

    Raises:
        UndoError: it is no undo file, or a damaged one.
    """
    from .bitmap.bring_back import Quarantine

    return Quarantine(Path(undo_file))


def why_not_undone(path: str | os.PathLike[str], held: Quarantine) -> str | None:
    """Why `undo` with an open undo file would refuse now, or None. Only reads, and settles nothing."""
    from .image.undo import require_restorable

    try:
        file = ImageFile.open(path)
    except Qcow2bmError as error:
        return error.message
    try:
        with naming(file.path):
            take_locks(file, writable=False, force_share=False)
            require_restorable(held.undo, file)
    except Qcow2bmError as error:
        return error.message
    finally:
        file.close()
    return None


def export_bitmaps(image: Image, names: Iterable[str], stream: BinaryIO, *, stale: bool = False) -> None:
    """Write bitmaps into a stream as an export file, which `read_export` reads. The image must not change meanwhile.

    Args:
        names: of the bitmaps; all that can be exported if there are none.
        stale: also those whose bits may lack writes, marked as such.

    Raises:
        BitmapNotFoundError, BitmapInconsistentError, BitmapBrokenError: one cannot be exported.
        CorruptImageError: a mapping table or the data of a bitmap cannot be read.
    """
    from .bitmap.sidecar import choose, export_to

    with naming(image.path):
        chosen = choose(image.qcow2, names, stale=stale)
    export_to(stream, image.qcow2, chosen)


def who_holds(path: str | os.PathLike[str]) -> list[str]:
    """The processes that hold QEMU's locks on an image, as far as /proc shows them: "pid 123 (qemu-system-x86)"."""
    file = ImageFile.open(path)
    try:
        return holders(file.fd)
    finally:
        file.close()
