"""A repair from beginning to end: work it out on an overlay, judge the result there, then write it as one change."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..bitmap.quarantine import doubted
from ..checks.model import RepairClass, Report, Severity
from ..checks.view import Progress
from ..errors import ProofError, Qcow2bmError
from ..format.header import CHANGE_CUT_SHORT
from ..image.file import ImageFile
from ..image.overlay import OverlayFile
from ..image.plan import Plan
from . import apart, counts, entries, fields, flags, rescue, revive, snapshots
from .model import Proposal, RepairPlan, RepairPolicy, Scope, Step
from .workshop import Workshop

Phase = Callable[[Workshop], Iterator[Proposal]]
Ask = Callable[[Step], bool]

PHASES: tuple[Phase, ...] = (
    fields.fields,
    rescue.rescue,
    snapshots.snapshots,
    counts.structures,
    apart.apart,
    entries.entries,
    counts.raised,
    counts.lowered,
    flags.copied,
    revive.revive,
    flags.marks,
)
"""What is mended, in this order: first what says where things are, then what things are, then how often they are
used, at last what vouches for all of it."""

_BUILT_ON_MAPPING = (Scope.MAPPINGS, Scope.REFCOUNTS, Scope.LEAKS)
_NO_EDITS = "there is nothing that may be changed: another structure uses its cluster too"
_ROUNDS = 4
"""Times that the phases are gone through: mending one thing may show another."""


def work_out(
    overlay: OverlayFile,
    policy: RepairPolicy,
    *,
    ask: Ask = lambda _: True,
    progress: Progress = lambda _done, _total: None,
) -> RepairPlan:
    """Work out a repair of an open image. Nothing is written but to the overlay, which the plan's writes are read from.

    Args:
        ask: is asked about every step that the policy allows, before it is worked out.
        progress: called with bytes of L2 tables read and to read, for each look at the image.

    Raises:
        NotQcow2Error, UnsupportedImageError: it is no image that can be judged.
        ImageIOError: the operating system refused.
    """
    shop = Workshop(overlay, policy, progress)
    before = shop.report()
    if not shop.is_readable:
        return RepairPlan(before, before, (), (), _nothing(overlay.base))
    done, refused = _go_through(shop, _asked_once(ask))
    for step, take in revive.changed_ranges(shop, done):
        if _take(shop, step, take, ask):
            done.append(step)
        elif step.refused != _NO_EDITS:  # else all of it is marked already
            raise ProofError(
                f"what would be given up cannot be marked in the recording bitmaps ({step.refused})",
                hint="mend the rest too, or remove those bitmaps first",
            )
    if any(step.guest for step in done):
        shop.kept = [doubted(kept) for kept in shop.kept]
    if done:
        _clear_unknown_autoclear(shop, done)
    plan = shop.plan([step.title for step in done])
    after = shop.report() if plan else before
    _require_better(before, after)
    return RepairPlan(before, after, tuple(done), tuple(refused), plan)


def _asked_once(ask: Ask) -> Ask:
    answers: dict[str, bool] = {}

    def answer(step: Step) -> bool:
        if step.key not in answers:
            answers[step.key] = ask(step)
        return answers[step.key]

    return answer


def _nothing(file: ImageFile) -> Plan:
    return Plan(0, file.size, file.size)


def _go_through(shop: Workshop, ask: Ask) -> tuple[list[Step], list[Step]]:
    done: list[Step] = []
    refused: dict[tuple[str, ...], Step] = {}
    for _ in range(_ROUNDS):
        refused.clear()
        before = len(done)
        for phase in PHASES:
            for step, take in phase(shop):
                if _take(shop, step, take, ask):
                    done.append(step)
                else:
                    refused[step.title, str(step.refused)] = step
        if len(done) == before:
            break
    return done, list(refused.values())


def _take(shop: Workshop, step: Step, take: Callable[[], object], ask: Ask) -> bool:
    """Take a step if it is allowed and can be taken; False, with the reason in the step, if not."""
    policy = shop.policy
    if step.refused is None and CHANGE_CUT_SHORT not in step.codes and shop.found(CHANGE_CUT_SHORT):
        step.refused = "a crash has cut a change short, and its journal may be found: that comes first"
    if step.scope in _BUILT_ON_MAPPING and step.refused is None:
        step.refused = shop.mapping_doubt
    if step.refused is None and not policy.covers(step.scope):
        step.refused = "not what was asked for (--only)"
    if step.refused is None and not policy.allows(step.kind):
        step.refused = f"needs --allow {step.kind.value}"
    if step.refused is None and step.scope is not None and not ask(step):
        step.refused = "declined"
    if step.refused is not None:
        return False
    shop.begin(step)
    try:
        take()
    except Qcow2bmError as error:
        shop.take_back()
        step.refused = error.message
        return False
    if not step.edits:
        step.refused = _NO_EDITS
    return bool(step.edits)


def _clear_unknown_autoclear(shop: Workshop, done: list[Step]) -> None:
    """What the specification asks of whoever writes to an image, whatever else the repair may do."""
    if shop.found("unknown-autoclear"):
        step = Step("clear unknown autoclear bits, as every writer must", RepairClass.LOSSLESS, None)
        shop.begin(step)
        fields.unknown_autoclear(shop)
        done.append(step)


def _require_better(before: Report, after: Report) -> None:
    order = list(Severity)
    was, now = (order.index(report.worst) if report.worst else len(order) for report in (before, after))
    if now < was:
        found = ", ".join(sorted(set(after.counts) - set(before.counts))[:3])
        raise ProofError(
            f"the repair would leave the image worse than it is ({found}); nothing was written",
            hint="please report this with the output of `qcow2bm check`",
        )
