"""What restore, cutover, purge, vacuum and optimize share: the lease, the record, one commit in the books."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import BusyError, DestinationError, RunError
from shoal.conf.loader import load_run
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.embed import embed
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.layout import table_of
from shoal.jobs.lease import held
from shoal.jobs.operation import operating, table_of_ours
from shoal.jobs.publish import Target, commit_sql
from shoal.jobs.published import State

pytestmark = pytest.mark.spark

PROPERTY = "ALTER TABLE {} SET TBLPROPERTIES ('team' = 'search')"


@pytest.fixture(scope="module")
def published(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    (folder / "corpus.jsonl").write_text('{"id": "a", "body": "one"}\n{"id": "b", "body": "two"}\n')
    (folder / "run.yaml").write_text(
        "{name: docs, source: {format: json, path: corpus.jsonl, key: id, text: body, schema: 'id STRING, body STRING'}"
        ", encoder: {model: 'hash:8'}, destination: {path: out/docs}, tracking: {enabled: false}}"
    )
    embed(spark, load_run(folder / "run.yaml"))
    return folder


@pytest.fixture
def table(published: Path, tmp_path: Path) -> str:
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    return str(tmp_path / "out/docs")


def books(spark: SparkSession, table: str) -> Bookkeeper:
    return Bookkeeper(spark, table_of_ours(spark, table).ref, lambda _: None)


def test_a_commit_carries_the_record_of_the_newest_run_and_raises_the_generation(
    spark: SparkSession, table: str
) -> None:
    steps: list[str] = []
    with operating(spark, table, "test", step=steps.append) as operation:
        record = operation.commit(PROPERTY.format(operation.ref.sql), "done", more="said")
    assert steps == ["lease taken", "recovered", "committed", "recorded"]
    now = table_of_ours(spark, table)
    assert now.version == record["version"] == 1
    assert (now.generation, record["generation"]) == (2, 2)
    assert now.ours is not None
    assert now.ours.state is not None
    assert now.ours.state.record == record | {"version": None}
    assert (record["verb"], record["status"], record["more"]) == ("test", "done", "said")
    assert record["rows"] == {**dict.fromkeys(record["rows"], 0), "source": 2, "unchanged": 2}
    assert (record["tokens"], sum(record["chunks"].values()), record["seconds"]["encode"]) == (0, 0, 0.0)
    assert record["config"]["name"] == "docs"
    assert books(spark, table).records()[0] == record
    assert not Path(now.ref.lease).exists()


def test_a_dead_commit_is_written_down_by_the_next_operation_and_its_work_removed(
    spark: SparkSession, table: str
) -> None:
    before = table_of_ours(spark, table)
    assert before.ours is not None
    assert before.ours.state is not None
    record = before.ours.state.record | {"run_id": "dead", "status": "done", "generation": 2}
    target = Target(before.ref, before, before.table_id, 2)
    commit_sql(spark, target, State("dead", 2, record), PROPERTY.format(before.ref.sql))
    work = Path(before.ref.work, "dead")
    work.mkdir(parents=True)
    with operating(spark, table, "test") as operation:
        assert operation.published.generation == 2
        assert not work.exists()
    assert next(run for run in books(spark, table).records() if run["run_id"] == "dead")["version"] == 1


def test_a_failure_is_written_down_with_its_code_and_the_lease_is_given_back(spark: SparkSession, table: str) -> None:
    with pytest.raises(RunError, match="came to nothing"), operating(spark, table, "test") as operation:
        raise RunError("came to nothing", code="DISK_FULL")
    failed = books(spark, table).records()[0]
    assert (failed["run_id"], failed["verb"]) == (operation.run_id, "test")
    assert (failed["status"], failed["code"], failed["error"]) == ("failed", "DISK_FULL", "came to nothing")
    assert not Path(operation.ref.lease).exists()
    # What failed says nothing of the table: the next one goes on from the commit.
    assert table_of_ours(spark, table).generation == 1


def test_a_table_with_a_run_alive_on_it_is_left_alone(spark: SparkSession, table: str) -> None:
    ref = table_of_ours(spark, table).ref
    files = FileSystem(spark, ref.sidecar)
    told = f"run alive by .* on {socket.gethostname()}.*{os.getpid()}"
    with (
        held(files, ref.lease, "alive", heartbeat_seconds=0.1),
        pytest.raises(BusyError, match=told),
        operating(spark, table, "test"),
    ):
        pytest.fail("the lease was taken from a run that is alive")


def test_there_must_be_a_table(spark: SparkSession, tmp_path: Path, run_file: Callable[..., Path]) -> None:
    nowhere = table_of(spark, load_run(run_file()).destination)
    with pytest.raises(DestinationError, match="there is no such table"), operating(spark, str(nowhere), "test"):
        pytest.fail("there is no table to work on")
    assert not (tmp_path / "out").exists()
