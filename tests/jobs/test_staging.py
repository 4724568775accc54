"""Staging with a file that rots: what can still be read stays."""

from pathlib import Path

import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.jobs.layout import TableRef
from shoal.jobs.staging import append_wave, create_staging, mend_staging, staged_rows

pytestmark = pytest.mark.spark


@pytest.mark.parametrize("damage", ["other bytes", "gone"])
def test_what_cannot_be_read_is_dropped_and_the_rest_is_kept(spark: SparkSession, tmp_path: Path, damage: str) -> None:
    ref = TableRef(str(tmp_path / "docs"), None, str(tmp_path / "side car"))
    create_staging(spark, ref)
    for wave, fingerprint in enumerate(("aa", "aa", "bb")):
        vectors = spark.range(wave * 100, wave * 100 + 100, 1, 1).select(
            F.sha2(F.col("id").cast("string"), 256).cast("binary").alias("content_hash"),
            F.array(F.rand(1).cast("float"), F.rand(2).cast("float")).alias("embedding"),
            F.lit(1).alias("n_tokens"),
            F.expr("false").alias("truncated"),
            F.lit(None).cast("string").alias("error"),
            F.current_timestamp().alias("embedded_at"),
        )
        append_wave(vectors, ref, fingerprint=fingerprint, run_id="run", wave=str(wave))
    first, second = sorted((tmp_path / "side car" / "staging" / "fingerprint=aa").glob("*.parquet"))
    kept = {bytes(row["content_hash"]) for row in spark.read.parquet(str(second)).collect()}
    if damage == "gone":
        first.unlink()
    else:
        content = bytearray(first.read_bytes())
        content[len(content) // 3 :][:64] = b""
        first.write_bytes(bytes(255 - byte for byte in content))

    with pytest.raises((PySparkException, Py4JJavaError)) as caught:
        staged_rows(spark, ref, "aa").collect()
    assert not mend_staging(spark, ref, RuntimeError("[FAILED_READ_FILE] of the source, not of staging"))
    assert mend_staging(spark, ref, caught.value)

    left = staged_rows(spark, ref, "aa").collect()
    assert {bytes(row["content_hash"]) for row in left} == kept
    assert len(left) == 100
    assert staged_rows(spark, ref, "bb").count() == 100
