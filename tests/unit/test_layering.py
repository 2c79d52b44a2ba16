"""The rules that hold the house up, read from the imports of qcow2bm/ (see "Layers" in CONTRIBUTING.md).

Imports count wherever they stand: inside functions, under TYPE_CHECKING, or spelled `import_module("name")`. An arrow
that only a type checker follows is still an arrow in the reader's head.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "qcow2bm"

# Each floor stands on the ones before it. The package itself only hands out the public names of what lies below.
FLOORS = (
    {"errors", "version"},
    {"format"},
    {"image"},
    {"bitmap"},
    {"checks", "chain", "transaction"},
    {"repair", "resize"},
    {"backup", "checkpoint", "nbd", "fleet"},
    {"api", "report"},
    {PACKAGE},
    {"cli"},
    {"__main__"},
)
HEIGHT = {part: height for height, floor in enumerate(FLOORS) for part in floor}

SYSTEM_MODULES = {"os", "io", "pathlib", "mmap", "fcntl", "shutil", "socket", "subprocess", "tempfile"}
OPENERS = {
    *("open", "os.open", "io.open", "io.FileIO", "io.open_code", "codecs.open"),
    *("gzip.open", "bz2.open", "lzma.open", "pathlib.Path().open"),
}
PATH_METHODS = {"read_bytes", "read_text", "write_bytes", "write_text"}  # these open a file without saying so


@dataclass
class Module:
    """One module as the rules see it."""

    name: str
    imports: set[str] = field(default_factory=set)  # dotted, absolute; a module of ours or any other name
    opens: list[int] = field(default_factory=list)  # lines that open a file

    @property
    def part(self) -> str:
        """The folder or top-level module it belongs to, which is what stands on a floor."""
        return self.name.split(".")[1] if "." in self.name else self.name


# ---- reading the sources ----


def read_package(sources: Mapping[str, str]) -> dict[str, Module]:
    """Modules by name, from sources by path relative to the project root ("qcow2bm/cli/app.py")."""
    names = {module_name(path): path for path in sources}
    return {
        name: read_module(name, sources[path], set(names), is_package=path.endswith("__init__.py"))
        for name, path in names.items()
    }


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def read_module(name: str, source: str, ours: set[str], *, is_package: bool) -> Module:
    module = Module(name)
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    home = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            module.imports.update(alias.name for alias in node.names)
            aliases.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, home)
            for alias in node.names:
                target = f"{base}.{alias.name}"
                aliases[alias.asname or alias.name] = target
                # `from .format import header` names a module, `from .format.header import Header` a thing in one.
                module.imports.add(target if target in ours else base)
        elif isinstance(node, ast.Call) and dotted(node.func, {}).endswith(("import_module", "__import__")):
            module.imports.update(literal_target(node, home))
    module.opens = sorted(opening_lines(tree, aliases))
    return module


def absolute(node: ast.ImportFrom, home: str) -> str:
    if not node.level:
        return node.module or ""
    base = home.split(".")[: len(home.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def literal_target(call: ast.Call, home: str) -> Iterator[str]:
    match call.args:
        case [ast.Constant(value=str(name)), *_]:
            yield home + name if name.startswith(".") else name


def opening_lines(tree: ast.Module, aliases: Mapping[str, str]) -> Iterator[int]:
    """Calls that open a file. A module with an open() of its own (api.py) means that one by the bare name."""
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in own:
                continue
            case ast.Call(func=ast.Attribute(attr=method)) if method in PATH_METHODS:
                yield node.lineno
            case ast.Call(func=func) if dotted(func, aliases).removeprefix("builtins.") in OPENERS:
                yield node.lineno


def dotted(node: ast.expr, aliases: Mapping[str, str]) -> str:
    """`os.open` for whatever name os was imported under; a call inside is written as ()."""
    match node:
        case ast.Name(id=name):
            return aliases.get(name, name)
        case ast.Attribute(value=value, attr=attr):
            return f"{dotted(value, aliases)}.{attr}"
        case ast.Call(func=func):
            return f"{dotted(func, aliases)}()"
    return "?"


# ---- the rules: each yields what breaks it ----


def arrows(modules: Mapping[str, Module]) -> Iterator[tuple[Module, Module]]:
    """Imports from one module of ours to another."""
    for module in modules.values():
        for target in sorted(module.imports):
            if target in modules and target != module.name:
                yield module, modules[target]


def upward_arrows(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.part not in HEIGHT:
            yield f"{module.name} stands on no floor: add {module.part!r} to FLOORS"
    for module, target in arrows(modules):
        if HEIGHT.get(target.part, 0) > HEIGHT.get(module.part, len(FLOORS)):
            yield f"{module.name} imports {target.name}, which stands above it"


def missing_modules(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for target in sorted(module.imports):
            if target.split(".")[0] == PACKAGE and target not in modules:
                yield f"{module.name} imports {target}, which does not exist"


def circles(modules: Mapping[str, Module]) -> Iterator[str]:
    """Between modules, and between folders: two folders of one floor must not lean on each other."""
    by_module: dict[str, set[str]] = {}
    by_part: dict[str, set[str]] = {}
    for module, target in arrows(modules):
        by_module.setdefault(module.name, set()).add(target.name)
        if module.part != target.part:
            by_part.setdefault(module.part, set()).add(target.part)
    for graph in (by_module, by_part):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            yield "circle: " + " <- ".join(error.args[1])


def misplaced_imports(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        outside = {name.split(".")[0] for name in module.imports}
        if module.part != "cli":
            yield from (f"{module.name} imports {name}: only cli/ may" for name in sorted(outside & {"typer", "click"}))
        if module.part not in {"cli", "report"} and "rich" in outside:
            yield f"{module.name} imports rich: only cli/ and report/ may"
        if module.part == "format":
            yield from (
                f"{module.name} imports {name}: format/ has no I/O" for name in sorted(outside & SYSTEM_MODULES)
            )
            if "numpy" in outside and module.name != f"{PACKAGE}.format.vectors":
                yield f"{module.name} imports numpy: in format/ only vectors.py may"


def opened_files(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.part != "image":
            yield from (f"{module.name}:{line} opens a file: only image/ may" for line in module.opens)


def passes_importing_passes(modules: Mapping[str, Module]) -> Iterator[str]:
    folder = f"{PACKAGE}.checks.passes."
    for module, target in arrows(modules):
        if module.name.startswith(folder) and target.name.startswith(folder):
            yield f"{module.name} imports {target.name}: check passes know nothing of each other"


RULES = (
    upward_arrows,
    missing_modules,
    circles,
    misplaced_imports,
    opened_files,
    passes_importing_passes,
)


def broken_rules(sources: Mapping[str, str]) -> list[str]:
    modules = read_package(sources)
    return [line for rule in RULES for line in rule(modules)]


# ---- the house as it stands ----


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule) -> None:
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    assert sources, "no sources found: the rule would pass unseen"
    assert list(rule(read_package(sources))) == []


# ---- the rules themselves, on small houses ----

SOUND = {
    "qcow2bm/__init__.py": "from .version import __version__\ndef __getattr__(name):\n    from . import api",
    "qcow2bm/__main__.py": "from qcow2bm.cli.app import app",
    "qcow2bm/version.py": "__version__ = '1'",
    "qcow2bm/errors.py": "class Error(Exception): ...",
    "qcow2bm/format/__init__.py": "from .header import Header",
    "qcow2bm/format/header.py": "import construct\nfrom ..errors import Error\nfrom . import geometry",
    "qcow2bm/format/geometry.py": "",
    "qcow2bm/format/vectors.py": "import numpy as np",
    "qcow2bm/image/file.py": "import os\nfd = os.open('x', os.O_RDONLY)\nopen('y')",
    "qcow2bm/bitmap/store.py": "from ..version import __version__\nfrom qcow2bm.image import file",
    "qcow2bm/checks/passes/refcounts.py": "from ..model import Finding",
    "qcow2bm/checks/model.py": "",
    "qcow2bm/api.py": "def open(name): ...\ndef check(name):\n    with open(name): ...",
    "qcow2bm/cli/app.py": "import typer, rich.table\nfrom qcow2bm import api, errors\napi.open('x')",
}


def test_a_sound_house_breaks_no_rule() -> None:
    assert broken_rules(SOUND) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("qcow2bm/image/file.py", "from qcow2bm.bitmap import store", "image.file imports qcow2bm.bitmap.store, which"),
        ("qcow2bm/image/file.py", "def f():\n    from ..bitmap import store", "imports qcow2bm.bitmap.store, which"),
        ("qcow2bm/image/file.py", "if TYPE_CHECKING:\n    import qcow2bm.bitmap.store", "which stands above it"),
        ("qcow2bm/image/file.py", "importlib.import_module('qcow2bm.bitmap.store')", "which stands above it"),
        ("qcow2bm/bitmap/store.py", "from qcow2bm import open", "bitmap.store imports qcow2bm, which stands above it"),
        ("qcow2bm/api.py", "from .cli.app import app", "api imports qcow2bm.cli.app, which stands above it"),
        ("qcow2bm/cli/app.py", "from .. import __main__", "imports qcow2bm.__main__, which stands above it"),
        ("qcow2bm/helpers.py", "", "stands on no floor: add 'helpers'"),
        ("qcow2bm/api.py", "from qcow2bm.bitmap.stores import Store", "qcow2bm.bitmap.stores, which does not exist"),
        ("qcow2bm/format/geometry.py", "from .header import Header", "circle: "),
        ("qcow2bm/api.py", "import typer", "only cli/ may"),
        ("qcow2bm/api.py", "def f():\n    from rich.table import Table", "only cli/ and report/ may"),
        ("qcow2bm/format/geometry.py", "from io import BytesIO", "format/ has no I/O"),
        ("qcow2bm/format/geometry.py", "def f():\n    import numpy", "only vectors.py may"),
        ("qcow2bm/bitmap/store.py", "open('x')", "bitmap.store:1 opens a file"),
        ("qcow2bm/bitmap/store.py", "from os import open as raw\nraw('x', 0)", "bitmap.store:2 opens a file"),
        ("qcow2bm/bitmap/store.py", "import os as _os\n_os.open('x', 0)", "bitmap.store:2 opens a file"),
        ("qcow2bm/bitmap/store.py", "import builtins\nbuiltins.open('x')", "bitmap.store:2 opens a file"),
        ("qcow2bm/bitmap/store.py", "from pathlib import Path\nPath('x').open()", "bitmap.store:2 opens a file"),
        ("qcow2bm/bitmap/store.py", "path.read_bytes()", "bitmap.store:1 opens a file"),
        ("qcow2bm/checks/passes/mapping.py", "from . import refcounts", "know nothing of each other"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named(path: str, source: str, complaint: str) -> None:
    broken = broken_rules({**SOUND, path: source})
    assert any(complaint in line for line in broken), broken


def test_two_folders_of_one_floor_must_not_lean_on_each_other() -> None:
    house = {
        **SOUND,
        "qcow2bm/chain/prove.py": "from qcow2bm.checks import model",
        "qcow2bm/chain/walk.py": "",
        "qcow2bm/checks/evidence.py": "from qcow2bm.chain import walk",
    }
    assert any(line.startswith("circle: ") for line in broken_rules(house))
