"""Plans in files: `repair --plan FILE` saves one to be reviewed, `repair --apply FILE` carries it out.

The file says what the plan was made from: the policy, and a fingerprint over the state of the image and every write.
The plan is worked out again and must come to the same. So a plan is never carried out on another image, and a file that
somebody has edited can only be refused, never make anything else be written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..checks.model import RepairClass
from ..errors import UsageError
from ..repair.model import RepairPolicy, Salvage, Scope
from ..repair.session import Repair
from .repair_output import repair_json

_KIND = "qcow2bm repair plan"
_VERSION = 1
_LARGEST = 1 << 30


def save_plan(path: Path, session: Repair, policy: RepairPolicy, declined: frozenset[str], image: Path) -> None:
    """Write a plan to a new file.

    Raises:
        UsageError: the file is there already.
    """
    document = {
        "kind": _KIND,
        "version": _VERSION,
        "fingerprint": session.fingerprint,
        "policy": {
            "allow": policy.allow.value,
            "only": sorted(scope.value for scope in policy.only),
            "in-use": policy.in_use.value,
            "detached": policy.detached.value,
            "bitmaps": sorted(policy.bitmaps),
            "against": None if policy.against is None else str(policy.against.resolve()),
            "against-format": policy.against_format,
            "snapshot": policy.snapshot,
            "layer-is-newer": policy.layer_is_newer,
            "snapshot-is-start": policy.snapshot_is_start,
            "keep-stale": policy.keep_stale,
            "keeps-undo": policy.keeps_undo,
        },
        "declined": sorted(declined),
        "plan": repair_json(image, session, changed=False, undo=None),
    }
    try:
        with path.open("x", encoding="ascii") as file:
            json.dump(document, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise UsageError(f"{path} is there already", hint="name a new file for the plan") from None


class Loaded(NamedTuple):
    """A saved plan: its policy, what it must come to, and the titles of steps that are not to be taken."""

    policy: RepairPolicy
    fingerprint: str
    declined: frozenset[str]


def load_plan(path: Path, *, keeps_undo: bool) -> Loaded:
    """Read a saved plan.

    Raises:
        UsageError: it is no saved plan.
    """
    document = _read(path)
    try:
        if document["kind"] != _KIND or document["version"] != _VERSION:
            raise ValueError
        said = document["policy"]
        against = said["against"]
        policy = RepairPolicy(
            RepairClass(said["allow"]),
            frozenset(Scope(name) for name in said["only"]),
            Salvage(said["in-use"]),
            Salvage(said["detached"]),
            frozenset(map(str, said["bitmaps"])),
            None if against is None else Path(against),
            None if said["against-format"] is None else str(said["against-format"]),
            None if said["snapshot"] is None else str(said["snapshot"]),
            layer_is_newer=bool(said["layer-is-newer"]),
            snapshot_is_start=bool(said["snapshot-is-start"]),
            keep_stale=None if said["keep-stale"] is None else bool(said["keep-stale"]),
            keeps_undo=bool(said["keeps-undo"]),
        )
        declined = frozenset(map(str, document["declined"]))
        expected = str(document["fingerprint"])
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path} is no plan that this version of `repair --plan` has saved") from None
    if policy.keeps_undo is not keeps_undo:
        raise UsageError("the plan was made " + ("without" if keeps_undo else "with") + " an undo file")
    return Loaded(policy, expected, declined)


def _read(path: Path) -> Any:  # noqa: ANN401 - JSON
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no plan that `repair --plan` has saved") from None
