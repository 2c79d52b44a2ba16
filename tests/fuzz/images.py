"""Hostile images by number: sound ones with damaged structures, with numbers overwritten at random, or cut."""

from __future__ import annotations

import random

from tests.support.damage import Generator

_STRUCTURES = 0.6
"""The share of images whose structures are damaged by those who know them; the rest is hit blindly."""
_HEAD = 0.6
"""The share of hits in the header and its extensions."""


def hostile(generator: Generator, number: int) -> bytes:
    """The image of a number; always the same."""
    chance = random.Random(f"hostile {number}")
    if chance.random() < _STRUCTURES:
        data = bytearray(generator.damaged(number).data)
    else:
        data = bytearray(generator.anatomies[number % len(generator.anatomies)].base.data)
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            _hit(data, chance)
    if chance.random() < 0.1:
        del data[chance.randrange(len(data) + 1) :]
    return bytes(data)


def struck(generator: Generator, number: int) -> bytes:
    """The same, overwritten where all hangs on it: in the header and its extensions, at the head of a structure."""
    chance = random.Random(f"struck {number}")
    anatomy = generator.anatomies[number % len(generator.anatomies)]
    data = bytearray(anatomy.base.data)
    head, *structures = anatomy.metadata
    for _ in range(chance.choice((1, 1, 1, 2))):
        where = head if chance.random() < _HEAD or not structures else chance.choice(structures)
        length = chance.choice((1, 2, 4, 4, 8, 8))
        _overwrite(data, chance, chance.choice(where[:1024:length]), length)
    return bytes(data)


def _hit(data: bytearray, chance: random.Random) -> None:
    """Overwrite a number somewhere, mostly where something is."""
    length = chance.choice((1, 2, 4, 8, 8, 8))
    if len(data) < 4096:
        return
    places = [chance.randrange(len(data) - length) for _ in range(20)]
    in_use = [place for place in places if any(data[place & ~7 : (place & ~7) + 8])]
    place = chance.choice([chance.randrange(0, 600), *(in_use or places)])
    if length == 8:
        place &= ~7
    _overwrite(data, chance, place, length)


def _overwrite(data: bytearray, chance: random.Random, place: int, length: int) -> None:
    """Another number: one from a border, or near the old one."""
    old = int.from_bytes(data[place : place + length], "big")
    most = (1 << 8 * length) - 1
    new = chance.choice(
        (0, 1, most, most >> 1, old ^ 1 << chance.randrange(8 * length), old + 1, old - 1, old << 9, old | 1 << 63,
         chance.getrandbits(8 * length), len(data), len(data) - 1, 1 << 62)
    )  # fmt: skip
    data[place : place + length] = (new & most).to_bytes(length, "big")
