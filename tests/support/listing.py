"""What an image's bitmaps say, as QEMU reads them: the reference that every answer of qcow2bm is held against."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.support.daemon import StorageDaemon, connect, read_map, spawn
from tests.support.tools import QemuError, Ranges, open_arguments, qemu_img_json


def read_bitmaps(image: Path, names: Iterable[str] | None = None, *, secret: str | None = None) -> dict[str, Ranges]:
    """The dirty ranges of persistent bitmaps by name, by default of all that are not inconsistent.

    One read-only daemon serves them all, so this is the fast way. Naming an inconsistent or missing bitmap raises
    QMPError with QEMU's words.
    """
    with StorageDaemon(image, writable=False, secret=secret) as daemon:
        return daemon.dirty(names)


def read_bitmap_nbd(image: Path, name: str, *, secret: str | None = None) -> Ranges:
    """The dirty ranges of one bitmap by the way QEMU's documents show: `qemu-nbd -r -B NAME`, then nbdinfo.

    (`nbdinfo -- [ qemu-nbd ... ]` would be shorter, but leaves a folder in /tmp and a zombie when qemu-nbd refuses.)
    """
    opening, file = open_arguments(image, secret)
    with tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder:
        link, log = Path(folder, "n"), Path(folder, "log")
        argv = ["qemu-nbd", "-r", "-t", *opening, "-B", name, "-k", str(link), file]
        with spawn(argv, cwd=image.absolute().parent, log=log) as server:
            try:
                connect(link, server, log).close()
                return read_map(f"nbd+unix:///?socket={link}", name)
            except QemuError as error:
                # qemu-nbd listens before it looks at the bitmap, so the reason may be in its words, not in nbdinfo's.
                raise QemuError(argv, server.poll(), f"{log.read_text(errors='replace')}\n{error.stderr}") from error
            finally:
                server.kill()


def describe(image: Path, *, secret: str | None = None) -> dict[str, Any]:
    """QEMU's listing of an image, in the words of origin.toml: sizes and every bitmap with its state and dirty ranges.

    The bitmaps come in the order of the directory. An inconsistent one has neither `dirty` nor `dirty-bytes`, for QEMU
    does not read its bits. `recording` is the auto flag on disk; QMP calls every inconsistent bitmap "not recording".
    """
    info = qemu_img_json("info", "-f", "qcow2", image.absolute(), cwd=image.absolute().parent)
    with StorageDaemon(image, writable=False, secret=secret) as daemon:
        known, dirty = daemon.bitmaps(), daemon.dirty()
    return {
        "virtual-size": info["virtual-size"],
        "cluster-size": info["cluster-size"],
        "bitmaps": [
            _bitmap(entry, known[entry["name"]], dirty.get(entry["name"]))
            for entry in info["format-specific"]["data"].get("bitmaps", [])
        ],
    }


def _bitmap(stored: dict[str, Any], loaded: dict[str, Any], ranges: Ranges | None) -> dict[str, Any]:
    said = {
        "name": stored["name"],
        "granularity": stored["granularity"],
        "recording": "auto" in stored["flags"],
        "state": "inconsistent" if loaded.get("inconsistent") else "ready",
    }
    if ranges is not None:
        said |= {"dirty-bytes": loaded["count"], "dirty": [list(pair) for pair in ranges]}
    return said
