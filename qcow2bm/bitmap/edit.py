"""Editing the bitmaps of one image: any number of edits, one plan, all or nothing.

An `Edit` is a draft of the bitmaps as they shall be. Edits change the draft in the order they are asked for and
refuse what QEMU would refuse; nothing is written. `Edit.plan` compares the draft with what is stored and says what
to write: only chunks that differ, into free clusters, beside tables and directory of their own; what is stored
stays valid until the header points elsewhere.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..errors import (
    BitmapError,
    BitmapExistsError,
    BitmapInconsistentError,
    BitmapLimitError,
    BitmapNotFoundError,
    BitmapSizeMismatchError,
    UnsupportedImageError,
    UsageError,
)
from ..format.bitmap_directory import BitmapFlag
from ..format.geometry import div_up
from ..format.limits import (
    MAX_BITMAP_BYTES,
    MAX_BITMAP_NAME,
    MAX_BITMAPS,
)
from ..format.text import decode_name, encode_name
from ..image.image import Qcow2Image
from ..image.plan import Plan
from .algebra import Grained, Ranges, combine, covering, marking, regrained
from .bits import BitVector
from .chunks import ONES, ZEROES, Op
from .draft import Draft, Drafts, Source, require_granularity
from .store import BitmapDirectory, State, StoredBitmap, not_found, require_ready
from .write import plan_changes


@dataclass
class Edit:
    """A draft of an image's bitmaps. Names are text; offsets, lengths and granularities are bytes."""

    image: Qcow2Image
    directory: BitmapDirectory
    drafts: Drafts
    summary: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, image: Qcow2Image) -> Edit:
        """Start from what is stored.

        Raises:
            UnsupportedImageError: a version 2 image, which cannot hold bitmaps.
            BitmapBrokenError: the directory as a whole is damaged.
        """
        if image.header.version < 3:
            raise UnsupportedImageError(
                "a version 2 image cannot hold bitmaps", hint="`qemu-img amend -o compat=1.1` makes it version 3"
            )
        directory = BitmapDirectory(image)
        directory.require_undamaged()
        drafts = (
            Draft(stored.entry.name, stored.entry.granularity_bits, stored.entry.flags, stored=stored)
            for stored in directory.bitmaps
        )
        return cls(image, directory, Drafts(drafts))

    def names(self, *patterns: str) -> list[str]:
        """The names that match any of the shell-style patterns, in directory order.

        A pattern that is a bitmap's very name means that bitmap alone, whatever else it would match.

        Raises:
            BitmapNotFoundError: a pattern matches none.
        """
        names = [decode_name(draft.name) for draft in self.drafts]
        chosen: set[str] = set()
        for pattern in patterns:
            matching = [pattern] if pattern in names else [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            if not matching:
                raise BitmapNotFoundError(f"no bitmap matches '{pattern}'")
            chosen.update(matching)
        return [name for name in names if name in chosen]

    def broken(self) -> list[StoredBitmap]:
        """The broken bitmaps that stay: QEMU refuses most images that have one."""
        stored = (draft.stored for draft in self.drafts)
        return [bitmap for bitmap in stored if bitmap is not None and bitmap.state is State.BROKEN]

    def require_usable(self, name: str) -> None:
        """Raise BitmapNotFoundError, BitmapInconsistentError or BitmapBrokenError unless edits may use the bitmap."""
        self._usable(name)

    # Edits

    def add(
        self, name: str, *, granularity: int | None = None, recording: bool = True, all_dirty: bool = False
    ) -> None:
        """A new bitmap, empty or all dirty, with QEMU's default granularity.

        Raises:
            UsageError: the name or the granularity is none that QEMU takes.
            BitmapExistsError, BitmapLimitError: the image cannot take it.
        """
        geometry = self.image.geometry
        chosen = geometry.default_granularity if granularity is None else granularity
        self._require_new(name, chosen)
        bits = BitVector.filled(geometry.bitmap_bits(chosen), geometry.cluster_size, ONES if all_dirty else ZEROES)
        self._append(name, chosen, bits, recording=recording)
        self._note(
            f"add '{name}', granularity {chosen}, {'recording' if recording else 'disabled'}{', all dirty' * all_dirty}"
        )

    def remove(self, *names: str) -> None:
        """Remove bitmaps, whatever their state unless a running VM uses them.

        Raises BitmapNotFoundError for one that is not there.
        """
        for name in names:
            # Of several with one name all but the first are broken: the last goes first.
            draft = self._find(name, last=True)
            if draft.stored is not None and draft.stored.state is State.ACTIVE:
                draft.require_ready()
            self.drafts.remove_last(draft.name)
            self._note(f"remove '{name}'")

    def rename(self, old: str, new: str) -> None:
        """Give a bitmap another name; raises as `add` does for the new one."""
        draft = self._usable(old)
        self._require_new(new, draft.granularity)
        self.drafts.rename_first(draft.name, encode_name(new))
        self._note(f"rename '{old}' to '{new}'")

    def clear(self, *names: str) -> None:
        """Set all bits to zero."""
        for name in names:
            draft = self._usable(name)
            bits = draft.current_bits()
            draft.bits = BitVector.filled(bits.length, bits.chunk_bytes)
            self._note(f"clear '{name}'")

    def invert(self, *names: str) -> None:
        """Make dirty what is clean, and clean what is dirty."""
        for name in names:
            draft = self._usable(name)
            draft.bits = draft.current_bits().inverted()
            self._note(f"invert '{name}'")

    def resample(self, *names: str, granularity: int) -> None:
        """Give bitmaps another granularity. They keep name, flags and place, and no dirty byte is lost.

        Raises:
            UsageError: the granularity is none that QEMU takes.
            BitmapLimitError: a bitmap of that granularity would be larger than any that QEMU takes.
        """
        require_granularity(granularity)
        self._require_fitting(granularity)
        for name in names:
            draft = self._usable(name)
            draft.bits = self._converted(self._source(name), granularity)
            self._note(f"resample '{name}' from granularity {draft.granularity} to {granularity}")
            draft.granularity_bits = granularity.bit_length() - 1

    def enable(self, *names: str) -> None:
        """Make QEMU record writes in the bitmaps."""
        self._set_recording(names, recording=True)

    def disable(self, *names: str) -> None:
        """Make QEMU leave the bitmaps as they are."""
        self._set_recording(names, recording=False)

    def _set_recording(self, names: Iterable[str], *, recording: bool) -> None:
        for name in names:
            draft = self._usable(name)
            draft.flags = draft.flags | BitmapFlag.AUTO if recording else draft.flags & ~BitmapFlag.AUTO
            self._note(f"{'enable' if recording else 'disable'} '{name}'")

    def set_range(self, name: str, offset: int, length: int) -> None:
        """Mark a guest range dirty: every bit that it touches.

        Raises:
            UsageError: the range is empty or begins before the disk.
            BitmapLimitError: it goes past the end of the disk.
        """
        self._require_range(offset, length)
        draft = self._usable(name)
        first, stop = offset // draft.granularity, div_up(offset + length, draft.granularity)
        draft.bits = draft.current_bits().with_range(first, stop, value=True)
        self._note(f"set {offset}+{length} in '{name}'")

    def unset_range(self, name: str, offset: int, length: int) -> None:
        """Mark a guest range clean: only bits that lie wholly inside it, so that nothing else is called clean.

        Raises as `set_range` does.
        """
        self._require_range(offset, length)
        draft = self._usable(name)
        end = offset + length
        first = div_up(offset, draft.granularity)
        stop = div_up(end, draft.granularity) if end == self.image.geometry.virtual_size else end // draft.granularity
        draft.bits = draft.current_bits().with_range(first, max(first, stop), value=False)
        self._note(f"unset {offset}+{length} in '{name}'")

    def set_ranges(self, name: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Mark many guest ranges (offset, length) dirty in one pass, as `set_range` does one.

        They may be millions, row by row out of a list: in order they take 16 bytes each.
        """
        runs = Ranges.of(self._within(ranges))
        draft = self._usable(name)
        marks = marking(runs, draft.granularity, self.image.geometry)
        draft.bits = draft.current_bits().combined(Op.OR, marks)
        self._note(f"set {_count(runs)} in '{name}'")

    def unset_ranges(self, name: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Mark many guest ranges (offset, length) clean in one pass: bits that lie wholly inside them together."""
        runs = Ranges.of(self._within(ranges))
        draft = self._usable(name)
        marks = covering(runs, draft.granularity, self.image.geometry)
        draft.bits = draft.current_bits().combined(Op.SUBTRACT, marks)
        self._note(f"unset {_count(runs)} in '{name}'")

    def merge(self, target: str, sources: Iterable[str | Source], *, op: Op | str = Op.OR) -> None:
        """Combine other bitmaps with one, from left to right, whatever their granularities.

        Each bitmap stands for the bytes of its dirty granules. The target holds the result, rounded out to its own
        granules: a byte that is dirty in the exact result is dirty in the target, always.

        Args:
            op: "or", "and", "xor", or "subtract" for what is in the target and in none of the sources.

        Raises:
            UsageError: there is no such operation.
            BitmapSizeMismatchError: a source describes a disk of another size.
            BitmapNotFoundError, BitmapInconsistentError, BitmapBrokenError: target or source cannot be used.
        """
        chosen_op = _operation(op)
        draft = self._usable(target)
        chosen = [self._source(source) for source in sources]
        for source in chosen:
            self._require_same_disk(source)
        own = Grained(draft.current_bits(), draft.granularity)
        theirs = [Grained(source.bits, source.granularity) for source in chosen]
        draft.bits = combine(chosen_op, own, theirs, self.image.geometry)
        how = "" if chosen_op is Op.OR else f" by '{chosen_op}'"
        self._note(f"merge {', '.join(repr(source.label) for source in chosen)} into '{target}'{how}")

    def copy(self, source: str | Source, name: str, *, granularity: int | None = None) -> None:
        """A new bitmap with the bits and the recording flag of another, if wanted at another granularity.

        Raises as `merge` and `add`.
        """
        chosen = self._source(source)
        wanted = chosen.granularity if granularity is None else granularity
        self._require_new(name, wanted)
        self._append(name, wanted, self._converted(chosen, wanted), recording=chosen.recording)
        self._note(f"copy '{chosen.label}' to '{name}', granularity {wanted}")

    def salvage(self, name: str, bits: BitVector, *, granularity: int, recording: bool) -> None:
        """Give a bitmap that cannot be used other bits, and make it count: it is no longer in use.

        It gets a table and clusters of its own, and what it had is given back. Detached bitmaps count again only all
        together: each must be salvaged or removed. One that the directory does not have any more is put back.

        Args:
            bits: at `granularity`, in chunks of the image's cluster size.

        Raises:
            BitmapError: a bitmap of that name is in good order.
            BitmapInconsistentError: it is in use by a running VM.
            UsageError, BitmapLimitError: as `add`, of one that is put back.
        """
        self._require_shape(bits, granularity)
        raw = encode_name(name)
        flags = BitmapFlag.AUTO if recording else BitmapFlag(0)
        new = Draft(raw, granularity.bit_length() - 1, flags, bits)
        # Of several with one name all but the first are broken, and the first is the one to salvage.
        old = self.drafts.find(raw)
        if old is None:
            self._require_new(name, granularity)
            self._append(name, granularity, bits, recording=recording)
        else:
            stored = old.stored
            if stored is None or stored.state is State.READY:
                raise BitmapError(f"bitmap '{name}' is in good order, there is nothing to salvage")
            if stored.state is State.ACTIVE:
                require_ready(stored)
            self.drafts.replace_first(new)
        self._note(f"salvage '{name}'")

    def replace_bits(self, name: str, bits: BitVector) -> None:
        """Give a bitmap in good order other bits, at its granularity and in chunks of the image's cluster size.

        Raises BitmapNotFoundError, BitmapInconsistentError or BitmapBrokenError if it cannot be used.
        """
        draft = self._usable(name)
        self._require_shape(bits, draft.granularity)
        draft.bits = bits
        self._note(f"replace the bits of '{name}'")

    # The plan

    def plan(self) -> Plan:
        """Everything the edits come to, proved against the image's mapping.

        Raises:
            BitmapInconsistentError: some detached bitmaps have other bits now, and some would count with stale ones.
            UsageError: hundreds of operations of different kinds are stacked on one bitmap.
            ProofError, CorruptImageError: the image is not what the plan would rely on.
            NoSpaceError: a block device or the first cluster is too small.
            BitmapLimitError: the directory would be too large.
        """
        is_new = {draft.stored is None for draft in self.drafts}
        if not self.directory.attached and len(is_new) == 2:
            raise BitmapInconsistentError(
                "its bitmaps are detached, and not all of them have been salvaged",
                hint="salvage the others too, or remove them",
            )
        try:
            return plan_changes(self.image, self.directory, list(self.drafts), tuple(self.summary))
        except RecursionError:  # bits are made of bits that are made of bits
            text = "these are too many operations on one bitmap for one change"
            raise UsageError(text, hint="commit some of them first") from None

    # Helpers

    def _note(self, line: str) -> None:
        self.summary.append(line)

    def _find(self, name: str, *, last: bool = False) -> Draft:
        draft = self.drafts.find(encode_name(name), last=last)
        if draft is None:
            raise not_found(name)
        return draft

    def _usable(self, name: str) -> Draft:
        draft = self._find(name)
        draft.require_ready()
        return draft

    def _append(self, name: str, granularity: int, bits: BitVector, *, recording: bool) -> None:
        if len(self.drafts) >= MAX_BITMAPS:
            raise BitmapLimitError(f"an image holds at most {MAX_BITMAPS} bitmaps")
        flags = BitmapFlag.AUTO if recording else BitmapFlag(0)
        self.drafts.append(Draft(encode_name(name), granularity.bit_length() - 1, flags, bits))

    def _source(self, source: str | Source) -> Source:
        if isinstance(source, Source):
            return source
        draft = self._usable(source)
        recording = bool(draft.flags & BitmapFlag.AUTO)
        return Source(source, self.image.geometry.virtual_size, draft.granularity, draft.current_bits(), recording)

    def _require_shape(self, bits: BitVector, granularity: int) -> None:
        geometry = self.image.geometry
        if (bits.length, bits.chunk_bytes) != (geometry.bitmap_bits(granularity), geometry.cluster_size):
            raise ValueError("these bits are not in the shape of a bitmap of this image")

    def _converted(self, source: Source, granularity: int) -> BitVector:
        """A source's bits in the shape of a bitmap of this image."""
        self._require_same_disk(source)
        return regrained(Grained(source.bits, source.granularity), granularity, self.image.geometry)

    def _require_same_disk(self, source: Source) -> None:
        size = self.image.geometry.virtual_size
        if source.virtual_size != size:
            raise BitmapSizeMismatchError(
                f"the disk has {size} bytes, that of '{source.label}' has {source.virtual_size}",
                hint="only bitmaps of disks of the same size can be combined",
            )

    def _within(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The ranges (offset, length) as (start, end); raises as `set_range` does."""
        for offset, length in ranges:
            self._require_range(offset, length)
            yield offset, offset + length

    def _require_range(self, offset: int, length: int) -> None:
        size = self.image.geometry.virtual_size
        if offset < 0 or length <= 0:
            raise UsageError(f"the range {offset}+{length} is empty or begins before the disk")
        if offset + length > size:
            raise BitmapLimitError(f"the range {offset}+{length} is not within the disk of {size} bytes")

    def _require_new(self, name: str, granularity: int) -> None:
        raw = encode_name(name)
        if not 0 < len(raw) <= MAX_BITMAP_NAME:
            raise UsageError(f"a bitmap's name has 1 to {MAX_BITMAP_NAME} bytes, this one has {len(raw)}")
        if b"\0" in raw:
            raise UsageError("a bitmap's name cannot hold a zero byte")
        require_granularity(granularity)
        if self.drafts.find(raw) is not None:
            raise BitmapExistsError(f"there is a bitmap called '{name}' already")
        if not self.directory.attached and any(
            draft.stored is not None and draft.stored.state is State.DETACHED for draft in self.drafts
        ):
            raise BitmapInconsistentError(
                "its bitmaps are detached: a program that knows no bitmaps wrote to the image", hint="remove them first"
            )
        self._require_fitting(granularity)
        if not self.image.geometry.virtual_size:
            raise BitmapLimitError("a disk of 0 bytes cannot have a bitmap")

    def _require_fitting(self, granularity: int) -> None:
        size = self.image.geometry.bitmap_bytes(granularity)
        if size > MAX_BITMAP_BYTES:
            raise BitmapLimitError(
                f"the bitmap would have {size} bytes, above {MAX_BITMAP_BYTES}", hint="choose a larger granularity"
            )


def _operation(op: Op | str) -> Op:
    try:
        return Op(op)
    except ValueError:
        raise UsageError(f"no operation is called '{op}'", hint=f"there are {', '.join(Op)}") from None


def _count(runs: Ranges) -> str:
    if len(runs) == 1:
        start, end = next(iter(runs))
        return f"{start}+{end - start}"
    return f"{len(runs)} ranges of {runs.total} bytes"
