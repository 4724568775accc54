"""What a served table is read as, and how it is noticed that it has moved."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import DestinationError
from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.served_table import Column, has_been_moved, has_moved, read_served

pytestmark = pytest.mark.spark


def test_a_table_is_read_with_its_columns_and_encoder_and_moves_with_every_commit(
    spark: SparkSession, run_file: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows([{"id": "a", "body": "one", "at": {"x-y": 1}}])
    source = {
        "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "columns": ["at"],
        "schema": "id STRING, body STRING, at STRUCT<`x-y`: INT>",
    }  # fmt: skip
    embed(spark, load_run(run_file(source=source, destination={"table": "served_docs"})))
    location = spark.sql("DESCRIBE DETAIL served_docs").collect()[0]["location"]
    try:
        by_name = read_served(spark, "docs", "served_docs")
        by_path = read_served(spark, "docs", location.removeprefix("file:"))
        assert str(by_name.ref) == "spark_catalog.default.served_docs"
        for served in (by_name, by_path):
            assert served.relation.endswith("served_docs` VERSION AS OF 0"), "a name may come to mean another folder"
            assert not has_been_moved(spark, served)
        assert by_name.keys == (Column("id", "STRING"),)
        assert by_name.metadata == (Column("at", "STRUCT<`x-y`: INT>"),)
        assert (by_name.dim, by_name.has_text, by_name.problem) == (8, True, None)
        assert by_name.encoder_key == by_path.encoder_key
        assert not has_moved(spark, by_name)

        spark.sql("ALTER TABLE served_docs SET TBLPROPERTIES ('a' = 'b')")

        assert has_moved(spark, by_name)
        assert has_moved(spark, by_path)
        assert not has_moved(spark, read_served(spark, "docs", "served_docs"))
    finally:
        spark.sql("DROP TABLE served_docs")
    assert has_moved(spark, by_name)
    embed(spark, load_run(run_file(source=source, destination={"path": "elsewhere"})))
    spark.sql(f"CREATE TABLE served_docs USING delta LOCATION '{tmp_path / 'elsewhere'}'")
    try:
        assert has_been_moved(spark, by_name)
    finally:
        spark.sql("DROP TABLE served_docs")
    with pytest.raises(DestinationError, match="there is no such table") as caught:
        read_served(spark, "docs", str(tmp_path / "none"))
    assert caught.value.code == "TABLE_NOT_FOUND"


@pytest.mark.long
def test_a_table_made_anew_at_the_same_version_is_another_one(
    spark: SparkSession, run_file: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows([{"id": "a", "body": "one"}])
    embed(spark, load_run(run_file()))
    before = read_served(spark, "docs", str(tmp_path / "out" / "docs"))
    shutil.rmtree(tmp_path / "out")

    embed(spark, load_run(run_file(encoder={"model": "hash:8", "query_prompt": "ask: "})))

    after = read_served(spark, "docs", str(tmp_path / "out" / "docs"))
    assert before.version == after.version == 0
    assert before.encoder_key != after.encoder_key
    assert has_moved(spark, before)
