"""The first cluster as an edit's plan makes it, step by step.

Why the image stays whole: steps that lie in one disk sector become one write, which the disk makes or does not make. A
rewrite that one sector does not hold comes between setting a mark and clearing it, so that QEMU will not open a header
that a crash tore. The commit engine keeps a journal of the three.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UnsupportedImageError
from ..format.header import AUTOCLEAR_FIELD, KNOWN_AUTOCLEAR
from .image import Qcow2Image
from .mark import FEATURES, bracketed, with_mark
from .plan import Stage, Switch, Write, fits_a_sector


@dataclass(frozen=True, slots=True)
class Step:
    """Bytes of the header that change; `unseen` where nothing refers to them yet, so that they may be torn."""

    offset: int
    data: bytes
    purpose: str
    unseen: bool = False


class HeaderDraft:
    """Header bytes as they are when the switch of a plan comes, and the steps that switch takes."""

    def __init__(self, image: Qcow2Image, earlier: Iterable[Write] = ()) -> None:
        """Start from the image's first cluster, with what earlier stages of the plan write to it."""
        self.image = image
        before = bytearray(image.head)
        for write in earlier:
            if write.offset < len(before):
                before[write.offset : write.end] = write.read()
        self._before = bytes(before)
        self.steps: list[Step] = []

    def put(self, offset: int, data: bytes, purpose: str, *, unseen: bool = False) -> None:
        """A step; `unseen` where nothing refers to these bytes yet, so that they may be torn."""
        if self._after(self.steps)[offset : offset + len(data)] != data:
            self.steps.append(Step(offset, data, purpose, unseen))

    def at_once(self, name: str) -> Switch:
        """All steps together, all or nothing."""
        write = self._write([], self.steps, name)
        if fits_a_sector([write]):
            return Switch((Stage(name, (write,)),))
        return self._torn(name)

    def in_steps(self, name: str, *, commit: int) -> Switch:
        """A stage for each step, in order; neighbours that one sector holds are one.

        Args:
            commit: index of the stage that makes the new state valid; -1 is the last.
        """
        groups = self._groups()
        stages = []
        for number, group in enumerate(groups):
            write = self._write([step for done in groups[:number] for step in done], group, group[-1].purpose)
            unseen = all(step.unseen for step in group)
            if not (unseen or fits_a_sector([write])):
                return self._torn(name)
            stages.append(Stage(write.purpose, (write,)))
        return Switch(tuple(stages), commit % len(stages))

    def _groups(self) -> list[list[Step]]:
        groups: list[list[Step]] = []
        for step in self.steps:
            if groups and fits_a_sector([self._write([], [*groups[-1], step], "")]):
                groups[-1].append(step)
            else:
                groups.append([step])
        return groups

    def _after(self, steps: Iterable[Step]) -> bytes:
        head = bytearray(self._before)
        for step in steps:
            head[step.offset : step.offset + len(step.data)] = step.data
        return bytes(head)

    def _write(self, done: list[Step], steps: list[Step], purpose: str) -> Write:
        """The one write that makes `steps` when those before them are done."""
        start = min(step.offset for step in steps)
        end = max(step.offset + len(step.data) for step in steps)
        old, new = self._after(done), self._after([*done, *steps])
        return Write.replace(start, old[start:end], new[start:end], f"header: {purpose}")

    def _torn(self, name: str) -> Switch:
        """A rewrite that one sector does not hold, while the mark keeps everybody out."""
        if self.image.header.version < 3:
            raise UnsupportedImageError(
                "a version 2 header cannot be rewritten in more than one sector: no feature bit would keep QEMU out",
                hint="`qemu-img amend -o compat=1.1` makes it version 3",
            )
        before, after = bytearray(self._before), bytearray(self._after(self.steps))
        features = bytes(before[FEATURES]), bytes(after[FEATURES])
        before[FEATURES], after[FEATURES] = map(with_mark, features)
        start = min(step.offset for step in self.steps)
        end = max(step.offset + len(step.data) for step in self.steps)
        write = Write.replace(start, bytes(before[start:end]), bytes(after[start:end]), f"header: {name}")
        stages = bracketed(*features, [Stage(write.purpose, (write,), journaled=True)])
        return Switch(tuple(stages), commit=len(stages) - 1)


def clear_unknown_autoclear(image: Qcow2Image) -> list[Write]:
    """What the specification asks of whoever writes to an image with autoclear bits it does not know."""
    # As plain numbers: the inverse of an IntFlag knows no bits above the highest one defined.
    features, known = int(image.header.autoclear_features), int(KNOWN_AUTOCLEAR)
    if not features & ~known:
        return []
    old, new = features.to_bytes(8, "big"), (features & known).to_bytes(8, "big")
    return [Write.replace(AUTOCLEAR_FIELD, old, new, "header: clear unknown autoclear bits")]
