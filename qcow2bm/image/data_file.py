"""The external data file beside a commit: its length follows the disk's, so that a crash never costs data.

It is extended before the image says that the disk is larger, and cut only when the image has long said that it is
smaller. In between it is longer than need be, which harms nobody.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from ..errors import OutdatedPlanError, naming
from .file import ImageFile
from .image import take_locks
from .plan import DataFile, Kept


class FollowingFile:
    """The data file of an image that is being changed; None for one without. Use it as a context manager."""

    def __init__(self, wanted: DataFile | None) -> None:
        self._wanted = wanted
        self._file: ImageFile | None = None

    def __enter__(self) -> Self:
        """Open and lock it.

        Raises:
            OutdatedPlanError: its length is not what it was when the change was planned.
            InUseError: another process has it open.
            ImageIOError: the operating system refused.
        """
        if self._wanted is None:
            return self
        self._file = ImageFile.open(self._wanted.path, writable=True)
        try:
            with naming(self._wanted.path):
                if self._wanted.use_locks:
                    take_locks(self._file, writable=True, force_share=False)
                if self._file.size != self._wanted.size_before:
                    raise OutdatedPlanError("its length has changed since the change was planned")
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def extend(self) -> None:
        """Before the change: as long as the disk before and after."""
        if self._wanted is not None:
            self._set(self._wanted.extend_to)

    def noted(self) -> tuple[Kept, ...]:
        """What an undo file says of it, once it is extended."""
        if self._wanted is None or self._file is None:
            return ()
        from .undo_data_file import NotedDataFile  # rarely needed

        return (NotedDataFile.of(self._file, self._wanted.size_before).kept(),)

    def restore(self) -> None:
        """After a change that was put back."""
        if self._wanted is not None:
            self._set(self._wanted.size_before)

    def cut(self) -> None:
        """After the change, if nobody needs what lies past the end any more."""
        if self._wanted is not None:
            self._set(self._wanted.cut_to)

    def _set(self, size: int) -> None:
        file = self._file
        if file is not None and not file.is_device and file.size != size:
            with naming(file.path):
                file.truncate(size)
                file.barrier()
