"""Random disks of all kinds, made by QEMU: raw files, qcow2 images of all options, chains of both."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from qcow2bm.chain.opening import Rules
from tests.support.tools import qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
STEP = 512


@dataclass
class Made:
    """A chain: the top's path, and the data files of those that have one."""

    path: Path
    format: str
    data_files: dict[Path, Path] = field(default_factory=dict)

    @property
    def rules(self) -> Rules:
        return Rules(data_files=self.data_files)


def options(chance: random.Random, *, top: bool) -> dict[str, str]:
    """Creation options that QEMU takes together."""
    chosen = {"cluster_size": str(chance.choice((512, 4 * KIB, 64 * KIB, 256 * KIB, 2 * MIB)))}
    if chance.random() < 0.2:
        return {**chosen, "compat": "0.10"}
    if int(chosen["cluster_size"]) >= 16 * KIB and chance.random() < 0.4:
        chosen["extended_l2"] = "on"
    chosen["compression_type"] = chance.choice(("zlib", "zstd"))
    if top and chance.random() < 0.2:
        chosen["data_file"] = "external.data"
    return chosen


def requests(chance: random.Random, size: int) -> list[str]:
    """Guest requests."""
    said = []
    for _ in range(chance.randrange(1, 12)):
        verb = chance.choice(("write -P {}", "write -P {}", "write -z", "write -z -u", "discard"))
        length = min(chance.choice((STEP, 4 * KIB, 64 * KIB, 700 * KIB)) * chance.randrange(1, 4), size)
        offset = chance.randrange(0, size - length + 1, STEP)
        said.append(f"{verb.format(chance.randrange(1, 256))} {offset} {length}")
    return said


def compressed(chance: random.Random, size: int, cluster: int) -> list[str]:
    """Compressed writes, for an image that is still empty: onto allocated clusters they fail."""
    chosen = chance.sample(range(size // cluster), k=min(size // cluster, chance.randrange(4)))
    return [f"write -c -P {chance.randrange(1, 256)} {index * cluster} {cluster}" for index in chosen]


def random_chain(chance: random.Random, folder: Path, name: str, size: int) -> Made:
    """One to four layers of all kinds; a backing file may be shorter or longer than what stands on it."""
    depth = chance.randrange(1, 5)
    below: Made | None = None
    for level in range(depth):
        last = level == depth - 1
        length = size if last else max(STEP, chance.randrange(size // 2, 2 * size) // STEP * STEP)
        path = folder / f"{name}-{level}"
        if level == 0 and chance.random() < 0.3:
            path.touch()
            os.truncate(path, length if last else length - chance.randrange(STEP))
            made = Made(path, "raw")
            qemu_io(path, *requests(chance, length - STEP), fmt="raw")
        else:
            made = random_layer(chance, path, length, below, last=last)
        below = made
    assert below is not None
    return below


def random_layer(chance: random.Random, path: Path, size: int, below: Made | None, *, last: bool) -> Made:
    chosen = options(chance, top=last)
    if below is not None:
        chosen |= {"backing_file": below.path.name, "backing_fmt": below.format}
        if chance.random() < 0.2:
            chosen["backing_file"] = f"file:{below.path}"
    data_files = dict(below.data_files) if below is not None else {}
    if "data_file" in chosen:
        chosen["data_file"] = f"{path.name}.data"
        if below is None and chance.random() < 0.5:
            chosen["data_file_raw"] = "on"
        data_files[path] = path.with_name(chosen["data_file"])
    said = ",".join(f"{key}={value}" for key, value in chosen.items())
    qemu_img("create", "-q", "-f", "qcow2", "-o", said, path.name, str(size), cwd=path.parent)
    if "data_file" not in chosen:
        first = compressed(chance, size, int(chosen["cluster_size"]))
        if first:
            qemu_io(path, *first)
    for _ in range(chance.randrange(1, 3)):
        qemu_io(path, *requests(chance, size), options=("-d", "unmap"))
    return Made(path, "qcow2", data_files)


def converted(made: Made, folder: Path) -> bytes:
    """What QEMU reads."""
    out = folder / "converted"
    qemu_img("convert", "-f", made.format, "-O", "raw", made.path, out, cwd=made.path.parent)
    data = out.read_bytes()
    out.unlink()
    return data
