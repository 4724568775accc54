"""The index of a published table: cells in its partitions, centroids beside it, a property that says which belong.

published    cell int, its partition column: a cell of the build, FRESH for rows since, NULL without a vector
cells        build, cell, centroid, built_at: append-only, so that a restored table finds its build again
property     INDEX_PROPERTY: the build and what was measured on it
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import RefusedError
from shoal.conf.run import MAX_CELLS
from shoal.jobs.compaction import live_files, physical_name
from shoal.jobs.layout import TableRef, create_delta, is_delta, read_delta
from shoal.udfs.vectors import to_list_array

CELL = "cell"
FRESH = -1
"""The cell of rows that came since the build: every query looks in it."""

INDEX_PROPERTY = "shoal.index"
CELLS_DDL = "build string, cell int, centroid array<float>, built_at timestamp"

# A file per cell: small enough that a few of them are a small part of the table, large enough to be worth opening.
MIN_CELL_BYTES, MAX_CELL_BYTES = 4 * 2**20, 128 * 2**20
MANY_CELLS = 256
"""Cells grow up to MAX_CELL_BYTES before there are more of them than this."""


@dataclass(frozen=True)
class Index:
    """One build: its cells, and the cells that a query for k rows has to look in to find the share `target`."""

    build: str
    cells: int
    rows: int
    """Rows with a vector at the build."""
    target: float
    probes: dict[int, int]
    """k -> cells to look in, for the k that were measured."""
    recall: dict[int, dict[int, float]]
    """k -> cells looked in -> share of the true neighbours found, on rows that the centroids were not trained on."""
    fit: float
    """Mean cosine of rows that the centroids were not trained on with their own centroid."""
    balance: float
    """Rows of the largest cell, in means of all cells."""
    asked: int | None = None
    """The number of cells that somebody asked for, None where it came from the size of the table."""

    def public(self) -> dict[str, Any]:
        return asdict(self)

    def to_property(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_property(cls, text: str) -> Self:
        found = json.loads(text)
        probes = {int(k): int(number) for k, number in found["probes"].items()}
        recall = {int(k): {int(n): float(r) for n, r in curve.items()} for k, curve in found["recall"].items()}
        return cls(**{**found, "probes": probes, "recall": recall})


@dataclass(frozen=True)
class CellSize:
    """What one cell holds now: files, bytes, and rows, those marked as deleted left out."""

    files: int
    bytes: int
    rows: int
    last_chunk: int
    """The greatest chunk_index of any row in it."""


def damaged(ref: TableRef, made: Index) -> RefusedError:
    """The error for a table whose centroids are gone."""
    return RefusedError(
        f"table {ref}: the centroids of its index (build {made.build}) are not in {ref.cells}; `shoal index` builds it "
        "anew",
        code="INDEX_DAMAGED",
    )


def number_of_cells(num_rows: int, dim: int) -> int:
    """For so many float32 vectors: at first one per MIN_CELL_BYTES, MANY_CELLS for long, then per MAX_CELL_BYTES."""
    num_bytes = num_rows * dim * 4
    wanted = max(min(num_bytes // MIN_CELL_BYTES, MANY_CELLS), num_bytes // MAX_CELL_BYTES)
    return int(min(max(wanted, 2), MAX_CELLS))


def fresh_cell(embedding: Column) -> Column:
    """The cell of a row that comes now, by its vector."""
    return F.when(embedding.isNotNull(), F.lit(FRESH)).cast("int")


def cell_sizes(spark: SparkSession, sql: str) -> dict[int | None, CellSize]:
    """By cell, from the log alone: one row per cell comes to the driver."""
    cell = F.col("partitionValues")[physical_name(spark, sql, CELL)].cast("int")
    rows = F.get_json_object("stats", "$.numRecords").cast("bigint")
    last = F.get_json_object("stats", f"$.maxValues['{physical_name(spark, sql, 'chunk_index')}']")
    deleted = F.coalesce(F.col("deletionVector.cardinality"), F.lit(0))
    sizes = (
        live_files(spark, sql)
        .groupBy(cell.alias(CELL))
        .agg(
            F.count(F.lit(1)).alias("files"),
            F.sum("size").alias("bytes"),
            F.sum(F.coalesce(rows, F.lit(0)) - deleted).alias("rows"),
            F.coalesce(F.max(last.cast("int")), F.lit(0)).alias("last_chunk"),
        )
        .collect()
    )
    return {row[CELL]: CellSize(row["files"], row["bytes"], row["rows"], row["last_chunk"]) for row in sizes}


def write_build(spark: SparkSession, ref: TableRef, build: str, centroids_CD: npt.NDArray[np.float32]) -> None:
    """Adds the centroids of a build; it means nothing until the published table names it."""
    create_delta(spark, ref.cells, CELLS_DDL)
    num_cells = len(centroids_CD)
    table = pa.table(
        {
            "build": pa.array([build] * num_cells),
            CELL: pa.array(range(num_cells), pa.int32()),
            "centroid": to_list_array(centroids_CD, np.ones(num_cells, dtype=np.bool_)),
        }
    )
    rows = spark.createDataFrame(table).withColumn("built_at", F.current_timestamp())
    # One file of a build: a query reads no other.
    rows.coalesce(1).write.format("delta").mode("append").save(ref.cells)


def has_build(spark: SparkSession, ref: TableRef, made: Index) -> bool:
    """Whether all centroids of a build are there; they stay on executors."""
    if not is_delta(spark, ref.cells):
        return False
    return (
        read_delta(spark, ref.cells).where(F.col("build") == made.build).select(CELL).distinct().count() == made.cells
    )


def read_build(spark: SparkSession, ref: TableRef, build: str) -> npt.NDArray[np.float32] | None:
    """Centroids float32 (C, D) of a build, None where it is not there or not whole."""
    if not is_delta(spark, ref.cells):
        return None
    rows = read_delta(spark, ref.cells).where(F.col("build") == build).orderBy(CELL).select(CELL, "centroid").collect()
    if not rows or [row[CELL] for row in rows] != list(range(len(rows))):
        return None
    return np.array([row["centroid"] for row in rows], dtype=np.float32)
