"""Whatever in a chain is encrypted: the way out that is printed is run word for word, and gives the right disk."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import __main__
from qcow2bm.errors import Qcow2bmError, UnsupportedImageError, UsageError
from tests.support.disks import KIB, MIB
from tests.support.qemu import create_luks, qemu_img, run

FIRST, SECOND = "first passphrase", "second passphrase"
KEYS = (
    "--object", f"secret,id=one,data={FIRST}",
    "--object", f"secret,id=two,data={SECOND}",
)  # fmt: skip


def io(options: str, *commands: str) -> None:
    script = [word for command in commands for word in ("-c", command)]
    run("qemu-io", *KEYS, "--image-opts", options, *script)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what takes its time to make: two LUKS images and a raw LUKS disk, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    create_luks(folder / "first", "4M", FIRST)
    create_luks(folder / "second", "4M", SECOND)
    io(f"driver=qcow2,file.filename={folder / 'first'},encrypt.key-secret=one", "write -P 3 0 1M")
    content = folder / "content"
    content.write_bytes(b"\3" * MIB + bytes(3 * MIB))
    words = ("-f", "raw", "-O", "luks", "-o", "key-secret=one,iter-time=10", content, folder / "raw")
    for _ in range(50):  # see create_luks
        done = qemu_img("convert", *KEYS, *words, check=False)
        if done.returncode == 0:
            return folder
    raise AssertionError(done.stderr)


def luks_base(made: Path, folder: Path) -> Path:
    return Path(shutil.copy(made / "first", folder / "base.qcow2"))


def raw_luks(made: Path, folder: Path) -> Path:
    return Path(shutil.copy(made / "raw", folder / "base.luks"))


def luks_image(made: Path, folder: Path) -> Path:
    return Path(shutil.copy(made / "second", folder / "vm.qcow2"))


def over(folder: Path, base: Path, fmt: str = "qcow2") -> Path:
    image = folder / "vm.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", fmt, "-b", base.name, image, "4M")
    return image


def plain_over_luks(made: Path, folder: Path) -> tuple[Path, str]:
    image = over(folder, luks_base(made, folder))
    return image, f"driver=qcow2,file.filename={image},backing.encrypt.key-secret=one"


def luks_over_luks(made: Path, folder: Path) -> tuple[Path, str]:
    luks_base(made, folder)
    image = luks_image(made, folder)
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", "base.qcow2", "--object", f"secret,id=two,data={SECOND}",
             "--image-opts", f"driver=qcow2,file.filename={image},encrypt.key-secret=two")  # fmt: skip
    return image, f"driver=qcow2,file.filename={image},encrypt.key-secret=two,backing.encrypt.key-secret=one"


def luks_over_plain(made: Path, folder: Path) -> tuple[Path, str]:
    base = folder / "base.raw"
    base.write_bytes(b"\3" * MIB + bytes(3 * MIB))
    image = luks_image(made, folder)
    options = f"driver=qcow2,file.filename={image},encrypt.key-secret=two"
    qemu_img("rebase", "-u", "-F", "raw", "-b", "base.raw", "--object", f"secret,id=two,data={SECOND}",
             "--image-opts", options)  # fmt: skip
    return image, options


def plain_over_raw_luks(made: Path, folder: Path) -> tuple[Path, str]:
    image = over(folder, raw_luks(made, folder), "luks")
    return image, f"driver=qcow2,file.filename={image},backing.key-secret=one"


def odd_name(made: Path, folder: Path) -> tuple[Path, str]:
    image, options = plain_over_luks(made, folder)
    renamed = folder / "a:b, 'c'.qcow2"
    image.rename(renamed)
    return renamed, options.replace(str(image), str(renamed).replace(",", ",,"))


def way_out(image: Path, bitmap: str, older: Path) -> tuple[str, str]:
    """The whole error, and the command in it."""
    with pytest.raises(Qcow2bmError, match="encrypted") as caught:
        qcow2bm.prove(image, bitmap, older)
    assert isinstance(caught.value, UnsupportedImageError)
    assert caught.value.hint is not None
    return str(caught.value), caught.value.hint.split("`")[1]


@pytest.mark.parametrize(
    "shape",
    [plain_over_luks, luks_over_luks, luks_over_plain, plain_over_raw_luks, odd_name],
    ids=lambda shape: shape.__name__,
)
def test_the_command_that_is_printed_gives_the_disk_of_the_image(
    shape: Callable[[Path, Path], tuple[Path, str]], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the base would prove a bitmap that misses what was written to the overlay."""
    image, options = shape(made, tmp_path)
    older, keys = tmp_path / "older.raw", {"one": FIRST, "two": SECOND}
    qemu_img("convert", *KEYS, "--image-opts", options, "-O", "raw", older)
    assert older.read_bytes() == b"\3" * MIB + bytes(3 * MIB)
    assert __main__.main(["add", str(image), "daily"]) == 0
    io(options, "write -P 9 1M 1M")
    assert __main__.main(["clear", str(image), "daily"]) == 0

    monkeypatch.chdir(tmp_path)  # so that the command has the name as a user gives it
    text, command = way_out(Path(image.name), "daily", older)
    assert f"the disk of {image.name}" in text
    ids = [part.split("=")[-1] for part in options.split(",") if "key-secret" in part]
    for number, name in enumerate(ids, 1):
        (tmp_path / f"KEYFILE{number if number > 1 else ''}").write_text(keys[name], encoding="utf-8")
    words = shlex.split(command)
    assert words[-1] == "COPY"
    run(*words, cwd=tmp_path)
    truth = b"\3" * MIB + b"\x09" * MIB + bytes(2 * MIB)
    assert (tmp_path / "COPY").read_bytes() == truth
    found = qcow2bm.prove(image, "daily", older, disk=tmp_path / "COPY")
    assert list(found.missed_ranges()) == [(MIB, MIB)]
    assert qcow2bm.rebuild(image, "daily", older, disk=tmp_path / "COPY").dirty_granules == MIB // (64 * KIB)


def test_a_raw_disk_that_is_encrypted_as_a_whole_has_a_way_out_too(made: Path, tmp_path: Path) -> None:
    disk = raw_luks(made, tmp_path)
    with pytest.raises(UsageError, match="LUKS") as caught:
        qcow2bm.diff(disk, disk)
    assert caught.value.hint is not None
    assert "--format-a" in caught.value.hint
    (tmp_path / "KEYFILE").write_text(FIRST, encoding="utf-8")
    run(*shlex.split(caught.value.hint.split("`")[1]), cwd=tmp_path)
    assert (tmp_path / "COPY").read_bytes() == b"\3" * MIB + bytes(3 * MIB)
    assert qcow2bm.diff(disk, disk, old_format="raw", new_format="raw").differing_bytes == 0


def test_a_chain_that_cannot_be_followed_below_is_encrypted_all_the_same(made: Path, tmp_path: Path) -> None:
    image, _ = luks_over_luks(made, tmp_path)
    (tmp_path / "base.qcow2").unlink()
    assert __main__.main(["add", str(image), "daily"]) == 0
    older, copy = tmp_path / "older.raw", tmp_path / "copy.raw"
    older.write_bytes(bytes(4 * MIB))
    copy.write_bytes(bytes(4 * MIB))
    way_out(image, "daily", older)
    assert qcow2bm.prove(image, "daily", older, disk=copy).is_covered


def test_a_view_of_a_disk_that_can_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be older than the image, and the image tells the truth itself."""
    image, older = tmp_path / "vm.qcow2", tmp_path / "older.raw"
    qemu_img("create", "-q", "-f", "qcow2", image, "4M")
    assert __main__.main(["add", str(image), "daily"]) == 0
    older.write_bytes(bytes(4 * MIB))
    (tmp_path / "view").write_bytes(bytes(4 * MIB))
    named = [str(image), "daily", "--against", str(older), "--disk", str(tmp_path / "view")]
    for command in ("prove", "rebuild"):
        capsys.readouterr()
        assert __main__.main([command, *named]) == 64
        assert "leave --disk out" in capsys.readouterr().err


def test_a_copy_that_is_older_than_the_image_that_gets_the_result_is_warned_about(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, older, copy = luks_image(made, tmp_path), tmp_path / "older.raw", tmp_path / "copy.raw"
    older.write_bytes(bytes(4 * MIB))
    copy.write_bytes(bytes(4 * MIB))
    assert __main__.main(["diff", str(older), str(copy), "--into", f"{image}#one"]) == 0
    assert "older than" not in capsys.readouterr().err
    os.utime(copy, (0, 0))
    assert __main__.main(["diff", str(older), str(copy), "--into", f"{image}#two"]) == 0
    assert "older than the image" in capsys.readouterr().err
