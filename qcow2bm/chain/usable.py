"""The bits of a stored bitmap, for whoever compares or counts them."""

from __future__ import annotations

from ..bitmap.bits import BitVector
from ..bitmap.store import State, StoredBitmap
from ..errors import InUseError


def usable_bits(bitmap: StoredBitmap) -> BitVector:
    """The bits, if they are to be relied on.

    Raises:
        InUseError: a running VM has them in its memory; what is on the disk is from before it started.
        BitmapInconsistentError, BitmapBrokenError: they are not to be relied on, whoever runs.
    """
    if bitmap.state is State.ACTIVE:
        raise InUseError(
            f"bitmap '{bitmap.name}' is in use by a running VM, which has its bits in memory",
            hint="shut the VM down first",
        )
    return bitmap.readable_bits()
