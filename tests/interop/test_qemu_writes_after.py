"""After every kind of edit QEMU goes on with the image as if it had written it itself.

Three times over: we edit, then QEMU opens the image for writing, a guest writes, discards and zeroes, QEMU closes it.
Bitmaps that record have the new writes and all that was there before; those that don't have what was there before. A
model says what that is, in ranges; QEMU and we must both read exactly that, before and after.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import qcow2bm
from tests.interop.model import Model
from tests.support.qemu import StorageDaemon, bitmap_info, check, qemu_img, qemu_img_json, read_bitmaps

if TYPE_CHECKING:
    from qcow2bm.bitmap.edit import Edit

    Script = Callable[[Edit | Model, int], None]

KIB, MIB = 1 << 10, 1 << 20
ROUNDS = 3

IMAGES = {
    "usual": (96 * MIB + 512, ("cluster_size=64k",)),
    "small-clusters": (20 * MIB + 512, ("cluster_size=512", "refcount_bits=64")),
    "subclusters": (64 * MIB, ("cluster_size=16k", "extended_l2=on", "refcount_bits=1")),
}


def first_and_last(edit: Edit | Model, turn: int) -> None:
    """The first bitmap of an image without any, none again, and another first one."""
    if turn == 1:
        edit.remove("first")
    else:
        edit.add("first", granularity=512 << turn, all_dirty=turn == 2)


def all_gone(edit: Edit | Model, turn: int) -> None:
    """The last bitmap removed; then two new ones."""
    if turn == 0:
        edit.remove("daily", "paused", "fine", "coarse", "spare0", "spare1", "spare2")
    elif turn == 1:
        edit.add("again")
        edit.add("again-fine", granularity=512, recording=False)
    else:
        edit.remove("again", "again-fine")


def merge_all_dirty(edit: Edit | Model, turn: int) -> None:
    """All-ones chunks that are merged before they have ever been on a disk."""
    edit.add(f"all{turn}", all_dirty=True)
    edit.merge("fine", [f"all{turn}"])


def all_at_once(edit: Edit | Model, turn: int) -> None:
    """A bit of everything in one commit."""
    edit.add(f"new{turn}")
    edit.merge(f"new{turn}", ["daily", "fine"])
    edit.rename(f"spare{turn}", f"kept{turn}")
    edit.copy("coarse", f"copy{turn}", granularity=4 * KIB)
    edit.enable("paused") if turn % 2 else edit.disable("paused")
    edit.clear("daily")


# What is done on turn 0, 1 and 2, to an Edit and to a Model alike. The bitmaps are those of `build`.
SCRIPTS: dict[str, Script] = {
    "nothing": lambda edit, turn: None,  # noqa: ARG005
    "add": lambda edit, turn: edit.add(f"new{turn}"),
    "add-fine": lambda edit, turn: edit.add(f"new{turn}", granularity=512),
    "add-disabled": lambda edit, turn: edit.add(f"new{turn}", recording=False),
    "add-all-dirty": lambda edit, turn: edit.add(f"new{turn}", all_dirty=True),
    "add-all-dirty-fine-disabled": lambda edit, turn: edit.add(
        f"new{turn}", all_dirty=True, granularity=512, recording=False
    ),
    "remove": lambda edit, turn: edit.remove(f"spare{turn}"),
    "rename": lambda edit, turn: edit.rename(f"spare{turn}", f"kept{turn}"),
    "rename-longer": lambda edit, turn: edit.rename(f"spare{turn}", f"{turn}" * 1023),
    "clear": lambda edit, turn: edit.clear(("daily", "fine", "coarse")[turn]),
    "enable": lambda edit, turn: edit.enable(("paused", "coarse", "paused")[turn]),
    "disable": lambda edit, turn: edit.disable(("daily", "fine", "daily")[turn]),
    "merge-same": lambda edit, turn: edit.merge("daily", [f"spare{turn}"]),
    "merge-finer": lambda edit, turn: edit.merge("coarse", ["fine"]),  # noqa: ARG005
    "merge-coarser": lambda edit, turn: edit.merge("fine", ["coarse"]),  # noqa: ARG005
    "merge-into-disabled": lambda edit, turn: edit.merge("paused", ["daily", "fine"]),  # noqa: ARG005
    "merge-what-is-there": lambda edit, turn: edit.merge("daily", ["daily", "daily"]),  # noqa: ARG005
    "merge-all-dirty": merge_all_dirty,
    "copy": lambda edit, turn: edit.copy(("daily", "fine", "paused")[turn], f"copy{turn}"),
    "copy-finer": lambda edit, turn: edit.copy("coarse", f"copy{turn}", granularity=512 << turn),
    "set": lambda edit, turn: edit.set_range("daily", (turn + 1) * MIB - 1, 3 * MIB),
    "unset": lambda edit, turn: edit.unset_range("fine", turn * 5 * MIB + 100, 6 * MIB),
    "all-gone": all_gone,
    "all-at-once": all_at_once,
}  # fmt: skip


def build(folder: Path, kind: str, model: Model) -> Path:
    """An image with bitmaps that QEMU made and wrote: `daily`, `fine` and the spares record, two are disabled."""
    image = create(folder, kind)
    model.add("daily")
    model.add("fine", granularity=512)
    model.add("coarse", granularity=MIB)
    model.add("paused")
    for turn in range(ROUNDS):
        model.add(f"spare{turn}")
    with StorageDaemon(image) as vm:
        for name, (granularity, _) in model.listing.items():
            vm.add_bitmap(name, granularity=granularity)
        use(vm, model, random.Random(kind))
        for name in ("coarse", "paused"):
            vm.disable_bitmap(name)
    model.disable("coarse", "paused")
    return image


def create(folder: Path, kind: str) -> Path:
    """An image without bitmaps."""
    image, (size, options) = folder / "image.qcow2", IMAGES[kind]
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(options), image, str(size))
    return image


def model_of(kind: str) -> Model:
    """No bitmaps, on a disk of the image's size."""
    size, options = IMAGES[kind]
    return Model(size, {"64k": 64 * KIB, "16k": 16 * KIB, "512": 512}[options[0].partition("=")[2]])


def use(vm: StorageDaemon, model: Model, chance: random.Random) -> None:
    """A guest at work, seen by the model too."""
    requests = []
    for verb in ("write -P 1", "write -P 2", "write -z", "discard", "write -P 3"):
        offset = chance.randrange(0, model.size - 128 * KIB, 512)
        # A whole 64 KiB: QEMU may leave the unaligned rest of a discard alone, and marks what it did discard.
        start, length = (
            (offset & -64 * KIB, 64 * KIB) if verb == "discard" else (offset, chance.randrange(512, 96 * KIB, 512))
        )
        requests.append(f"{verb} {start} {length}")
        model.guest_wrote(start, length)
    requests.append(f"write -P 4 {model.size - 512} 512")
    model.guest_wrote(model.size - 512, 512)
    vm.io(*requests)


def require(image: Path, model: Model) -> None:
    """QEMU and we both list and read what the model has; QEMU's check finds nothing."""
    said = check(image)
    assert said["returncode"] == 0, said
    flags: dict[str, tuple[int, bool]] = {}
    for entry in bitmap_info(image):
        assert "in-use" not in entry["flags"]
        flags[entry["name"]] = (entry["granularity"], "auto" in entry["flags"])
    assert flags == model.listing
    assert read_bitmaps(image) == model.dirty
    with qcow2bm.open(image) as ours:
        assert {bitmap.name: (bitmap.granularity, bitmap.recording) for bitmap in ours.bitmaps} == model.listing
        assert {
            bitmap.name: [(extent.offset, extent.length) for extent in bitmap.extents()] for bitmap in ours.bitmaps
        } == model.dirty


def cycle(image: Path, model: Model, script: Script, chance: random.Random) -> None:
    """Ours, QEMU's, three times."""
    for turn in range(ROUNDS):
        with qcow2bm.open(image, writable=True) as ours, ours.edit() as edit:
            script(edit, turn)
        script(model, turn)
        require(image, model)
        with StorageDaemon(image) as vm:
            loaded: dict[str, dict[str, Any]] = vm.bitmaps()
            assert {name: entry["recording"] for name, entry in loaded.items()} == {
                name: recording for name, (_, recording) in model.listing.items()
            }
            use(vm, model, chance)
        require(image, model)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_qemu_goes_on(name: str, kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    image = build(tmp_path, kind, model)
    require(image, model)
    cycle(image, model, SCRIPTS[name], random.Random(f"{name} {kind}"))


@pytest.mark.parametrize("kind", IMAGES)
def test_qemu_goes_on_from_a_first_bitmap(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    cycle(create(tmp_path, kind), model, first_and_last, random.Random(kind))


@pytest.mark.parametrize("kind", IMAGES)
def test_a_merge_that_changes_nothing_writes_nothing(kind: str, tmp_path: Path) -> None:
    """Else each merge of a backup that found nothing new would rewrite the bitmap."""
    image = build(tmp_path, kind, model_of(kind))
    before = image.read_bytes()
    with qcow2bm.open(image, writable=True) as ours:
        draft = ours.draft()
        draft.merge("daily", ["daily", "spare0"])
        assert not draft.plan()
        with ours.edit() as edit:
            edit.merge("daily", ["spare0"])
    assert image.read_bytes() == before


def test_all_dirty_takes_no_data_clusters(tmp_path: Path) -> None:
    """An all-dirty bitmap is table entries alone until QEMU, which knows no other way, stores it with data."""
    image = create(tmp_path, "small-clusters")
    with qcow2bm.open(image, writable=True) as ours:
        with ours.edit() as edit:
            edit.add("all", all_dirty=True, granularity=512)
        assert ours.bitmaps["all"].bytes_on_disk == 512  # a table of 11 entries
    with StorageDaemon(image) as vm:
        vm.write(0, 512)
    with qcow2bm.open(image) as ours:
        assert ours.bitmaps["all"].bytes_on_disk == 512 + 11 * 512
    assert qemu_img_json("info", image)["format-specific"]["data"]["bitmaps"][0]["name"] == "all"
