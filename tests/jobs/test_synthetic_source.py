"""What the benches' changes do to the source, row by row."""

from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.jobs.synthetic_source import Change, SyntheticSource

pytestmark = pytest.mark.spark


def test_of_ten_rows_touched_eight_are_changed_one_goes_and_one_comes(spark: SparkSession, tmp_path: Path) -> None:
    source = SyntheticSource(spark, tmp_path, 1000)
    source.create()
    before = contents(spark, source)

    source.apply(Change("recent", 0.1), "one")

    after = contents(spark, source)
    changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert (len(changed), before.keys() - after.keys()) == (80, {key for key in range(900, 1000) if key % 10 == 3})
    assert after.keys() - before.keys() == set(range(1000, 1010))
    assert min(changed) == 900
    assert len({body for body, _ in after.values()}) == len(after) == 1000

    source.apply(Change("metadata", 0.5), "two")

    labelled = {key for key, (_, label) in contents(spark, source).items() if label == "two"}
    assert 400 < len(labelled) < 600


def contents(spark: SparkSession, source: SyntheticSource) -> dict[int, tuple[str, str]]:
    return {row["id"]: (row["body"], row["label"]) for row in spark.read.format("delta").load(source.path).collect()}
