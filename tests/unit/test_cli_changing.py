"""The commands that change bitmaps, on copies of fixture images. Real QEMU reads the results in interop/test_cli.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcow2bm import api
from tests.crash.disk import Folder
from tests.crash.recorder import recorded
from tests.support.images import unpack
from tests.support.scenes import behind_another

WEEK = ["mon", "tue", "wed", "thu", "fri", "sat"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack("office-week", tmp_path)


def names(path: Path) -> list[str]:
    with api.open(path) as opened:
        return opened.bitmaps.names


def dirty(path: Path, name: str) -> list[tuple[int, int]]:
    with api.open(path) as opened:
        return [(extent.offset, extent.length) for extent in opened.bitmaps[name].extents()]


def recording(path: Path) -> list[str]:
    with api.open(path) as opened:
        return [bitmap.name for bitmap in opened.bitmaps if bitmap.recording]


# ---- each command ----


def test_add(image: Path, run) -> None:
    status, out, err = run("add", image, "new")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "add 'new', granularity 65536, recording"
    assert names(image) == [*WEEK, "new"]
    assert dirty(image, "new") == []


def test_add_with_everything(image: Path, run) -> None:
    assert run("add", image, "new", "-g", "2M", "--disabled", "--all-dirty")[0] == 0
    assert dirty(image, "new") == [(0, 1 << 30)]
    with api.open(image) as opened:
        assert opened.bitmaps["new"].granularity == 2 << 20
        assert not opened.bitmaps["new"].recording


def test_names_globs_and_doubles_are_one_commit(image: Path, run) -> None:
    status, out, _ = run("remove", image, "sat", "mon", "--match", "m*", "--match", "t*", "sat")
    assert status == 0
    assert out.splitlines()[:4] == ["remove 'sat'", "remove 'mon'", "remove 'tue'", "remove 'thu'"]
    assert names(image) == ["wed", "fri"]


def test_one_that_is_not_there_and_none_is_removed(image: Path, run) -> None:
    before = image.read_bytes()
    status, out, err = run("remove", image, "mon", "sun")
    assert (status, out) == (1, "")
    assert f"{image}: no bitmap is called 'sun'" in err
    assert run("remove", image, "mon", "--match", "x*")[0] == 1
    assert run("remove", image)[0] == 64
    assert image.read_bytes() == before


def test_rename_clear_enable_disable(image: Path, run) -> None:
    assert run("rename", image, "mon", "monday")[0] == 0
    assert run("clear", image, "tue", "--match", "w*")[0] == 0
    assert run("enable", image, "--match", "t*")[0] == 0
    assert run("disable", image, "sat")[0] == 0
    assert names(image) == ["monday", *WEEK[1:]]
    assert dirty(image, "tue") == dirty(image, "wed") == []
    assert dirty(image, "monday")
    assert recording(image) == ["tue", "thu"]


def test_set_and_unset_ranges(image: Path, run) -> None:
    run("add", image, "new", "-g", "64k")
    assert run("set", image, "new", "--range", "1+1", "--range", "1M+128k")[0] == 0
    assert dirty(image, "new") == [(0, 65536), (1 << 20, 131072)]
    assert run("unset", image, "new", "--range", "1+65534", "--range", "1M+65k")[0] == 0
    assert dirty(image, "new") == [(0, 65536), ((1 << 20) + 65536, 65536)]


def test_merge_creates_the_union(image: Path, run) -> None:
    days = ["mon", "tue", "wed"]
    status, out, _ = run("merge", image, "week", *days, "--create")
    assert status == 0
    assert out.splitlines()[1] == "merge 'mon', 'tue', 'wed' into 'week'"
    with api.open(image) as opened:
        bits = [opened.bitmaps[day].stored.bits for day in days]
        assert opened.bitmaps["week"].stored.bits.count() == bits[0].union(*bits[1:]).count()
        assert not opened.bitmaps["week"].recording


def test_merge_without_create_needs_the_target(image: Path, run) -> None:
    status, _, err = run("merge", image, "week", "mon")
    assert status == 1
    assert "no bitmap is called 'week'" in err


def test_a_created_target_is_as_fine_as_the_finest_source_and_records_if_one_does(image: Path, run) -> None:
    run("copy", f"{image}#mon", f"{image}#coarse", "-g", "1M")
    run("copy", f"{image}#mon", f"{image}#fine", "-g", "4k")
    assert run("merge", image, "union", "coarse", "fine", "sat", "--create")[0] == 0
    assert run("merge", image, "rough", "fine", "--create", "-g", "2M")[0] == 0
    with api.open(image) as opened:
        assert opened.bitmaps["union"].granularity == 4096
        assert opened.bitmaps["union"].recording
        assert opened.bitmaps["rough"].granularity == 2 << 20


def test_merge_takes_sources_from_other_images(image: Path, tmp_path: Path, run) -> None:
    other = unpack("office-week", tmp_path / "other")
    expected = dirty(image, "tue")
    assert run("clear", image, "mon", "tue")[0] == 0
    assert run("merge", image, "mon", f"{other}#tue", f"{other}#tue")[0] == 0
    assert dirty(image, "mon") == expected


def test_a_source_in_the_image_itself_is_not_opened_twice(image: Path, tmp_path: Path, run) -> None:
    link = tmp_path / "link.qcow2"
    link.symlink_to(image)
    assert run("merge", image, "mon", f"{link}#tue", "#wed")[0] == 0
    assert run("copy", f"{image}#mon", f"{link}#copy")[0] == 0
    assert dirty(image, "copy") == dirty(image, "mon")


def test_a_name_with_a_hash_is_a_name_first(image: Path, run) -> None:
    assert run("rename", image, "mon", "a#b")[0] == 0
    assert run("merge", image, "tue", "a#b")[0] == 0
    assert run("copy", f"{image}#a#b", f"{image}#c#d")[0] == 0
    assert "c#d" in names(image)


def test_a_file_name_with_a_hash(tmp_path: Path, run) -> None:
    path = unpack("office-week", tmp_path).rename(tmp_path / "vm#1.qcow2")
    assert run("copy", f"{path}#mon", f"{path}#x")[0] == 0
    assert run("merge", path, "x", f"{path}#tue")[0] == 0
    assert names(path)[-1] == "x"


def test_copy_to_another_image_keeps_the_name(image: Path, tmp_path: Path, run) -> None:
    other = unpack("office-week", tmp_path / "other")
    run("remove", other, "mon", "sat")
    assert run("copy", f"{image}#mon", other)[0] == 0
    assert run("copy", f"{image}#sat", f"{other}#saturday", "-g", "1M")[0] == 0
    assert dirty(other, "mon") == dirty(image, "mon")
    assert recording(other) == ["saturday"]


def test_disks_of_different_sizes_do_not_mix(image: Path, tmp_path: Path, run) -> None:
    other = unpack("internal-snapshots", tmp_path / "other")
    before = other.read_bytes()
    status, _, err = run("copy", f"{image}#mon", f"{other}#m")
    assert status == 1
    assert f"{other}: the disk has 268435456 bytes" in err
    assert run("merge", other, "full", f"{image}#mon")[0] == 1
    assert other.read_bytes() == before


def test_an_error_in_a_source_image_names_that_image(image: Path, tmp_path: Path, run) -> None:
    other = unpack("in-use", tmp_path / "other")
    status, _, err = run("merge", image, "mon", f"{other}#kept")
    assert status == 4
    assert err.startswith(f"qcow2bm: {other}: bitmap 'kept' is inconsistent")
    status, _, err = run("merge", image, "mon", f"{other}#nothing")
    assert status == 1
    assert err.startswith(f"qcow2bm: {other}: no bitmap is called 'nothing'")


# ---- dry run, undo, result ----

CHANGES = [
    ["add", "{}", "new"],
    ["remove", "{}", "mon"],
    ["rename", "{}", "mon", "x"],
    ["clear", "{}", "mon"],
    ["enable", "{}", "mon"],
    ["disable", "{}", "sat"],
    ["set", "{}", "mon", "--range", "0+1G"],
    ["unset", "{}", "mon", "--range", "0+1G"],
    ["merge", "{}", "mon", "tue"],
    ["copy", "{}#mon", "{}#x"],
]


def words(change: list[str], image: Path) -> list[str]:
    return [word.replace("{}", str(image)) for word in change]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[0])
def test_a_dry_run_says_what_would_be_and_writes_nothing(change, image, run) -> None:
    before = image.read_bytes(), image.stat().st_mtime_ns
    image.chmod(0o444)
    status, out, err = run(*words(change, image), "-n")
    assert (status, err) == (0, "")
    assert "stage 1:" in out
    assert out.endswith("dry run: nothing was written\n")
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[0])
def test_undo_puts_back_every_byte(change, image, run) -> None:
    before, kept = image.read_bytes(), image.with_name("undo")
    status, out, _ = run(*words(change, image), "--undo", kept)
    assert status == 0
    assert out.endswith(f"undo file: {kept}\n")
    assert image.read_bytes() != before
    assert run("undo", image, kept) == (0, f"{image} is as it was before\n", "")
    assert image.read_bytes() == before
    status, _, err = run("undo", image, kept)
    assert status == 1
    assert "has been used already" in err


def test_the_dry_run_is_the_change(image: Path, run) -> None:
    plan = json.loads(run("merge", image, "mon", "tue", "-n", "--output", "json")[1])
    result = json.loads(run("merge", image, "mon", "tue", "--output", "json")[1])
    for key in ("summary", "bytes-written", "growth"):
        assert plan[key] == result[key]
    assert sum(write["length"] for stage in plan["stages"] for write in stage["writes"]) == plan["bytes-written"]
    assert (plan["changed"], result["changed"]) == (False, True)


def test_nothing_to_do_is_said_and_makes_no_undo_file(image: Path, run) -> None:
    before = image.read_bytes()
    status, out, _ = run("disable", image, "mon", "--undo", image.with_name("undo"))
    assert status == 0
    assert "nothing to do" in out
    assert image.read_bytes() == before
    assert not image.with_name("undo").exists()


def test_undo_refuses_an_image_that_has_changed(image: Path, run) -> None:
    kept = image.with_name("undo")
    run("add", image, "a", "--undo", kept)
    run("add", image, "b")
    status, _, err = run("undo", image, kept)
    assert status == 1
    assert "has changed since" in err
    assert names(image) == [*WEEK, "a", "b"]


def test_undo_after_the_time_stamp_changed_needs_force(image: Path, run) -> None:
    kept, before = image.with_name("undo"), image.read_bytes()
    run("add", image, "a", "--undo", kept)
    image.touch()
    status, _, err = run("undo", image, kept)
    assert status == 1
    assert "--force" in err
    assert run("undo", image, kept, "--force")[0] == 0
    assert image.read_bytes() == before


def test_an_undo_file_is_never_overwritten(image: Path, run) -> None:
    kept, before = image.with_name("undo"), image.read_bytes()
    kept.write_text("precious")
    status, _, err = run("add", image, "a", "--undo", kept)
    assert status == 1
    assert "cannot create the undo file" in err
    assert kept.read_text() == "precious"
    assert image.read_bytes() == before


def test_an_interrupted_change_is_rolled_back_first_and_told(tmp_path: Path, run) -> None:
    """Removing the last bitmap moves the extension behind it, which takes a journal; here power is cut meanwhile."""
    image = behind_another(tmp_path)
    before = Folder.read(tmp_path)
    with recorded(tmp_path) as ops:
        assert run("remove", image, "a")[0] == 0
    writes = [place for place, op in enumerate(ops) if op.kind == "write" and op.file == before.names[image.name]]
    marked = next(place for place in writes if ops[place].offset == 72 and ops[place].data[0] & 0x40)
    before.after(ops[: marked + 1]).write(tmp_path)
    assert run("list", image)[0] == 1
    status, _, err = run("check", image)
    assert status == 1
    assert "cut short by a crash" in err
    assert run("clear", image, "a", "-n", "--no-lock")[0] == 1
    status, out, err = run("disable", image, "a", "--output", "json")
    assert status == 0
    assert "it was rolled back first" in err
    assert json.loads(out)["rolled-back"]
    assert not image.with_name(image.name + ".qcow2bm-journal").exists()
    assert run("enable", image, "a")[0] == 0
    assert image.read_bytes() == before.files[before.names[image.name]]


def test_a_progress_bar_goes_to_stderr_and_only_when_asked_for(image: Path, run) -> None:
    assert run("add", image, "a")[2] == ""
    status, out, err = run("add", image, "b", "--progress")
    assert status == 0
    assert "100%" in err
    assert "\r" not in out
    assert run("add", image, "c", "--no-progress")[2] == ""


def test_names_of_switches_after_a_double_dash(image: Path, run) -> None:
    assert run("add", image, "--", "--all-dirty")[0] == 0
    assert names(image)[-1] == "--all-dirty"


@pytest.mark.parametrize("bit", [2, 17, 63])
def test_whoever_writes_clears_the_autoclear_bits_he_does_not_know(bit: int, image: Path, run) -> None:
    with image.open("r+b") as file:
        file.seek(88)
        file.write((1 << bit | 1).to_bytes(8, "big"))
    assert run("add", image, "new")[0] == 0
    assert image.read_bytes()[88:96] == (1).to_bytes(8, "big")
