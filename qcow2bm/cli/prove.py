"""`qcow2bm prove`: does a bitmap mark everything that has changed?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from heapq import merge
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CorruptImageError, UnprovedError, UsageError
from .disks import (
    AgainstFormatOption,
    AgainstOption,
    DataFilesOption,
    DiskOption,
    data_files,
    format_of,
    shut_down_first,
    warn_if_outdated,
)
from .options import BitmapArgument, ImageArgument, NoLockOption, OutputOption, ProgressOption
from .output import Cell, JsonObject, Output, print_json, print_pairs, warn
from .progress import ProgressBar
from .reading import warn_unlocked
from .sizes import exact_size, human_size, parse_size, percent

if TYPE_CHECKING:
    from ..chain.prove import Coverage, Sample  # loads numpy

MISSED = 2
"""Exit status: the bitmap misses changes, so backups by it lack data. Nothing else has it here."""

_SHOWN = 20
_CHANCES = (0.95, 0.99)

SampleOption = Annotated[
    int | None,
    typer.Option(
        "--sample", metavar="SIZE", parser=parse_size, show_default=False,
        help="Compare so many bytes of what could be missed, drawn at random, and tell what chance that leaves.",
    ),
]  # fmt: skip
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="With --sample: draw as another run did.", show_default="a new one")
]


def prove(
    image: ImageArgument,
    bitmap: BitmapArgument,
    *,
    against: AgainstOption,
    against_format: AgainstFormatOption = None,
    data_file: DataFilesOption = None,
    disk: DiskOption = None,
    sample: SampleOption = None,
    seed: SeedOption = None,
    no_lock: NoLockOption = False,
    output: OutputOption = Output.HUMAN,
    progress: ProgressOption = None,
) -> int:
    """Prove a bitmap against a copy of the disk from when it began: is every byte that differs marked?

    What differs and is not marked is missed: backups by the bitmap lack it. What is marked and does not differ is
    excess: it is copied in vain, which is normal. What lies past the end of BASE is compared with zeroes.

    --sample reads a bounded part of what the bitmap calls clean, and tells how many misses that would have shown. It
    finds no excess.

    Of a bitmap that does not record, what differs and is not marked may have been changed since it stopped: what it
    misses is told, and that nobody knows whether that is a fault.

    Exit status: 0 nothing is missed, as far as was compared; 2 something is; 1 it could not be put to the test, for
    one of the disks cannot be read; 4 the bitmap is broken or inconsistent; 75 something is in use.
    """
    from ..chain.prove import prove as compared

    if seed is not None and sample is None:
        raise UsageError("--seed goes with --sample")
    warn_if_outdated(disk, image)
    with _as_unproved(), shut_down_first(), ProgressBar(wanted=progress) as bar:
        found = compared(
            image,
            bitmap,
            against,
            against_format=format_of(against, against_format),
            disk=disk,
            data_files=data_files(data_file, image),
            sample=sample,
            seed=seed,
            use_locks=not no_lock,
            on_unlocked=warn_unlocked,
            progress=bar,
        )
    if sample is not None and found.sample is None:
        warn("all of it was compared: that is faster than so many single granules of a sample", image)
    if output is Output.JSON:
        print_json(_document(found), ("extents", _extents(found)))
    else:
        _print(found)
    if found.virtual_size < found.against_size:
        past = human_size(found.against_size - found.virtual_size)
        warn(f"BASE is larger by {past}: no bitmap of this disk tells what became of that", image)
    return 0 if found.is_covered else MISSED


@contextlib.contextmanager
def _as_unproved() -> Iterator[None]:
    """Damage that keeps the disks from being read says nothing of the bitmap, and must not look as if it did."""
    try:
        yield
    except CorruptImageError as error:
        raise UnprovedError(
            f"nothing is proved, for it cannot be read: {error.message}", hint=error.hint, image=error.image
        ) from error


# JSON


def _document(found: Coverage) -> dict[str, object]:
    return {
        "image": str(found.image),
        "bitmap": found.bitmap,
        "against": str(found.against),
        "virtual-size": found.virtual_size,
        "against-size": found.against_size,
        "granularity": found.granularity,
        "recording": found.recording,
        "covered": found.is_covered,
        "verdict": found.verdict.value,
        "changed-bytes": found.changed_bytes,
        "missed-bytes": found.missed_bytes,
        "excess-bytes": found.excess_bytes,
        "sample": None if found.sample is None else _sample_json(found.sample),
    }


def _sample_json(sample: Sample) -> JsonObject:
    found = [{"chance": chance, "missed-granules": sample.would_be_found(chance)} for chance in _CHANCES]
    return {
        "seed": sample.seed,
        "suspect-granules": sample.suspects,
        "compared-granules": sample.compared,
        "complete": sample.is_complete,
        "would-be-found": found,
    }


def _extents(found: Coverage) -> Iterator[JsonObject]:
    """Missed and excess ranges, in order."""
    missed = ((offset, length, "missed") for offset, length in found.missed_ranges())
    excess = ((offset, length, "excess") for offset, length in found.excess_ranges())
    for offset, length, kind in merge(missed, excess):
        yield {"offset": offset, "length": length, "kind": kind}


# For reading


def _print(found: Coverage) -> None:
    print_pairs(_facts(found))
    ranges = list(islice(found.missed_ranges(), _SHOWN + 1))
    if not ranges:
        return
    print("\nmissed:")
    for offset, length in ranges[:_SHOWN]:
        print(f"  {offset:#014x}  {length:>12}  {human_size(length)}")
    if len(ranges) > _SHOWN:
        print("  and more; --output json lists all")
    if found.recording:
        print("\nA backup by this bitmap lacks what is missed: make a full one. `qcow2bm rebuild` mends the bitmap.")
    else:
        print(
            "\nThe bitmap does not record: it stands for a time that is over. What is missed was changed after that "
            "time,\nwhich is no fault, or in it, which is one: that can be told only with a copy from when it stopped."
        )


def _facts(found: Coverage) -> Iterator[tuple[str, str | Cell]]:
    yield "bitmap", Cell(found.bitmap, "bold")
    yield "image", f"{found.image}, {exact_size(found.virtual_size)}"
    yield "against", f"{found.against}, {exact_size(found.against_size)}"
    yield "granularity", exact_size(found.granularity)
    yield "recording", "yes" if found.recording else "no: it stands for a time that is over"
    if found.changed_bytes is not None:
        yield "changed", f"{exact_size(found.changed_bytes)}, {percent(found.changed_bytes, found.virtual_size)}"
    missed = found.missed.count_runs()
    text = f"{exact_size(found.missed_bytes)} in {_ranges(missed)}" if missed else "nothing"
    yield "missed", Cell(text, "red" if missed else "green")
    if found.excess is not None and found.excess_bytes is not None:
        yield "excess", f"{exact_size(found.excess_bytes)} in {_ranges(found.excess.count_runs())}"
    if found.virtual_size > found.against_size:
        yield "grown by", f"{exact_size(found.virtual_size - found.against_size)}, compared with zeroes"
    if found.sample is not None:
        yield from _sample_facts(found.sample, found.granularity)
    yield "verdict", _verdict(found.verdict.value)


def _verdict(name: str) -> Cell:
    return {
        "covered": Cell("every change is marked", "green"),
        "sampled": Cell("nothing missed in what was compared, which is no proof"),
        "missed": Cell("changes are missed: not to be relied on", "red"),
        "undecided": Cell("not all that differs is marked, but it may have been changed later", "yellow"),
    }[name]


def _ranges(count: int) -> str:
    return f"{count} range{'s' * (count != 1)}"


def _sample_facts(sample: Sample, granularity: int) -> Iterator[tuple[str, str]]:
    yield "compared", f"{sample.compared} of {sample.suspects} granules that could be missed, seed {sample.seed}"
    if sample.is_complete:
        return
    for chance in _CHANCES:
        least = sample.would_be_found(chance)
        if least is None:
            text = "no number of misses would have been found"
        else:
            text = f"{least} missed granules ({human_size(least * granularity)}) or more would have been found"
        yield f"at {chance:.0%}", text
