"""Every edit on every kind of image, by us and by `qemu-img bitmap`: QEMU must see no difference afterwards.

QEMU makes the image; copies of it are edited: one by qemu-img, one by us in a few commits, and for three refcount
widths one by us with a commit for each edit. The two ways we do it leave different traces: a commit of its own switches
a directory entry in place and reuses clusters that the one before gave back. QEMU then lists and reads all copies,
checks ours, and compares the disks.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

import qcow2bm
from qcow2bm.bitmap.edit import Edit
from tests.interop.combinations import Combination, Kind, Maker, copy, discard, matrix, sample
from tests.interop.edits import STEPS, by_qemu, by_us, paint
from tests.support.qemu import Ranges, bitmap_info, check, guest_digest, read_bitmaps, same_guest_data

TOGETHER = [list(STEPS[:9]), list(STEPS[9:17]), list(STEPS[17:])]
APART = [[step] for step in STEPS]

APART_WIDTHS = (1, 16, 64)
"""Refcount widths on which each edit also has a commit of its own: the usual one, and those whose refcount blocks hold
the most and the fewest refcounts. All widths would take the time of the whole run once more."""


def listing(image: Path) -> list[dict[str, Any]]:
    """What `qemu-img info` says of every bitmap, by name: QEMU itself changes the directory's order at times."""
    return sorted(bitmap_info(image), key=lambda entry: entry["name"])


def read_by_us(image: Path) -> dict[str, Ranges]:
    """The dirty ranges as qcow2bm reads them."""
    with qcow2bm.open(image) as ours:
        return {bitmap.name: [(extent.offset, extent.length) for extent in bitmap.extents()] for bitmap in ours.bitmaps}


def require_clean(image: Path, secret: str | None) -> None:
    """Neither a corruption nor a leak."""
    said = check(image, secret)
    assert said["returncode"] == 0, said


DIGESTED = (Kind.DATA_FILE, Kind.DATA_FILE_RAW, Kind.LUKS)
"""Kinds that `qemu-img compare` cannot do, so that their content is digested by way of `qemu-img convert`.

It would look for both relative data files in one folder; and on a LUKS image of 2 MiB clusters QEMU 7.2 aborts with an
assertion (bdrv_co_block_status: QEMU_IS_ALIGNED), even when it compares a file with its copy."""


@pytest.mark.parametrize("combination", sample(), ids=str)
def test_our_edits_are_qemus(combination: Combination, tmp_path: Path) -> None:
    original = Maker(combination, tmp_path / "original").make()
    secret = combination.secret
    require_clean(original, secret)
    digest = guest_digest(original, secret) if combination.kind in DIGESTED else None

    theirs = copy(original, tmp_path / "theirs")
    by_qemu(theirs, secret)
    expected, dirty = listing(theirs), read_bitmaps(theirs, secret=secret)
    granularities = {entry["name"]: entry["granularity"] for entry in expected}
    paint(dirty, granularities.__getitem__, combination.size)
    discard(theirs)

    ways = {"together": TOGETHER} | ({"apart": APART} if combination.refcount_bits in APART_WIDTHS else {})
    for name, groups in ways.items():
        ours = copy(original, tmp_path / name)
        by_us(ours, groups, lambda image: require_clean(image, secret))
        assert listing(ours) == expected
        assert read_bitmaps(ours, secret=secret) == dirty
        assert read_by_us(ours) == dirty
        assert guest_digest(ours, secret) == digest if digest else same_guest_data(original, ours)
        discard(ours)
    discard(original)


def test_the_matrix_is_whole() -> None:
    """Nothing falls out unnoticed: 4 cluster sizes, 7 refcount widths, 8 kinds, less what the two rules exclude."""
    assert len(matrix()) == 4 * 7 * 8 - 2 * 7 - 4


def test_the_sample_has_every_pair() -> None:
    """What CI leaves out are threes, never two that go together."""

    def pairs(combinations: list[Combination]) -> set[tuple[object, object]]:
        return {
            pair for one in combinations for pair in permutations((one.cluster_size, one.kind, -one.refcount_bits), 2)
        }

    assert pairs(sample()) == pairs(matrix())


def test_every_edit_is_there() -> None:
    """What `Edit` can do is what the steps do: a new edit without its counterpart fails here."""
    of_no_bitmap = {"of", "names", "broken", "require_usable", "plan"}
    tried_elsewhere = {"invert", "resample", "salvage", "replace_bits", "set_ranges", "unset_ranges"}
    public = {name for name in vars(Edit) if not name.startswith("_")} - of_no_bitmap - tried_elsewhere
    used = {name for step in STEPS for name in step.ours.__code__.co_names}
    assert public <= used
    assert {step.name for step in STEPS} == {step.name for group in TOGETHER for step in group}
