"""Fuzzing that is guided by coverage: `python -m tests.fuzz.guided --seconds 600`. Needs the extra `fuzz`.

The first byte of an input says who reads it: an image (header, check, bitmaps, repair) or a file beside one. What is
changed keeps its structure: mostly a whole number becomes another, seldom in the magic, and files with checksums get
them right again. An input that ends in anything but a result or an error of ours is kept and ends the run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import random
import struct
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is missing: pip install -e '.[fuzz]'")

with atheris.instrument_imports(include=["qcow2bm"]):
    from qcow2bm import api, read_export
    from qcow2bm.bitmap.extents import Where, parse_extents
    from qcow2bm.bitmap.store import State
    from qcow2bm.checks import runner
    from qcow2bm.checks.model import RepairClass
    from qcow2bm.cli.saved_plan import load_plan
    from qcow2bm.errors import Qcow2bmError
    from qcow2bm.image.undo_reader import UndoReader
    from qcow2bm.repair.model import RepairPolicy
    from qcow2bm.repair.session import repairing

from tests.fuzz.images import hostile
from tests.fuzz.running import Material
from tests.fuzz.side import blindly, export_file, json_text, undo_file
from tests.support.images import all_fixtures

_LONGEST = 1 << 19
_IMAGES, _FILES = 400, 40
"""Seeds: hostile images that are made as the runner makes them, and files beside images, sound ones and damaged."""

_place = Path(tempfile.mkdtemp(prefix="guided-")) / "image.qcow2"


# ---- who reads it ----


def image(data: bytes) -> None:
    """Everything that looks at an image in one process."""
    _place.write_bytes(data)
    runner.check(_place, owners=True)
    with api.open(_place) as opened:
        _ = [list(bitmap.extents()) for bitmap in opened.bitmaps if bitmap.state is State.READY]
        opened.usage()
        opened.snapshots()


def repair(data: bytes) -> None:
    """What a repair would do, with everything allowed."""
    _place.write_bytes(data)
    with repairing(_place, RepairPolicy(allow=RepairClass.GUESS), writable=False):
        pass


def undo(data: bytes) -> None:
    """An undo file, all of it."""
    _place.write_bytes(data)
    with UndoReader(_place) as reader:
        _ = reader.records, reader.data_file, reader.bytes_replaced
        reader.kept()


def export(data: bytes) -> None:
    """An export file, with every bit."""
    with read_export(io.BytesIO(data)) as held:
        for bitmap in held.bitmaps:
            list(bitmap.read_bits().runs())


def extents(data: bytes) -> None:
    """A list of extents."""
    for _ in parse_extents(data.decode("utf-8", "surrogateescape"), where=Where.ALL, size=4 << 20):
        pass


def plan(data: bytes) -> None:
    """A saved plan of a repair."""
    _place.write_bytes(data)
    load_plan(_place, keeps_undo=True)


READERS = (image, repair, undo, export, extents, plan)
_KNOWING = {undo: undo_file, export: export_file, extents: json_text, plan: json_text}


def one_input(data: bytes) -> None:
    """Run one input; whatever is raised here is a finding."""
    if data:
        with contextlib.suppress(Qcow2bmError):
            READERS[data[0] % len(READERS)](data[1:])


# ---- new inputs ----


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """An input that differs a little, and mostly in numbers."""
    chance = random.Random(seed)
    if len(data) < 2 or chance.random() < 0.05:
        return bytes(atheris.Mutate(data, most))
    reader, body = READERS[data[0] % len(READERS)], data[1:]
    knowing = _KNOWING.get(reader)
    if knowing is not None and chance.random() < 0.5:
        try:
            return (data[:1] + knowing(body, chance))[:most]
        except (AssertionError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError, struct.error):
            pass  # no longer whole enough for those who know it
    if knowing is None:
        return data[:1] + _number(body, chance)[:most]
    return (data[:1] + blindly(body, chance))[:most]


def _number(body: bytes, chance: random.Random) -> bytes:
    """An image with a number changed, where something is; the magic and the version are mostly left."""
    found = bytearray(body)
    words = [at for at in range(0, len(found) - 7, 8) if any(found[at : at + 8])]
    at = chance.choice([chance.randrange(8, 112), *chance.sample(words, min(8, len(words)))]) & ~7
    at = at + 8 if at == 0 and chance.random() < 0.9 else at
    length = chance.choice((1, 2, 4, 8, 8, 8))
    old = int.from_bytes(found[at : at + length], "big")
    other = int.from_bytes(found[chance.choice(words or [0]) :][:8], "big")
    flipped, some = old ^ 1 << chance.randrange(8 * length), chance.getrandbits(8 * length)
    new = chance.choice(
        (0, 1, old + 1, old - 1, flipped, other, len(found), 1 << 63 | other, (1 << 8 * length) - 1, some)
    )
    found[at : at + length] = (new & (1 << 8 * length) - 1).to_bytes(length, "big")
    return bytes(found)


def seeds(corpus: Path) -> None:
    """Inputs to begin with: the fixtures, hostile images, and files beside images."""
    with tempfile.TemporaryDirectory() as folder:
        material = Material.make(Path(folder))
        bodies = [(reader, hostile(material.generator, number)) for number in range(_IMAGES) for reader in (0, 1)]
        for number, fixture in enumerate(all_fixtures()):
            bodies += [(reader, fixture.unpack(Path(folder, str(number))).read_bytes()) for reader in (0, 1)]
        kinds = {"undo": 2, "exported": 3, "extents": 4, "plan": 5}
        bodies += [(kinds[side.name], side.data) for side in material.sides if side.name in kinds]
    for number, (reader, body) in enumerate(bodies):
        if len(body) < _LONGEST:
            (corpus / f"{number:05}").write_bytes(bytes([reader]) + body)


def main() -> None:
    """Fuzz for a while; an input that was found is written into the folder and named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, help="Keep inputs here, and begin with those that are there.")
    parser.add_argument("--repeat", type=Path, help="Run this one input, as a finding was kept.")
    wanted = parser.parse_args()
    if wanted.repeat is not None:
        one_input(wanted.repeat.read_bytes())
        return
    corpus = wanted.corpus or Path(tempfile.mkdtemp(prefix="corpus-"))
    corpus.mkdir(exist_ok=True)
    if not any(corpus.iterdir()):
        # In a process of its own: what the seeds are made from takes more memory than all the fuzzing.
        maker = multiprocessing.Process(target=seeds, args=(corpus,))
        maker.start()
        maker.join()
    # What is traced runs at less than a quarter of its speed, so that 60 s are the promise's 10 with room to spare.
    options = [f"-max_total_time={wanted.seconds}", f"-max_len={_LONGEST}", "-timeout=60", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
