"""The LUKS header of an encrypted image, and for what QEMU does not open one: nothing is decrypted here.

Source: LUKS On-Disk Format Specification 1.2.3; the rules are those of QEMU 7.2 (`qcrypto_block_luks_check_header`,
`qcrypto_block_luks_parse_header`), which looks at the header whatever the key, and at the key material of one slot
after the other until a key fits. Counts and sums are of 32 bits there, so they are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from construct import Array, Bytes, Int16ub, Int32ub, Struct

from .geometry import div_up, round_up

MAGIC = b"LUKS\xba\xbe"
ACTIVE, INACTIVE = 0x00AC71F3, 0x0000DEAD
STRIPES = 4000
SECTOR = 512
_VERSION = 1
_KEYS_FROM = 8
"""Sectors that the header takes, up to the first key material; also what the length of key material is rounded to."""
_WORD = (1 << 32) - 1

SLOT_STRUCT = Struct(
    "active" / Int32ub,
    "iterations" / Int32ub,
    "salt" / Bytes(32),
    "key_material_offset" / Int32ub,
    "stripes" / Int32ub,
)
LUKS_STRUCT = Struct(
    "magic" / Bytes(6),
    "version" / Int16ub,
    "cipher_name" / Bytes(32),
    "cipher_mode" / Bytes(32),
    "hash_spec" / Bytes(32),
    "payload_offset" / Int32ub,
    "key_bytes" / Int32ub,
    "mk_digest" / Bytes(20),
    "mk_digest_salt" / Bytes(32),
    "mk_digest_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "slots" / Array(8, SLOT_STRUCT),
)
LUKS_LENGTH = LUKS_STRUCT.sizeof()
"""Bytes of a LUKS header without its key material."""

_KEY_SIZES = {"aes": (16, 24, 32), "cast5": (16,), "serpent": (16, 24, 32), "twofish": (16, 24, 32)}
_MODES = ("ecb", "cbc", "xts", "ctr")
_DIGESTS = {"md5": 16, "sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64, "ripemd160": 20}
"""Hash algorithms with the bytes of what they make."""
_IV_GENERATORS = ("plain", "plain64", "essiv")
_ESSIV_NAMES = {"aes": "AES", "serpent": "Serpent", "twofish": "Twofish"}


class LuksFault(NamedTuple):
    """Why QEMU does not open an image for its LUKS header.

    Attributes:
        message: what is wrong.
        in_qemu: the same in QEMU's words.
    """

    message: str
    in_qemu: str


@dataclass(frozen=True, slots=True)
class KeySlot:
    """A key slot: where the key material of one passphrase lies. Offset in sectors of 512 bytes."""

    active: int
    iterations: int
    key_material_offset: int
    stripes: int


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A LUKS header as it is stored. `payload_offset` is in sectors of 512 bytes."""

    version: int
    cipher_name: bytes
    cipher_mode: bytes
    hash_spec: bytes
    payload_offset: int
    key_bytes: int
    mk_digest_iterations: int
    slots: tuple[KeySlot, ...]

    @classmethod
    def parse(cls, data: bytes) -> LuksHeader:
        """Take the fields out of the 592 bytes of a header, magic number included; nothing is judged."""
        fields = LUKS_STRUCT.parse(data)
        slots = tuple(
            KeySlot(slot.active, slot.iterations, slot.key_material_offset, slot.stripes) for slot in fields.slots
        )
        names = (name for name in cls.__slots__ if name != "slots")
        return cls(**{name: getattr(fields, name) for name in names}, slots=slots)

    def key_material(self, slot: KeySlot) -> int:
        """Bytes of key material of a slot."""
        return self.key_bytes * slot.stripes & _WORD

    def faults(self, length: int) -> Iterator[LuksFault]:
        """Why QEMU does not open the image: the first reason, and all of those that are about one key alone.

        Args:
            length: of header and key material together, in bytes, as the image's header extension has it.
        """
        slots = (fault for index, slot in enumerate(self.slots) for fault in self._slot_faults(index, slot))
        first = next(chain(self._field_faults(), slots, self._cipher_faults()), None)
        if first is not None:  # one wrong number would be many faults, which say the same
            yield first
            return
        yield from self._key_faults(length)

    def _field_faults(self) -> Iterator[LuksFault]:
        if self.version != _VERSION:
            text = f"the LUKS header has version {self.version}, not {_VERSION}"
            yield LuksFault(text, f"LUKS version {self.version} is not supported")
        fields = (("cipher name", self.cipher_name), ("cipher mode", self.cipher_mode), ("hash spec", self.hash_spec))
        for what, data in fields:
            if b"\0" not in data:
                text = f"the {what} of the LUKS header does not end"
                yield LuksFault(text, f"LUKS header {what} is not NUL terminated")
        if self.payload_offset < _KEYS_FROM:
            text = f"the payload offset of the LUKS header is {self.payload_offset}, within the header"
            yield LuksFault(text, "LUKS payload is overlapping with the header")
        if not self.mk_digest_iterations:
            yield LuksFault("the LUKS header's iteration count is 0", "LUKS key iteration count is zero")

    def _slot_faults(self, index: int, slot: KeySlot) -> Iterator[LuksFault]:
        """A slot alone, then beside those after it."""
        if slot.stripes != STRIPES:
            signed = slot.stripes - (1 << 32) if slot.stripes >> 31 else slot.stripes
            text = f"key slot {index} has {slot.stripes} stripes, not {STRIPES}"
            yield LuksFault(text, f"Keyslot {index} is corrupted (stripes {signed} != {STRIPES})")
        if slot.active not in (ACTIVE, INACTIVE):
            text = f"key slot {index} is neither active nor inactive: {slot.active:#x}"
            yield LuksFault(text, f"Keyslot {index} state (active/disable) is corrupted")
        if slot.active == ACTIVE and not slot.iterations:
            yield LuksFault(f"key slot {index} has an iteration count of 0", f"Keyslot {index} iteration count is zero")
        start, end = self._sectors(slot)
        if start < _KEYS_FROM:
            text = f"the key material of slot {index} is said to begin in sector {start}, within the LUKS header"
            yield LuksFault(text, f"Keyslot {index} is overlapping with the LUKS header")
        if end > self.payload_offset:
            text = f"the key material of slot {index} ends in sector {end}, after the payload begins"
            yield LuksFault(text, f"Keyslot {index} is overlapping with the encrypted payload")
        for other in range(index + 1, len(self.slots)):
            other_start, other_end = self._sectors(self.slots[other])
            if end > other_start and other_end > start:
                text = f"the key material of slots {index} and {other} overlaps"
                yield LuksFault(text, f"Keyslots {index} and {other} are overlapping in the header")

    def _sectors(self, slot: KeySlot) -> tuple[int, int]:
        """Where the room for a slot's key material begins and ends."""
        length = round_up(div_up(self.key_material(slot), SECTOR), _KEYS_FROM)
        return slot.key_material_offset, slot.key_material_offset + length & _WORD

    def _cipher_faults(self) -> Iterator[LuksFault]:
        """What cannot be decrypted, the first reason alone: the others would follow from it."""
        mode = _text(self.cipher_mode)
        cipher_mode, dash, rest = mode.partition("-")
        generator, colon, iv_hash = rest.partition(":")
        if not dash:
            yield _cipher_fault(f"Unexpected cipher mode string format '{mode}'")
        elif colon and iv_hash not in _DIGESTS:
            yield _cipher_fault(f"Hash algorithm '{iv_hash}' not supported")
        elif cipher_mode not in _MODES:
            yield _cipher_fault(f"Cipher mode '{cipher_mode}' not supported")
        else:
            yield from self._algorithm_faults(xts=cipher_mode == "xts", generator=generator, iv_hash=iv_hash)

    def _algorithm_faults(self, *, xts: bool, generator: str, iv_hash: str) -> Iterator[LuksFault]:
        cipher, hash_name = _text(self.cipher_name), _text(self.hash_spec)
        size = self.key_bytes // 2 if xts else self.key_bytes
        if size not in _KEY_SIZES.get(cipher, ()):
            signed = size - (1 << 32) if size >> 31 else size
            yield _cipher_fault(f"Algorithm '{cipher}' with key size {signed} bytes not supported")
        elif hash_name not in _DIGESTS:
            yield _cipher_fault(f"Hash algorithm '{hash_name}' not supported")
        elif generator not in _IV_GENERATORS:
            yield _cipher_fault(f"IV generator '{generator}' not supported")
        elif generator == "essiv" and not iv_hash:
            yield _cipher_fault("Missing IV generator hash specification")
        elif generator == "essiv" and _DIGESTS[iv_hash] != size:
            digest = _DIGESTS[iv_hash]
            if cipher not in _ESSIV_NAMES:
                yield _cipher_fault(f"Cipher {cipher}-{8 * size} not supported with essiv")
            elif digest not in _KEY_SIZES[cipher]:
                yield _cipher_fault(f"No {_ESSIV_NAMES[cipher]} cipher with key size {digest} available")

    def _key_faults(self, length: int) -> Iterator[LuksFault]:
        """Key material that QEMU would not find. Whose key is in an earlier slot may open the image all the same."""
        active = [(index, slot) for index, slot in enumerate(self.slots) if slot.active == ACTIVE]
        if not active:
            yield LuksFault(
                "no key slot of the LUKS header is active: no key opens the image",
                "Invalid password, cannot unlock any keyslot",
            )
        for index, slot in active:
            end = slot.key_material_offset * SECTOR + self.key_material(slot)
            if end > length:
                text = f"the key material of slot {index} ends at byte {end} of an encryption header of {length} bytes"
                yield LuksFault(text, "Request for data outside of extension header")


def _cipher_fault(in_qemu: str) -> LuksFault:
    return LuksFault(f"the LUKS header names what QEMU does not know ({in_qemu})", in_qemu)


def _text(data: bytes) -> str:
    """A C string."""
    return data.partition(b"\0")[0].decode(errors="surrogateescape")
