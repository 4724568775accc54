"""Which files a compaction writes again, and which it leaves alone."""

from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.jobs.compaction import compact, size_of

pytestmark = pytest.mark.spark


@pytest.fixture
def sql(spark: SparkSession, tmp_path: Path) -> str:
    """A table of three files with a hundred rows each."""
    sql = f"delta.`{tmp_path / 'table'}`"
    spark.sql(f"CREATE TABLE {sql} (id INT) USING delta TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    for start in (0, 100, 200):
        rows = spark.range(start, start + 100, 1, 1).selectExpr("CAST(id AS INT) AS id")
        rows.write.format("delta").mode("append").save(str(tmp_path / "table"))
    return sql


def newest(spark: SparkSession, sql: str) -> int:
    version: int = spark.sql(f"DESCRIBE HISTORY {sql} LIMIT 1").collect()[0]["version"]
    return version


def test_large_files_are_written_again_only_for_a_tenth_of_deleted_rows(spark: SparkSession, sql: str) -> None:
    spark.sql(f"DELETE FROM {sql} WHERE id < 5 OR id BETWEEN 100 AND 110 OR id BETWEEN 200 AND 210")
    found = size_of(spark, sql, small_bytes=1)
    assert (found.files, found.small_files, found.worn_files) == (3, 0, 2)
    assert (found.rows, found.deleted_rows) == (300, 27)
    assert found.deleted_share == pytest.approx(27 / 300)
    setting = "spark.databricks.delta.optimize.minFileSize"
    spark.conf.set(setting, "12345")
    try:
        compact(spark, sql, small_bytes=1)
        assert spark.conf.get(setting) == "12345"
    finally:
        spark.conf.unset(setting)
    found = size_of(spark, sql, small_bytes=1)
    assert (found.files, found.worn_files, found.rows, found.deleted_rows) == (2, 0, 278, 5)
    compact(spark, sql)
    found = size_of(spark, sql)
    assert (found.files, found.small_files, found.deleted_rows) == (1, 1, 0)
    assert spark.sql(f"SELECT count(*) FROM {sql}").collect()[0][0] == 273
    version = newest(spark, sql)
    compact(spark, sql)
    assert newest(spark, sql) == version, "there was nothing to do"


def test_a_worn_file_that_has_none_to_join_waits_until_the_whole_table_is_worn(spark: SparkSession, sql: str) -> None:
    spark.sql(f"DELETE FROM {sql} WHERE id < 5 OR id BETWEEN 100 AND 119")
    version = newest(spark, sql)
    compact(spark, sql, small_bytes=1)
    assert newest(spark, sql) == version
    spark.sql(f"DELETE FROM {sql} WHERE id BETWEEN 120 AND 139")
    compact(spark, sql, small_bytes=1)
    found = size_of(spark, sql, small_bytes=1)
    assert (found.worn_files, found.rows, found.deleted_rows) == (0, 255, 0)
