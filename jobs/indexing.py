"""Puts a table's rows into k-means cells, so that a search reads a few of them, and measures how many it must read.

    a sample -> centroids -> true neighbours of held-out rows -> cells to look in -> one commit

The cells are those of one build; rows that come later wait in the fresh cell, in which every query looks, until
`fold` puts them into theirs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import RefusedError
from shoal.jobs.cells import (
    CELL,
    FRESH,
    Index,
    damaged,
    number_of_cells,
    read_build,
    write_build,
)
from shoal.jobs.hashing import quoted
from shoal.jobs.nearest import nearest
from shoal.jobs.operation import Operation
from shoal.jobs.publish import Target, publish_index
from shoal.jobs.published import Published, State
from shoal.udfs.cells import make_assign, nearest_cells, probes_for, ranks_of_cells, recall_by_probes, train_cells

VERB = "index"
INDEXED, FOLDED = "indexed", "folded"
RECALL = 0.95

SAMPLE_PER_CELL, MAX_SAMPLE_BYTES = 256, 600 * 2**20
"""What centroids are trained on: more per cell moves them by little, and all of it comes to the driver."""

HELD_OUT = 200
MEASURED_K = (10, 100, 1000)
MAX_HELD_SHARE = 0.2
CURVE_POINTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

MAX_DRIFT = 0.15
"""Share by which the rows folded in may be further from their centroids than those of the build."""

SEED = 1


def build(operation: Operation, *, cells: int | None = None, recall: float = RECALL) -> dict[str, Any]:
    """Trains, measures and publishes under the caller's lease; the record."""
    spark, published = operation.spark, operation.published
    _require_ours(spark, published)
    rows = published.rows(spark).drop(CELL)
    num_rows = rows.where(F.col("error").isNull()).count()
    if num_rows == 0:
        raise RefusedError(
            f"table {published.ref} has no row with a vector, so there is nothing to index; `shoal errors` says why"
        )
    dim = int(published.encoder["identity"]["dim"])
    num_cells = cells or number_of_cells(num_rows, dim)
    operation.say(f"index: {num_rows:,} rows into {num_cells:,} cells")
    drawn = _Draw(rows.where(F.col("error").isNull()), [*published.keys, "chunk_index"], num_rows, num_cells, dim)
    sample_ND = drawn.sample()
    if len(sample_ND) == 0:  # all of a handful of rows were held out
        sample_ND = _vectors(drawn.rows)
    centroids_CD = train_cells(sample_ND, num_cells, seed=SEED)
    operation.step("cells trained")
    assign = F.pandas_udf(make_assign(centroids_CD), "int")  # type: ignore[call-overload]
    placed = rows.withColumn(CELL, assign("embedding"))
    names, held_QD = drawn.held_out()
    curves = _recall(placed, drawn.by, names, held_QD, centroids_CD)
    sizes_C = np.bincount(nearest_cells(sample_ND, centroids_CD), minlength=len(centroids_CD))
    build_id = operation.run_id
    made = Index(
        build=build_id,
        cells=len(centroids_CD),
        rows=num_rows,
        target=recall,
        probes={k: probes_for(curve_C, recall, len(names)) for k, curve_C in curves.items()},
        recall={k: _points(curve_C) for k, curve_C in curves.items()},
        fit=round(_fit(held_QD if len(names) else sample_ND, centroids_CD), 6),
        balance=round(float(sizes_C.max() / sizes_C.mean()), 3),
        asked=cells,
    )
    operation.lease.check()
    write_build(spark, published.ref, build_id, centroids_CD)
    operation.step("cells written")

    def write(target: Target, state: State) -> int:
        return publish_index(spark, target, gathered(placed, published), made, state)

    reason = f"indexed in {made.cells} cells"
    return operation.publish(write, INDEXED, index=made.public(), reason=reason)


def fold(operation: Operation) -> dict[str, Any] | None:
    """Puts the rows of the fresh cell into theirs, in one MERGE that changes nothing else.

    Under the caller's lease. None: nothing was done, as was said, where others have changed rows, which a commit of
    ours would hide, and where the centroids are gone.
    `fit` of the record's `fold` is the mean cosine of these rows with their centroids: well below that of the build,
    the rows to come are unlike those that the centroids were trained on.
    """
    spark, published = operation.spark, operation.published
    made = published.index
    assert made is not None  # noqa: S101 - there are fresh rows in tables with an index alone
    if published.changed_by_others(spark):
        operation.say("fresh rows stay where they are: others wrote to the table, see `shoal audit`")
        return None
    centroids_CD = read_build(spark, published.ref, made.build)
    if centroids_CD is None or len(centroids_CD) != made.cells:
        operation.say(f"fresh rows stay where they are: {damaged(published.ref, made)}")
        return None
    fresh = published.rows(spark).where(F.col(CELL) == FRESH)
    assign = F.pandas_udf(make_assign(centroids_CD), "int")  # type: ignore[call-overload]
    sample_ND = _vectors(fresh.limit(SAMPLE_PER_CELL * 4))
    fit = round(_fit(sample_ND, centroids_CD), 6) if len(sample_ND) else None
    told = {"build": made.build, "rows": fresh.count(), "fit": fit}
    by = [*published.keys, "chunk_index"]
    view = f"shoal_fold_{operation.run_id.replace('-', '_')}"
    named = [quoted(name) for name in by]
    fresh.select(*named, assign("embedding").alias(CELL)).createOrReplaceTempView(view)
    on = " AND ".join([f"t.{CELL} = {FRESH}", *[f"t.{name} <=> s.{name}" for name in named]])
    try:
        return operation.commit(
            f"MERGE INTO {published.ref.sql} AS t USING {view} AS s ON {on} "
            f"WHEN MATCHED THEN UPDATE SET t.{CELL} = s.{CELL}",
            FOLDED,
            fold=told,
            reason=f"{told['rows']} fresh rows folded into their cells",
        )
    finally:
        spark.catalog.dropTempView(view)


def gathered(placed: DataFrame, published: Published) -> DataFrame:
    """The rows as they are to be written: those of a cell in one task, by key, so that each cell is one file."""
    return placed.repartition(F.col(CELL)).sortWithinPartitions(CELL, *[quoted(key) for key in published.keys])


def has_drifted(fit: float, made: Index) -> bool:
    """Whether rows with this mean product with their centroids are unlike those that the index was built on."""
    return fit < made.fit * (1 - MAX_DRIFT)


def _require_ours(spark: SparkSession, published: Published) -> None:
    if published.changed_by_others(spark):
        newest = published.foreign[0]
        raise RefusedError(
            f"table {published.ref}: version {newest.version} ({newest.operation} by {newest.user or 'unknown'}) was "
            "not written by Shoal, and to write the table anew would hide what it did; `shoal embed` puts it right, "
            "then index it",
            code="FOREIGN_COMMITS",
        )


@dataclass(frozen=True)
class _Draw:
    """Rows drawn by the hash of what names them: those held out are never among those trained on."""

    rows: DataFrame
    by: list[str]
    num_rows: int
    num_cells: int
    dim: int

    def sample(self) -> npt.NDArray[np.float32]:
        """What centroids are trained on, float32 (N, D)."""
        wanted = min(self.num_cells * SAMPLE_PER_CELL, MAX_SAMPLE_BYTES // (4 * self.dim))
        end = self._held + wanted / self.num_rows
        return _vectors(self.rows.where((self._place >= self._held) & (self._place < end)))

    def held_out(self) -> tuple[list[tuple[Any, ...]], npt.NDArray[np.float32]]:
        """Names and vectors of about HELD_OUT rows, in the same order."""
        found = self.rows.where(self._place < self._held).select(*[quoted(name) for name in self.by], "embedding")
        rows = found.collect()
        names = [tuple(row[name] for name in self.by) for row in rows]
        return names, np.array([row["embedding"] for row in rows], dtype=np.float32)

    @property
    def _place(self) -> Column:
        """Where a row stands between 0 and 1, evenly."""
        return F.pmod(F.xxhash64(*[quoted(name) for name in self.by]), F.lit(2**31)) / 2**31

    @property
    def _held(self) -> float:
        return min(HELD_OUT / self.num_rows, MAX_HELD_SHARE)


def _recall(
    placed: DataFrame,
    by: list[str],
    names: list[tuple[Any, ...]],
    queries_QD: npt.NDArray[np.float32],
    centroids_CD: npt.NDArray[np.float32],
) -> dict[int, npt.NDArray[np.float64]]:
    """By k, recall by the number of cells looked in: an exact search for held-out rows, each row itself left out."""
    if not names:
        return {k: np.ones(len(centroids_CD)) for k in MEASURED_K}
    ranks_QC = ranks_of_cells(queries_QD, centroids_CD)
    hits = nearest(placed, [*by, CELL], queries_QD, max(MEASURED_K) + 1)
    ranks: dict[int, list[int]] = {k: [] for k in MEASURED_K}
    for query, (name, found) in enumerate(zip(names, hits, strict=True)):
        others = [row[CELL] for row in found if tuple(row[column] for column in by) != name]
        for k in MEASURED_K:
            ranks[k] += [int(ranks_QC[query, cell]) for cell in others[:k]]
    alone_C = np.ones(len(centroids_CD))
    return {k: recall_by_probes(np.array(ranks[k]), len(centroids_CD)) if ranks[k] else alone_C for k in MEASURED_K}


def _points(curve_C: npt.NDArray[np.float64]) -> dict[int, float]:
    """Some points of a recall curve, with its end."""
    shown = [number for number in CURVE_POINTS if number < len(curve_C)] + [len(curve_C)]
    return {number: round(float(curve_C[number - 1]), 6) for number in shown}


def _vectors(rows: DataFrame) -> npt.NDArray[np.float32]:
    """The vectors of these rows, float32 (N, D); they come to the driver."""
    column = rows.select("embedding").toArrow().column("embedding").combine_chunks()
    num_rows = len(column)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(num_rows, -1).astype(np.float32, copy=False) if num_rows else np.empty((0, 1), np.float32)


def _fit(vectors_ND: npt.NDArray[np.float32], centroids_CD: npt.NDArray[np.float32]) -> float:
    """Mean cosine of the vectors with their own centroids."""
    norms_N = np.linalg.norm(vectors_ND, axis=1)
    products_N = np.einsum("nd,nd->n", vectors_ND, centroids_CD[nearest_cells(vectors_ND, centroids_CD)])
    return float(np.mean(products_N[norms_N > 0] / norms_N[norms_N > 0]))
