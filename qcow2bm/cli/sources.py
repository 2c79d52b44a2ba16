"""Bitmaps to take bits from: in the image itself, or in others, each opened once and kept open until the commit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

from .. import api
from ..bitmap.draft import Source
from ..errors import naming
from .reading import warn_unlocked
from .references import same_file, split_reference


class Sources:
    """A context manager that holds the other images open.

    The bits of a source are read while the plan is carried out, so its image must not be closed, nor written to by
    anybody, before that.
    """

    def __init__(self, target: Path, *, use_locks: bool) -> None:
        self._target = target
        self._use_locks = use_locks
        self._open: dict[Path, api.Image] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def find(self, text: str, own: api.Bitmaps) -> str | Source:
        """What a word names: a bitmap of the target if it has one of that name, else `IMAGE#name`."""
        if text in own.names:
            return text
        image, name = split_reference(text)
        return text if name is None else self.bitmap(Path(image) if image else self._target, name)

    def bitmap(self, image: Path, name: str) -> str | Source:
        """A bitmap of some image: its name if the image is the target itself."""
        if same_file(image, self._target):
            return name
        with naming(image):
            return self._opened(image).bitmaps[name].source

    def _opened(self, path: Path) -> api.Image:
        known = next((image for other, image in self._open.items() if same_file(other, path)), None)
        if known is None:
            known = self._stack.enter_context(api.open(path, use_locks=self._use_locks))
            self._open[path] = known
            if self._use_locks and not known.qcow2.locked:
                warn_unlocked(path)
        return known
