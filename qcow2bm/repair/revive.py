"""Bitmaps that are in use or detached: removed, or made to hold every change again, as the user says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from ..bitmap.edit import Edit
from ..bitmap.store import State, StoredBitmap, not_found
from ..checks.model import RepairClass
from ..errors import BitmapError, CorruptImageError, UnsupportedImageError
from .model import Proposal, Salvage, Scope, Step
from .salvage import Proof, Salvaged, Terms, apply_salvage, salvaged
from .workshop import Workshop

if TYPE_CHECKING:
    from ..chain.opening import Rules

_ON_A_WORD = (Salvage.ALLOCATED, Salvage.REBUILD, Salvage.SNAPSHOT)
"""Policies that hold if something is as it was when the bitmap began, which the user says of one bitmap."""
_MOST_RANGES = 4096
"""Ranges that are marked one by one; more of them are joined over the narrowest gaps."""


def revive(shop: Workshop) -> Iterator[Proposal]:
    """A step for each bitmap in use; one for all the detached ones, which count again only together."""
    policy = shop.policy
    if not policy.covers(Scope.BITMAPS):
        return
    names = {bitmap.name for bitmap in shop.view.directory.bitmaps}
    for name in sorted(policy.bitmaps - names):
        raise not_found(name)
    in_use = _chosen(shop, State.INCONSISTENT)
    for bitmap in in_use:
        yield from _proposals(shop, [bitmap], policy.in_use, "bitmap-inconsistent", len(in_use))
    detached = _chosen(shop, State.DETACHED)
    if detached:
        yield from _proposals(shop, detached, policy.detached, "bitmap-detached", len(detached))


def _chosen(shop: Workshop, state: State) -> list[StoredBitmap]:
    wanted = shop.policy.bitmaps
    bitmaps = (bitmap for bitmap in shop.view.directory.bitmaps if bitmap.state is state)
    return [bitmap for bitmap in bitmaps if not wanted or bitmap.name in wanted]


def _proposals(
    shop: Workshop, bitmaps: list[StoredBitmap], chosen: Salvage, code: str, candidates: int
) -> Iterator[Proposal]:
    names = [bitmap.name for bitmap in bitmaps]
    listed = ", ".join(f"'{name}'" for name in names)
    one = names[0] if len(names) == 1 else None
    codes = {code: len(names)}
    if chosen is Salvage.REMOVE:
        step = Step(f"remove {listed}", RepairClass.LOSSY, Scope.BITMAPS, codes, bitmap=one)
        yield step, partial(_remove, shop, names)
    elif chosen is not Salvage.KEEP:
        step = Step(f"salvage {listed}: {chosen.value}", RepairClass.LOSSLESS, Scope.BITMAPS, codes, bitmap=one)
        results: list[Salvaged] = []
        if candidates > 1 and not shop.policy.bitmaps and chosen in _ON_A_WORD:
            step.refused = (
                f"what {chosen.value} relies on is true of one bitmap and not of another: name each of which it is "
                "(--bitmap)"
            )
        else:
            results = [_salvaged(shop, bitmap, chosen) for bitmap in bitmaps]
            step.proof = "; ".join(dict.fromkeys(f"{result.proof.value}: {result.reason}" for result in results))
            step.refused = next((result.reason for result in results if result.bits is None), None)
        yield step, partial(_apply, shop, results)


def changed_ranges(shop: Workshop, taken: Iterable[Step]) -> Iterator[Proposal]:
    """Where steps have changed what the guest reads, the next incremental backup must copy it."""
    ranges = _joined(sorted(span for step in taken for span in step.guest))
    names = [b.name for b in shop.view.directory.bitmaps if b.state is State.READY and b.recording]
    if ranges and names:
        text = f"mark what was given up or guessed as changed in {len(names)} recording bitmaps"
        yield Step(text, RepairClass.LOSSLESS, None), partial(_mark, shop, names, ranges)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges without overlaps, at most `_MOST_RANGES`: the narrowest gaps go first."""
    gaps = sorted(later[0] - sum(earlier) for earlier, later in pairwise(ranges))
    widest = max(0, gaps[-_MOST_RANGES]) if len(gaps) >= _MOST_RANGES else 0
    joined: list[tuple[int, int]] = []
    for start, length in ranges:
        if joined and start <= sum(joined[-1]) + widest:
            first = joined[-1][0]
            joined[-1] = first, max(sum(joined[-1]), start + length) - first
        else:
            joined.append((start, length))
    return joined


def _mark(shop: Workshop, names: list[str], ranges: list[tuple[int, int]]) -> None:
    edit = Edit.of(shop.image)
    for name in names:
        for start, length in ranges:
            edit.set_range(name, start, length)
    shop.replay(edit.plan())


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
            rules=_rules(shop),
            keep_stale=policy.keep_stale,
            as_found=shop.as_found,
        )
        try:
            result = salvaged(shop.image, bitmap, chosen, terms, progress=shop.progress)
        except (BitmapError, CorruptImageError, UnsupportedImageError) as error:  # others are about what the user named
            result = Salvaged(bitmap.name, bitmap.granularity, bitmap.recording, None, Proof.UNKNOWN, error.message)
        shop.salvages[bitmap.name] = result
    return shop.salvages[bitmap.name]


def _rules(shop: Workshop) -> Rules | None:
    """The external data file is opened only where the user names it."""
    if shop.policy.data_file is None:
        return None
    from ..chain.opening import Rules  # loads numpy

    return Rules(data_files={shop.file.path: shop.policy.data_file})


def _remove(shop: Workshop, names: list[str]) -> None:
    edit = Edit.of(shop.image)
    edit.remove(*names)
    shop.replay(edit.plan())


def _apply(shop: Workshop, results: Iterable[Salvaged]) -> None:
    shop.replay(apply_salvage(shop.file, results))
