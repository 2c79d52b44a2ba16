"""The copied flags of the active disk, and the marks in the header that say an image is dirty or corrupt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

from ..checks.model import RepairClass, Severity
from ..checks.problems import PROBLEMS
from ..format.header import INCOMPATIBLE_FIELD, Incompatible
from . import whole_tables
from .model import Proposal, Scope, Step
from .workshop import Workshop


def copied(shop: Workshop) -> Iterator[Proposal]:
    """Set the flags where, and only where, the refcount is one."""
    codes = Counter[str]()
    for finding in shop.found("copied-l1", "copied-l2"):
        codes[finding.code] += finding.count
    if codes:
        title = f"correct {codes.total()} copied flags"
        yield Step(title, RepairClass.LOSSLESS, Scope.REFCOUNTS, codes), partial(_correct, shop)


def _correct(shop: Workshop) -> None:
    for finding in shop.found("copied-l1", "copied-l2"):
        place, values = finding.location.host_offset, finding.values
        assert place is not None, "findings about entries say where they are"
        if finding.folded:
            whole_tables.mend_flags(shop, finding)
            continue
        if not shop.owns(place):
            continue
        size = 8 if finding.code == "copied-l1" else shop.seen.geometry.l2_entry_size
        data = bytearray(shop.file.read_padded(place, size * values["entries"]))
        for at in range(0, len(data), size):  # the flag is the highest bit of an entry
            data[at] = data[at] | 0x80 if values["refcount"] == 1 else data[at] & 0x7F
        shop.write(place, bytes(data), f"{finding.location.structure}: entry {finding.location.index}")


def marks(shop: Workshop) -> Iterator[Proposal]:
    """Clear the dirty bit once the refcounts are right, and the corrupt bit once nothing is corrupt any more."""
    left = {code for code in shop.look() if PROBLEMS[code].severity in (Severity.CORRUPTION, Severity.UNKNOWN)}
    left -= {"marked-corrupt"}
    for code, bit, text in (
        ("marked-dirty", Incompatible.DIRTY, "clear the dirty bit: the refcounts are right"),
        ("marked-corrupt", Incompatible.CORRUPT, "clear the corrupt bit: nothing is corrupt any more"),
    ):
        if shop.found(code):
            step = Step(text, RepairClass.LOSSLESS, Scope.REFCOUNTS, {code: 1})
            if left:
                step.refused = f"other damage is left ({', '.join(sorted(left)[:3])})"
            yield step, partial(_clear, shop, bit)


def _clear(shop: Workshop, bit: Incompatible) -> None:
    features = int(shop.image.header.incompatible_features) & ~int(bit)
    shop.write(INCOMPATIBLE_FIELD, features.to_bytes(8, "big"), "header: incompatible features")
