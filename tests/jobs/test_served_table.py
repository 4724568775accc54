"""What a served table is read as, and how it is noticed that it has moved."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import DestinationError
from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.served_table import Column, has_moved, read_served

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
        assert by_name.relation == "`spark_catalog`.`default`.`served_docs` VERSION AS OF 0"
        assert by_path.relation.endswith("served_docs` VERSION AS OF 0")
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
    with pytest.raises(DestinationError, match="there is no such table") as caught:
        read_served(spark, "docs", str(tmp_path / "none"))
    assert caught.value.code == "TABLE_NOT_FOUND"
