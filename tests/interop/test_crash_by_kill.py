"""A process of ours killed in the middle of its work: QEMU must find the old bitmaps or the new ones, and no damage.

The crash tests proper replay recorded writes. Here it is the real thing: SIGKILL at a random moment of a loop of
commits. What was written before the kill is in the file, whatever was not yet flushed: the kernel is not gone.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qcow2bm
from tests.interop.ranges import joined
from tests.support.qemu import Ranges, StorageDaemon, bitmap_info, check, guest_digest, qemu_img, qemu_io, read_bitmaps

KIB, MIB = 1 << 10, 1 << 20
SIZE = 24 * MIB
ROUNDS = 30
FIXED: Ranges = [(1 * MIB, 64 * KIB)]

# Each commit changes every bitmap but `fixed`, and both the number of bitmaps and their names tell which it was.
CHILD = """
import sys
import qcow2bm

image, number = sys.argv[1], int(sys.argv[2])
while True:
    with qcow2bm.open(image, writable=True) as ours:
        edit = ours.draft()
        edit.rename(f"n{number}", f"n{number + 1}")
        edit.set_range(f"n{number + 1}", (number + 1) % 20 * 1048576, 524288)
        if number % 3 == 2:
            edit.clear(f"n{number + 1}")
        if number % 2:
            edit.remove("twin")
        else:
            edit.copy(f"n{number + 1}", "twin", granularity=65536)
        plan = edit.plan()
        print("begin", flush=True)
        ours.commit(plan)
    number += 1
    print(number, flush=True)
"""


def bits(number: int) -> Ranges:
    """What bitmap `n<number>` holds after that commit: the ranges since the last clear."""
    return joined([(turn % 20 * MIB, MIB // 2) for turn in range(number // 3 * 3 + 1, number + 1)])


def expected(number: int) -> dict[str, Ranges]:
    """All bitmaps after commit `number`."""
    twin = {"twin": bits(number)} if number % 2 else {}
    return {"fixed": FIXED, f"n{number}": bits(number), **twin}


def create(image: Path, cluster_size: int) -> None:
    """The image as it is before the first commit."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", image, str(SIZE))
    qemu_img("bitmap", "--add", "-g", "64k", image, "fixed")
    qemu_io(image, f"write -P 3 {FIXED[0][0]} {FIXED[0][1]}")
    qemu_img("bitmap", "--disable", image, "fixed")
    qemu_img("bitmap", "--add", "-g", "512", "--disable", image, "n0")


def kill_one(image: Path, number: int, chance: random.Random) -> int:
    """Let a child edit and kill it a moment after it began a commit; returns the last commit that it reported."""
    argv = [sys.executable, "-c", CHILD, str(image), str(number)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as child:
        assert child.stdout is not None
        said: list[str] = []
        while said.count("begin") < chance.randrange(1, 4):
            said.append(child.stdout.readline().strip())
            assert said[-1], "the child has died of something else"
        time.sleep(chance.random() * 0.003)
        child.kill()
        said += child.stdout.read().split()
    return max((int(word) for word in said if word != "begin"), default=number)


@pytest.mark.parametrize("cluster_size", [512, 64 * KIB])
def test_killed_at_any_moment(cluster_size: int, tmp_path: Path) -> None:
    image, chance = tmp_path / "image.qcow2", random.Random(cluster_size)
    number = leaks = moments = rounds = 0
    create(image, cluster_size)
    disk = guest_digest(image)
    while rounds < ROUNDS // 2 or not moments:
        rounds += 1
        assert rounds < 5 * ROUNDS, "no child was killed in the middle of anything"
        reported = kill_one(image, number, chance)
        said = check(image)
        assert said["returncode"] in (0, 3), said  # 3: leaked clusters, no harm
        dirty = read_bitmaps(image)
        (found,) = (int(name[1:]) for name in dirty if name.startswith("n"))
        assert found in (reported, reported + 1)
        assert dirty == expected(found)
        assert not any("in-use" in entry["flags"] for entry in bitmap_info(image))
        with qcow2bm.open(image, writable=True) as ours:
            assert set(ours.bitmaps.names) == set(dirty)
        assert guest_digest(image) == disk
        moments += said.get("leaks", 0) > leaks or found > reported
        number, leaks = found, said.get("leaks", 0)
    qemu_img("check", "-r", "leaks", image)
    with StorageDaemon(image) as vm:
        vm.write(2 * MIB, 512)
    assert check(image)["returncode"] == 0
    assert read_bitmaps(image) == expected(number)
