"""Plans in files: `repair --plan FILE` saves one to be reviewed, `repair --apply FILE` carries it out.

The file says what the plan was made from: the policy, and a fingerprint over the state of the image and every write.
The plan is worked out again and must come to the same. So a plan is never carried out on another image, and a file that
somebody has edited can only be refused, never make anything else be written.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ExportFileError, UsageError, from_os_error
from ..repair.model import RepairPolicy
from ..repair.session import Repair
from .repair_output import repair_json

_KIND = "qcow2bm repair plan"
_VERSION = 1
_LARGEST = 1 << 30


def save_plan(path: Path, session: Repair, policy: RepairPolicy, declined: frozenset[str], image: Path) -> None:
    """Write a plan to a new file, which is there whole or not at all.

    Raises:
        UsageError: the file is there already.
        ImageIOError: it cannot be written; the error names it.
    """
    from ..image.export_file import NewFile  # rarely needed, and slow to load

    document = {
        "kind": _KIND,
        "version": _VERSION,
        "fingerprint": session.fingerprint,
        "policy": policy.to_json(),
        "declined": sorted(declined),
        "plan": repair_json(image, session, changed=False, undo=None),
    }
    try:
        with NewFile(path) as file:
            for part in json.JSONEncoder(indent=2).iterencode(document):
                file.write(part.encode("ascii"))
            file.write(b"\n")
    except ExportFileError as error:
        raise UsageError(error.message, hint="name a new file for the plan") from None


class Loaded(NamedTuple):
    """A saved plan: its policy, what it must come to, and the keys of steps that are not to be taken."""

    policy: RepairPolicy
    fingerprint: str
    declined: frozenset[str]


def load_plan(path: Path, *, keeps_undo: bool) -> Loaded:
    """Read a saved plan.

    Raises:
        UsageError: it is no saved plan.
        ImageIOError: it cannot be read; the error names it.
    """
    try:
        document = _read(path)
    except OSError as error:
        raise from_os_error(error, path) from error
    try:
        if document["kind"] != _KIND or document["version"] != _VERSION:
            raise ValueError
        policy = RepairPolicy.from_json(document["policy"])
        declined = frozenset(map(str, document["declined"]))
        expected = str(document["fingerprint"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UsageError(f"{path} is no plan that this version of `repair --plan` has saved") from None
    if policy.keeps_undo is not keeps_undo:
        raise UsageError("the plan was made " + ("without" if keeps_undo else "with") + " an undo file")
    return Loaded(policy, expected, declined)


def _read(path: Path) -> Any:  # noqa: ANN401 - JSON
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for its other end
            raise ValueError
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no plan that `repair --plan` has saved") from None
