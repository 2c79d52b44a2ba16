"""Exported bitmaps back into an image, as edits of its bitmaps: whatever `sidecar_reader` read becomes part of a plan.

A bitmap that says too little makes a backup miss data, and nobody notices. So what is imported must be of this disk as
it is now, as far as that can be told; what may lack writes is refused; and whoever knows better has to say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..errors import BitmapExistsError, BitmapInconsistentError, LineageError, UsageError
from ..format.text import encode_name
from ..image.image import Qcow2Image
from .edit import Edit
from .sidecar_lineage import Standing, require_size
from .sidecar_model import Export, ExportedBitmap


@dataclass(frozen=True, slots=True)
class ImportPolicy:
    """How exported bitmaps come into an image.

    Attributes:
        merge: into one that has the name already; at its granularity, and without touching its recording flag.
        replace: one that has the name already is removed first, whatever its state.
        granularity: another one for a new bitmap; whatever was dirty stays dirty.
        recording: whether QEMU tracks writes in it; None for as it was, and not if it is stale.
        stale: also bitmaps that were marked as stale when they were exported; they come in without recording.
        force_lineage: also bitmaps that are not known to be of this disk as it is.
        untouched: not even if nothing but bitmaps need have been written since, for clusters may have been rewritten.
    """

    merge: bool = False
    replace: bool = False
    granularity: int | None = None
    recording: bool | None = None
    stale: bool = False
    force_lineage: bool = False
    untouched: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError for what cannot go together."""
        if self.merge and self.replace:
            raise UsageError("--merge keeps what is there, and --replace does not: choose one")
        if self.force_lineage and self.untouched:
            raise UsageError("--force-lineage does not look at the image, and --untouched does: choose one")
        if self.stale and self.recording:
            raise UsageError(
                "--stale takes bitmaps that may lack writes, and --enabled would make them count as if they did not",
                hint="leave one out",
            )


_PLAIN = ImportPolicy()


def import_bitmaps(
    edit: Edit, export: Export, bitmaps: Iterable[str] = (), *, policy: ImportPolicy = _PLAIN, name: str | None = None
) -> Standing | None:
    """Draft exported bitmaps as bitmaps of the image; the export stays open until the plan is carried out.

    Args:
        bitmaps: their names in the export; all of them by default.
        name: another name for the only one.

    Returns:
        How the image stands to the export; None if `policy.force_lineage` says not to look.

    Raises:
        BitmapNotFoundError: the export has no bitmap of that name.
        Others: as `require_fit` and `bring_in`.
    """
    chosen = [export.find(one) for one in dict.fromkeys(bitmaps)] or export.bitmaps
    found = require_fit(export, edit.image, policy)
    if name is not None and len(chosen) != 1:
        raise UsageError(f"another name goes with one bitmap, and these are {len(chosen)}", hint="choose one")
    for bitmap in chosen:
        bring_in(edit, bitmap, policy, name)
    return found


def require_fit(export: Export, image: Qcow2Image, policy: ImportPolicy) -> Standing | None:
    """Refuse an export that is not known to be of this image as it is now; how the image stands to it otherwise.

    None means that nothing was looked at: somebody vouches for it.

    Raises:
        BitmapSizeMismatchError: it is of a disk of another size, which no vouching helps.
        LineageError: it is of another image or another time, or does not say.
        CorruptImageError: a mapping table of the image cannot be read.
    """
    for size in {bitmap.virtual_size for bitmap in export.bitmaps}:
        require_size(size, image)
    if policy.force_lineage:
        return None
    if export.lineage is None:
        raise LineageError(
            f"{export.name} does not say which disk it is about, or when",
            hint="if you know that it is right for this disk as it is now, use --force-lineage",
        )
    return export.lineage.require(image, untouched=policy.untouched)


def bring_in(edit: Edit, bitmap: ExportedBitmap, policy: ImportPolicy, name: str | None = None) -> None:
    """Draft an exported bitmap as one of the image. `require_fit` has been asked before.

    Args:
        name: another name for it.

    Raises:
        BitmapInconsistentError: it is stale and `policy.stale` is off, or the one to merge into is not ready.
        BitmapExistsError: the image has one of that name, and is to keep it.
        UsageError, BitmapLimitError: the image cannot take it.
    """
    if bitmap.stale and not policy.stale:
        raise BitmapInconsistentError(
            f"bitmap '{bitmap.name}' was stale when it was exported: it may lack writes",
            hint="--stale imports it without recording; only a full backup makes up for what it lacks",
        )
    wanted = bitmap.name if name is None else name
    there = edit.drafts.find(encode_name(wanted)) is not None
    if there and policy.merge:
        _merge(edit, bitmap, wanted, policy)
        return
    if there and not policy.replace:
        raise BitmapExistsError(
            f"there is a bitmap called '{wanted}' already", hint="--merge adds to it, --replace does away with it"
        )
    if there:
        edit.remove(wanted)
    recording = bitmap.recording and not bitmap.stale if policy.recording is None else policy.recording
    edit.copy(replace(bitmap.source, recording=recording), wanted, granularity=policy.granularity)


def _merge(edit: Edit, bitmap: ExportedBitmap, name: str, policy: ImportPolicy) -> None:
    if policy.granularity is not None:
        raise UsageError(f"'{name}' is there and keeps its granularity", hint="leave -g out, or use `qcow2bm resample`")
    edit.merge(name, [bitmap.source])
    if policy.recording is not None:
        (edit.enable if policy.recording else edit.disable)(name)
