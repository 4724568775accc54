"""`shoal index --report`: recall, files and time of a search by the cells it looks in, as a table and a plot.

Recall comes from an exact search for rows drawn from the table as it is now, fresh rows included, and is thus also what
drift has made of it. Files and time are those of the SQL function that users call.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import ConfigError, RefusedError
from shoal.jobs.cells import CELL, FRESH, Index, damaged, read_build
from shoal.jobs.hashing import quoted
from shoal.jobs.indexing import CURVE_POINTS
from shoal.jobs.nearest import nearest
from shoal.jobs.operation import table_of_ours
from shoal.jobs.published import Published
from shoal.jobs.sql_functions import install
from shoal.udfs.cells import ranks_of_cells, recall_by_probes

K = 10
QUERIES, TIMED = 100, 5
"""Rows drawn to measure recall, and those of them that the function is called with."""

NAME = "shoal_report"
PLOTS = (".png", ".svg", ".pdf")


def index_report(
    spark: SparkSession, table: str, *, plot: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The document of `--json`: the build, and a point for each number of cells looked in; the last is exact.

    Reads only. Raises DestinationError when there is no such table, RefusedError when it has no index or too few rows.
    """
    if plot is not None and plot.suffix not in PLOTS:
        raise ConfigError(f"--plot '{plot}': write a file name that ends in {', '.join(PLOTS)}")
    published = table_of_ours(spark, table)
    made = published.index
    if made is None:
        raise RefusedError(f"table {published.ref} has no index; `shoal index {table}` builds it")
    centroids_CD = read_build(spark, published.ref, made.build)
    if centroids_CD is None or len(centroids_CD) != made.cells:
        raise damaged(published.ref, made)
    names, queries_QD = _drawn(published, spark)
    if len(names) < 2:
        raise RefusedError(f"table {published.ref} has {len(names)} rows with a vector; recall needs neighbours")
    say(f"exact neighbours of {len(names)} rows")
    recall_C = _recall(spark, published, made, names, queries_QD, centroids_CD)
    served = install(spark, {NAME: table}).served[NAME].index
    assert served is not None  # noqa: S101 - the centroids have just been read
    # With fewer cells a function looks in more of its own accord, to be sure of K rows.
    least = next((cells for chunks, cells in served.enough if chunks >= K), made.cells)
    _search(spark, queries_QD[0], made.cells)  # the first query also compiles and warms up
    points = []
    for probes in [number for number in CURVE_POINTS if least <= number < made.cells] + [made.cells]:
        measured = [_search(spark, query_D, probes) for query_D in queries_QD[:TIMED]]
        seconds = statistics.median(took for took, _ in measured)
        files = statistics.mean(number for _, number in measured)
        point = {"probes": probes, "recall": round(float(recall_C[probes - 1]), 4), "files": files, "seconds": seconds}
        points.append(point)
        say(_line(point))
    document = {
        "table": str(published.ref),
        "version": published.version,
        "k": K,
        "index": made.public(),
        "points": points,
        "plot": str(plot) if plot else None,
    }
    if plot is not None:
        _draw(document, made, plot)
    return document


def files_read(answer: DataFrame) -> int:
    """Data files that a query has read which has run, by the metrics of its scans; not those of its subqueries."""
    plans, total = [answer._jdf.queryExecution().executedPlan()], 0
    while plans:
        plan = plans.pop()
        name = plan.nodeName()
        if name.startswith("AdaptiveSparkPlan"):
            plans.append(plan.executedPlan())
        elif "QueryStage" in name:
            plans.append(plan.plan())
        elif plan.metrics().contains("numFiles"):
            total += plan.metrics().get("numFiles").get().value()
        children = plan.children()
        plans += [children.apply(position) for position in range(children.size())]
    return total


def lines(found: dict[str, Any]) -> list[str]:
    """The report for people."""
    made = found["index"]
    told = [f"{found['table']} version {found['version']}: {made['rows']:,} vectors in {made['cells']:,} cells", HEADER]
    told += [_line(point) for point in found["points"]]
    return told + ([f"plot      {found['plot']}"] if found["plot"] else [])


HEADER = f"{'cells':>8}{'recall@10':>12}{'files':>8}{'seconds':>10}"


def _line(point: dict[str, Any]) -> str:
    return f"{point['probes']:>8,}{point['recall']:>12.3f}{point['files']:>8,.0f}{point['seconds']:>10.3f}"


def _drawn(published: Published, spark: SparkSession) -> tuple[list[tuple[Any, ...]], npt.NDArray[np.float32]]:
    """Names and vectors of QUERIES rows, others with each version of the table."""
    by = [*published.keys, "chunk_index"]
    rows = published.rows(spark).where(F.col("error").isNull())
    place = F.xxhash64(*[quoted(name) for name in by], F.lit(published.version))
    drawn = rows.orderBy(place).limit(QUERIES).select(*[quoted(name) for name in by], "embedding").collect()
    return [tuple(row[name] for name in by) for row in drawn], np.array([r["embedding"] for r in drawn], np.float32)


def _recall(
    spark: SparkSession,
    published: Published,
    made: Index,
    names: list[tuple[Any, ...]],
    queries_QD: npt.NDArray[np.float32],
    centroids_CD: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """Recall of the K nearest by the number of cells looked in; a row itself is left out, the fresh cell never."""
    by = [*published.keys, "chunk_index"]
    ranks_QC = ranks_of_cells(queries_QD, centroids_CD)
    ranks: list[int] = []
    hits = nearest(published.rows(spark), [*by, CELL], queries_QD, K + 1)
    for query, (name, found) in enumerate(zip(names, hits, strict=True)):
        others = [row[CELL] for row in found if tuple(row[column] for column in by) != name][:K]
        # Others may have put rows into cells that there are not: no search finds these but one in all cells.
        ranks += [
            0 if cell in (None, FRESH) else int(ranks_QC[query, cell]) if cell < made.cells else made.cells - 1
            for cell in others
        ]
    return recall_by_probes(np.array(ranks), len(centroids_CD))


def _search(spark: SparkSession, query_D: npt.NDArray[np.float32], probes: int) -> tuple[float, int]:
    """Seconds and files of one call of the function."""
    vector = ", ".join(f"{value:.8e}" for value in query_D.tolist())
    answer = spark.sql(f"SELECT * FROM {NAME}_search_vector(array({vector}), {K}, {probes})")
    began = time.monotonic()
    answer.collect()
    return round(time.monotonic() - began, 4), files_read(answer)


def _draw(found: dict[str, Any], made: Index, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4))
    points = found["points"]
    probes = [point["probes"] for point in points]
    left.plot(probes, [point["recall"] for point in points], "o-", color="tab:blue", label=f"recall@{K}")
    left.axhline(made.target, color="tab:blue", linestyle=":", label="target")
    left.set(xscale="log", xlabel="cells looked in", ylabel=f"recall@{K}", ylim=(0, 1.05))
    right = left.twinx()
    right.plot(probes, [point["seconds"] for point in points], "s--", color="tab:orange", label="seconds")
    right.set(ylabel="seconds", ylim=(0, None))
    figure.legend(loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
