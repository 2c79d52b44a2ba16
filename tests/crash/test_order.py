"""What leads back is on the disk, whole and by its name, before the image is overwritten.

That a folder is flushed no state of the model can show, in which names reach the disk in their order; so it is seen by
the calls themselves.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from qcow2bm.image import undo, undo_writer
from tests.crash.commands import COMMANDS
from tests.crash.disk import Op
from tests.crash.recorder import recorded
from tests.crash.shapes import SHAPES
from tests.crash.trial import Trial, named

WITH = (
    ("merge, with undo", SHAPES[0].name),
    ("undo", SHAPES[0].name),
    ("remove the last", "extension outside the first sector"),
    ("repair refcounts", SHAPES[0].name),
    ("repair mappings", SHAPES[0].name),
    ("undo of a repair", SHAPES[0].name),
    ("shrink to little", SHAPES[0].name),
)
"""Commands with an undo file, a journal or both, and a shape."""


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize(("command", "shape"), WITH)
def test_what_leads_back_is_on_the_disk_first(
    tmp_path: Path, command: str, shape: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(undo_writer, "second_name", lambda *_: False)
        monkeypatch.setattr(undo, "second_name", lambda *_: False)
    trial = Trial(tmp_path, named(COMMANDS, command), named(SHAPES, shape))
    with recorded(tmp_path) as ops:
        trial.run()
    image = trial.before.names[trial.image.name]
    begun = [place for place, op in enumerate(ops) if op.kind == "write" and op.file == image]
    assert begun, "nothing was written"
    for place in begun:
        assert not (wrong := not_on_the_disk(ops[:place], image)), wrong


def test_a_name_that_may_be_lost_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This proof can fail as well."""
    monkeypatch.setattr(undo_writer, "sync_folder", lambda _: None)
    with pytest.raises(AssertionError, match="may be lost"):
        test_what_leads_back_is_on_the_disk_first(tmp_path, *WITH[0], links=True, monkeypatch=monkeypatch)


def not_on_the_disk(ops: list[Op], image: int) -> str:
    """What of the other files may be lost by a power cut after these operations; or an empty string."""
    unflushed: dict[int, list[int]] = defaultdict(list)
    unnamed: set[str] = set()
    for op in ops:
        match op.kind:
            case "write" if op.file != image:
                if op.offset == 0 and any(at >= 512 for at in unflushed[op.file]):
                    return "a header says that the file is whole, and what it speaks of may not be on the disk"
                unflushed[op.file].append(op.offset)
            case "flush":
                unflushed.pop(op.file, None)
            case "link":
                unnamed.add(op.name)
            case "unlink":
                unnamed.discard(op.name)
            case "flush folder":
                unnamed.clear()
    if unnamed:
        return f"the name {unnamed} may be lost"
    return "its bytes may be lost" if any(unflushed.values()) else ""
