"""Rebuild: new bits for a bitmap from a comparison with an older copy of the disk, whatever state it is in.

An inconsistent, detached or broken bitmap is salvaged. One in good order gets its bits replaced, one that is not there
is added. All keep name, granularity and recording flag.

A bitmap that does not record stands for a time that is over. Comparing tells what is different now, be it changed in
that time or after it, and knows nothing of what changed in that time and changed back since. So such a bitmap keeps
the bits it has beside the new ones, unless the user says otherwise: then it marks all that the time changed, and more.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..bitmap.bits import BitVector
from ..bitmap.edit import Edit
from ..bitmap.store import State, StoredBitmap
from ..errors import BitmapInconsistentError, UsageError, naming
from ..format.bitmap_directory import BitmapFlag
from ..format.text import decode_name, encode_name
from ..image.commit import commit
from ..image.image import Qcow2Image
from .model import Salvage
from .salvage import Proof, Terms, changed_since, salvaged

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A bitmap that has new bits.

    Attributes:
        dirty_granules: how many it marks.
        proof: what is known of them, and `reason` why: one sentence without a final full stop.
    """

    image: Path
    bitmap: str
    granularity: int
    recording: bool
    dirty_granules: int
    proof: Proof
    reason: str


def rebuild(
    image: str | os.PathLike[str],
    bitmap: str,
    against: str | os.PathLike[str],
    *,
    against_format: str | None = None,
    disk: str | os.PathLike[str] | None = None,
    data_files: Mapping[Path, Path] | None = None,
    create: bool = False,
    granularity: int | None = None,
    keep_marked: bool | None = None,
    undo: str | os.PathLike[str] | None = None,
    use_locks: bool = True,
    progress: Progress = lambda _done, _total: None,
) -> Rebuilt:
    """Give a bitmap new bits by comparing its disk with an older copy, in one commit: all of it or nothing.

    Args:
        against: the disk exactly as it was when the bitmap began; a raw file or device, or a qcow2 image with its
            chain. Nobody can tell a wrong copy from a right one, and by a wrong one the bitmap misses changes.
        against_format: "raw" or "qcow2"; None for raw, unless the file begins like something else.
        disk: a raw view of the image's own disk, for one that is encrypted.
        data_files: the external data file of each image that has one.
        create: add a bitmap that is not there.
        granularity: of one that is added; None for QEMU's default.
        keep_marked: unite with what is marked now; None for what is right: of a bitmap that does not record.
        undo: keep what is replaced in this file, which must not exist yet.
        use_locks: False takes no locks: the caller knows that nobody uses any of the files.
        progress: called with bytes of the disk compared, and in all.

    Raises:
        Qcow2bmError: as `draft_rebuild` and `qcow2bm.open`, or the commit fails; the image is as before.
    """
    from ..chain.opening import Rules  # loads numpy

    rules = Rules(data_files=data_files or {}, use_locks=use_locks)
    view = None if disk is None else Path(disk)
    terms = Terms(Path(against), against_format, rules, view, keep_stale=keep_marked)
    with Qcow2Image.open(image, writable=True, use_locks=use_locks) as opened, naming(opened.file.path):
        opened.require_writable()
        edit = Edit.of(opened)
        proof, reason = draft_rebuild(edit, bitmap, terms, create=create, granularity=granularity, progress=progress)
        draft = edit.drafts.find(encode_name(bitmap))
        assert draft is not None, "it has just been drafted"
        marked = draft.current_bits().count()
        plan = edit.plan()
        if plan:
            commit(opened, plan, undo=None if undo is None else Path(undo))
        recording = bool(draft.flags & BitmapFlag.AUTO)
        return Rebuilt(opened.file.path, bitmap, draft.granularity, recording, marked, proof, reason)


def draft_rebuild(
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
        BitmapError: it is not there and not to be added, in use by a running VM, broken beyond salvage, or one of
            several detached ones.
        UsageError: a granularity for a bitmap that has one, no base, or a base that the image is written to.
        UnsupportedImageError, CorruptImageError, InUseError, ImageIOError: one of the disks cannot be read.
    """
    raw = encode_name(name)
    found = next((bitmap for bitmap in edit.directory.bitmaps if bitmap.entry.name == raw), None)
    if found is not None and granularity not in (None, found.granularity):
        raise UsageError(
            f"bitmap '{name}' has granularity {found.granularity}", hint="`qcow2bm resample` gives it another one"
        )
    if found is not None and found.state is State.DETACHED:
        _require_alone(edit, against=terms.base)
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


def _require_alone(edit: Edit, *, against: Path | None) -> None:
    """Raise BitmapInconsistentError if other bitmaps are detached too: they count again only all together."""
    names = [draft.name for draft in edit.drafts if draft.stored is not None]
    if len(names) < 2:
        return
    words = [word for name in names for word in ("--bitmap", decode_name(name))]
    base = "BASE" if against is None else str(against)
    line = shlex.join(["qcow2bm", "repair", str(edit.image.file.path), "--detached", "rebuild", "--against", base])
    raise BitmapInconsistentError(
        f"its {len(names)} bitmaps are detached, and count again only all together",
        hint=f"if all began when BASE was made: `{line} {shlex.join(words)}`; otherwise remove those that did not",
    )


def _with_stored(stored: StoredBitmap | None, bits: BitVector, terms: Terms) -> tuple[Proof, BitVector, str]:
    """The new bits, united with those of the bitmap if that is wanted."""
    reason = f"marked is what differs from {terms.base}, which by the user's word is the disk as the bitmap began"
    if stored is None or not (not stored.recording if terms.keep_stale is None else terms.keep_stale):
        return Proof.EXACT, bits, reason
    return Proof.SUPERSET, bits.union(stored.bits), f"{reason}; what was marked before is kept beside that"
