"""Rebuild: new bits for a bitmap from a comparison with an older copy of the disk, whatever state it is in.

An inconsistent, detached or broken bitmap is salvaged. One in good order gets its bits replaced, one that is not there
is added. All keep name, granularity and recording flag.

A bitmap that does not record stands for a time that is over. Comparing tells what is different now, be it changed in
that time or after it, and knows nothing of what changed in that time and changed back since. So such a bitmap keeps
the bits it has beside the new ones, unless the user says otherwise: then it marks all that the time changed, and more.
"""

from __future__ import annotations

from collections.abc import Callable

from ..bitmap.bits import BitVector
from ..bitmap.edit import Edit
from ..bitmap.store import State, StoredBitmap
from ..errors import UsageError
from ..format.text import encode_name
from .model import Salvage
from .salvage import Proof, Terms, changed_since, salvaged

Progress = Callable[[int, int], None]


def rebuild(
    edit: Edit,
    name: str,
    terms: Terms,
    *,
    create: bool = False,
    granularity: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> tuple[Proof, str]:
    """Draft new bits for a bitmap: what differs from `terms.base`. Returns what is proved of them, and why.

    Args:
        terms: `base` is the disk as it was when the bitmap began; `keep_stale` unites with the bits that are stored,
            whatever they are; None for what is right: those of a bitmap that does not record.
        create: add a bitmap that is not there.
        granularity: of one that is added; None for QEMU's default.
        progress: called with bytes of the disk compared, and in all.

    Raises:
        BitmapError: it is not there and not to be added, in use by a running VM, or broken beyond salvage.
        UsageError: a granularity for a bitmap that has one, no base, or the image as its own base.
        UnsupportedImageError, CorruptImageError, InUseError, ImageIOError: one of the disks cannot be read.
    """
    raw = encode_name(name)
    found = next((bitmap for bitmap in edit.directory.bitmaps if bitmap.entry.name == raw), None)
    if found is not None and granularity not in (None, found.granularity):
        raise UsageError(
            f"bitmap '{name}' has granularity {found.granularity}", hint="`qcow2bm resample` gives it another one"
        )
    if found is not None and found.state is not State.READY:
        result = salvaged(edit.image, found, Salvage.REBUILD, terms, progress=progress)
        assert result.bits is not None, "a comparison gives bits"
        edit.salvage(name, result.bits, granularity=result.granularity, recording=result.recording)
        edit.summary.append(result.reason)
        return result.proof, result.reason
    if found is None and create:
        edit.add(name, granularity=granularity)
    edit.require_usable(name)
    wanted = found.granularity if found is not None else granularity or edit.image.geometry.default_granularity
    bits = changed_since(edit.image, wanted, terms, progress=progress)
    proof, bits, reason = _with_stored(found, bits, terms)
    edit.replace_bits(name, bits)
    edit.summary.append(reason)
    return proof, reason


def _with_stored(stored: StoredBitmap | None, bits: BitVector, terms: Terms) -> tuple[Proof, BitVector, str]:
    """The new bits, united with those of the bitmap if that is wanted."""
    reason = f"marked is what differs from {terms.base}, which by the user's word is the disk as the bitmap began"
    if stored is None or not (not stored.recording if terms.keep_stale is None else terms.keep_stale):
        return Proof.EXACT, bits, reason
    return Proof.SUPERSET, bits.union(stored.bits), f"{reason}; what was marked before is kept beside that"
