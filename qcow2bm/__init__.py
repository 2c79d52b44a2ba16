"""Persistent dirty bitmaps in qcow2 images whose VM is off: list, edit, merge, check, repair, undo.

The names below are loaded when they are first used, so `import qcow2bm` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import errors
    from .api import Bitmap, Bitmaps, Extent, Image, open, undo, who_holds  # noqa: A004 - the public name
    from .bitmap.edit import Edit, Source
    from .bitmap.store import State
    from .checks.model import Finding, Report
    from .checks.runner import check
    from .errors import Qcow2bmError
    from .image.plan import Plan
    from .repair.model import RepairPlan, RepairPolicy
    from .repair.session import plan_repair, repairing

_HOME = {
    "open": "api",
    "Image": "api",
    "Bitmap": "api",
    "Bitmaps": "api",
    "Extent": "api",
    "Edit": "bitmap.edit",
    "Source": "bitmap.edit",
    "State": "bitmap.store",
    "Plan": "image.plan",
    "check": "checks.runner",
    "Finding": "checks.model",
    "Report": "checks.model",
    "plan_repair": "repair.session",
    "repairing": "repair.session",
    "RepairPlan": "repair.model",
    "RepairPolicy": "repair.model",
    "undo": "api",
    "who_holds": "api",
    "Qcow2bmError": "errors",
}

__all__ = [
    "Bitmap",
    "Bitmaps",
    "Edit",
    "Extent",
    "Finding",
    "Image",
    "Plan",
    "Qcow2bmError",
    "RepairPlan",
    "RepairPolicy",
    "Report",
    "Source",
    "State",
    "check",
    "errors",
    "open",
    "plan_repair",
    "repairing",
    "undo",
    "who_holds",
]


def __getattr__(name: str) -> object:
    """Load a public name on first use (PEP 562)."""
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
