"""The JSON Schema for editors agrees with the loader, and the README with the classes."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import shoal.conf
from shoal.conf.run import RunConfig
from shoal.conf.schema import field_table, json_schema

CONF = Path(shoal.conf.__file__).parent
VALID: dict[str, Any] = {
    "name": "docs",
    "source": {"format": "csv", "path": "a.csv", "key": "id", "text": "text", "options": {"header": True}},
    "encoder": {"model": "hash:8"},
    "destination": {"path": "out"},
}


def is_valid(**changes: Any) -> bool:
    return jsonschema.Draft202012Validator(json_schema()).is_valid({**VALID, **changes})


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.name)
def test_every_run_file_that_ships_fits_the_schema(file: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.validate(yaml.safe_load(file.read_text(encoding="utf-8")), json_schema())


def test_the_schema_knows_names_choices_and_what_is_required() -> None:
    assert is_valid()
    assert is_valid(source={"format": "text", "path": "a"})
    assert not is_valid(source={"format": "csv", "path": "a"})
    assert not is_valid(encoder={"model": "hash:8", "poolng": "cls"})
    assert not is_valid(encoder={"model": "hash:8", "pooling": "max"})
    assert is_valid(limits={"max_errors": "1%", "max_deleted": 5})
    assert not is_valid(limits={"max_errors": 0.01})
    assert is_valid(source={**VALID["source"], "schema": "id STRING"})
    assert not is_valid(source={**VALID["source"], "schema_ddl": "id STRING"})


def test_every_setting_carries_its_documentation() -> None:
    schema = json_schema()
    described = [schema, *schema["$defs"].values()]
    missing = [name for part in described for name, entry in part["properties"].items() if "description" not in entry]
    assert missing == []


def test_defaults_are_written_as_a_run_file_writes_them() -> None:
    sections = json_schema()["$defs"]
    assert sections["LimitsConfig"]["properties"]["max_errors"]["default"] == "10%"
    assert sections["DestinationConfig"]["properties"]["retain"]["default"] == "7d"
    assert sections["EncodeConfig"]["properties"]["time_limit"]["default"] == "10m"


def test_the_reference_in_the_readme_is_what_the_classes_say() -> None:
    readme = (CONF / "README.md").read_text(encoding="utf-8")
    assert readme.endswith(f"-->\n\n{field_table()}"), "write field_table() of shoal.conf.schema below the marker"


def test_the_reference_has_a_row_for_every_setting() -> None:
    table = field_table()
    for name in RunConfig.model_fields:
        assert f"| `{name}` |" in table
    assert "| `schema` |" in table
    assert "| `max_errors` | `10%` |" in table


def test_the_readme_lists_every_file_of_the_folder() -> None:
    readme = (CONF / "README.md").read_text(encoding="utf-8").partition("## ")[0]
    listed = re.findall(r"^\| `([\w.]+)` \|", readme, re.MULTILINE)
    assert listed == sorted(listed, key=str.lower)
    assert set(listed) == {file.name for file in CONF.iterdir() if file.is_file()}
