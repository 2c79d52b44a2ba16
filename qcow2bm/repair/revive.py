"""Bitmaps that are in use or detached: removed, or made to hold every change again, as the user says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..bitmap.edit import Edit
from ..bitmap.store import State
from ..checks.model import RepairClass
from .model import Proposal, Salvage, Scope, Step
from .workshop import Workshop


def revive(shop: Workshop) -> Iterator[Proposal]:
    """A step for the bitmaps in use, one for the detached ones."""
    for state, code, chosen in (
        (State.INCONSISTENT, "bitmap-inconsistent", shop.policy.in_use),
        (State.DETACHED, "bitmap-detached", shop.policy.detached),
    ):
        bitmaps = [bitmap for bitmap in shop.view.directory.bitmaps if bitmap.state is state]
        if not bitmaps or chosen is Salvage.KEEP:
            continue
        names = [bitmap.name for bitmap in bitmaps]
        if chosen is Salvage.REMOVE:
            step = Step("remove " + ", ".join(map(repr, names)), RepairClass.LOSSY, Scope.BITMAPS, {code: len(names)})
            yield step, partial(_remove, shop, names)


def _remove(shop: Workshop, names: list[str]) -> None:
    edit = Edit.of(shop.image)
    edit.remove(*names)
    shop.replay(edit.plan())
