"""A command on an image: what the folder was like before, and a judge who knows the old state and the new one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from tests.crash.commands import Command, quiet
from tests.crash.disk import Folder
from tests.crash.judge import Judge, Truth, settle
from tests.crash.shapes import Shape


@dataclass
class Outcome:
    """How often something was tried, and what was wrong afterwards."""

    states: int = 0
    bad: list[str] = field(default_factory=list)


class Trial:
    """Makes the image and what the command needs; then `run`, once, shows what it is to become.

    Attributes:
        before: the folder as the command finds it.
        settled: the image's bytes then, once a journal that there may be has been settled.
    """

    def __init__(self, folder: Path, command: Command, shape: Shape, *, by_qemu: bool = False) -> None:
        self.image = shape.make(folder)
        self._command = command
        self._shape = shape
        self._by_qemu = by_qemu
        command.prepare(self.image, shape)
        self.before = Folder.read(folder)
        settle(self.image)  # where a crash has left a journal, the old state is what it leads back to
        self.settled = self.image.read_bytes()
        self._old = self._truth()
        self.before.write(folder)
        self.before = Folder.read(folder)  # what settling had changed is another file now

    def _truth(self) -> Truth:
        return Truth.of(self.image, self._shape.secret, by_qemu=self._by_qemu)

    def run(self) -> None:
        """Let the command do its work undisturbed."""
        with quiet() as said:
            status = self._command.run(self.image, self._shape)
        assert status in self._command.status, f"undisturbed it ended with {status}: {said.getvalue().strip()}"

    def judge(self) -> Judge:
        """Of what is left of other runs; call it while the folder is as `run` has left it."""
        return Judge(self.image, self._shape.secret, self._old, self._truth())


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Row = TypeVar("_Row", bound=_Named)


def named(rows: Iterable[_Row], name: str) -> _Row:
    """The command, shape or fault of a name."""
    return next(row for row in rows if row.name == name)
