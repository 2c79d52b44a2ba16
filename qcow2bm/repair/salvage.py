"""Salvage: new bits for a bitmap that cannot be used, with what is proved of them, and why.

A bitmap is to hold every change of the disk since it began. What is asked of new bits is the same: where a bit is
clear, the disk is as it was then. The policies differ in what they take for granted:

- all dirty: nothing;
- allocated: that nothing had been written to this image file when the bitmap began, as in an overlay whose bitmap was
  made with it, and that its backing file is as it was. Then whatever the file itself says nothing of is unchanged,
  whatever happened in between: a cluster that was discarded and is unallocated again reads as it did in the beginning.
  Of an image that had data already this is not true, and no image tells when its bitmaps began: the user must say it;
- rebuild: that BASE holds the disk as it was when the bitmap began. A copy from before will not do: what was changed
  before the bitmap began and changed back since looks the same in both;
- snapshot: that an internal snapshot was taken when the bitmap began, or before, and that the backing file is as it was
  then. What both disks use is copied before it is written to. A snapshot from before proves less, see `evidence.py`.

The stale bits on the disk are united with what a policy gives. They hold what was recorded up to the last clean close,
whatever the user was wrong about, and at worst a bit too many. Only an exact answer needs nothing beside it: unless the
bitmap does not record. Then it stands for a time that is over, and of what changed in it and changed back after it the
comparison knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ..bitmap.bits import BitVector
from ..bitmap.chunks import ONES
from ..bitmap.edit import Edit
from ..bitmap.store import State, StoredBitmap
from ..errors import BitmapBrokenError, BitmapError, BitmapInconsistentError, UsageError
from ..format.header import Autoclear
from ..format.limits import MAX_BITMAP_BYTES, MAX_BITMAP_NAME, MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS
from ..format.text import encode_name
from ..image.file import ImageFile
from ..image.image import Qcow2Image, read_head
from ..image.plan import Plan
from .model import Salvage

if TYPE_CHECKING:
    from ..chain.opening import Rules  # loads numpy, which only some policies need

Progress = Callable[[int, int], None]


class Proof(Enum):
    """What is known of salvaged bits."""

    EXACT = "exact"
    """A bit is set if and only if its granule differs from what it was when the bitmap began."""
    SUPERSET = "superset"
    """Every granule that differs has its bit set; others may have."""
    UNKNOWN = "unknown"
    """Nothing could be proved, so there are no bits."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a salvage may rely on: the user's word, where the image cannot tell.

    Attributes:
        base: for REBUILD: the disk as it was when the bitmap began; a raw file or a qcow2 image with its chain.
        base_format: "raw" or "qcow2"; None for what it is by its first bytes, as `open_disk` takes it.
        rules: how BASE and the image's own chain may be opened.
        disk: for REBUILD: a raw view of the image's own disk, for an image that is encrypted.
        snapshot: for SNAPSHOT: id or name of an internal snapshot taken when the bitmap began, or before.
        snapshot_is_start: it was taken at that very moment, nothing having been written in between.
        layer_is_newer: for ALLOCATED: nothing had been written to this image file when the bitmap began.
        keep_stale: unite with the stale bits; None for what is right for the policy.
        as_found: the image before anything of it was repaired, if something was. What a repair mends in the mapping
            may be what tells that a snapshot's clusters were written to.
    """

    base: Path | None = None
    base_format: str | None = None
    rules: Rules | None = None
    disk: Path | None = None
    snapshot: str | None = None
    snapshot_is_start: bool = False
    layer_is_newer: bool = False
    keep_stale: bool | None = None
    as_found: Qcow2Image | None = None


@dataclass(frozen=True, slots=True)
class Salvaged:
    """New bits for a bitmap.

    Attributes:
        granularity: in bytes, as it was.
        recording: as it was.
        bits: None if the policy was refused. Stale ones are read when they are asked for, so the image stays open.
        reason: why the proof holds, or why there is none: one sentence without a final full stop.
    """

    name: str
    granularity: int
    recording: bool
    bits: BitVector | None
    proof: Proof
    reason: str


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What a policy gives: None for nothing."""

    bits: BitVector | None
    proof: Proof
    reason: str


def salvaged(
    image: Qcow2Image,
    bitmap: StoredBitmap,
    policy: Salvage,
    terms: Terms | None = None,
    *,
    progress: Progress = lambda _done, _total: None,
) -> Salvaged:
    """New bits for a bitmap that is inconsistent, detached or broken. Nothing is written.

    Args:
        image: the image as it is to be; its mapping, and for REBUILD its guest data, is read.
        progress: called with bytes of the disk compared, and in all.

    Raises:
        BitmapError: the bitmap is ready, in use by a running VM, or so broken that not even its granularity is known.
        UsageError: the terms lack what the policy needs, or name what is not there.
        UnsupportedImageError, CorruptImageError, InUseError, ImageIOError: what must be read cannot be.
    """
    _require_salvageable(image, bitmap)
    chosen = terms if terms is not None else Terms()
    evidence = _POLICIES[policy](image, bitmap, chosen, progress)
    if evidence.bits is None:
        return Salvaged(bitmap.name, bitmap.granularity, bitmap.recording, None, evidence.proof, evidence.reason)
    evidence = _with_stale(bitmap, policy, chosen, evidence)
    return Salvaged(bitmap.name, bitmap.granularity, bitmap.recording, evidence.bits, evidence.proof, evidence.reason)


def apply_salvage(file: ImageFile, salvages: Iterable[Salvaged], *, removed: Iterable[str] = ()) -> Plan:
    """The change that gives bitmaps their new bits and makes them count, in a file whose image is otherwise sound.

    Detached bitmaps count again only if all of them are among `salvages` or `removed`. A bitmap that is not in the
    directory any more, because it was so broken that it was taken out, is put back.

    Args:
        removed: names of bitmaps to remove in the same change.

    Raises:
        BitmapError: a salvage without bits, a bitmap that needs none, or detached ones that would stay stale.
        ProofError, CorruptImageError, NoSpaceError, BitmapLimitError: as `Edit.plan`.
    """
    image = Qcow2Image(file, *read_head(file), locked=True)
    edit = Edit.of(image)
    edit.remove(*removed)
    # What is put back comes last: by then no detached bitmap is in its way.
    for salvage in sorted(salvages, key=lambda one: edit.drafts.find(encode_name(one.name)) is None):
        if salvage.bits is None:
            raise BitmapError(f"bitmap '{salvage.name}' cannot be salvaged: {salvage.reason}")
        edit.salvage(salvage.name, salvage.bits, granularity=salvage.granularity, recording=salvage.recording)
    return edit.plan()


def _require_salvageable(image: Qcow2Image, bitmap: StoredBitmap) -> None:
    """Raise unless the bitmap needs a salvage, and name and granularity can be kept."""
    name, entry = bitmap.name, bitmap.entry
    if bitmap.state is State.ACTIVE:
        raise BitmapInconsistentError(f"bitmap '{name}' is in use by a running VM", hint="shut the VM down first")
    if bitmap.state is State.READY:
        raise BitmapError(f"bitmap '{name}' is in good order, there is nothing to salvage")
    if bitmap.state is not State.BROKEN:
        return
    fits = MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS
    if not fits or image.geometry.bitmap_bytes(bitmap.granularity) > MAX_BITMAP_BYTES:
        raise BitmapBrokenError(f"bitmap '{name}' is broken beyond salvage: its granularity is not known")
    if not 0 < len(entry.name) <= MAX_BITMAP_NAME:
        raise BitmapBrokenError(f"bitmap '{name}' is broken beyond salvage: {bitmap.fault}", hint="rename it first")


def _with_stale(bitmap: StoredBitmap, policy: Salvage, terms: Terms, evidence: _Evidence) -> _Evidence:
    """Unite with the bits on the disk where that is wanted and possible; why, see the module's text."""
    assert evidence.bits is not None
    wanted = terms.keep_stale
    if wanted is None:
        wanted = policy is not Salvage.REBUILD or not bitmap.recording
    if not wanted or policy is Salvage.ALL_DIRTY or bitmap.state is State.BROKEN:
        return evidence
    reason = f"{evidence.reason}; the stale bits are kept beside that"
    return _Evidence(evidence.bits.union(bitmap.bits), Proof.SUPERSET, reason)


# The policies


def _all_dirty(image: Qcow2Image, bitmap: StoredBitmap, _terms: Terms, _progress: Progress) -> _Evidence:
    length = image.geometry.bitmap_bits(bitmap.granularity)
    bits = BitVector.filled(length, image.geometry.cluster_size, ONES)
    return _Evidence(bits, Proof.SUPERSET, "the whole disk is marked")


def _allocated(image: Qcow2Image, bitmap: StoredBitmap, terms: Terms, _progress: Progress) -> _Evidence:
    if not terms.layer_is_newer:
        return _Evidence(None, Proof.UNKNOWN, _why_not_allocated(image))
    from .evidence import allocated

    below = "its backing file, which is as it was" if image.backing_file is not None else "nothing"
    reason = (
        "all that this image holds itself is marked, and by the user's word it held nothing when the bitmap began, "
        f"above {below}"
    )
    return _Evidence(allocated(image, bitmap.granularity), Proof.SUPERSET, reason)


def _why_not_allocated(image: Qcow2Image) -> str:
    if image.backing_file is None:
        return (
            "no image tells when a bitmap began, and this one has no backing file: unless the bitmap is as old as the "
            "image, what held data in the beginning and is unallocated now would be missed"
        )
    return (
        "no image tells when a bitmap began: only if nothing had been written to this overlay by then is all that it "
        "does not hold unchanged"
    )


def _rebuilt(image: Qcow2Image, bitmap: StoredBitmap, terms: Terms, progress: Progress) -> _Evidence:
    bits = changed_since(image, bitmap.granularity, terms, progress=progress)
    reason = f"marked is what differs from {terms.base}, which by the user's word is the disk as the bitmap began"
    return _Evidence(bits, Proof.EXACT, reason)


def changed_since(
    image: Qcow2Image, granularity: int, terms: Terms, *, progress: Progress = lambda _done, _total: None
) -> BitVector:
    """The granules of an image's disk that differ from the base that the terms name.

    Raises:
        UsageError: they name none, or something that the image is written to, or a data file that is nobody's.
        UnsupportedImageError, CorruptImageError, InUseError, ImageIOError: one of the disks cannot be read.
    """
    if terms.base is None:
        raise UsageError("a rebuild needs the disk as it was when the bitmap began", hint="name it with --against")
    from ..chain.compare import compare
    from ..chain.opening import Rules, open_disk, view_of
    from ..chain.pairing import require_apart, require_owners

    rules = replace(terms.rules if terms.rules is not None else Rules(), held=(image.file,))
    with (
        open_disk(terms.base, format=terms.base_format, rules=rules) as old,
        view_of(image, terms.disk, rules=rules) as new,
    ):
        require_owners(rules.data_files, old, new, image=image)
        require_apart(old, new, image=image, data_files=rules.data_files)
        return compare(old, new, granularity, chunk_bytes=image.geometry.cluster_size, progress=progress)


def _unlike_snapshot(image: Qcow2Image, bitmap: StoredBitmap, terms: Terms, _progress: Progress) -> _Evidence:
    if terms.snapshot is None:
        raise UsageError("an internal snapshot is needed", hint="name it with --snapshot; `qcow2bm info` shows them")
    from .evidence import find_snapshot, unlike_snapshot

    images = [seen for seen in (image, terms.as_found) if seen is not None]
    attached = all(seen.header.autoclear_features & Autoclear.BITMAPS for seen in images)
    if not (attached or terms.snapshot_is_start):
        reason = (
            "a program that knows no bitmaps wrote to the image, and may have gone back to the snapshot: only one that "
            "was taken at the very moment the bitmap began proves anything"
        )
        return _Evidence(None, Proof.UNKNOWN, reason)
    bits: BitVector | None = None
    for seen in images:
        snapshot = find_snapshot(seen, terms.snapshot)
        found = unlike_snapshot(seen, snapshot, bitmap.granularity, is_start=terms.snapshot_is_start)
        bits = found if bits is None else bits.union(found)
    when = "at the moment" if terms.snapshot_is_start else "not after"
    reason = (
        f"marked is every cluster that is not the one of snapshot '{terms.snapshot}', which by the user's word was "
        f"taken {when} the bitmap began, over the backing file that there is now, or none"
    )
    return _Evidence(bits, Proof.SUPERSET, reason)


_POLICIES: dict[Salvage, Callable[[Qcow2Image, StoredBitmap, Terms, Progress], _Evidence]] = {
    Salvage.ALL_DIRTY: _all_dirty,
    Salvage.ALLOCATED: _allocated,
    Salvage.REBUILD: _rebuilt,
    Salvage.SNAPSHOT: _unlike_snapshot,
}
