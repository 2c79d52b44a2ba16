"""The lineage of an exported bitmap in a JSON document, sealed: it is read back as it was written or not at all.

The digest of the bits vouches for the extents beside it. This one vouches for what is said of the bitmap and its image:
a mark as stale that is edited away, or another image id, would let a bitmap in that misses writes.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from ..errors import ExportFileError
from ..format.sidecar import DIGEST_BYTES
from .sidecar import Exported
from .sidecar_lineage import Lineage
from .sidecar_model import ExportedBitmap

SEAL = "lineage-digest"
_DOMAIN = b"qcow2bm lineage 1"
_LINEAGE = re.compile(r'"lineage"\s*:\s*')
_REMAINS = re.compile(rf'"(image-id|{SEAL})"\s*:')
"""What is left of a lineage whose own key is damaged."""
OURS = re.compile(
    rb'\{\n  "format-version": \d+,\n  "image": "(?:[^"\\\n]|\\.)*",\n  "name": "(?:[^"\\\n]|\\.)*",\n'
    rb'(?:  "[a-z-]+": [^\n{]*,\n)*  "lineage": \{\n    "image-id": "[0-9a-f]{64}",\n'
)
"""How the document begins that we write, and nothing else does: a line break is in no JSON text but between values."""


def lineage_json(lineage: Lineage) -> dict[str, object]:
    """What is known of the image, for a JSON document."""
    return {
        "image-id": lineage.image_id.hex(),
        "image-name": lineage.image,
        "virtual-size": lineage.virtual_size,
        "cluster-size": lineage.cluster_size,
        "made-ns": lineage.made_ns,
        "mtime-ns": lineage.mtime_ns,
        "tool": lineage.tool,
    }


def exported_json(bitmap: Exported | ExportedBitmap) -> dict[str, object]:
    """What is said of a bitmap, for a JSON document."""
    return {
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "recording": bitmap.recording,
        "stale": bitmap.stale,
        "dirty-bytes": bitmap.dirty_bytes,
        "digest": bitmap.digest.hex(),
    }


def sealed_json(lineage: Lineage, bitmap: Exported) -> dict[str, object]:
    """Both, with a digest of all that is in them."""
    found = lineage_json(lineage) | exported_json(bitmap)
    return found | {SEAL: _digest(found)}


def find_sealed(text: str) -> tuple[Lineage, Exported] | None:
    """The lineage in a JSON document that we wrote; None in one of somebody else.

    Raises:
        ExportFileError: there is one, and it is damaged or was changed.
    """
    place = _LINEAGE.search(text)
    if place is None and _REMAINS.search(text) is None:
        return None
    try:
        if place is None:
            raise ValueError
        found, _ = json.JSONDecoder().raw_decode(text, place.end())
        return _unsealed(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportFileError(
            "the lineage in the JSON is damaged, or was changed since it was written", hint="export the bitmap again"
        ) from error


def _digest(found: dict[str, Any]) -> str:
    """SHA-256 over the members in one fixed way to write them: keys sorted, no spaces, nothing but ASCII."""
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(_DOMAIN + text.encode("ascii")).hexdigest()


def _unsealed(found: dict[str, Any]) -> tuple[Lineage, Exported]:
    """Raises one of the errors above for anything that is not as `sealed_json` had it."""
    if found.pop(SEAL) != _digest(found):
        raise ValueError
    numbers = {
        key: found[key] for key in ("virtual-size", "cluster-size", "made-ns", "mtime-ns", "granularity", "dirty-bytes")
    }
    texts = {key: found[key] for key in ("image-name", "tool", "name")}
    flags = {key: found[key] for key in ("recording", "stale")}
    digests = {key: bytes.fromhex(found[key]) for key in ("image-id", "digest")}
    if (
        any(type(value) is not int for value in numbers.values())  # True is an int as well
        or any(not isinstance(value, str) for value in texts.values())
        or any(not isinstance(value, bool) for value in flags.values())
        or any(len(value) != DIGEST_BYTES for value in digests.values())
    ):
        raise ValueError
    lineage = Lineage(
        image_id=digests["image-id"],
        virtual_size=numbers["virtual-size"],
        cluster_size=numbers["cluster-size"],
        made_ns=numbers["made-ns"],
        mtime_ns=numbers["mtime-ns"],
        tool=texts["tool"],
        image=texts["image-name"],
    )
    return lineage, Exported(
        name=texts["name"],
        granularity=numbers["granularity"],
        recording=flags["recording"],
        stale=flags["stale"],
        dirty_bytes=numbers["dirty-bytes"],
        digest=digests["digest"],
    )
