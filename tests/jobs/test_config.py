"""`shoal config` as functions: one line for a good file, every problem of a bad one, nothing secret."""

import json
from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError
from shoal.jobs import config

RUN = """\
name: docs
source: {format: json, path: corpus.jsonl, key: id, text: text}
encoder: {model: "hash:8"}
destination: {path: "${SHOAL_PLACE:-out}"}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SHOAL_PLACE", raising=False)
    file = tmp_path / "run.yaml"
    file.write_text(RUN, encoding="utf-8")
    return file


def test_check_says_in_one_line_what_a_valid_file_does(file: Path) -> None:
    folder = file.parent
    assert config.check(file) == (
        f"{file}: valid run 'docs' (json {folder}/corpus.jsonl, encoder hash:8, to {folder}/out)"
    )


def test_check_counts_many_paths_and_names_a_query(file: Path) -> None:
    assert "(json 2 paths," in config.check(file, ["source.path=[a, b]"])
    overrides = ["source.format=query", "source.path=null", "source.query=SELECT 1"]
    assert "(query a query," in config.check(file, overrides)


def test_check_hides_what_came_from_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_PLACE", "geheim")
    assert "to ***)" in config.check(file)


def test_check_raises_with_every_problem(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)chunk\.tokens is 0.*name is 'a b'|name is 'a b'.*chunk\.tokens is 0"):
        config.check(file, ["name=a b", "chunk.tokens=0"])


def test_schema_is_json_for_an_editor() -> None:
    assert json.loads(config.schema())["title"] == "Shoal run file"
