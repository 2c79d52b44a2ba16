"""QEMU's command-line tools as functions.

Two habits of QEMU shape this module. A *relative* external data file is looked up in the working directory of the
process, not next to the image (a backing file is looked up next to the image), so every function that takes an image
runs its tool in the image's folder. And an encrypted image needs its key's object and a JSON file name, so
`open_arguments` builds both, and nobody else has to know.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Ranges = list[tuple[int, int]]
"""Dirty ranges of a bitmap: (offset, length) in bytes, sorted, never touching each other."""

DEADLINE = 120.0
"""Seconds after which a tool is taken for hung. A test that waits for ever tells nobody why."""

_BLOCK = 64 * 1024


class QemuError(RuntimeError):
    """A QEMU tool said no. The message is the command and what it printed on stderr."""

    def __init__(self, argv: list[str], returncode: int | None, stderr: str) -> None:
        super().__init__(f"{' '.join(argv)}\n  exit status {returncode}\n  {stderr.strip()}")
        self.argv = argv
        self.returncode = returncode
        self.stderr = stderr


def run(
    *argv: str | Path, check: bool = True, cwd: Path | None = None, timeout: float = DEADLINE
) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end. A tool that is missing raises FileNotFoundError: the test fails, it does not skip."""
    words = [str(word) for word in argv]
    done = subprocess.run(
        words, capture_output=True, text=True, errors="surrogateescape", cwd=cwd, timeout=timeout, check=False,
        stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    if check and done.returncode != 0:
        raise QemuError(words, done.returncode, done.stderr or done.stdout)
    return done


def open_arguments(image: Path, secret: str | None = None) -> tuple[list[str], str]:
    """How to name `image` to a QEMU tool: the options that go before it, and the file name."""
    if secret is None:
        return ["-f", "qcow2"], str(image.absolute())
    options = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(image.absolute())},
        "encrypt": {"format": "luks", "key-secret": "key"},
    }
    return ["--object", f"secret,id=key,data={secret}", "-f", "qcow2"], "json:" + json.dumps(options)


def qemu_img(*args: str | Path, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`qemu-img ARGS`. With an external data file, `cwd` must be the image's folder."""
    return run("qemu-img", *args, check=check, cwd=cwd)


def qemu_img_json(*args: str | Path, cwd: Path | None = None) -> Any:
    """`qemu-img SUBCOMMAND --output=json ...`, parsed."""
    return json.loads(qemu_img(args[0], "--output=json", *args[1:], cwd=cwd).stdout)


def qemu_io(
    image: Path | str,
    *commands: str,
    fmt: str = "qcow2",
    secret: str | None = None,
    options: tuple[str, ...] = (),
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run qemu-io commands one after the other on an image (a Path) or on an NBD export (a URI, with fmt="raw").

    `options` are further switches, `("-r",)` for read-only. qemu-io exits with 1 when any of its commands failed.
    """
    script = [word for command in commands for word in ("-c", command)]
    if isinstance(image, str):
        return run("qemu-io", "-f", fmt, *options, *script, image, check=check)
    opening, name = open_arguments(image, secret)
    opening[-1] = fmt
    return run("qemu-io", *opening, *options, *script, name, check=check, cwd=image.absolute().parent)


def bitmap_info(image: Path) -> list[dict[str, Any]]:
    """The bitmaps as `qemu-img info` lists them: name, granularity, flags (`in-use`, `auto`)."""
    info = qemu_img_json("info", "-f", "qcow2", image.absolute(), cwd=image.absolute().parent)
    bitmaps: list[dict[str, Any]] = info["format-specific"]["data"].get("bitmaps", [])
    return bitmaps


def check(image: Path, secret: str | None = None) -> dict[str, Any]:
    """What `qemu-img check` says: its JSON and `returncode`; if QEMU could not open the image, `error` instead."""
    opening, name = open_arguments(image, secret)
    done = qemu_img("check", "--output=json", *opening, name, check=False, cwd=image.absolute().parent)
    said: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {"error": done.stderr.strip()}
    return {**said, "returncode": done.returncode}


def guest_digest(image: Path, secret: str | None = None) -> str:
    """A SHA-256 of what a guest sees on the disk: equal exactly when virtual size and contents are equal.

    QEMU writes the disk to a sparse raw file and only the blocks that hold a non-zero byte are hashed, each with its
    offset. So a 1 TiB disk costs what it holds, and where clusters lie or whether zeroes are allocated does not count.
    """
    opening, name = open_arguments(image, secret)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="q-") as folder:
        raw = Path(folder, "disk.raw")
        qemu_img("convert", *opening, "-O", "raw", name, raw, cwd=image.absolute().parent)
        digest.update(raw.stat().st_size.to_bytes(8, "big"))
        for offset, block in _blocks_with_data(raw):
            digest.update(offset.to_bytes(8, "big"))
            digest.update(block)
    return digest.hexdigest()


def same_guest_data(left: Path, right: Path, secret: str | None = None) -> bool:
    """Whether two images hold the same disk by `qemu-img compare`: QEMU's own word, at any virtual size."""
    opening, left_name = open_arguments(left, secret)
    _, right_name = open_arguments(right, secret)
    secrets = opening[:-2]
    done = qemu_img(
        "compare", *secrets, "-f", "qcow2", "-F", "qcow2", left_name, right_name, check=False,
        cwd=left.absolute().parent,
    )  # fmt: skip
    if done.returncode not in (0, 1):  # negative: killed, as by an assertion of QEMU's own
        raise QemuError(list(done.args), done.returncode, done.stderr)
    return done.returncode == 0


def create_luks(image: Path, size: str, secret: str, *options: str) -> None:
    """`qemu-img create` of a LUKS image whose key derivation takes no time, in as many attempts as it needs.

    To find its iteration count QEMU measures the CPU time of a short run; when that run falls between two ticks of the
    kernel's accounting it gives up with "Unable to get accurate CPU usage". Nothing is wrong; another try succeeds.
    """
    luks = ("encrypt.format=luks", "encrypt.key-secret=key", "encrypt.iter-time=10", *options)
    key = f"secret,id=key,data={secret}"
    argv = ["create", "-q", "--object", key, "-f", "qcow2", "-o", ",".join(luks), str(image), size]
    for _ in range(50):
        done = qemu_img(*argv, check=False)
        if "accurate CPU usage" not in done.stderr:
            break
    else:
        raise QemuError(["qemu-img", *argv], None, "can't measure CPU time, in 50 attempts")
    if done.returncode != 0:
        raise QemuError(list(done.args), done.returncode, done.stderr)


def version() -> str:
    """The version of QEMU in use, such as "7.2.22"."""
    return qemu_img("--version").stdout.split()[2]


def _blocks_with_data(raw: Path) -> Iterator[tuple[int, bytes]]:
    """The 64 KiB blocks of a raw disk that are not all zero. Holes are stepped over, not read."""
    with raw.open("rb") as disk:
        size, position = os.fstat(disk.fileno()).st_size, 0
        while position < size:
            try:
                data = os.lseek(disk.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            position = data - data % _BLOCK
            block = os.pread(disk.fileno(), _BLOCK, position)
            if block.count(0) != len(block):
                yield position, block
            position += _BLOCK
