"""Shell completion of bitmap names, read from the image that is on the command line.

Completing must never disturb: it takes no locks, writes nothing, and is silent whatever goes wrong.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import typer

from .references import split_reference


def bitmap_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the bitmaps of IMAGE, without those that the line has already."""
    given: set[object] = set()
    for value in context.params.values():
        given.update(value if isinstance(value, list | tuple) else [value])
    names = [name for name in _names_in(context.params.get("image")) if name not in given]
    return list(_matching("", names, incomplete))


def sources(context: typer.Context, incomplete: str) -> list[str]:
    """Names of bitmaps of IMAGE, and `other.qcow2#name` once that image is on the line."""
    return [*bitmap_names(context, incomplete), *references(incomplete)]


def references(incomplete: str) -> list[str]:
    """`IMAGE#name` for each bitmap of IMAGE, once IMAGE# is on the line."""
    image, name = split_reference(incomplete)
    if name is None:
        return []
    prefix = f"{image}#"
    return list(_matching(prefix, _names_in(image), incomplete))


def _names_in(image: object) -> list[str]:
    if not isinstance(image, str | Path):
        return []
    from .. import api

    try:
        with api.open(image, use_locks=False) as opened:
            return opened.bitmaps.names
    except Exception:  # noqa: BLE001 - a shell prompt is no place for messages
        return []


def _matching(prefix: str, names: list[str], incomplete: str) -> Iterator[str]:
    """Completed words in the shape the shell takes; a name that cannot be typed is left out."""
    in_bash = os.environ.get("_QCOW2BM_COMPLETE") == "complete_bash"
    for word in (prefix + name for name in names if name.isprintable()):
        if word.startswith(incomplete):
            # Bash puts the word on the line as it is; the other shells quote it themselves.
            yield _escaped(word) if in_bash else word


def _escaped(word: str) -> str:
    if shlex.quote(word) == word:
        return word
    return "".join(
        char if char.isalnum() or char in "-_./#~%+,:=@" or ord(char) > 0x7F else f"\\{char}" for char in word
    )
