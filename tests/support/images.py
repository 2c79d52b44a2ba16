"""The fixture images: finding them, reading their origin.toml, unpacking them into a test's own folder."""

import gzip
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[2] / "fixtures"

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Fixture:
    """One folder of fixtures/. `origin` is its origin.toml; fixtures/README.md says what is in it."""

    name: str
    path: Path
    origin: dict[str, Any]

    @property
    def secret(self) -> str | None:
        """The key of an encrypted image, or None."""
        secret: str | None = self.origin.get("secret")
        return secret

    @property
    def bitmaps(self) -> dict[str, dict[str, Any]]:
        """The expected bitmaps of image.qcow2 by name, in the order of the directory."""
        return {bitmap["name"]: bitmap for bitmap in self.origin.get("bitmaps", [])}

    def unpack(self, directory: Path) -> Path:
        """Unpack the image and its sidecar files (backing file, data file) into `directory`; the path of the image."""
        directory.mkdir(parents=True, exist_ok=True)
        for packed in sorted(self.path.glob("*.gz")):
            _gunzip(packed, directory / packed.stem)
        return directory / "image.qcow2"


@cache
def fixture(name: str) -> Fixture:
    """The fixture of that name."""
    path = FIXTURES / name
    return Fixture(name, path, tomllib.loads((path / "origin.toml").read_text(encoding="utf-8")))


def all_fixtures() -> list[Fixture]:
    """Every fixture but the damaged ones, by name."""
    return [fixture(origin.parent.name) for origin in sorted(FIXTURES.glob("*/origin.toml"))]


def corrupt_fixtures() -> list[Fixture]:
    """Every damaged fixture, by problem code; its name is `corrupt/CODE`."""
    return [fixture(f"corrupt/{origin.parent.name}") for origin in sorted(FIXTURES.glob("corrupt/*/origin.toml"))]


def unpack(name: str, directory: Path) -> Path:
    """Unpack the fixture of that name into `directory`; the path of its image.qcow2."""
    return fixture(name).unpack(directory)


def _gunzip(packed: Path, target: Path) -> None:
    """Unpack one file, leaving holes where it is zero: an image of mostly nothing should cost no disk either."""
    with gzip.open(packed) as source, target.open("wb") as out:
        while block := source.read(_BLOCK):
            if block.count(0) == len(block):
                out.seek(len(block), 1)
            else:
                out.write(block)
        out.truncate()
