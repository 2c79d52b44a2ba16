"""What is encrypted: keys are QEMU's business, so all there is to say is how QEMU makes a decrypted copy."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..errors import UnsupportedImageError

LUKS = "luks"
"""The format of a raw disk that is encrypted as a whole: known by name, to say what to do about it."""


class EncryptedDiskError(UnsupportedImageError):
    """A file of the chain is encrypted."""


def refusal(top: Path, top_format: str, encrypted: Sequence[tuple[int, Path, str]]) -> EncryptedDiskError:
    """The error about a chain in which something is encrypted.

    Args:
        top: the image whose disk is wanted; another one may be encrypted.
        encrypted: depth in the chain, path and format of each file that is.
    """
    depth, path, _ = encrypted[0]
    below = f", and the disk of {top} stands on it" if depth else ""
    return EncryptedDiskError(
        f"it is encrypted{below}, so what a guest reads cannot be read here",
        hint=f"what needs no guest data works; for the rest take a decrypted copy of the disk of {top}: "
        f"`{decrypting(top, top_format, [(depth, kind) for depth, _, kind in encrypted])}`",
        image=path,
    )


def decrypting(top: Path, top_format: str, encrypted: Sequence[tuple[int, str]]) -> str:
    """The command that makes a decrypted copy of a disk: `KEYFILE` holds the passphrase, `COPY` is raw.

    Args:
        encrypted: depth in the chain and format of what is. If that is more than one, each has a KEYFILE of its own.
    """
    name = str(top)
    if ":" in name.partition("/")[0]:
        name = f"./{name}"  # or QEMU takes what is before the colon for a protocol
    numbers = ["", *(str(number) for number in range(2, len(encrypted) + 1))]
    secrets = " ".join(f"--object secret,id=key{number},file=KEYFILE{number}" for number in numbers)
    escaped = name.replace(",", ",,")  # as QEMU's options have it
    options = [f"driver={top_format}", f"file.filename={escaped}"]
    for number, (depth, kind) in zip(numbers, encrypted, strict=True):
        own = "key-secret" if kind == LUKS else "encrypt.key-secret"
        options.append(f"{'backing.' * depth}{own}=key{number}")
    return f"qemu-img convert {secrets} --image-opts {shlex.quote(','.join(options))} -O raw COPY"
