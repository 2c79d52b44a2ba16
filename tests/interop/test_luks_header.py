"""The LUKS header of an encrypted image: what QEMU refuses is found, in its words, and nothing else is."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import qcow2bm
from fixtures.corrupt_recipes import CRYPTO_HEADER, SECRET, luks
from qcow2bm.__main__ import main
from qcow2bm.cli.qemu_check import run as drop_in_check
from qcow2bm.errors import CorruptImageError
from tests.support.qemu import qemu_io
from tests.support.raw import Raw

ACTIVE, INACTIVE = 0x00AC71F3, 0x0000DEAD
# Offsets in the LUKS header, and in a key slot.
VERSION, CIPHER, MODE, HASH, PAYLOAD, KEY_BYTES, MASTER_ITERATIONS, SLOTS = 6, 8, 40, 72, 104, 108, 164, 208
STATE, ITERATIONS, MATERIAL, STRIPES, SLOT_LENGTH = 0, 4, 40, 44, 48

Damage = Callable[[Raw], None]


def extension(raw: Raw) -> int:
    return raw.extensions()[CRYPTO_HEADER][0]


def length(number: int) -> Damage:
    """Of header and key material, as the header extension has it."""
    return lambda raw: raw.put(extension(raw) + 8, number)


def offset(clusters: int) -> Damage:
    return lambda raw: raw.put(extension(raw), raw.number(extension(raw)) + clusters * raw.cluster_size)


def field(place: int, value: int, width: int = 4) -> Damage:
    return lambda raw: raw.put(raw.number(extension(raw)) + place, value, width)


def slot(index: int, place: int, value: int) -> Damage:
    return field(SLOTS + SLOT_LENGTH * index + place, value)


def text(place: int, value: bytes) -> Damage:
    def damage(raw: Raw) -> None:
        start = raw.number(extension(raw)) + place
        raw.data[start : start + 32] = value.ljust(32, b"\0")

    return damage


DAMAGE: dict[str, Damage] = {
    "nothing": lambda _: None,
    "half as long": length(0x40800),
    "a cluster shorter": length(0x80000),
    "an eighth as long": length(0x10200),
    "key material and a byte less": length(0x1000 + 64000 - 1),
    "just key material": length(0x1000 + 64000),
    "one cluster": length(0x1000),
    "592 bytes": length(592),
    "512 bytes": length(512),
    "0 bytes": length(0),
    "a cluster on": offset(1),
    "on the L1 table": offset(-1),
    "version 2": field(VERSION, 2, 2),
    "payload in the header": field(PAYLOAD, 7),
    "payload after the header": field(PAYLOAD, 8),
    "no key bytes": field(KEY_BYTES, 0),
    "17 key bytes": field(KEY_BYTES, 17),
    "8 key bytes": field(KEY_BYTES, 8),
    "very many key bytes": field(KEY_BYTES, 0xFFFFFFFF),
    "key bytes that wrap": field(KEY_BYTES, 1 << 27),
    "no iterations": field(MASTER_ITERATIONS, 0),
    "no state": slot(0, STATE, 1),
    "no active slot": slot(0, STATE, INACTIVE),
    "no iterations of a slot": slot(0, ITERATIONS, 0),
    "no iterations of an inactive slot": slot(1, ITERATIONS, 0),
    "an active slot without iterations": slot(1, STATE, ACTIVE),
    "material in the header": slot(0, MATERIAL, 7),
    "material after the header": slot(0, MATERIAL, 8),
    "material behind all": slot(0, MATERIAL, 0xFFFFFFFF),
    "material that wraps": slot(0, MATERIAL, 0xFFFFFFF8),
    "material in the payload": slot(7, MATERIAL, 4000),
    "material of two slots": slot(3, MATERIAL, 8),
    "material of two slots, in part": slot(1, MATERIAL, 16),
    "3999 stripes": slot(0, STRIPES, 3999),
    "no stripes of an inactive slot": slot(5, STRIPES, 0),
    "very many stripes": slot(0, STRIPES, 0xFFFFFFFF),
    **{f"cipher {name!r}": text(CIPHER, name) for name in (b"", b"aes", b"foo", b"sm4", b"a" * 32, b"\xff\xfe")},
    **{
        f"mode {name!r}": text(MODE, name)
        for name in (
            b"xts-plain64", b"cbc-plain", b"cbc-essiv", b"cbc-essiv:sha1", b"cbc-essiv:sha512", b"cbc-essiv:foo",
            b"cbc", b"foo-plain64", b"cbc-foo", b"cbc-plain64:foo", b"cbc-plain64:sha1", b"cbc-null", b"c" * 32,
            b"cbc-plain64:",
        )
    },
    **{f"hash {name!r}": text(HASH, name) for name in (b"", b"foo", b"sm3", b"h" * 32)},
}  # fmt: skip


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("luks")
    luks(folder)
    return (folder / "image.qcow2").read_bytes()


@pytest.fixture(params=DAMAGE)
def image(request: pytest.FixtureRequest, encrypted: bytes, tmp_path: Path) -> Path:
    raw = Raw(encrypted)
    DAMAGE[request.param](raw)
    raw.save(tmp_path / "image.qcow2")
    return tmp_path / "image.qcow2"


def test_what_qemu_refuses_with_the_right_key_is_found_in_its_words(image: Path) -> None:
    done = qemu_io(image, "length", secret=SECRET, check=False)
    report = qcow2bm.check(image)
    codes = {finding.code for finding in report.findings if finding.code.startswith("encryption-")}
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        status = drop_in_check([str(image)])
    if done.returncode == 0:
        assert not codes
        assert status in (0, 3)
        return
    reason = done.stderr.strip().partition("}}: ")[2]
    assert reason
    assert report.exit_status == 2
    assert codes
    assert status == 1
    assert errors.getvalue().strip().endswith(f": {reason}")


def test_no_edit_touches_an_image_whose_encryption_header_is_damaged(
    encrypted: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, image = Raw(encrypted), tmp_path / "image.qcow2"
    length(0x1000)(raw)
    raw.save(image)
    with pytest.raises(CorruptImageError), qcow2bm.open(image, writable=True):
        pass
    assert main(["resize", str(image), "+64k"]) == 2
    assert "key material of slot 0" in capsys.readouterr().err
    assert image.read_bytes() == bytes(raw.data)


def test_no_lossless_repair_frees_key_material_that_a_wrong_length_has_cut_off(
    encrypted: bytes, tmp_path: Path
) -> None:
    """QEMU would: to it they are leaked clusters, and the only copy of the key."""
    raw, image = Raw(encrypted), tmp_path / "image.qcow2"
    length(0x1000)(raw)
    raw.save(image)
    assert main(["repair", "-y", str(image)]) == 2
    mended = Raw.load(image)
    mended.put(extension(mended) + 8, Raw(encrypted).number(extension(mended) + 8))
    mended.save(image)
    assert "encrypt" not in qemu_io(image, "read -P 0 0 64k", secret=SECRET).stderr
    assert qcow2bm.check(image).exit_status == 0
