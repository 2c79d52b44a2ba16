"""Bit patterns for big bitmaps, made piece by piece: a bitmap of 2^30 bits never exists as 2^30 bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PIECE_BITS = 1 << 24


class Pattern(Protocol):
    """Says which bits of a bitmap are set."""

    def piece(self, bits: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """The next so many bits."""


@dataclass(frozen=True)
class Zeros:
    """No bit."""

    def piece(self, bits: int, rng: np.random.Generator) -> NDArray[np.bool_]:  # noqa: ARG002 nothing to draw
        """The next so many bits."""
        return np.zeros(bits, bool)


@dataclass(frozen=True)
class Ones:
    """Every bit."""

    def piece(self, bits: int, rng: np.random.Generator) -> NDArray[np.bool_]:  # noqa: ARG002 nothing to draw
        """The next so many bits."""
        return np.ones(bits, bool)


@dataclass(frozen=True)
class Scattered:
    """Each bit by itself, with this probability: a database."""

    density: float

    def piece(self, bits: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """The next so many bits."""
        if self.density >= 0.01:
            return rng.random(bits, np.float32) < self.density
        out = np.zeros(bits, bool)
        out[rng.integers(0, bits, round(bits * self.density))] = True  # the few that fall together do not matter
        return out


@dataclass(frozen=True)
class Runs:
    """Runs of set bits with this mean length, covering this part of the disk: files written one after the other."""

    density: float
    mean_length: float

    def piece(self, bits: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """The next so many bits."""
        # Gaps and runs in turn until the piece is full; 20 % more of them than expected always reach its end.
        count = int(bits * self.density / self.mean_length * 1.2) + 16
        mean_gap = self.mean_length * (1 - self.density) / self.density
        gaps = rng.geometric(min(1.0, 1 / mean_gap), count)
        runs = rng.geometric(1 / self.mean_length, count)
        edges = np.cumsum(np.stack([gaps, runs], axis=1).ravel())
        edges = edges[: np.searchsorted(edges, bits)]
        flips = np.zeros(bits, np.uint8)
        flips[edges] = 1
        odd: NDArray[np.bool_] = np.bitwise_xor.accumulate(flips).view(bool)
        return odd


def chunks(pattern: Pattern, bits: int, chunk_bytes: int, rng: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """The bitmap data of one cluster after the other, least significant bit first; the last one may be shorter."""
    per_piece = max(PIECE_BITS // (chunk_bytes * 8), 1) * chunk_bytes * 8
    for start in range(0, bits, per_piece):
        packed = np.packbits(pattern.piece(min(per_piece, bits - start), rng), bitorder="little")
        for at in range(0, len(packed), chunk_bytes):
            yield packed[at : at + chunk_bytes]
