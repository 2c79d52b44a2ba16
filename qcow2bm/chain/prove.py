"""Does a bitmap tell the truth? Every byte that differs from an older copy must be marked.

A granule that differs and is not marked is missed: a backup by this bitmap would lack it, and nobody would notice. One
that is marked and does not differ is excess: it is copied in vain, and no more. Excess is normal: QEMU marks what is
written, even with the same bytes, in whole granules, and what was changed back stays marked.

The older copy must be of the moment the bitmap began, or of a later one at which everything marked by then had been
copied. A copy from before shows changes that the bitmap was never there for as missed.

What lies past the end of the older copy is compared with zeroes. QEMU leaves the tail of a disk that grew clean, and
whoever restores makes a disk of the new size, whose tail reads as zeroes.

A sample reads only some granules. Only a granule that the bitmap calls clean can be missed, and of these only one that
is not known to be equal from the mapping of both disks: zero in both, or the same bytes of one file. These suspects
are counted, put in order and cut into as many equal parts as granules may be read; of each part one is drawn. If at
least `m` of the suspects were missed, a part of `s` of them holds a share of these, and the chance that no draw hits
any is at most ``(1 - m / (n * s)) ** n``, whatever their place: a product is largest where its factors are equal.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from ..bitmap.algebra import joined
from ..bitmap.bits import BitVector
from ..bitmap.chunks import Op
from ..bitmap.store import BitmapDirectory
from ..errors import UsageError, naming
from ..format.geometry import div_up
from ..image.image import Qcow2Image
from .batches import pairs
from .compare import Progress, compare, differing_pairs
from .diff import Range, range_bytes, ranges
from .disk import Disk
from .held import held
from .layers import Extent
from .marks import Marks
from .opening import Rules, open_disk, view_of
from .pairing import require_apart, require_owners
from .usable import usable_bits

_READ_COSTS = 128 << 10
"""A read by itself takes as long as so many bytes of a long one."""
_FEW_READS = 2048
"""So many are done in no time, whatever else would be."""
_OFTEN = 1024
"""Rows between two words about the progress."""


class Verdict(Enum):
    """What a comparison says of a bitmap."""

    COVERED = "covered"
    """Every change is marked."""
    SAMPLED = "sampled"
    """Nothing was missed in what was compared, which is no proof."""
    MISSED = "missed"
    """Changes are missed: backups by it lack them."""
    UNDECIDED = "undecided"
    """It does not record, and something is not marked that may have been changed since it stopped."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Which granules were compared, of those that could have been missed.

    Attributes:
        seed: draws the same granules again, of the same disks and bitmap.
        suspects: granules that the bitmap calls clean, and that must be read to know whether they are.
        compared: how many of them were.
    """

    seed: int
    suspects: int
    compared: int

    @property
    def is_complete(self) -> bool:
        """True if none was left out: then nothing was left to chance."""
        return self.compared == self.suspects

    def chance_to_find(self, missed: int) -> float:
        """The least chance that one of so many missed granules would have been among those compared."""
        if missed <= 0:
            return 0.0
        if self.is_complete:
            return 1.0
        share = missed / (self.compared * div_up(self.suspects, self.compared)) if self.compared else 0.0
        return 1 - (1 - min(share, 1.0)) ** self.compared

    def would_be_found(self, chance: float) -> int | None:
        """So many missed granules, or more, would have been found with at least this chance; None for no number."""
        if self.is_complete:
            return 1
        if not self.compared:
            return None
        share = 1 - (1 - chance) ** (1 / self.compared)
        number = max(1, math.ceil(share * self.compared * div_up(self.suspects, self.compared)))
        return number if number <= self.suspects else None


@dataclass(frozen=True, slots=True)
class Coverage:
    """How a bitmap compares with what has changed. Sizes in bytes, `missed` and `excess` in granules of the bitmap.

    Attributes:
        recording: False for a bitmap that stands for a time that is over. Then what is missed may have been changed
            after that time, which is no fault, or in it, which is one: nobody can tell.
        missed: granules that differ and are not marked; of a sample those that were found.
        excess: granules that are marked and do not differ; None if only a sample was compared.
        changed: granules that differ; None as `excess`.
        sample: None if everything was compared.
    """

    image: Path
    bitmap: str
    against: Path
    virtual_size: int
    against_size: int
    granularity: int
    recording: bool
    missed: BitVector
    excess: BitVector | None
    changed: BitVector | None
    sample: Sample | None = None

    @property
    def is_covered(self) -> bool:
        """True if nothing was found that the bitmap misses."""
        return not self.missed_bytes

    @property
    def verdict(self) -> Verdict:
        """What that means."""
        if not self.is_covered:
            return Verdict.MISSED if self.recording else Verdict.UNDECIDED
        return Verdict.COVERED if self.sample is None or self.sample.is_complete else Verdict.SAMPLED

    @property
    def missed_bytes(self) -> int:
        """Bytes of the granules missed."""
        return range_bytes(self.missed, self.granularity, self.virtual_size)

    @property
    def excess_bytes(self) -> int | None:
        """Bytes of the granules marked in vain."""
        return None if self.excess is None else range_bytes(self.excess, self.granularity, self.virtual_size)

    @property
    def changed_bytes(self) -> int | None:
        """Bytes of the granules that differ."""
        return None if self.changed is None else range_bytes(self.changed, self.granularity, self.virtual_size)

    def missed_ranges(self) -> Iterator[Range]:
        """The ranges missed (offset, length), in order and apart."""
        return ranges(self.missed, self.granularity, self.virtual_size)

    def excess_ranges(self) -> Iterator[Range]:
        """The ranges marked in vain; none of a sample."""
        return iter(()) if self.excess is None else ranges(self.excess, self.granularity, self.virtual_size)


def prove(
    image: str | os.PathLike[str],
    bitmap: str,
    against: str | os.PathLike[str],
    *,
    against_format: str | None = None,
    disk: str | os.PathLike[str] | None = None,
    data_files: Mapping[Path, Path] | None = None,
    sample: int | None = None,
    seed: int | None = None,
    use_locks: bool = True,
    on_unlocked: Callable[[Path], object] = lambda _: None,
    progress: Progress = lambda _done, _total: None,
) -> Coverage:
    """Compare what a bitmap marks with what has changed since an older copy. Nothing is written.

    Args:
        against: the disk as it was when the bitmap began; a raw file or device, or a qcow2 image with its chain.
        against_format: "raw" or "qcow2"; None for raw, unless the file begins like something else.
        disk: a raw view of the image's own disk, for one that is encrypted.
        data_files: the external data file of each image that has one.
        sample: compare at most so many bytes, and say what chance that leaves; None for all. Where all is read sooner
            than so many single granules, all is compared, and the result has no sample.
        seed: of the sample; None for a new one.
        use_locks: False takes no locks.
        on_unlocked: called with each file that is read without the locks that were wanted: its file system has none.
        progress: called with bytes of the disk done, and in all.

    Raises:
        BitmapNotFoundError, BitmapInconsistentError, BitmapBrokenError: there are no bits to be relied on.
        UsageError: the sample holds no granule, `against` or a file of its chain is what the image is written to, a
            format must be named, a data file is nobody's, or `disk` is given for an image that can be read.
        BitmapSizeMismatchError: `disk` is of another size than the image's.
        UnsupportedImageError, CorruptImageError, InUseError, ImageIOError: as `qcow2bm.open`, of any file.
    """
    rules = Rules(data_files=data_files or {}, use_locks=use_locks, on_unlocked=on_unlocked)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Qcow2Image.open(image, use_locks=use_locks))
        if use_locks and not opened.locked:
            on_unlocked(opened.file.path)
        with naming(opened.file.path):
            stored = BitmapDirectory(opened).find(bitmap)
            bits = usable_bits(stored)
        old = stack.enter_context(open_disk(against, format=against_format, rules=rules))
        new = stack.enter_context(view_of(opened, disk, rules=rules))
        require_owners(rules.data_files, old, new, image=opened)
        require_apart(old, new, image=opened, data_files=rules.data_files)
        facts = (
            opened.file.path, bitmap, Path(against), opened.geometry.virtual_size, old.size, stored.granularity,
            stored.recording,
        )  # fmt: skip
        case = _Case(old, new, bits, stored.granularity)
        if sample is None:
            return Coverage(*facts, *_in_full(case, progress))
        part = _in_part(case, sample, seed, progress)
        if part is None:
            return Coverage(*facts, *_in_full(case, _second(progress, case.new.size)))
        missed, drawn = part
        return Coverage(*facts, missed, None, None, drawn)


def _second(progress: Progress, before: int) -> Progress:
    """The progress of what comes after so many bytes that were gone through already."""
    return lambda done, total: progress(before + done, before + total)


# In full


class _Case(NamedTuple):
    """What is to be proved: that `bits` mark what differs between two disks."""

    old: Disk
    new: Disk
    bits: BitVector
    granularity: int

    def marks(self) -> Marks:
        """Bits of the same shape, none of them set."""
        return Marks(self.new.size, self.granularity, self.bits.chunk_bytes)


def _in_full(case: _Case, progress: Progress) -> tuple[BitVector, BitVector, BitVector]:
    """What is missed, what is excess, what has changed."""
    bits = case.bits
    changed = compare(
        case.old, case.new, case.granularity, chunk_bytes=bits.chunk_bytes, zero_tail=True, progress=progress
    )
    return held(changed.combined(Op.SUBTRACT, bits)), held(bits.combined(Op.SUBTRACT, changed)), changed


# In part


def _in_part(case: _Case, limit: int, seed: int | None, progress: Progress) -> tuple[BitVector, Sample] | None:
    """What a sample of at most `limit` bytes finds missed, and which it was; None where reading all is faster."""
    granularity = case.granularity
    if limit < granularity:
        raise UsageError(f"a sample of {limit} bytes holds no granule of {granularity} bytes")
    size = case.new.size
    suspects, unlike = _suspects(case, lambda done: progress(done, size + min(limit, size)))
    total = suspects.count()
    count = min(limit // granularity, total)
    number = secrets.randbits(32) if seed is None else seed
    drawn = _drawn(total, count, random.Random(number))  # noqa: S311 - chosen to be fair, not to be secret
    chosen = list(joined((granule, granule + 1) for granule in _nth_set(suspects, drawn)))
    if len(chosen) > _FEW_READS and count * granularity + len(chosen) * _READ_COSTS > unlike:
        return None
    marks = case.marks()
    with contextlib.closing(_compared(case, chosen, count, _second(progress, size))) as runs:
        for run in runs:
            marks.mark(*run)
    return marks.vector(), Sample(number, total, count)


def _compared(case: _Case, chosen: list[Range], count: int, progress: Progress) -> Generator[Range, None, None]:
    """Of runs of granules (first, end) those that differ; `count` is how many they are."""
    granularity, done = case.granularity, 0

    def rows() -> Iterator[tuple[Extent, Extent]]:
        nonlocal done
        for first, stop in chosen:
            yield from pairs(case.old, case.new, first * granularity, stop * granularity, zero_tail=True)
            done += stop - first

    yield from differing_pairs(
        case.old, case.new, rows(), granularity, length=count * granularity,
        progress=lambda *_: progress(done * granularity, count * granularity),
    )  # fmt: skip


def _suspects(case: _Case, progress: Callable[[int], None]) -> tuple[BitVector, int]:
    """Granules that the bitmap calls clean and that must be read to know it, and bytes that a full proof would read."""
    marks, unlike = case.marks(), 0
    for number, (left, right) in enumerate(pairs(case.old, case.new, zero_tail=True)):
        if not left.is_stored_as(right):
            marks.mark_bytes(right.offset, right.end)
            unlike += right.length
        if number % _OFTEN == 0:
            progress(right.offset)
    return marks.vector().combined(Op.SUBTRACT, case.bits), unlike


def _drawn(total: int, count: int, chance: random.Random) -> Iterator[int]:
    """One number out of each of `count` equal parts of 0 to `total`, in order."""
    for part in range(count):
        yield chance.randrange(part * total // count, (part + 1) * total // count)


def _nth_set(bits: BitVector, wanted: Iterable[int]) -> Iterator[int]:
    """The places of set bits, which are asked for by number: from 0, in order."""
    runs = bits.runs()
    before, first, stop = 0, 0, 0
    for number in wanted:
        while number >= before + stop - first:
            before += stop - first
            first, stop = next(runs)
        yield first + number - before
