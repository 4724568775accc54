"""Where tables lie: by path and, through a whole life of a table, by catalog name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import DestinationError, LimitError
from shoal.conf.loader import load_run
from shoal.conf.run import DestinationConfig
from shoal.jobs.embed import embed
from shoal.jobs.errors import errors
from shoal.jobs.history import history
from shoal.jobs.layout import SIDECAR_SUFFIX, table_named, table_of
from shoal.jobs.search import search

pytestmark = pytest.mark.spark


def test_the_sidecar_of_a_path_lies_beside_it_unless_the_run_file_says_where(spark: SparkSession) -> None:
    beside = table_of(spark, DestinationConfig(path="/data/docs/"))
    elsewhere = table_of(spark, DestinationConfig(path="/data/docs", sidecar="/scratch/docs"))

    assert (beside.path, beside.staging) == ("/data/docs", f"/data/docs{SIDECAR_SUFFIX}/staging")
    assert (elsewhere.path, elsewhere.lease) == ("/data/docs", "/scratch/docs/lease.json")


def test_a_table_on_the_command_line_is_a_path_unless_the_catalog_knows_its_name(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spark.sql("CREATE SCHEMA IF NOT EXISTS shelf")
    spark.sql("CREATE TABLE IF NOT EXISTS shelf.known (id INT) USING delta")

    assert table_named(spark, "shelf.known").name == "shelf.known"
    assert table_named(spark, "shelf.other").path == str(tmp_path / "shelf.other")
    assert table_named(spark, "out/docs/").path == str(tmp_path / "out/docs")
    assert table_named(spark, "s3a://bucket/docs").path == "s3a://bucket/docs"


def test_a_table_by_name_says_itself_where_its_sidecar_is(spark: SparkSession, tmp_path: Path) -> None:
    spark.sql("CREATE SCHEMA IF NOT EXISTS shelf")
    spark.sql("CREATE TABLE shelf.apart (id INT) USING delta TBLPROPERTIES ('shoal.sidecar' = '/scratch/apart')")
    spark.sql("CREATE VIEW shelf.seen AS SELECT 1 AS id")

    assert table_named(spark, "shelf.apart").sidecar == "/scratch/apart"
    assert table_named(spark, "shelf.seen").sidecar.endswith(f"shelf.db/seen{SIDECAR_SUFFIX}")


def test_a_schema_that_is_not_there_is_named(spark: SparkSession) -> None:
    with pytest.raises(
        DestinationError, match=r"destination\.table 'nowhere\.docs': the schema `nowhere` is not there"
    ):
        table_of(spark, DestinationConfig(table="nowhere.docs"))


@pytest.mark.slow
def test_a_table_by_name_is_made_kept_in_step_and_searched_by_its_name(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path]
) -> None:
    spark.sql("CREATE SCHEMA IF NOT EXISTS shop")
    spark.sql("DROP TABLE IF EXISTS shop.docs")
    source = {
        "format": "json", "path": "corpus.jsonl", "key": ["day", "price", "`my.n-1` AS my.n-1"], "text": "body",
        "schema": "day DATE, price DECIMAL(5, 2), `my.n-1` INT, body STRING",
    }  # fmt: skip
    run = run_file(source=source, destination={"table": "shop.docs"}, limits={"max_deleted": "100%"})
    rows = [{"day": "2026-01-31", "price": 1.5, "my.n-1": n, "body": body} for n, body in enumerate(["x", "y", "z"])]
    write_rows(rows)

    first = embed(spark, load_run(run)).record()
    rows[1]["body"], rows[2]["body"] = "changed", None
    write_rows(rows[1:])
    second = embed(spark, load_run(run)).record()

    assert (first["table"], first["status"], first["version"]) == ("shop.docs", "published", 0)
    assert (second["status"], second["generation"]) == ("published", 2)
    assert (second["rows"]["changed"], second["rows"]["deleted"]) == (2, 1)
    table = spark.table("shop.docs")
    assert dict(table.dtypes)["price"] == "decimal(5,2)"
    assert {(row["my.n-1"], row["text"]) for row in table.collect()} == {(1, "changed"), (2, None)}
    (hits,) = search(spark, "shop.docs", ["changed"], 5, where="`my.n-1` > 0")
    assert hits == [
        {"day": "2026-01-31", "price": "1.50", "my.n-1": 1, "chunk_index": 0, "text": "changed", "score": 1.0}
    ]
    assert [entry["version"] for entry in history(spark, "shop.docs")][-1] == 0
    (failed,) = errors(spark, "shop.docs")
    assert failed["samples"] == [{"day": "2026-01-31", "price": "1.50", "my.n-1": 2, "chunk_index": 0, "text": None}]
    json.dumps([hits, failed])


@pytest.mark.long
@pytest.mark.slow
def test_an_external_table_is_kept_in_its_folder_and_found_by_name_and_by_path(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    spark.sql("CREATE SCHEMA IF NOT EXISTS shop")
    spark.sql("DROP TABLE IF EXISTS shop.outside")
    run = run_file(destination={"table": "shop.outside", "path": "out/my docs"})
    write_rows([{"id": "a", "body": "one text"}, {"id": "b", "body": "two texts"}])
    first = embed(spark, load_run(run)).record()
    write_rows([{"id": "a", "body": "one text"}, {"id": "b", "body": "two other texts"}])
    second = embed(spark, load_run(run)).record()

    assert (first["table"], first["version"]) == ("shop.outside", 0)
    assert (second["rows"]["changed"], second["chunks"]["encoded"]) == (1, 1)
    folder = str(tmp_path / "out/my docs")
    told = {row[0]: row[1] for row in spark.sql("DESCRIBE TABLE EXTENDED shop.outside").collect()}
    assert (told["Type"], told["Location"]) == ("EXTERNAL", f"file:{folder}")
    assert table_named(spark, "shop.outside").sidecar == f"{folder}{SIDECAR_SUFFIX}"
    for name in ("shop.outside", folder):
        (hits,) = search(spark, name, ["two other texts"], 1)
        assert (hits[0]["id"], hits[0]["score"]) == ("b", 1.0)
        assert [entry["run_id"] for entry in history(spark, name)] == [second["run_id"], first["run_id"]]

    moved = run_file(destination={"table": "shop.outside", "path": "out/elsewhere"})
    with pytest.raises(DestinationError, match=r"has 'shop\.outside' in file:/.*my docs, and destination\.path is"):
        embed(spark, load_run(moved))
    unknown = run_file(destination={"table": "shop.unknown", "path": "out/my docs"})
    with pytest.raises(DestinationError, match=r"CREATE TABLE `shop`\.`unknown` USING delta LOCATION '/.*my docs'"):
        embed(spark, load_run(unknown))
    spark.sql(f"CREATE TABLE shop.unknown USING delta LOCATION '{folder}'")
    assert embed(spark, load_run(unknown)).status == "unchanged"


def test_an_empty_source_is_refused_and_leaves_no_table(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows([])

    with pytest.raises(LimitError, match=r"limits\.min_rows is 1 and the source has 0 rows"):
        embed(spark, load_run(run_file()))

    assert not (tmp_path / "out/docs").exists()
