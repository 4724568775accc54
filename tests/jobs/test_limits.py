"""Limits stop a run before readers see anything, and what was encoded is not lost by it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import LimitError
from shoal.conf.loader import load_run
from shoal.conf.values import Limit
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.embed import embed
from shoal.jobs.layout import table_of
from shoal.jobs.limits import check_errors
from shoal.jobs.published import read_published
from shoal.jobs.reconcile import Account
from shoal.jobs.staging import staged_rows

pytestmark = pytest.mark.spark

ROWS = [{"id": "a", "body": "one fish"}, {"id": "b", "body": "two fish"}, {"id": "c", "body": None}]


def refused(spark: SparkSession, run: Path, match: str) -> dict[str, Any]:
    """The record of a run that a limit stops."""
    with pytest.raises(LimitError, match=match) as error:
        embed(spark, load_run(run))
    assert error.value.exit_code == 3
    record: dict[str, Any] = error.value.report.record()  # type: ignore[attr-defined]
    assert record["status"] == "refused"
    return record


def test_after_too_many_errors_a_run_with_a_raised_limit_publishes_without_encoding_again(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path]
) -> None:
    write_rows(ROWS)
    strict = run_file("strict.yaml", limits={"max_errors": 0})
    ref = table_of(spark, load_run(strict).destination)

    first = refused(spark, strict, r"limits\.max_errors is 0 and 1 of 3 planned chunks have no vector \(null_text: 1\)")

    assert read_published(spark, ref) is None
    assert first["chunks"]["encoded"] == staged_rows(spark, ref, first["fingerprint"]).count() == 2
    assert [run["status"] for run in Bookkeeper(spark, ref, lambda _: None).records()] == ["refused"]

    second = embed(spark, load_run(run_file(limits={"max_errors": "34%"}))).record()

    assert second["status"] == "published"
    assert (second["chunks"]["encoded"], second["chunks"]["reused"], second["chunks"]["embedded"]) == (0, 2, 2)
    assert second["errors"] == {"null_text": 1}


@pytest.fixture(scope="module")
def published(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file and its published table, to be copied."""
    folder = tmp_path_factory.mktemp("limits")
    (folder / "corpus.jsonl").write_text("".join(f'{{"id": "r{n}", "body": "text {n}"}}\n' for n in range(4)))
    (folder / "run.yaml").write_text(
        'source: {format: json, path: corpus.jsonl, key: id, text: body, schema: "id STRING, body STRING"}\n'
        'name: docs\nencoder: {model: "hash:8"}\ndestination: {path: out/docs}\ntracking: {enabled: false}\n'
    )
    embed(spark, load_run(folder / "run.yaml"))
    return folder


@pytest.mark.parametrize(
    ("rows", "overrides", "match"),
    [
        (
            [{"id": "r0", "body": "text 0"}, {"id": "r1", "body": "new"}],
            ["limits.max_deleted=49%"],
            r"limits\.max_deleted is 49% and 2 of the 4 published rows are no longer in the source",
        ),
        ([], [], r"limits\.min_rows is 1 and the source has 0 rows; nothing was published"),
        (
            [{"id": f"r{n}", "body": f"text {n}"} for n in range(5)],
            ["limits.max_cost=0.01", "encode.price_per_hour=1000000000"],
            r"limits\.max_cost is 0\.01 and this run would cost about .*; nothing was encoded",
        ),
    ],
    ids=["max_deleted", "min_rows", "max_cost"],
)
def test_a_limit_that_the_plan_exceeds_stops_the_run_before_it_encodes(
    spark: SparkSession,
    published: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    rows: list[dict[str, Any]],
    overrides: list[str],
    match: str,
) -> None:
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    write_rows(rows)
    config = load_run(tmp_path / "run.yaml", overrides)
    ref = table_of(spark, config.destination)

    with pytest.raises(LimitError, match=match) as error:
        embed(spark, config)

    assert error.value.exit_code == 3
    head = read_published(spark, ref)
    assert head is not None
    assert head.version == 0
    assert head.rows(spark).count() == 4
    record = error.value.report.record()  # type: ignore[attr-defined]
    assert (record["status"], record["chunks"]["encoded"]) == ("refused", 0)
    assert spark.read.format("delta").load(ref.staging).isEmpty()


def test_an_empty_source_empties_the_table_where_the_limits_allow_it(
    spark: SparkSession, published: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    write_rows([])
    config = load_run(tmp_path / "run.yaml", ["limits.min_rows=0", "limits.max_deleted=100%"])

    record = embed(spark, config).record()

    assert (record["status"], record["version"], record["rows"]["deleted"]) == ("published", 1, 4)
    assert table_of(spark, config.destination).read(spark).isEmpty()


def test_errors_that_were_published_before_and_only_retried_do_not_count_against_a_run() -> None:
    limit = Limit(share=0.01)
    check_errors(limit, Account(1, 0, 0, 1, 0, {"non_finite": 1}, num_retried=1))
    check_errors(limit, Account(6, 5, 0, 6, 0, {"non_finite": 1}, num_retried=1))
    with pytest.raises(LimitError, match="1 of 5 planned chunks"):
        check_errors(limit, Account(6, 4, 0, 6, 0, {"non_finite": 2}, num_retried=1))
