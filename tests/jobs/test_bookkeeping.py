"""The runs table and what is sent from it: every step repeated, interrupted and caught up with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.conf.run import RunConfig, TrackingConfig
from shoal.jobs import bookkeeping
from shoal.jobs.bookkeeping import Bookkeeper, drop_work
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.published import Published, State, commits
from shoal.jobs.report import Report
from shoal.jobs.tracking import RUN_ID_TAG

pytestmark = pytest.mark.spark

OFF = TrackingConfig(enabled=False)
NOWHERE = TrackingConfig(uri="http://127.0.0.1:9")


@pytest.fixture
def config(run_file: Callable[..., Path]) -> RunConfig:
    return load_run(run_file())


@pytest.fixture
def ref(spark: SparkSession, config: RunConfig) -> TableRef:
    return table_of(spark, config.destination)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def books(spark: SparkSession, ref: TableRef, said: list[str]) -> Bookkeeper:
    books = Bookkeeper(spark, ref, said.append)
    books.create()
    return books


@pytest.fixture
def sqlite(tmp_path: Path) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="books")


def record(config: RunConfig, run_id: str, **fields: Any) -> dict[str, Any]:
    """A run's record as report.py makes it."""
    return Report(config, run_id, config.destination.name, status="published").record() | fields


def dead(spark: SparkSession, ref: TableRef, found: dict[str, Any]) -> Published:
    """A table whose head is the commit of a run, as that run recorded itself in it."""
    state = {"shoal": {"run_id": found["run_id"], "generation": 1, "record": found}}
    rows = spark.range(1).write.format("delta").mode("append").option("userMetadata", json.dumps(state))
    rows.save(ref.path)
    head = next(commits(spark, ref))
    assert head.state == State(found["run_id"], 1, found)
    return Published(ref, head.version, {}, None, ref.path or "", head, head, ())


def sent_to(tracking: TrackingConfig) -> list[str]:
    client = mlflow.MlflowClient(tracking_uri=tracking.uri)
    experiment = client.get_experiment_by_name("books")
    if experiment is None:
        return []
    return sorted(run.data.tags[RUN_ID_TAG] for run in client.search_runs([experiment.experiment_id]))


def test_the_tables_and_records_can_be_made_again_without_harm(
    spark: SparkSession, ref: TableRef, config: RunConfig, books: Bookkeeper
) -> None:
    books.create()
    books.write(record(config, "one"))
    books.write(record(config, "one"))

    assert spark.read.format("delta").load(ref.runs).count() == 1


def test_a_run_that_died_after_its_commit_is_written_down_once_with_its_version(
    spark: SparkSession, ref: TableRef, config: RunConfig, books: Bookkeeper, said: list[str]
) -> None:
    table = dead(spark, ref, record(config, "one", version=None, generation=1))

    books.recover(table, OFF)
    books.recover(table, OFF)

    (run,) = books.records()
    assert (run["run_id"], run["version"], run["status"]) == ("one", 0, "published")
    assert said == ["run one published version 0 and died; writing it down"]


def test_a_run_that_failed_after_its_commit_landed_counts_as_published(
    spark: SparkSession, ref: TableRef, config: RunConfig, books: Bookkeeper
) -> None:
    books.write(record(config, "one", status="failed", version=None, error="the answer got lost"))

    books.recover(dead(spark, ref, record(config, "one", version=None, error=None)), OFF)

    assert [(run["status"], run["version"], run["error"]) for run in books.records()] == [("published", 0, None)]


def test_a_run_that_was_written_down_before_it_died_is_left_alone(
    spark: SparkSession, ref: TableRef, config: RunConfig, books: Bookkeeper, said: list[str]
) -> None:
    books.write(record(config, "one", version=0, bytes_written=99))

    books.recover(dead(spark, ref, record(config, "one", version=None)), OFF)
    books.recover(None, OFF)

    assert [run["bytes_written"] for run in books.records()] == [99]
    assert said == []


def test_the_highest_generation_and_the_newest_rate_are_remembered(config: RunConfig, books: Bookkeeper) -> None:
    assert books.last_generation() == 0
    assert books.last_rate("f") is None
    seconds = {"total": 9.0, "start": 0.0, "plan": 0.0, "encode": 4.0, "audit": 0.0, "publish": 0.0}
    books.write(record(config, "one", generation=11, fingerprint="f", tokens=400, seconds=seconds))
    books.write(record(config, "two", generation=9, fingerprint="f", tokens=800, seconds=seconds))
    books.write(record(config, "three", generation=None, fingerprint="g", tokens=4, seconds=seconds))
    books.write(record(config, "four", generation=None, fingerprint="f", tokens=0))

    assert books.last_generation() == 11
    assert books.last_rate("f") == 200.0


def test_what_a_server_that_was_down_has_missed_is_sent_later_newest_first_and_a_few_at_a_time(
    config: RunConfig, books: Bookkeeper, sqlite: TrackingConfig, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three"):
        books.write(record(config, name))

    assert books.send_pending(NOWHERE) == {}
    assert len(said) == 2, "a server that is down is asked twice, not once for each record"
    assert "did not take run three" in said[0]
    monkeypatch.setattr(bookkeeping, "MAX_SENT_PER_RUN", 2)
    assert books.send_pending(OFF) == {}
    assert list(books.send_pending(sqlite)) == ["three", "two"]
    assert list(books.send_pending(sqlite)) == ["one"]
    assert books.send_pending(sqlite) == {}
    assert sent_to(sqlite) == ["one", "three", "two"]
    assert all(run["mlflow_run"] for run in books.records())
    assert [run["run_id"] for run in books.records()] == ["three", "two", "one"]


def test_a_run_that_was_sent_but_not_ticked_off_is_not_doubled(
    spark: SparkSession, ref: TableRef, config: RunConfig, books: Bookkeeper, sqlite: TrackingConfig
) -> None:
    books.write(record(config, "one"))
    first = books.send_pending(sqlite)
    spark.sql(f"DELETE FROM delta.`{ref.runs}` WHERE kind = 'mlflow'")

    assert books.send_pending(sqlite) == first
    assert sent_to(sqlite) == ["one"]


def test_work_of_dead_runs_is_dropped_by_name(spark: SparkSession, ref: TableRef) -> None:
    files = FileSystem(spark, ref.sidecar)
    for run in ("one", "two"):
        files.create(f"{ref.work}/{run}/rows/part", "rows")

    drop_work(files, ref)
    drop_work(files, ref)

    assert files.names(ref.work) == []


def test_a_run_that_was_sent_as_failed_is_sent_again_as_published(
    config: RunConfig, books: Bookkeeper, sqlite: TrackingConfig
) -> None:
    books.write(record(config, "one") | {"status": "failed"})
    first = books.send_pending(sqlite)
    books.write(record(config, "one") | {"status": "published", "version": 3})

    assert books.send_pending(sqlite) == first
    client = mlflow.MlflowClient(sqlite.uri)
    run = client.get_run(first["one"])
    assert run.info.status == "FINISHED"
    assert (run.data.tags["shoal.status"], run.data.tags["delta.version"]) == ("published", "3")
    assert books.send_pending(sqlite) == {}


def test_one_record_that_the_server_will_not_take_holds_up_no_other(
    config: RunConfig, books: Bookkeeper, sqlite: TrackingConfig
) -> None:
    books.write(record(config, "good"))
    books.write(record(config, "bad") | {"rows": "not what MLflow can be told"})

    assert list(books.send_pending(sqlite)) == ["good"]
