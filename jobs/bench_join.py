"""`shoal bench join`: pairs per second of the join against Spark's NEAREST BY in the same run, and what a worker holds.

Random unit vectors in two Delta tables, the 10 nearest of each left one. NEAREST BY gets the first REFERENCE_LEFT left
rows and REFERENCE_RIGHT right ones at most, for it takes as long for each pair whatever their number; what it and the
join find there is thrown away. Both read those rows from Spark's cache: reading vectors from Parquet takes as long as
the join of so few. The join of all rows reads Delta, is written as a Delta table, and looked at afterwards.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import ConfigError
from shoal.conf.run import SparkConfig
from shoal.jobs.knn import Side, join_sides
from shoal.jobs.meter import Figures, human, metered, metering, watched_workers
from shoal.udfs.knn_join import JoinOptions
from shoal.udfs.vectors import to_list_array

K = 10
REFERENCE_LEFT, REFERENCE_RIGHT = 100, 40_000
RUNS, COUNTED = 12, 5
"""Of the join beside NEAREST BY: the first also starts the Python workers, the median of the last ones counts."""

BLOCK_ROWS = 1000
SEEDS = {"left": 1, "right": 2}
CHECKED = 20
"""Left rows whose neighbours are looked for again, one by one, by numpy alone."""


def bench_join(
    num_left: int, num_right: int, dim: int, *, say: Callable[[str], None], settings: SparkConfig | None = None
) -> dict[str, Any]:
    """The document that `--json` prints. `settings`: how Spark is opened, a local master."""
    for flag, value in (("--left", num_left), ("--right", num_right), ("--dim", dim)):
        if value < 1:
            raise ConfigError(f"{flag} is {value}; ask for at least 1")
    cores = len(os.sched_getaffinity(0))
    settings = settings or SparkConfig(master=f"local[{cores}]")
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, metering(settings, "shoal bench") as spark:
        left = _written(spark, f"{folder}/left", "left", num_left, dim, cores)
        right = _written(spark, f"{folder}/right", "right", num_right, dim, cores)
        say(f"{num_left:,} x {num_right:,} vectors of {dim} numbers are written")
        reference = _reference(spark, left, right, dim, say)
        with watched_workers() as memory, metered(spark) as figures:
            _joined(spark, left, right, dim).write.format("delta").save(f"{folder}/pairs")
        say(f"join of all: {figures.seconds:.1f} s")
        return {
            "left": num_left,
            "right": num_right,
            "dim": dim,
            "k": K,
            "cores": cores,
            "reference": reference,
            "join": {
                **figures.public(),
                "pairs_per_second": round(num_left * num_right / figures.seconds),
                "worker_peak_bytes": memory.peak,
                "recall": _recall(spark.read.format("delta").load(f"{folder}/pairs"), left, right, dim),
            },
        }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    reference, all_of_it = found["reference"], found["join"]
    return [
        f"{reference['left']:,} x {reference['right']:,} x {found['dim']}, k {found['k']}, {found['cores']} cores",
        f"NEAREST BY        {reference['nearest_by_seconds']:8.2f} s",
        f"join, first run   {reference['join_seconds'][0]:8.2f} s",
        f"join, warm        {reference['join_warm_seconds']:8.2f} s",
        f"join : NEAREST BY {reference['ratio']:8.1f}",
        f"{found['left']:,} x {found['right']:,} x {found['dim']}",
        f"join              {all_of_it['seconds']:8.2f} s, {all_of_it['pairs_per_second']:,} pairs/s",
        f"shuffled          {human(all_of_it['shuffle_bytes'])}",
        f"largest worker    {human(all_of_it['worker_peak_bytes'])}",
        f"recall            {all_of_it['recall']}",
    ]


def _reference(spark: SparkSession, left: Side, right: Side, dim: int, say: Callable[[str], None]) -> dict[str, Any]:
    """NEAREST BY and the join on the same rows, few enough for the former, and whether they found the same."""
    left, right = _held(_first(left, REFERENCE_LEFT)), _held(_first(right, REFERENCE_RIGHT))
    nearest = left.rows.selectExpr("id AS left_id", "embedding AS l").nearestByJoin(
        right.rows.selectExpr("id AS right_id", "embedding AS r"),
        F.call_function("vector_inner_product", "l", "r"),
        K,
        "exact",
        "similarity",
    )
    nearest = nearest.select("left_id", "right_id")
    by_spark = _timed(spark, nearest).seconds
    say(f"NEAREST BY, {left.num_vectors:,} x {right.num_vectors:,}: {by_spark:.1f} s")
    by_join = [_timed(spark, _joined(spark, left, right, dim)).seconds for _ in range(RUNS)]
    warm = statistics.median(by_join[-COUNTED:])
    pairs = left.num_vectors * right.num_vectors
    for side in (left, right):
        side.rows.unpersist()
    return {
        "left": left.num_vectors,
        "right": right.num_vectors,
        "nearest_by_seconds": round(by_spark, 3),
        "join_seconds": [round(seconds, 3) for seconds in by_join],
        "join_warm_seconds": round(warm, 3),
        "nearest_by_pairs_per_second": round(pairs / by_spark),
        "join_pairs_per_second": round(pairs / warm),
        "ratio": round(by_spark / warm, 1),
    }


def _timed(spark: SparkSession, rows: DataFrame) -> Figures:
    with metered(spark) as figures:
        rows.write.format("noop").mode("overwrite").save()
    return figures


def _joined(spark: SparkSession, left: Side, right: Side, dim: int) -> DataFrame:
    return join_sides(spark, left, right, dim, JoinOptions(K, None))


def _held(side: Side) -> Side:
    """The same rows, in Spark's cache."""
    side.rows.cache().count()
    return side


def _first(side: Side, limit: int) -> Side:
    return Side(side.rows.where(F.col("id") < limit), side.keys, min(side.num_vectors, limit))


def _recall(pairs: DataFrame, left: Side, right: Side, dim: int) -> float:
    """Share of the true neighbours of CHECKED left rows that are among the pairs."""
    some = _first(left, CHECKED)
    found: dict[int, set[int]] = {row: set() for row in range(some.num_vectors)}
    for row in pairs.where(F.col("left_id") < some.num_vectors).collect():
        found[row["left_id"]].add(row["right_id"])
    queries_QD = vectors_of_block("left", 0, dim)[: some.num_vectors].astype(np.float64)
    scores_QN = np.concatenate(
        [
            queries_QD @ vectors_of_block("right", block, dim).T.astype(np.float64)
            for block in range(-(-right.num_vectors // BLOCK_ROWS))
        ],
        axis=1,
    )[:, : right.num_vectors]
    true = [set(row.tolist()) for row in np.argsort(-scores_QN, axis=1)[:, :K]]
    hits = sum(len(found[row] & neighbours) for row, neighbours in enumerate(true))
    return hits / sum(len(neighbours) for neighbours in true)


def vectors_of_block(side: str, block: int, dim: int) -> npt.NDArray[np.float32]:
    """Random unit vectors, float32 (BLOCK_ROWS, dim), the same for the same arguments."""
    vectors_ND = np.random.default_rng((SEEDS[side], block)).standard_normal((BLOCK_ROWS, dim))
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


def _written(spark: SparkSession, path: str, side: str, num_rows: int, dim: int, cores: int) -> Side:
    """A Delta table of `id` and `embedding`, made by the executors."""

    def blocks(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for block in batch.column(0).to_pylist():
                vectors_ND = vectors_of_block(side, block, dim)
                ids = pa.array(np.arange(BLOCK_ROWS, dtype=np.int64) + block * BLOCK_ROWS)
                embedding = to_list_array(vectors_ND, np.ones(BLOCK_ROWS, dtype=np.bool_))
                yield pa.RecordBatch.from_arrays([ids, embedding], names=["id", "embedding"])

    num_blocks = -(-num_rows // BLOCK_ROWS)
    made = spark.range(0, num_blocks, 1, min(num_blocks, 4 * cores)).mapInArrow(
        blocks, "id long, embedding array<float>"
    )
    made.where(F.col("id") < num_rows).write.format("delta").save(path)
    return Side(spark.read.format("delta").load(Path(path).as_posix()), ("id",), num_rows)
