"""The benches' figures against what is known to have been read and written."""

from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.run import SparkConfig
from shoal.jobs.meter import UNSEEN, bytes_on_disk, human, metered, metering

pytestmark = pytest.mark.spark


def test_bytes_are_those_of_the_files_and_only_of_the_columns_that_were_read(
    spark: SparkSession, tmp_path: Path
) -> None:
    numbers = F.transform(F.sequence(F.lit(1), F.lit(64)), lambda _: F.rand(4))
    rows = spark.range(0, 20_000, 1, 2).select(
        F.sha2(F.col("id").cast("string"), 256).alias("hash"), numbers.alias("embedding")
    )
    folder = tmp_path / "table"
    with metering(SparkConfig(), "unused") as session:
        with metered(session) as written:
            rows.write.parquet(str(folder))
        with metered(session) as whole:
            spark.read.parquet(str(folder)).write.format("noop").mode("overwrite").save()
        with metered(session) as hashes:
            spark.read.parquet(str(folder)).select("hash").write.format("noop").mode("overwrite").save()

    size = bytes_on_disk(folder)
    assert size > 10_000_000
    assert written.bytes_written == pytest.approx(size, rel=0.02)
    assert whole.bytes_read == pytest.approx(size, rel=0.1)
    assert 20_000 * 32 < hashes.bytes_read < 0.2 * size
    assert spark.conf.get(UNSEEN, None) is None


def test_bytes_for_people_have_three_digits_or_so() -> None:
    assert [human(n) for n in (0, 999, 1000, 13_420_000, 2.5e12)] == ["0 B", "999 B", "1.0 kB", "13.4 MB", "2.5 TB"]
