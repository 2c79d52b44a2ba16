"""Random edits on real images, against a model of names, flags and sets of bits; QEMU has the last word."""

from __future__ import annotations

import functools
import operator
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import qcow2bm
from qcow2bm import Edit
from qcow2bm.errors import BitmapError
from tests.support.qemu import check, qemu_img, qemu_io, read_bitmaps

SIZE = (5 << 20) + 3 * 512  # ends within a cluster and, at most granularities, within a bit
NAMES = ("a", "b", "a longer name that moves what follows")
GRANULARITIES = (512, 4096, 65536, 1 << 20)
CLUSTERS, REFCOUNTS = ("512", "4k", "64k"), (1, 16, 64)


@dataclass(frozen=True)
class Model:
    """A bitmap: `bits` are numbers of dirty bits."""

    granularity: int
    recording: bool
    bits: frozenset[int] = field(default_factory=frozenset)

    @property
    def length(self) -> int:
        return -(-SIZE // self.granularity)

    def at(self, granularity: int) -> frozenset[int]:
        """The bits at another granularity: every one that a dirty byte lies in."""
        found: set[int] = set()
        for bit in self.bits:
            end = min(SIZE, (bit + 1) * self.granularity)
            found.update(range(bit * self.granularity // granularity, -(-end // granularity)))
        return frozenset(found)

    def extents(self) -> list[tuple[int, int]]:
        runs: list[list[int]] = []
        for bit in sorted(self.bits):
            if runs and runs[-1][1] == bit:
                runs[-1][1] += 1
            else:
                runs.append([bit, bit + 1])
        return [(a * self.granularity, min(SIZE, b * self.granularity) - a * self.granularity) for a, b in runs]


Models = dict[str, Model]
EXACT: dict[str, Callable[[frozenset[int], frozenset[int]], frozenset[int]]] = {
    "or": operator.or_, "and": operator.and_, "xor": operator.xor, "subtract": operator.sub,
}  # fmt: skip
Operation = tuple[object, ...]

names = st.sampled_from(NAMES)
granularities = st.sampled_from(GRANULARITIES)
edges = st.integers(0, SIZE // 512 - 1).map(lambda sector: 512 * sector) | st.integers(0, SIZE - 1)
ranges = st.builds(
    lambda start, length: (start, min(length, SIZE - start)),
    edges,
    st.sampled_from([1, 512, 4096, 65536, 1 << 20, 3 << 20, SIZE]),
)
operations = st.one_of(
    st.tuples(st.just("add"), names, granularities, st.booleans(), st.booleans()),
    st.tuples(st.just("set"), names, ranges),
    st.tuples(st.just("unset"), names, ranges),
    st.tuples(st.just("unset"), st.just("a"), ranges),
    st.tuples(st.just("merge"), names, st.lists(names, min_size=1, max_size=3)),
    st.tuples(st.just("combine"), names, st.lists(names, min_size=1, max_size=3), st.sampled_from(list(EXACT))),
    st.tuples(st.just("invert"), names),
    st.tuples(st.just("resample"), names, granularities),
    st.tuples(st.just("set many"), names, st.lists(ranges, max_size=4)),
    st.tuples(st.just("unset many"), names, st.lists(ranges, max_size=4)),
    st.tuples(st.just("copy"), names, names, st.none() | granularities),
    st.tuples(st.just("rename"), names, names),
    st.tuples(st.just("remove"), names),
    st.tuples(st.just("clear"), names),
    st.tuples(st.just("record"), names, st.booleans()),
)
commits = st.lists(st.lists(operations, min_size=1, max_size=6), min_size=1, max_size=4)


# ---- what each operation means ----


def model_add(models: Models, name: str, granularity: int, recording: bool, dirty: bool) -> Models:
    new = Model(granularity, recording)
    return {**models, _new(models, name): replace(new, bits=frozenset(range(new.length))) if dirty else new}


def model_set(models: Models, name: str, where: tuple[int, int]) -> Models:
    old, (start, length) = models[name], where
    touched = range(start // old.granularity, -(-(start + length) // old.granularity))
    return {**models, name: replace(old, bits=old.bits | set(touched))}


def model_unset(models: Models, name: str, where: tuple[int, int]) -> Models:
    """Only bits that lie inside; the last bit of the disk is as long as the disk goes."""
    old, (start, length) = models[name], where
    inside = {
        bit
        for bit in old.bits
        if start <= bit * old.granularity and min(SIZE, (bit + 1) * old.granularity) <= start + length
    }
    return {**models, name: replace(old, bits=old.bits - inside)}


def model_merge(models: Models, name: str, sources: list[str]) -> Models:
    old = models[name]
    return {**models, name: replace(old, bits=old.bits.union(*(models[s].at(old.granularity) for s in sources)))}


def model_combine(models: Models, name: str, sources: list[str], op: str) -> Models:
    """In sectors, of which every granule has a whole number; then the granules that hold one."""
    exact = functools.reduce(EXACT[op], [models[one].at(512) for one in (name, *sources)])
    granularity = models[name].granularity
    return {
        **models,
        name: replace(models[name], bits=replace(models[name], granularity=512, bits=exact).at(granularity)),
    }


def model_invert(models: Models, name: str) -> Models:
    old = models[name]
    return {**models, name: replace(old, bits=frozenset(range(old.length)) - old.bits)}


def model_resample(models: Models, name: str, granularity: int) -> Models:
    return {**models, name: replace(models[name], granularity=granularity, bits=models[name].at(granularity))}


def model_set_many(models: Models, name: str, where: list[tuple[int, int]]) -> Models:
    models[name]
    return functools.reduce(lambda changed, one: model_set(changed, name, one), where, models)


def model_unset_many(models: Models, name: str, where: list[tuple[int, int]]) -> Models:
    """What the ranges cover together, so each of the stretches that they make up counts by itself."""
    models[name]
    together: list[tuple[int, int]] = []
    for start, length in sorted(where):
        if together and start <= sum(together[-1]):
            together[-1] = together[-1][0], max(sum(together[-1]), start + length) - together[-1][0]
        else:
            together.append((start, length))
    return functools.reduce(lambda changed, one: model_unset(changed, name, one), together, models)


def model_copy(models: Models, source: str, name: str, granularity: int | None) -> Models:
    old = models[source]
    wanted = granularity or old.granularity
    return {**models, _new(models, name): Model(wanted, old.recording, old.at(wanted))}


def model_rename(models: Models, old: str, new: str) -> Models:
    models[old]
    _new(models, new)
    return {new if name == old else name: model for name, model in models.items()}


def model_remove(models: Models, name: str) -> Models:
    models[name]
    return {other: model for other, model in models.items() if other != name}


def model_clear(models: Models, name: str) -> Models:
    return {**models, name: replace(models[name], bits=frozenset())}


def model_record(models: Models, name: str, recording: bool) -> Models:
    return {**models, name: replace(models[name], recording=recording)}


def _new(models: Models, name: str) -> str:
    if name in models:
        raise KeyError(name)
    return name


MEANING: dict[str, tuple[Callable[..., Models], Callable[..., object]]] = {
    "add": (model_add, lambda e, n, g, r, d: e.add(n, granularity=g, recording=r, all_dirty=d)),
    "set": (model_set, lambda e, n, where: e.set_range(n, *where)),
    "unset": (model_unset, lambda e, n, where: e.unset_range(n, *where)),
    "merge": (model_merge, lambda e, n, sources: e.merge(n, sources)),
    "combine": (model_combine, lambda e, n, sources, op: e.merge(n, sources, op=op)),
    "invert": (model_invert, lambda e, n: e.invert(n)),
    "resample": (model_resample, lambda e, n, g: e.resample(n, granularity=g)),
    "set many": (model_set_many, lambda e, n, where: e.set_ranges(n, where)),
    "unset many": (model_unset_many, lambda e, n, where: e.unset_ranges(n, where)),
    "copy": (model_copy, lambda e, s, n, g: e.copy(s, n, granularity=g)),
    "rename": (model_rename, lambda e, old, new: e.rename(old, new)),
    "remove": (model_remove, lambda e, n: e.remove(n)),
    "clear": (model_clear, lambda e, n: e.clear(n)),
    "record": (model_record, lambda e, n, on: e.enable(n) if on else e.disable(n)),
}


def carry_out(edit: Edit, models: Models, operation: Operation) -> Models:
    """Do it to both; what the model refuses the edit must refuse."""
    name, *arguments = operation
    meaning, action = MEANING[str(name)]
    try:
        changed = meaning(models, *arguments)
    except KeyError:
        with pytest.raises(BitmapError):
            action(edit, *arguments)
        return models
    action(edit, *arguments)
    return changed


# ---- images ----


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Models]]:
    """An image for each cluster size and refcount width, with guest data and one bitmap of QEMU's."""
    folder = tmp_path_factory.mktemp("templates")
    made = {}
    for cluster in CLUSTERS:
        for bits in REFCOUNTS:
            image = folder / f"{cluster}-{bits}.qcow2"
            options = f"cluster_size={cluster},refcount_bits={bits}"
            qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(SIZE))
            qemu_img("bitmap", "--add", "-g", "4096", image, "a")
            qemu_io(image, "write -P 1 512 512", "write -P 2 2M 8k", "discard 3M 1M")
            dirty = read_bitmaps(image)["a"]
            bits_set = frozenset(bit for at, n in dirty for bit in range(at // 4096, -(-(at + n) // 4096)))
            assert bits_set
            made[cluster, bits] = (image, {"a": Model(4096, recording=True, bits=bits_set)})
    return made


@contextmanager
def copy_of(image: Path) -> Iterator[Path]:
    copy = image.with_suffix(".copy")
    shutil.copyfile(image, copy)
    try:
        yield copy
    finally:
        copy.unlink()


def compare(image: Path, models: Models) -> None:
    with qcow2bm.open(image) as opened:
        assert opened.bitmaps.names == list(models)
        for bitmap in opened.bitmaps:
            model = models[bitmap.name]
            assert (bitmap.granularity, bitmap.recording, bitmap.state.value) == (
                model.granularity, model.recording, "ready",
            )  # fmt: skip
            assert [(extent.offset, extent.length) for extent in bitmap.extents()] == model.extents()
            assert bitmap.dirty_bytes == sum(length for _, length in model.extents())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(cluster=st.sampled_from(CLUSTERS), bits=st.sampled_from(REFCOUNTS), changes=commits)
@example(cluster="512", bits=1, changes=[[("add", "b", 512, True, True), ("unset", "b", (1 << 20, 2 << 20))]])
@example(cluster="512", bits=64, changes=[[("resample", "a", 512)], [("invert", "a")], [("resample", "a", 1 << 20)]])
@example(cluster="4k", bits=16, changes=[[("set", "a", (0, SIZE)), ("unset", "a", (1, 1 << 20))]])
@example(cluster="64k", bits=64, changes=[[("remove", "a")], [("add", "b", 512, True, False)], [("remove", "b")]])
def test_any_edits_in_any_commits_leave_what_the_model_says_and_qemu_finds_no_fault(
    templates: dict[tuple[str, int], tuple[Path, Models]], cluster: str, bits: int, changes: list[list[Operation]]
) -> None:
    template, models = templates[cluster, bits]
    with copy_of(template) as image:
        for change in changes:
            with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
                for operation in change:
                    models = carry_out(edit, models, operation)
            compare(image, models)
        said = check(image)
        assert said["returncode"] == 0, said


def test_qemu_reads_the_same_bits(templates: dict[tuple[str, int], tuple[Path, Models]]) -> None:
    """Once for every image: the property above trusts our own reader."""
    operations: list[Operation] = [
        ("add", "b", 512, False, True),
        ("unset", "b", (4096, 3 << 20)),
        ("copy", "b", "c", 1 << 20),
        ("merge", "a", ["b"]),
        ("copy", "a", "d", 65536),
        ("combine", "d", ["b", "a"], "xor"),
        ("resample", "a", 512),
        ("combine", "a", ["d"], "subtract"),
        ("set", "c", (SIZE - 1, 1)),
    ]
    for template, start in templates.values():
        models = start
        with copy_of(template) as image:
            with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
                for operation in operations:
                    models = carry_out(edit, models, operation)
            assert read_bitmaps(image) == {name: model.extents() for name, model in models.items()}
