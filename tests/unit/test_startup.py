"""Start-up is part of the design: the everyday commands load nothing heavy."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OFFICE_WEEK = ROOT / "fixtures" / "office-week" / "image.qcow2.gz"

# Runs in a fresh interpreter and tells on its last line which modules the command left behind.
RUN_MAIN = """
import json, sys
import qcow2bm.__main__
status = None
try:
    status = qcow2bm.__main__.main(json.loads(sys.argv[1]))
except SystemExit as stop:
    status = stop.code
print()
print(json.dumps([status or 0, sorted(sys.modules)]))
"""
IMPORT_PACKAGE = """
import json, sys
import qcow2bm
print(json.dumps([0, sorted(sys.modules)]))
"""
HEAVY = {"numpy", "rich", "pydantic"}


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "vm.qcow2"
    path.write_bytes(gzip.decompress(OFFICE_WEEK.read_bytes()))
    return str(path)


def top_level_modules(program: str, *argv: str) -> set[str]:
    """The top-level names of all modules that a Python program of ours has loaded when it ends well."""
    command = [sys.executable, "-c", program, json.dumps(argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status, modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    return {name.partition(".")[0] for name in modules}


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = top_level_modules(IMPORT_PACKAGE)
    assert not loaded & (HEAVY | {"typer", "construct", "bitarray", "crc32c"})


def test_version_loads_nothing_heavy() -> None:
    assert not top_level_modules(RUN_MAIN, "--version") & HEAVY


def test_list_loads_nothing_heavy(image: str) -> None:
    assert not top_level_modules(RUN_MAIN, "list", image) & HEAVY


def test_add_loads_nothing_heavy(image: str) -> None:
    assert not top_level_modules(RUN_MAIN, "add", image, "b") & HEAVY


def test_export_and_import_load_nothing_heavy(image: str) -> None:
    assert not top_level_modules(RUN_MAIN, "export", image, "mon", f"{image}.bitmaps") & HEAVY
    assert not top_level_modules(RUN_MAIN, "import", image, f"{image}.bitmaps", "--as", "b") & HEAVY


def test_check_of_a_small_image_loads_nothing_heavy(image: str) -> None:
    assert not top_level_modules(RUN_MAIN, "check", "--owners", image) & HEAVY


@pytest.mark.parametrize("words", [["bitmap", "--add", "{}", "b"], ["check", "{}"]], ids=lambda words: words[0])
def test_the_drop_in_runs_before_typer_is_loaded(words: list[str], image: str) -> None:
    loaded = top_level_modules(RUN_MAIN, "qemu-img", *(word.replace("{}", image) for word in words))
    assert not loaded & (HEAVY | {"typer"})


def test_the_probe_would_see_a_heavy_module() -> None:
    """Guards the guard: a program that does load numpy is caught."""
    assert "numpy" in top_level_modules(IMPORT_PACKAGE.replace("import qcow2bm", "import numpy"))
