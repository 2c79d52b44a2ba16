"""The drop-in for `qemu-img bitmap`: actions in the order written, all or nothing.

qemu-img stops at the first action that fails and leaves what it did before; here nothing is left. The messages are
qemu-img's (QEMU 7.2, `img_bitmap` and the QMP commands it calls), because scripts read them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .qemu_options import ForeignError, RefusedError, answered, read_options, refusing, require_locked, require_ours
from .real_qemu_img import complain

if TYPE_CHECKING:
    from ..api import Image
    from ..bitmap.edit import Edit
    from ..errors import BitmapError
    from ..format.header import Incompatible

_SHORT = "b:f:F:g:h"
_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")
_LONG = [
    *("help", "object=", "image-opts", "add", "remove", "clear", "enable", "disable", "merge="),
    *("granularity=", "source-file=", "source-format="),
]
_SIZE = re.compile(r"\s*\+?(?:(0[xX][0-9a-fA-F]+)|(\d+(?:\.\d*)?)([bkmgtpeBKMGTPE])?)\Z")
_UNITS = "bkmgtpe"
_MAX_SIZE = (1 << 63) - 1


@dataclass(slots=True)
class Request:
    """A parsed command line. `actions` are (action, source bitmap or "") in the order written."""

    actions: list[tuple[str, str]] = field(default_factory=list)
    image: str = ""
    bitmap: str = ""
    format: str | None = None
    source_file: str | None = None
    source_format: str | None = None
    granularity: int = 0


def run(argv: list[str]) -> int:
    """Carry out `qemu-img bitmap ARGV`; returns 0 or 1, or hands over to the real qemu-img."""
    return answered("bitmap", argv, lambda: _carry_out(parse(argv)))


# The command line


def parse(argv: list[str]) -> Request:
    """Read the arguments by getopt_long's rules: options anywhere, abbreviated, joined."""
    line = read_options(argv, _SHORT, _LONG)
    request = Request()
    for name, value in line.options:
        _take(request, name.lstrip("-"), value)
    line.require_understood()
    operands = line.operands
    added, merged = (any(action == kind for action, _ in request.actions) for kind in ("add", "merge"))
    if not request.actions:
        raise RefusedError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if request.granularity and not added:
        raise RefusedError("granularity only supported with --add")
    if request.source_format is not None and request.source_file is None:
        raise RefusedError("-F only supported with -b")
    if request.source_file is not None and not merged:
        raise RefusedError("Merge bitmap source file only supported with --merge")
    if len(operands) != 2:
        raise RefusedError("Expecting filename and bitmap name")
    request.image, request.bitmap = operands
    require_ours(request.image, request.format)
    if request.source_file is not None:
        require_ours(request.source_file, request.source_format)
    return request


def _take(request: Request, name: str, value: str) -> None:
    if name in _ACTIONS:
        request.actions.append((name, value))
    elif name in ("h", "help", "object", "image-opts"):
        raise ForeignError
    elif name in ("g", "granularity"):
        request.granularity = _size(value)
    elif name in ("b", "source-file"):
        request.source_file = value
    elif name in ("F", "source-format"):
        request.source_format = value
    else:
        request.format = value


def _size(text: str) -> int:
    """A size as qemu-img reads it: a decimal with a binary suffix, or hexadecimal without one."""
    match = _SIZE.match(text)
    if match is None:
        raise RefusedError(
            "Invalid granularity specified. You may use k, M, G, T, P or E suffixes for\n"
            "qcow2bm: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        )
    hexadecimal, decimal, suffix = match.groups()
    if hexadecimal is not None:
        size = int(hexadecimal, 16)
    else:
        whole, _, fraction = decimal.partition(".")
        unit = 1024 ** _UNITS.index((suffix or "b").lower())
        size = int(whole or "0") * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)
    if size > _MAX_SIZE:
        raise RefusedError(f"Invalid granularity specified. Must be between 0 and {_MAX_SIZE}.")
    return size


# The work


def _carry_out(request: Request) -> int:
    from ..errors import Qcow2bmError, naming
    from .committing import commit

    with contextlib.ExitStack() as stack:
        image = stack.enter_context(_opened(request.image, request.format, writable=True))
        source = image
        if request.source_file is not None:
            source = stack.enter_context(_opened(request.source_file, request.source_format, writable=False))
        try:
            with naming(request.image):
                edit = _draft(image, request)
                for action, argument in request.actions:
                    _act(edit, action, argument, source, request)
                if edit.broken():  # of which QEMU says what it makes of them, and mostly opens no such image
                    raise ForeignError
                commit(image, edit.plan())
        except Qcow2bmError as error:
            raise RefusedError(str(error)) from None
    return 0


@contextlib.contextmanager
def _opened(name: str, given_format: str | None, *, writable: bool) -> Iterator[Image]:
    """An open image; what only the real qemu-img can open, repair or explain is left to it."""
    from ..api import open as open_image
    from ..errors import Qcow2bmError
    from ..format.header import Incompatible

    try:
        with refusing(name, given_format, writable=writable):
            image = open_image(name, writable=writable)
    except Qcow2bmError:
        if _is_marked(name, Incompatible.CORRUPT):
            refusal = f"Could not open '{name}': qcow2: Image is corrupt; cannot be opened read/write"
            raise RefusedError(refusal) from None
        if not (writable and _is_marked(name, Incompatible.DIRTY)):
            raise ForeignError from None
        image = _mended(name, given_format)
    with image:
        with refusing(name, given_format, writable=writable):
            require_locked(locked=image.qcow2.locked)
        yield image


def _is_marked(name: str, mark: Incompatible) -> bool:
    from ..api import open as open_image
    from ..errors import Qcow2bmError

    try:
        with open_image(name) as image:
            return bool(image.qcow2.header.incompatible_features & mark)
    except Qcow2bmError:
        return False


def _mended(name: str, given_format: str | None) -> Image:
    """A dirty image, open after the repair that QEMU makes too before it writes to one."""
    from ..api import open as open_image
    from ..checks.view import opened
    from ..errors import Qcow2bmError
    from .qemu_repair import mend_dirty

    try:
        with refusing(name, given_format, writable=True):
            with opened(name, writable=True) as (file, locked):
                mend_dirty(file, name, locked=locked)
            return open_image(name, writable=True)
    except Qcow2bmError:
        raise ForeignError from None


def _draft(image: Image, request: Request) -> Edit:
    """A draft of the bitmaps, without those that count no longer: QEMU drops them too when it opens for writing."""
    from ..bitmap.store import State
    from ..errors import Qcow2bmError, UnsupportedImageError, naming

    try:
        with naming(request.image):  # what cannot be read is the real one's to explain
            edit = image.draft()
    except UnsupportedImageError:  # a version 2 image
        action, _ = request.actions[0]
        problem = _not_found(request.bitmap)
        if action == "add":
            _check_new(request)
            problem = _cannot_store(request.bitmap, "Cannot store dirty bitmaps in qcow2 v2 files")
        raise RefusedError(_failed(action, request, problem)) from None
    except Qcow2bmError:
        raise ForeignError from None
    detached = [bitmap.name for bitmap in image.bitmaps if bitmap.state is State.DETACHED]
    if detached:
        complain(
            "warning: a program lacking bitmap support modified this file, "
            "so all bitmaps are now considered inconsistent"
        )
        edit.remove(*detached)
    return edit


def _act(edit: Edit, action: str, argument: str, source: Image, request: Request) -> None:
    """One action on the draft.

    Raises:
        RefusedError: with qemu-img's words for it.
    """
    from ..errors import BitmapError

    name = request.bitmap
    if action == "add":
        _check_new(request)
    try:
        if action == "add":
            edit.add(name, granularity=request.granularity or None)
        elif action == "merge":
            edit.require_usable(name)
            _merge(edit, argument, source, request)
        else:
            getattr(edit, action)(name)
    except BitmapError as error:
        problem, *advice = _in_qemus_words(error, name)
        raise RefusedError(_failed(action, request, problem), *advice) from None


def _merge(edit: Edit, argument: str, source: Image, request: Request) -> None:
    """Merge one source; what is wrong now is wrong with the source."""
    from ..bitmap.draft import Source
    from ..errors import BitmapError, BitmapSizeMismatchError

    local = source.qcow2 is edit.image
    try:
        edit.merge(request.bitmap, [argument if local else Source.stored(source.qcow2, argument)])
    except BitmapSizeMismatchError:
        problem = (
            f"Bitmaps are of different sizes (destination size is {edit.image.geometry.virtual_size}, "
            f"source size is {source.virtual_size}) and can't be merged"
        )
        raise RefusedError(_failed("merge", request, problem)) from None
    except BitmapError as error:
        problem, *advice = _in_qemus_words(error, argument)
        raise RefusedError(_failed("merge", request, problem), *advice) from None


# qemu-img's words


def _failed(action: str, request: Request, problem: str) -> str:
    return f"Operation {action} on bitmap {request.bitmap} failed: {problem}"


def _not_found(name: str) -> str:
    return f"Dirty bitmap '{name}' not found"


def _cannot_store(name: str, problem: str) -> str:
    # QEMU names the node it generated for the image; ours has none, so it has a number of its own.
    return f"Can't make bitmap '{name}' persistent in '#block100': {problem}"


def _check_new(request: Request) -> None:
    """What QEMU looks at before the image: name and granularity, in this order."""
    from ..format.geometry import is_power_of_two
    from ..format.limits import MAX_BITMAP_NAME, MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS

    if not request.bitmap:
        raise RefusedError(_failed("add", request, "Bitmap name cannot be empty"))
    wanted = request.granularity or 1 << MIN_GRANULARITY_BITS
    if not is_power_of_two(wanted) or not 1 << MIN_GRANULARITY_BITS <= wanted <= 1 << MAX_GRANULARITY_BITS:
        raise RefusedError(_failed("add", request, "Granularity must be power of 2 and at least 512"))
    if len(os.fsencode(request.bitmap)) > MAX_BITMAP_NAME:
        problem = _cannot_store(request.bitmap, f"Name length exceeds maximum ({MAX_BITMAP_NAME} characters)")
        raise RefusedError(_failed("add", request, problem))


def _in_qemus_words(error: BitmapError, name: str) -> tuple[str, ...]:
    """What QEMU says where we raise `error` about bitmap `name`; our own words where QEMU could not open the image."""
    from ..errors import BitmapExistsError, BitmapInconsistentError, BitmapLimitError, BitmapNotFoundError

    if isinstance(error, BitmapNotFoundError):
        return (_not_found(name),)
    if isinstance(error, BitmapExistsError):
        return (f"Bitmap already exists: {name}",)
    if isinstance(error, BitmapInconsistentError):
        advice = "Try block-dirty-bitmap-remove to delete this bitmap from disk"
        return f"Bitmap '{name}' is inconsistent and cannot be used", advice
    if isinstance(error, BitmapLimitError):
        return (_cannot_store(name, "Too much space will be occupied by the bitmap. Use larger granularity"),)
    return (str(error),)
