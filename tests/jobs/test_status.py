"""`shoal status`: what a monitor sees of a table in order, behind, failed, written to by others, or not there."""

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import LimitError
from shoal.conf.loader import load_run
from shoal.jobs.cli import main
from shoal.jobs.embed import embed
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.layout import table_of
from shoal.jobs.lease import held
from shoal.jobs.status import lines, status

pytestmark = pytest.mark.spark

RUN = """
name: docs
source: {format: delta, path: source, key: id, text: body, columns: [kind]}
encoder: {model: "hash:8"}
destination: {path: out/docs}
limits: {max_deleted: "100%"}
encode: {price_per_hour: 2.0}
tracking: {enabled: false}
"""
DDL = "id string, body string, kind string"


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Delta source of three rows with a change feed, one of them blank, and its published table."""
    folder = tmp_path_factory.mktemp("status")
    rows = spark.createDataFrame([("a", "one", "x"), ("b", "two", "x"), ("c", " ", "x")], DDL)
    writer = rows.write.format("delta").option("delta.enableChangeDataFeed", "true")
    writer.save(str(folder / "source"))
    (folder / "run.yaml").write_text(RUN)
    embed(spark, load_run(folder / "run.yaml"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it; the record of the run knows the source by its first path, so the copy is embedded once more."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def of(spark: SparkSession, folder: Path, **options: Any) -> dict[str, Any]:
    [found] = status(spark, [str(folder / "out/docs")], **options)
    json.dumps(found)
    assert lines([found])
    return found


def test_a_table_in_order_has_no_problem(spark: SparkSession, made: Path) -> None:
    found = of(spark, made, max_lag=timedelta(hours=1))

    assert found["problems"] == []
    assert (found["version"], found["generation"], found["encoder"], found["lease"]) == (0, 1, "hash:8", None)
    assert (found["chunks"], found["errors"]) == (3, {"blank_text": 1})
    assert found["last_run"]["status"] == "published"
    assert (found["lag_s"], found["pending"]["how"]) == (0, "the source has not moved")
    assert set(found["pending"]["rows"].values()) == {0}
    assert found["maintenance"]["optimize"] == []


def test_what_the_next_run_would_find_is_counted_by_kind_and_writes_nothing(spark: SparkSession, folder: Path) -> None:
    run = load_run(folder / "run.yaml")
    embed(spark, run)
    source = f"delta.`{folder}/source`"
    spark.sql(f"UPDATE {source} SET body = 'three' WHERE id = 'c'")
    spark.sql(f"UPDATE {source} SET kind = 'y' WHERE id = 'a'")
    spark.sql(f"DELETE FROM {source} WHERE id = 'b'")
    spark.sql(f"INSERT INTO {source} VALUES ('d', 'four', 'x'), ('e', 'five', 'x')")
    ref = table_of(spark, run.destination)
    before = FileSystem(spark, ref.sidecar).size(str(folder / "out"))

    found = of(spark, folder, max_lag=timedelta(seconds=3600))

    assert found["pending"]["rows"] == {"new": 2, "changed": 1, "metadata_only": 1, "deleted": 1}
    assert found["lag_s"] > 0
    assert found["problems"] == []
    behind = of(spark, folder, max_lag=timedelta(milliseconds=1))
    assert "behind (since the oldest commit of the source that no run has seen" in behind["problems"][0]
    assert FileSystem(spark, ref.sidecar).size(str(folder / "out")) == before


def test_a_failed_run_a_foreign_write_and_a_live_run_are_seen(spark: SparkSession, folder: Path) -> None:
    with pytest.raises(LimitError):
        embed(spark, load_run(folder / "run.yaml", ["limits.min_rows=9"]))
    ref = table_of(spark, load_run(folder / "run.yaml").destination)
    spark.sql(f"DELETE FROM {ref.sql} WHERE id = 'a'")

    with held(FileSystem(spark, ref.sidecar), ref.lease, "run-9"):
        found = of(spark, folder)

    assert "refused: [" in found["problems"][0]
    assert "limits.min_rows is 9" in found["problems"][0]
    assert "others wrote to the table since our last commit: version 1 (DELETE)" in found["problems"][1]
    assert (found["lease"]["run_id"], found["lease"]["alive"]) == ("run-9", None)
    assert found["last_success_ms"] is not None


def test_a_table_that_is_not_there_hides_no_other_and_monitors_get_a_code(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, missing = str(made / "out/docs"), str(tmp_path / "none")

    assert main(["status", missing, there, "--json"]) == 1

    first, second = json.loads(capsys.readouterr().out)
    assert (first["table"], first["code"]) == (missing, "TABLE_NOT_FOUND")
    assert second["problems"] == []
    assert main(["status", there]) == 0
    assert capsys.readouterr().out.startswith(f"{there}: in order\n")
    assert main(["status", there, "--max-lag", "soon"]) == 2


def test_a_source_of_files_is_compared_only_when_asked(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows([{"id": "a", "body": "one"}])
    embed(spark, load_run(run_file()))
    write_rows([{"id": "a", "body": "one"}, {"id": "b", "body": "two"}])

    found = of(spark, tmp_path)
    asked = of(spark, tmp_path, pending=True)

    assert found["pending"] == {"rows": None, "how": "--pending compares the source with the table"}
    assert asked["pending"]["rows"] == {"new": 1, "changed": 0, "metadata_only": 0, "deleted": 0}
    assert "since the start of the last successful run" in asked["lag_measure"]
