"""Bitmaps that are in use or detached: removed, or made to hold every change again, as the user says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from ..bitmap.edit import Edit
from ..bitmap.store import State, StoredBitmap
from ..checks.model import RepairClass
from ..errors import Qcow2bmError
from .model import Proposal, Salvage, Scope, Step
from .salvage import Policy, Proof, Salvaged, Terms, apply_salvage, salvaged
from .workshop import Workshop


def revive(shop: Workshop) -> Iterator[Proposal]:
    """A step for each bitmap in use; one for all the detached ones, which count again only together."""
    policy = shop.policy
    if not policy.covers(Scope.BITMAPS):
        return
    in_use = [bitmap for bitmap in shop.view.directory.bitmaps if bitmap.state is State.INCONSISTENT]
    for bitmap in in_use:
        yield from _proposals(shop, [bitmap], policy.in_use, "bitmap-inconsistent")
    detached = [bitmap for bitmap in shop.view.directory.bitmaps if bitmap.state is State.DETACHED]
    if detached:
        yield from _proposals(shop, detached, policy.detached, "bitmap-detached")


def _proposals(shop: Workshop, bitmaps: list[StoredBitmap], chosen: Salvage, code: str) -> Iterator[Proposal]:
    names = [bitmap.name for bitmap in bitmaps]
    listed = ", ".join(f"'{name}'" for name in names)
    one = names[0] if len(names) == 1 else None
    codes = {code: len(names)}
    if chosen is Salvage.REMOVE:
        step = Step(f"remove {listed}", RepairClass.LOSSY, Scope.BITMAPS, codes, bitmap=one)
        yield step, partial(_remove, shop, names)
    elif chosen is not Salvage.KEEP:
        step = Step(f"salvage {listed}: {chosen.value}", RepairClass.LOSSLESS, Scope.BITMAPS, codes, bitmap=one)
        results = [_salvaged(shop, bitmap, chosen) for bitmap in bitmaps]
        step.proof = "; ".join(dict.fromkeys(f"{result.proof.value}: {result.reason}" for result in results))
        step.refused = next((result.reason for result in results if result.bits is None), None)
        yield step, partial(_apply, shop, results)


def _salvaged(shop: Workshop, bitmap: StoredBitmap, chosen: Salvage) -> Salvaged:
    """The new bits of a bitmap, worked out once: a comparison of disks takes its time."""
    if bitmap.name not in shop.salvages:
        policy = shop.policy
        terms = Terms(
            base=policy.against,
            base_format=policy.against_format,
            snapshot=policy.snapshot,
            snapshot_is_start=policy.snapshot_is_start,
            layer_is_newer=policy.layer_is_newer,
            keep_stale=policy.keep_stale,
            as_found=shop.as_found,
        )
        try:
            result = salvaged(shop.image, bitmap, Policy(chosen.value), terms)
        except Qcow2bmError as error:
            result = Salvaged(bitmap.name, bitmap.granularity, bitmap.recording, None, Proof.UNKNOWN, error.message)
        shop.salvages[bitmap.name] = result
    return shop.salvages[bitmap.name]


def _remove(shop: Workshop, names: list[str]) -> None:
    edit = Edit.of(shop.image)
    edit.remove(*names)
    shop.replay(edit.plan())


def _apply(shop: Workshop, results: Iterable[Salvaged]) -> None:
    shop.replay(apply_salvage(shop.file, results))
