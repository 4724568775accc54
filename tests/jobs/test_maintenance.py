"""Nights in a row: what they leave behind without maintenance, what is said to be due, and that it stays bounded."""

import json
import shutil
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from shoal.conf.errors import RunError
from shoal.conf.loader import load_run
from shoal.jobs import embed as embed_verb
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.compaction import TableSize, size_of
from shoal.jobs.embed import embed
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.maintenance import DEFAULT, due, maintain
from shoal.jobs.operation import operating, table_of_ours
from shoal.jobs.report import Report
from shoal.jobs.sweep import tables

pytestmark = [pytest.mark.spark, pytest.mark.slow]

# A night marks up to three of some fifty rows as deleted, so that a tenth is there after two nights, or a few.
NIGHTS, AUTO_NIGHTS, WIDTH = 4, 4, 48


def night(spark: SparkSession, folder: Path, number: int, maintenance: str) -> Report:
    """One `shoal embed`: of 48 rows one has gone, one has changed and one has come since the night before."""
    rows = [
        {"id": f"r{index:03}", "body": f"night {number}" if index == number + 1 else f"text {index}"}
        for index in range(number, number + WIDTH)
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "schema": "id STRING, body STRING"
        },
        "encoder": {"model": "hash:8"},
        "destination": {"path": "out/docs"},
        "maintenance": maintenance,
        "limits": {"max_deleted": "100%"},
        "tracking": {"enabled": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    report = embed(spark, load_run(folder / "run.yaml"))
    assert report.status == "published"
    return report


def ref_of(spark: SparkSession, folder: Path) -> TableRef:
    return table_of(spark, load_run(folder / "run.yaml").destination)


def sizes(spark: SparkSession, ref: TableRef) -> dict[str, TableSize]:
    return {name: size_of(spark, sql) for name, sql in tables(spark, ref).items()}


def contents(spark: SparkSession, ref: TableRef) -> list[str]:
    return sorted(str(row) for row in ref.read(spark).collect())


def nothing(*_: str) -> None:
    pass


@pytest.fixture(scope="module")
def first(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table after its first night."""
    folder = tmp_path_factory.mktemp("first")
    assert night(spark, folder, 0, "manual").maintenance is None
    return folder


@pytest.fixture
def nights(spark: SparkSession, first: Path, tmp_path: Path) -> Path:
    """The table after so many nights without maintenance."""
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    for number in range(1, NIGHTS):
        assert night(spark, tmp_path, number, "manual").maintenance is None
    return tmp_path


@pytest.mark.long
def test_files_and_deleted_rows_grow_until_what_is_due_is_done_and_stay_bounded_where_runs_do_it(
    spark: SparkSession, nights: Path
) -> None:
    ref = ref_of(spark, nights)
    thresholds = replace(DEFAULT, small_files=3, sidecar_files=3)
    before, rows = sizes(spark, ref), contents(spark, ref)
    assert before["published"].files > 3
    assert before["published"].deleted_share > DEFAULT.deleted_share
    assert before["runs"].files >= NIGHTS
    found = due(spark, table_of_ours(spark, str(ref)), thresholds)
    assert [reason.split(" (")[0] for reason in found.optimize] == [
        f"{before['published'].files} small files",
        f"{before['published'].deleted_rows} of {before['published'].rows} rows are marked as deleted",
        f"{before['runs'].files} files in runs",
    ]
    assert found.vacuum == ()
    with operating(spark, str(ref), "maintain") as operation:
        done = maintain(operation, thresholds=thresholds)
    after = sizes(spark, ref)
    assert done["vacuum"] is None
    assert done["optimize"]["tables"]["published"]["after"] == after["published"].public()
    assert (after["published"].files, after["published"].deleted_rows, after["runs"].files) == (1, 0, 1)
    assert contents(spark, ref) == rows
    assert due(spark, table_of_ours(spark, str(ref)), thresholds).optimize == ()

    optimized: list[bool] = []
    while not any(optimized) and len(optimized) < AUTO_NIGHTS:
        report = night(spark, nights, NIGHTS + len(optimized), "auto")
        assert report.maintenance is not None
        optimized.append(report.maintenance["optimize"] is not None)
        now = sizes(spark, ref)
        assert now["published"].files < before["published"].files
        assert now["published"].deleted_share <= DEFAULT.deleted_share
        assert now["staging"].files == 0
    assert optimized.index(True) > 0
    record = Bookkeeper(spark, ref, nothing).records()[0]
    assert record["maintenance"] == report.maintenance
    assert record["seconds"]["maintain"] > 0


@pytest.mark.long
def test_a_vacuum_is_due_a_while_after_the_first_run_and_again_after_the_last(
    spark: SparkSession, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = ref_of(spark, first)
    published = table_of_ours(spark, str(ref))
    assert due(spark, published).vacuum == ()
    now = time.time()
    with monkeypatch.context() as patched:
        patched.setattr("shoal.jobs.maintenance.time.time", lambda: now + 8 * 86400)
        assert due(spark, published).vacuum == ("the first run was 8 days ago",)
    with operating(spark, str(ref), "maintain") as operation:
        done = maintain(operation, thresholds=replace(DEFAULT, vacuum_every=timedelta(0)))
    assert done["vacuum"]["reasons"]
    books = Bookkeeper(spark, ref, nothing)
    books.write(books.records()[0] | {"run_id": "vacuumed now", "maintenance": done})
    assert due(spark, published).last_vacuum_ms == done["vacuum"]["at_ms"]


def test_maintenance_that_fails_is_a_warning_and_the_night_stands(
    spark: SparkSession, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RunError("no room")

    monkeypatch.setattr(embed_verb, "maintain", fails)
    report = night(spark, first, 1, "auto")
    assert (report.status, report.maintenance) == ("published", None)
    assert any("no room" in warning for warning in report.warnings)
