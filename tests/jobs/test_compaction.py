"""Which files a compaction writes again, and which it leaves alone."""

from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.jobs.compaction import compact, size_of

pytestmark = pytest.mark.spark


def test_large_files_are_written_again_only_for_a_tenth_of_deleted_rows(spark: SparkSession, tmp_path: Path) -> None:
    sql = f"delta.`{tmp_path / 'table'}`"
    spark.sql(f"CREATE TABLE {sql} (id INT) USING delta TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    for start in (0, 100, 200):
        spark.range(start, start + 100).selectExpr("CAST(id AS INT) AS id").coalesce(1).write.format("delta").mode(
            "append"
        ).save(str(tmp_path / "table"))
    spark.sql(f"DELETE FROM {sql} WHERE id < 5 OR id BETWEEN 100 AND 119")
    found = size_of(spark, sql, small_bytes=1)
    assert (found.files, found.small_files, found.worn_files) == (3, 0, 1)
    assert (found.rows, found.deleted_rows) == (300, 25)
    assert found.deleted_share == pytest.approx(25 / 300)
    setting = "spark.databricks.delta.optimize.minFileSize"
    spark.conf.set(setting, "12345")
    try:
        compact(spark, sql, small_bytes=1)
        assert spark.conf.get(setting) == "12345"
    finally:
        spark.conf.unset(setting)
    found = size_of(spark, sql, small_bytes=1)
    assert (found.files, found.worn_files, found.rows, found.deleted_rows) == (3, 0, 280, 5)
    compact(spark, sql)
    found = size_of(spark, sql)
    assert (found.files, found.small_files, found.deleted_rows) == (1, 1, 0)
    assert spark.sql(f"SELECT count(*) FROM {sql}").collect()[0][0] == 275
    version = spark.sql(f"DESCRIBE HISTORY {sql} LIMIT 1").collect()[0]["version"]
    compact(spark, sql)
    assert spark.sql(f"DESCRIBE HISTORY {sql} LIMIT 1").collect()[0]["version"] == version
