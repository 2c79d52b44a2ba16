"""`export` and `import` on the command line: what they refuse, what they say, and that they leave nothing behind."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import api
from qcow2bm.bitmap import sidecar
from qcow2bm.bitmap.edit import Edit
from qcow2bm.bitmap.sidecar_reader import read_from
from qcow2bm.bitmap.sidecar_text import LARGEST, Form, read_extent_file
from qcow2bm.errors import BitmapError, BitmapExistsError, ExportFileError, ImageIOError, LineageError, UsageError
from qcow2bm.image.export_file import Input, NewFile
from tests.support.exports import DISK, dirty_bits, exported, input_of, varied
from tests.support.images import unpack
from tests.support.qemu import qemu_img, qemu_io
from tests.support.scenes import create, three


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Bitmaps a, b and c."""
    return three(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "out.qcow2bm"


def bits_of(image: Path, name: str) -> list[tuple[int, int]]:
    with qcow2bm.open(image) as opened:
        return dirty_bits(opened.bitmaps[name].stored.readable_bits())


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Put bytes on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# ---- there and back ----


def test_everything_there_and_back(image: Path, file: Path, run) -> None:
    before = {name: bits_of(image, name) for name in "abc"}
    assert run("export", image, file).status == 0
    assert run("remove", image, "--match", "*").status == 0
    done = run("import", image, file)
    assert (done.status, done.out.splitlines()[0]) == (0, f"copy '{file}#a' to 'a', granularity 65536")
    assert {name: bits_of(image, name) for name in before} == before


def test_only_some_of_them_under_another_name_at_another_granularity(image: Path, file: Path, run) -> None:
    assert run("export", image, "a", "b", file).status == 0
    assert run("import", image, file, "a", "--as", "fine", "-g", "4k", "--disabled").status == 0
    with qcow2bm.open(image) as opened:
        assert opened.bitmaps.names == ["a", "b", "c", "fine"]
        fine, old = opened.bitmaps["fine"], opened.bitmaps["a"]
        assert (fine.granularity, fine.recording) == (4096, False)
        assert list(fine.extents()) == list(old.extents())
    assert run("export", image, "--match", "[bf]*", file, "--force").out.splitlines()[0].startswith("'b': ")
    assert run("import", image, file, "--match", "f*", "--replace").status == 0
    refused = run("import", image, file, "--match", "f*", "--match", "z*", "--replace")
    assert (refused.status, f"no bitmap of {file} matches 'z*'" in refused.err) == (1, True)


def test_a_name_that_is_there_is_kept_added_to_or_replaced(image: Path, file: Path, run) -> None:
    run("export", image, "a", file)
    run("set", image, "a", "--range", "128k+64k")
    refused = run("import", image, file)
    assert (refused.status, "--merge adds to it, --replace does away with it" in refused.err) == (1, True)
    assert run("import", image, file, "--merge", "--replace").status == 64
    assert run("import", image, file, "--merge", "-g", "1M").status == 64
    marked = bits_of(image, "a")
    assert run("clear", image, "a").status == run("set", image, "a", "--range", "128k+64k").status == 0
    assert run("import", image, file, "--merge", "--disabled").status == 0
    assert bits_of(image, "a") == marked
    assert run("import", image, file, "--replace").status == 0
    assert bits_of(image, "a") != marked
    assert bits_of(image, "a") == [run_ for run_ in marked if run_[0] != 2]


def test_a_dry_run_writes_nothing_and_undo_puts_all_back(image: Path, file: Path, tmp_path: Path, run) -> None:
    run("export", image, file)
    before = image.read_bytes()
    assert "dry run" in run("import", image, file, "--replace", "-g", "1M", "-n").out
    assert image.read_bytes() == before
    assert run("import", image, file, "--replace", "-g", "1M", "--undo", tmp_path / "undo").status == 0
    assert image.read_bytes() != before
    assert run("undo", image, tmp_path / "undo").status == 0
    assert image.read_bytes() == before


def test_all_or_none(image: Path, file: Path, run) -> None:
    run("export", image, file)
    run("remove", image, "a", "b")
    before = image.read_bytes()
    assert run("import", image, file).status == 1  # c is there
    assert image.read_bytes() == before


# ---- lineage ----


def test_a_guest_that_writes_where_nothing_was_makes_it_another_disk(image: Path, file: Path, run) -> None:
    run("export", image, "a", file)
    qemu_io(image, "write 0 64k")
    refused = run("import", image, file, "--replace")
    assert refused.status == 1
    assert "an incremental backup by them would miss what they do not mark" in refused.err
    assert run("import", image, file, "--replace", "--force-lineage").status == 0


def test_a_warning_says_that_clusters_may_have_been_rewritten_in_place(image: Path, file: Path, run) -> None:
    run("export", image, "a", file)
    assert run("import", image, file, "--replace", "--untouched").err == ""
    refused = run("import", image, file, "--replace", "--untouched")
    assert (refused.status, "its file was written to since the bitmaps were exported" in refused.err) == (1, True)
    assert run("import", image, file, "--replace", "--untouched", "--force-lineage").status == 64
    again = run("import", image, file, "--replace")
    assert (again.status, "rewritten clusters in place" in again.err) == (0, True)
    assert run("import", image, file, "--replace", "--force-lineage").err == ""


def test_a_disk_of_another_size_is_refused_whoever_vouches(image: Path, file: Path, tmp_path: Path, run) -> None:
    run("export", image, file)
    (tmp_path / "other").mkdir()
    other = create(tmp_path / "other", "5M")
    for words in ([], ["--force-lineage"]):
        refused = run("import", other, file, *words)
        assert (refused.status, "its disk has 5242880 bytes, that of the exported" in refused.err) == (1, True)


def test_another_image_of_the_same_size_is_refused(image: Path, file: Path, tmp_path: Path, run) -> None:
    run("export", image, file)
    (tmp_path / "other").mkdir()
    refused = run("import", create(tmp_path / "other", "4M"), file)
    assert (refused.status, "not the image the bitmaps were exported from ('image.qcow2')" in refused.err) == (1, True)


# ---- stale ----


def test_stale_bitmaps_are_marked_all_the_way(tmp_path: Path, file: Path, run) -> None:
    image = unpack("in-use", tmp_path)
    listed = json.loads(run("list", "--output", "json", image).out)["images"][0]["bitmaps"]
    stale = [bitmap["name"] for bitmap in listed if bitmap["state"] == "inconsistent"]
    refused = run("export", image, stale[0], file)
    assert (refused.status, "--stale exports what is stored" in refused.err, file.exists()) == (4, True, False)
    done = run("export", image, stale[0], file, "--stale")
    assert (done.status, f"'{stale[0]}' is marked as stale" in done.err) == (0, True)
    assert "stale" in run("import", "--list", file).out
    refused = run("import", image, file, "--replace")
    assert (refused.status, "it may lack writes" in refused.err) == (4, True)
    as_json = file.with_suffix(".json")
    assert run("export", image, stale[0], as_json, "--stale", "--format", "json").status == 0
    assert run("import", image, as_json, "--format", "json", "--replace").status == 4
    taken = run("import", image, file, "--as", "back", "--stale")
    assert (taken.status, f"'{stale[0]}' was stale when it was exported: it may lack writes" in taken.err) == (0, True)
    with qcow2bm.open(image) as opened:
        assert not opened.bitmaps["back"].recording
    for words in ([], ["--merge"], ["--replace"]):
        refused = run("import", image, file, "--as", "rec", "--stale", "--enabled", *words)
        assert (refused.status, "would make them count" in refused.err) == (64, True)


def test_an_export_of_all_says_why_there_is_none(tmp_path: Path, file: Path, run) -> None:
    image = unpack("in-use", tmp_path)
    refused = run("export", image, file)
    assert (refused.status, "--stale exports what is stored" in refused.err, file.exists()) == (4, True, False)
    assert run("export", image, file, "--stale").status == 0
    (tmp_path / "none").mkdir()
    none = run("export", create(tmp_path / "none", "4M"), file, "--force")
    assert (none.status, "there is no bitmap to export" in none.err) == (1, True)


def test_what_is_left_out_of_all_is_said(tmp_path: Path, file: Path, run) -> None:
    image = unpack("in-use", tmp_path)
    with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
        edit.add("sound")
    done = run("export", image, file)
    assert done.status == 0
    with qcow2bm.open(image) as opened, qcow2bm.read_export(file) as held:
        assert [bitmap.name for bitmap in held.bitmaps] == ["sound"]
        for name in opened.bitmaps.names[:-1]:
            assert f"bitmap '{name}' is inconsistent and left out" in done.err


# ---- files ----


def test_a_file_that_is_there_is_kept(image: Path, file: Path, run) -> None:
    file.write_bytes(b"precious")
    refused = run("export", image, file)
    assert (refused.status, "is there already; --force replaces it" in refused.err) == (1, True)
    refused = run("export", image, file, "--force")
    assert (refused.status, "is something else than an export and is not replaced" in refused.err) == (1, True)
    assert file.read_bytes() == b"precious"
    file.write_bytes(b"")
    assert run("export", image, file, "--force").status == 0
    assert run("export", image, "a", file, "--force").status == 0
    with qcow2bm.read_export(file) as held:
        assert len(held.bitmaps) == 1


def test_only_what_we_wrote_is_replaced(image: Path, file: Path, run) -> None:
    """A list that somebody else made, or a report of ours, begins alike; bare bits are known by nothing."""
    for form, foreign in (
        ("json", '{"precious": 1}'),
        ("json", run("info", "--output", "json", image).out),
        ("json", run("show", image, "a", "--extents", "--output", "json").out),
        ("json", '{\n  "format-version": 1,\n  "image": "x",\n  "name": "y"\n}\n'),
        ("csv", "offset,length\n0,1\n"),
        ("csv", "offset,length,dirty,and more\n"),
        ("csv", "offset,length,dirty"),
        ("raw", "\0" * 8),
        ("raw", "precious"),
    ):
        file.write_text(foreign)
        refused = run("export", image, "a", file, "--format", form, "--force")
        assert (refused.status, file.read_text()) == (1, foreign), (form, foreign)
        file.unlink()
    for form in ("json", "csv"):
        assert run("export", image, "a", file, "--format", form).status == 0
        assert run("export", image, "b", file, "--format", form, "--force").status == 0
        file.unlink()
    file.write_bytes(b"")
    assert run("export", image, "b", file, "--format", "raw", "--force").status == 0
    refused = run("export", image, "b", file, "--format", "raw", "--force")
    assert (refused.status, "nothing tells whether it is bare bits; remove it first" in refused.err) == (1, True)


def test_no_image_is_ever_replaced(image: Path, tmp_path: Path, run) -> None:
    (tmp_path / "other").mkdir()
    other = create(tmp_path / "other", "4M")
    before = image.read_bytes(), other.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(image)
    for form in ("qcow2bm", "json", "csv", "raw"):
        assert run("export", image, "a", image, "--force", "--format", form).status == 64
        assert run("export", image, "a", link, "--force", "--format", form).status == 64
        refused = run("export", image, "a", other, "--force", "--format", form)
        assert (refused.status, "is a qcow2 image and is not replaced" in refused.err) == (1, True)
    assert (image.read_bytes(), other.read_bytes()) == before


def test_a_forgotten_file_does_not_make_one_called_after_the_bitmap(
    image: Path, tmp_path: Path, run, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = run("export", image, "a")
    assert (refused.status, "the file comes last" in refused.err) == (64, True)
    assert not Path("a").exists()
    assert run("export", image, "a", "./a").status == 0
    assert Path("a").exists()


@pytest.mark.parametrize("kind", ["folder", "fifo", "missing folder"])
def test_places_where_no_file_can_be(kind: str, image: Path, tmp_path: Path, run) -> None:
    place = tmp_path / "place"
    if kind == "folder":
        place.mkdir()
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place = place / "file"
    for words in ([], ["--force"]):
        refused = run("export", image, place, *words)
        assert refused.status == 1
        assert str(place) in refused.err


@pytest.mark.parametrize("call", ["unlink", "fsync"])
def test_what_fails_after_an_export_is_whole_is_said_so(
    image: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whoever believes that there is none would export again, and be told that it is there already."""
    said = {"unlink": "a temporary file stays", "fsync": "it is whole, but"}[call]
    path, real = tmp_path / "out", getattr(os, call)

    def fail(what: object, *args: object, **options: object) -> object:
        if call == "unlink" or (isinstance(what, int) and Path(f"/proc/self/fd/{what}").is_dir()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(what, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        ended = run("export", image, path)
    assert ended.status == 1
    assert f"{path}: {said}" in ended.err
    assert run("list", image).status == 0
    assert run("import", image, path, "--merge", "--dry-run").status == 0


def test_nothing_is_left_of_an_export_that_fails(image: Path, tmp_path: Path, run, monkeypatch) -> None:
    before = sorted(tmp_path.iterdir())
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()):

        def fail(*_: object, error: BaseException = error) -> bytes:
            raise error

        monkeypatch.setattr(sidecar, "_chunks", fail)
        failed = run("export", image, tmp_path / "out")
        assert failed.status == (130 if isinstance(error, KeyboardInterrupt) else 1)
        assert sorted(tmp_path.iterdir()) == before
        if isinstance(error, OSError):
            assert f"{tmp_path / 'out'}: No space left on device" in failed.err


def test_a_file_that_comes_while_ours_is_written_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    new = NewFile(path)
    new.__enter__().write(b"ours")
    path.write_bytes(b"theirs")
    with pytest.raises(ExportFileError, match="is there already"):
        new.__exit__(None, None, None)
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    with NewFile(tmp_path / "out") as out:
        out.write(b"ours")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"ours"]


def test_without_links_too_a_file_that_comes_meanwhile_is_kept(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "out"
    new = NewFile(path)
    new.__enter__().write(b"ours")

    def link(*_: object) -> None:
        path.write_bytes(b"theirs")
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ExportFileError, match="is there already"):
        new.__exit__(None, None, None)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"theirs", [path])


def test_without_links_nothing_is_left_if_the_name_cannot_be_given(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ImageIOError), NewFile(tmp_path / "out") as out:
        out.write(b"ours")
    assert list(tmp_path.iterdir()) == []


def test_replacing_by_way_of_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with NewFile(tmp_path / "link", force=True) as out:
        out.write(b"ours")
    assert (tmp_path / "real").read_bytes() == b"ours"
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(ExportFileError, match="is there already"):
        NewFile(tmp_path / "nowhere")
    with NewFile(tmp_path / "nowhere", force=True) as out:
        out.write(b"too")
    assert (tmp_path / "gone").read_bytes() == b"too"


# ---- streams ----


def test_what_is_on_standard_output_is_the_file(image: Path, run, monkeypatch) -> None:
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", out)
    assert run("export", image, "a", "-").status == 0
    data = out.buffer.getvalue()  # type: ignore[attr-defined]
    monkeypatch.undo()
    assert run("remove", image, "a").status == 0
    feed(monkeypatch, data)
    assert run("import", image, "-").status == 0
    feed(monkeypatch, data[:-1])
    cut = run("import", image, "-", "--replace")
    assert (cut.status, "standard input is damaged: it is cut short in its end record" in cut.err) == (1, True)
    feed(monkeypatch, data)
    assert "undamaged" in run("import", "--list", "-").out


def test_streams_that_will_not_do(image: Path, run, monkeypatch) -> None:
    assert run("export", image, "-", "--output", "json").status == 64
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in run("import", image, "-").err
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert "standard output is closed" in run("export", image, "-").err


def test_bytes_do_not_go_to_a_terminal(image: Path, run, monkeypatch) -> None:
    monkeypatch.setattr("qcow2bm.cli.export.is_terminal", lambda _: True)
    assert run("export", image, "a", "-").status == 64
    assert run("export", image, "a", "-", "--format", "raw").status == 64


def test_a_fifo_is_a_stream(image: Path, tmp_path: Path) -> None:
    data = exported(image)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY)
    os.write(writer, data)
    source = Input.open(fifo)
    os.close(writer)
    os.close(reader)
    with read_from(source) as held:
        assert len(held.bitmaps) == 3
        assert held.find("a").read_bits().count() == held.find("a").dirty_bytes >> 16


@pytest.mark.parametrize("form", ["qcow2bm", "json", "raw"])
def test_a_fifo_whose_writer_comes_later(form: str, image: Path, file: Path, tmp_path: Path, run) -> None:
    """The writer reads the image that the bitmap goes into: it is not locked before all has been read."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert run("export", image, "a", file, "--format", form).status == 0

    def write() -> None:
        time.sleep(0.3)
        with fifo.open("wb") as out:
            time.sleep(0.3)
            with api.open(image, writable=True):
                out.write(file.read_bytes())

    writer = threading.Thread(target=write)
    writer.start()
    words = ["--force-lineage", "-g", "64k"] if form == "raw" else []
    done = run("import", image, fifo, "--format", form, "--as", "z", *words)
    writer.join()
    assert done.status == 0, done.err
    assert bits_of(image, "z") == bits_of(image, "a")


def test_a_stream_that_is_too_long_is_not_kept(image: Path, run, monkeypatch) -> None:
    monkeypatch.setitem(LARGEST, Form.RAW, 100)
    feed(monkeypatch, bytes(5000))
    words = ["--format", "raw", "--as", "x", "-g", "64k", "--force-lineage"]
    assert "has more than 8 bytes" in run("import", image, "-", *words).err


def test_an_image_in_the_place_of_the_file(image: Path, file: Path, run) -> None:
    run("export", image, file)
    refused = run("import", file, image)
    assert (refused.status, "the image comes first, then the file" in refused.err) == (1, True)
    assert run("import", image).status == 64


# ---- --list ----


def test_a_listing_says_what_the_file_holds_and_how_an_image_stands_to_it(tmp_path: Path, file: Path, run) -> None:
    image = varied(tmp_path)
    run("export", image, file)
    alone = run("import", "--list", file)
    assert alone.status == 0
    assert "undamaged" in alone.out
    assert "täglich\\x1b[1m" in alone.out
    assert "\x1b" not in alone.out
    assert "untouched since the export" in run("import", "--list", image, file).out
    run("clear", image, "ones")
    assert "the mapping is the same; the file was written to" in run("import", "--list", image, file).out
    qemu_io(image, "write 0 64k")
    assert "another image, or one that a guest has written to" in run("import", "--list", image, file).out
    qemu_img("resize", "-q", image, "2G")
    parsed = json.loads(run("import", "--list", image, file, "--output", "json").out)
    assert (parsed["standing"], parsed["lineage"]["virtual-size"]) == ("other", DISK)
    assert [bitmap["name"] for bitmap in parsed["bitmaps"]][3] == "täglich\x1b[1m"


def test_a_listing_goes_alone(image: Path, file: Path, run) -> None:
    run("export", image, file)
    for words in (["-n"], ["--replace"], ["--as", "x"], ["-g", "64k"], ["--force-lineage"], ["--match", "a"]):
        assert run("import", "--list", file, *words).status == 64
    assert run("import", "--list", file, "--format", "json").status == 64
    file.write_bytes(file.read_bytes()[:-1])
    assert run("import", "--list", file).status == 1


# ---- other forms ----


@pytest.mark.parametrize("form", ["json", "csv", "raw"])
def test_a_form_of_one_bitmap(form: str, image: Path, file: Path, run) -> None:
    assert run("export", image, file, "--format", form).status == 64
    assert run("export", image, "a", file, "--format", form).status == 0
    words = [] if form == "json" else ["--force-lineage"]
    grain = ["-g", "64k"] if form == "raw" else []
    assert run("import", image, file, "--format", form, "--as", "again", *words, *grain).status == 0
    assert bits_of(image, "again") == bits_of(image, "a")
    assert run("clear", image, "again").status == 0
    assert run("import", image, file, "--format", form, "--as", "again", "--merge", *words, *grain).status == 0
    assert bits_of(image, "again") == bits_of(image, "a")
    with qcow2bm.open(image) as opened:
        assert opened.bitmaps["again"].recording is (form == "json" and opened.bitmaps["a"].recording)


def test_forms_that_know_no_lineage_need_somebody_who_vouches(image: Path, file: Path, run) -> None:
    for form, words in (("csv", []), ("raw", ["-g", "64k"])):
        run("export", image, "a", file, "--format", form)
        refused = run("import", image, file, "--format", form, "--as", "x", *words)
        assert (refused.status, "does not say which disk it is about" in refused.err) == (1, True)
        assert run("import", image, file, "--format", form, "--force-lineage", *words).status == 64
        file.unlink()
    file.write_text('[{"start": 0, "length": 4194304, "depth": 0, "present": true, "zero": false, "data": true}]')
    assert run("import", image, file, "--format", "json", "--as", "x").status == 1
    assert run("import", image, file, "--format", "json", "--as", "x", "--force-lineage", "-g", "1M").status == 0
    assert bits_of(image, "x") == [(0, 4)]


def test_json_of_ours_is_checked_like_an_export_file(image: Path, file: Path, run) -> None:
    run("export", image, "a", file, "--format", "json")
    shown = json.loads(run("show", image, "a", "--extents", "--output", "json").out)
    document = json.loads(file.read_text())
    sealed = document.pop("lineage")
    lineage = {key: value for key, value in sealed.items() if key != "lineage-digest"}
    assert document == shown
    assert sealed == seal(lineage)
    assert (lineage["name"], lineage["granularity"], lineage["stale"]) == ("a", 65536, False)
    file.write_text(json.dumps({**shown, "lineage": sealed}))  # by another printer
    assert run("import", image, file, "--format", "json", "--replace").status == 0
    cut = shown["extents"][:-1]
    damaged, changed = "the lineage in the JSON is damaged", "or was changed since it was written"
    for bad, said in (
        ({"extents": cut, "lineage": seal({**lineage, "dirty-bytes": 0})}, "other extents than its digest says"),
        ({"lineage": seal({**lineage, "digest": "00" * 32})}, "other extents than its digest says"),
        ({"lineage": seal({**lineage, "digest": "0"})}, damaged),
        ({"lineage": seal({**lineage, "granularity": True})}, damaged),
        ({"lineage": seal({**lineage, "stale": 0})}, damaged),
        ({"lineage": []}, damaged),
        ({"lineage": lineage}, damaged),
        ({"lineage": seal({**lineage, "granularity": 1000})}, "is not a power of two"),
        ({"lineage": seal({**lineage, "image-id": "00" * 32})}, "is not the image the bitmaps were exported from"),
        ({"lineage": seal({**lineage, "virtual-size": 1 << 62})}, "that of the exported bitmaps has"),
        ({"lineage": {**sealed, "name": "c"}}, changed),
        ({"lineage": {**sealed, "stale": True}}, changed),
        ({"lineage": {**sealed, "recording": not lineage["recording"]}}, changed),
        ({"lineage": {**sealed, "mtime-ns": 1}}, changed),
        ({"lineage": {**sealed, "image-id": "00" * 32}}, changed),
        ({"lineage": {**sealed, "new": 1}}, changed),
        ({"linage": sealed}, damaged),
    ):
        file.write_text(json.dumps({**shown, **bad}))
        refused = run("import", image, file, "--format", "json", "--replace", "--as", "x")
        assert (refused.status != 0, said in refused.err) == (True, True), refused.err


def seal(lineage: dict[str, object]) -> dict[str, object]:
    """By hand, from docs/export-format.md."""
    text = json.dumps(lineage, sort_keys=True, separators=(",", ":"))
    return {**lineage, "lineage-digest": hashlib.sha256(b"qcow2bm lineage 1" + text.encode()).hexdigest()}


def test_no_flipped_bit_of_a_json_export_lets_anything_else_in(image: Path, file: Path, run) -> None:
    """Whatever is said outside of the lineage is not believed; and it is no list of another program either."""
    assert run("export", image, "a", file, "--format", "json").status == 0
    data = file.read_bytes()

    def read(data: bytes, name: str | None) -> tuple[object, ...]:
        with input_of(data) as source:
            held = read_extent_file(source, Form.JSON, opened.qcow2, name=name, granularity=None)
            (one,) = held.bitmaps
            return held.lineage, one.name, one.granularity, one.recording, one.stale, one.dirty_bytes, one.digest

    with qcow2bm.open(image) as opened:
        whole = read(data, None)
        for at, bit in itertools.product(range(len(data)), range(8)):
            bad = bytearray(data)
            bad[at] ^= 1 << bit
            for name in (None, "x"):
                try:
                    found = read(bytes(bad), name)
                except (BitmapError, ExportFileError, UsageError):
                    continue
                assert found == whole, (at, bit, bad[max(0, at - 20) : at + 5])


def test_which_rows_of_a_map_count_must_be_said(image: Path, file: Path, run) -> None:
    """Zeroes that were written over data: a backup that leaves them out brings back what was there before."""
    row = '{"start": %d, "length": 1048576, "depth": 0, "present": true, "zero": %s, "data": %s}'
    file.write_text(f"[{row % (0, 'false', 'true')},{row % (1 << 20, 'true', 'false')}]")
    words = ["import", image, file, "--format", "json", "--force-lineage", "-g", "1M"]
    refused = run(*words, "--as", "x")
    assert (refused.status, "row 2 is allocated in the image itself and is no data" in refused.err) == (64, True)
    assert "--where allocated" in refused.err
    assert "--where data" in refused.err
    for where, wanted in (("allocated", [(0, 2)]), ("data", [(0, 1)])):
        assert run(*words, "--as", where, "--where", where).status == 0
        assert bits_of(image, where) == wanted
    for command, expected in (("set", "--where allocated"), ("unset", "says what there is, and not what is clean")):
        refused = run(command, image, "a", "--from-extents", file)
        assert (refused.status, expected in refused.err) == (64, True)
        assert run(command, image, "a", "--from-extents", file, "--where", "data").status == 0
    assert run("import", image, file, "--where", "data").status == 64
    file.unlink()
    run("export", image, "a", file, "--format", "json")
    refused = run("import", image, file, "--format", "json", "--replace", "--where", "all")
    assert (refused.status, "--where is about lists that other programs made" in refused.err) == (64, True)


def test_a_data_file_has_no_time_stamp_that_tells(tmp_path: Path, file: Path, run) -> None:
    """A guest rewrites its clusters there, and the image file stays as it is."""
    image = create(tmp_path, "4M", f"data_file={tmp_path / 'data'}", "data_file_raw=on", "preallocation=metadata")
    assert run("add", image, "a", "--disabled").status == 0
    assert run("export", image, file).status == 0
    qemu_io(image, "write -P 7 1M 64k")
    assert json.loads(run("import", "--list", image, file, "--output", "json").out)["standing"] == "same-mapping"
    refused = run("import", image, file, "--untouched", "--replace")
    assert (refused.status, "has no time stamp that would tell" in refused.err) == (1, True)
    taken = run("import", image, file, "--replace")
    assert (taken.status, "rewritten clusters in place" in taken.err) == (0, True)


def test_bare_bits_must_be_as_many_as_the_disk_takes(image: Path, file: Path, run) -> None:
    words = ["--format", "raw", "--as", "x", "--force-lineage"]
    for length in (0, 7, 9, 1 << 20):
        file.write_bytes(bytes(length))
        refused = run("import", image, file, *words, "-g", "64k")
        assert (refused.status, "take 8" in refused.err) == (1, True)
    file.write_bytes(b"\x81" + bytes(7))
    assert run("import", image, file, *words).status == 64
    assert run("import", image, file, *words, "-g", "1000").status == 64
    assert run("import", image, file, *words, "-g", "64k").status == 0
    assert bits_of(image, "x") == [(0, 1), (7, 8)]
    file.write_bytes(b"\x10")
    refused = run("import", image, file, "--format", "raw", "--as", "y", "--force-lineage", "-g", "1M")
    assert (refused.status, "bits set past the end of the disk" in refused.err) == (1, True)


def test_bare_bits_of_what_is_all_dirty_or_all_clean(tmp_path: Path, file: Path, run) -> None:
    image = varied(tmp_path)
    run("add", image, "full", "-g", "512", "--all-dirty")
    for name, wanted in (
        ("full", b"\xff" * (1 << 18) + b"\x07"),
        ("ones", b"\xff" * 128 + b"\x01"),
        ("nothing", bytes(2049)),
    ):
        assert run("export", image, name, file, "--format", "raw").status == 0
        assert file.read_bytes() == wanted
        file.unlink()
    (tmp_path / "large").mkdir()
    large = create(tmp_path / "large", "8T")
    refused = run("import", large, image, "--format", "raw", "--as", "x", "-g", "512", "--force-lineage")
    assert (refused.status, "choose a larger one with -g" in refused.err) == (64, True)


def test_bare_bits_that_change_while_they_are_read(tmp_path: Path, file: Path, run) -> None:
    image = varied(tmp_path)
    run("export", image, "all kinds", file, "--format", "raw")
    good = file.read_bytes()
    for bad in (good[:-1], b"\1" + good[1:]):
        file.write_bytes(good)
        with (
            qcow2bm.open(image) as opened,
            read_extent_file(Input.open(file), Form.RAW, opened.qcow2, name="x", granularity=512) as held,
        ):
            assert held.bitmaps[0].read_bits().count() > 0
            file.write_bytes(bad)
            with pytest.raises(ExportFileError, match="has changed since it was read"):
                held.bitmaps[0].read_bits().count()


# ---- the API ----


def test_the_public_functions(image: Path, file: Path) -> None:
    with qcow2bm.open(image) as opened, file.open("wb") as stream:
        qcow2bm.export_bitmaps(opened, ["a", "b"], stream)
    with qcow2bm.open(image, writable=True) as opened, qcow2bm.read_export(file) as held, opened.edit() as edit:
        edit.remove("a")
        edit.copy(held.find("a").source, "copied")
        edit.merge("c", [bitmap.source for bitmap in held.bitmaps])
        qcow2bm.import_bitmaps(edit, held, ["a"])
        with pytest.raises(BitmapExistsError):
            qcow2bm.import_bitmaps(edit, held)
        with pytest.raises(UsageError, match="another name goes with one bitmap, and these are 2"):
            qcow2bm.import_bitmaps(edit, held, name="x")
    with qcow2bm.open(image) as opened:
        assert opened.bitmaps.names == ["b", "c", "copied", "a"]


def test_an_export_of_another_image_is_refused_by_the_functions_too(image: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = three(tmp_path / "other")
    qemu_io(other, "write 0 64k")
    with qcow2bm.open(image) as opened, qcow2bm.read_export(io.BytesIO(exported(other))) as held:
        edit: Edit = opened.draft()
        policy = qcow2bm.ImportPolicy(replace=True)
        with pytest.raises(LineageError):
            qcow2bm.import_bitmaps(edit, held, policy=policy)
        policy = qcow2bm.ImportPolicy(replace=True, force_lineage=True)
        assert qcow2bm.import_bitmaps(edit, held, policy=policy) is None
