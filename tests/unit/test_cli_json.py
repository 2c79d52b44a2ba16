"""What `--output json` prints is what docs/schemas says, key for key."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from qcow2bm import __main__
from qcow2bm.checks.model import InQemu, RepairClass, Severity
from qcow2bm.cli.app import COMMANDS
from tests.support.images import FIXTURES, all_fixtures, corrupt_fixtures, unpack

SCHEMAS = {
    path.name: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((FIXTURES.parent / "docs" / "schemas").glob("*.schema.json"))
}
SHARED = "bitmap.schema.json"
VERDICTS = SCHEMAS["check.schema.json"]["properties"]["images"]["items"]["oneOf"][0]["properties"]["verdict"]["enum"]


def strict(schema: Any) -> Any:
    """The schema with every key that it does not know forbidden: a key that nobody wrote down is a bug of ours."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items() if key not in {"oneOf", "const", "enum"}}
    result |= {key: schema[key] for key in ("const", "enum") if key in schema}
    if (
        "oneOf" in schema
    ):  # alternatives of one object are told apart by what they require, and not closed by themselves
        inner = [strict(item) if "type" in item else item for item in schema["oneOf"]]
        result["oneOf"] = inner
    if "$ref" in schema or ("properties" in schema and "type" in schema and schema.get("$id") != SHARED):
        result["unevaluatedProperties"] = False
    return result


def validator(name: str) -> Draft202012Validator:
    registry: Registry[Any] = Registry().with_resources(
        (key, Resource.from_contents(strict(copy.deepcopy(schema)))) for key, schema in SCHEMAS.items()
    )
    return Draft202012Validator(strict(SCHEMAS[f"{name}.schema.json"]), registry=registry)


@pytest.fixture
def document(capsys):
    """Run a command with --output json: its one object."""

    def runner(*words: str | Path) -> dict[str, Any]:
        __main__.main([*(str(word) for word in words[:1]), "--output", "json", *(str(word) for word in words[1:])])
        parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
        return parsed

    return runner


def check(name: str, parsed: dict[str, Any]) -> None:
    validator(name).validate(parsed)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_are_schemas(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])


def test_every_command_has_a_schema() -> None:
    own = {name.removesuffix(".schema.json") for name in SCHEMAS}
    assert set(COMMANDS) == (own & set(COMMANDS)) | set(SCHEMAS["change.schema.json"]["properties"]["command"]["enum"])


@pytest.mark.parametrize("sample", all_fixtures(), ids=lambda sample: sample.name)
def test_reading_commands(sample, tmp_path: Path, document) -> None:
    path = sample.unpack(tmp_path)
    check("list", document("list", path, tmp_path / "missing"))
    check("info", document("info", path))
    check("dump", document("dump", path))
    for name in list(sample.bitmaps)[:5]:
        check("show", document("show", "--", path, name))
        check("show", document("show", "--extents", "--stale", "--", path, name))


def test_diff_prove_and_estimate(tmp_path: Path, document) -> None:
    image, older = unpack("office-week", tmp_path / "now"), unpack("office-week", tmp_path / "then")
    check("diff", document("diff", older, image))
    check("diff", document("diff", "--extents", older, image))
    kept = document("diff", older, image, "--into", f"{image}#new", "--format-a", "qcow2")
    check("change", kept)
    check("change", document("diff", older, image, "--into", f"{image}#new", "--merge", "--dry-run"))
    check("change", document("rebuild", image, "mon", "--against", older, "--undo", tmp_path / "undo"))
    check("prove", document("prove", image, "mon", "--against", older))
    sampled = document("prove", image, "tue", "--against", older, "--sample", "1M", "--seed", "7")
    check("prove", sampled)
    assert sampled["sample"]["seed"] == 7
    check("estimate", document("estimate", image))
    check("estimate", document("estimate", image, "mon"))


def test_damaged_images(tmp_path: Path, document) -> None:
    path = unpack("office-week", tmp_path)
    with path.open("r+b") as file:
        file.truncate(100_000)
    for name in ("list", "info", "dump"):
        check(name, document(name, path))


def test_check(tmp_path: Path, document) -> None:
    """A sound image and all damaged ones in one document, with one that is not there and one that is no image."""
    (tmp_path / "raw").write_bytes(bytes(4096))
    healthy = unpack("office-week", tmp_path)
    damaged = [sample.unpack(tmp_path / sample.name) for sample in corrupt_fixtures()]
    parsed = document("check", "--owners", healthy, *damaged, tmp_path / "missing", tmp_path / "raw")
    check("check", parsed)
    clean, *images, missing, raw = parsed["images"]
    assert [image["status"] for image in (clean, missing, raw)] == [0, 1, 63]
    assert (clean["verdict"], clean["counts"], clean["findings"]) == ("clean", {}, [])
    for image in images:
        kept = sum(finding["count"] for finding in image["findings"])
        assert image["findings-dropped"] == sum(image["counts"].values()) - kept
        assert {finding["code"] for finding in image["findings"]} == set(image["counts"])
    findings = [finding for image in images for finding in image["findings"]]
    assert {finding["severity"] for finding in findings} == set(VERDICTS) - {"clean"}
    assert {finding["qemu-img"] for finding in findings} == {qemu.value for qemu in InQemu}
    assert any(finding["owners"] for finding in findings)


def test_check_knows_the_words_of_the_schema() -> None:
    """Enumerations are written twice, in the schema and in the program."""
    result = SCHEMAS["check.schema.json"]["properties"]["images"]["items"]["oneOf"][0]["properties"]
    finding = result["findings"]["items"]["properties"]
    assert set(VERDICTS) == {"clean"} | {severity.value for severity in Severity}
    assert finding["severity"]["enum"] == result["severities"]["required"] == [one.value for one in Severity]
    assert finding["repair"]["enum"] == [one.value for one in RepairClass]
    assert finding["qemu-img"]["enum"] == [one.value for one in InQemu]


@pytest.mark.parametrize(
    "words",
    [
        ["add", "{}", "new"],
        ["remove", "{}", "mon", "tue"],
        ["rename", "{}", "mon", "x"],
        ["clear", "{}", "mon"],
        ["enable", "{}", "mon"],
        ["disable", "{}", "mon"],
        ["set", "{}", "mon", "--range", "0+1G"],
        ["unset", "{}", "mon", "--range", "0+1G"],
        ["merge", "{}", "mon", "tue"],
        ["invert", "{}", "mon"],
        ["resample", "{}", "mon", "-g", "4k"],
        ["resize", "{}", "+1G"],
        ["copy", "{}#mon", "{}#x"],
    ],
    ids=lambda words: words[0],
)
def test_changing_commands(words: list[str], tmp_path: Path, document) -> None:
    path = unpack("office-week", tmp_path)
    words = [word.replace("{}", str(path)) for word in words]
    check("change", document(*words, "--dry-run"))
    done = document(*words, "--undo", tmp_path / "undo")
    check("change", done)
    if done["changed"]:
        check("undo", document("undo", path, tmp_path / "undo"))


def test_export_and_import(tmp_path: Path, document) -> None:
    path, file = unpack("office-week", tmp_path), tmp_path / "file"
    for form in ("qcow2bm", "json", "csv", "raw"):
        parsed = document("export", path, "mon", file, "--format", form)
        check("export", parsed)
        assert parsed["file-bytes"] == file.stat().st_size
        file.unlink()
    document("export", path, file)
    check("import-list", document("import", file, "--list"))
    check("import-list", document("import", path, file, "--list"))
    check("change", document("import", path, file, "mon", "--as", "x", "--dry-run"))
    check("change", document("import", path, file, "mon", "--as", "x"))


def test_a_key_that_is_not_written_down_would_be_seen(tmp_path: Path, document) -> None:
    """Guards the guard."""
    parsed = document("list", unpack("office-week", tmp_path))
    parsed["images"][0]["bitmaps"][0]["surprise"] = 1
    assert not validator("list").is_valid(parsed)
    del parsed["images"][0]["bitmaps"][0]["surprise"]
    del parsed["images"][0]["bitmaps"][0]["granularity"]
    assert not validator("list").is_valid(parsed)
