"""Persistent dirty bitmaps in qcow2 images whose VM is off: list, edit, merge, check, repair, undo.

The names below are loaded when they are first used, so `import qcow2bm` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import errors
    from .api import Bitmap, Bitmaps, Extent, Image, export_bitmaps, open, plan_resize, undo, who_holds  # noqa: A004 - the public name
    from .bitmap.draft import Source
    from .bitmap.edit import Edit
    from .bitmap.extents import read_extents
    from .bitmap.sidecar_import import ImportPolicy, import_bitmaps
    from .bitmap.sidecar_model import Export, ExportedBitmap
    from .bitmap.sidecar_reader import read_export
    from .bitmap.store import State
    from .chain.diff import Difference, diff
    from .chain.estimate import Estimate, estimate
    from .chain.prove import Coverage, prove
    from .checks.model import Finding, Report
    from .checks.runner import check
    from .errors import Qcow2bmError
    from .image.plan import Plan
    from .repair.model import RepairPlan, RepairPolicy
    from .repair.rebuild import Rebuilt, rebuild
    from .repair.session import plan_repair, repairing

_HOME = {
    "open": "api",
    "Image": "api",
    "Bitmap": "api",
    "Bitmaps": "api",
    "Extent": "api",
    "Edit": "bitmap.edit",
    "Source": "bitmap.draft",
    "read_extents": "bitmap.extents",
    "State": "bitmap.store",
    "export_bitmaps": "api",
    "read_export": "bitmap.sidecar_reader",
    "Export": "bitmap.sidecar_model",
    "ExportedBitmap": "bitmap.sidecar_model",
    "import_bitmaps": "bitmap.sidecar_import",
    "ImportPolicy": "bitmap.sidecar_import",
    "Plan": "image.plan",
    "diff": "chain.diff",
    "Difference": "chain.diff",
    "prove": "chain.prove",
    "Coverage": "chain.prove",
    "estimate": "chain.estimate",
    "Estimate": "chain.estimate",
    "check": "checks.runner",
    "Finding": "checks.model",
    "Report": "checks.model",
    "plan_repair": "repair.session",
    "plan_resize": "api",
    "repairing": "repair.session",
    "rebuild": "repair.rebuild",
    "Rebuilt": "repair.rebuild",
    "RepairPlan": "repair.model",
    "RepairPolicy": "repair.model",
    "undo": "api",
    "who_holds": "api",
    "Qcow2bmError": "errors",
}

__all__ = [
    "Bitmap",
    "Bitmaps",
    "Coverage",
    "Difference",
    "Edit",
    "Estimate",
    "Export",
    "ExportedBitmap",
    "Extent",
    "Finding",
    "Image",
    "ImportPolicy",
    "Plan",
    "Qcow2bmError",
    "Rebuilt",
    "RepairPlan",
    "RepairPolicy",
    "Report",
    "Source",
    "State",
    "check",
    "diff",
    "errors",
    "estimate",
    "export_bitmaps",
    "import_bitmaps",
    "open",
    "plan_repair",
    "plan_resize",
    "prove",
    "read_export",
    "read_extents",
    "rebuild",
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
