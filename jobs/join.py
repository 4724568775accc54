"""`shoal join`: for every chunk of a published table its nearest of another one, or what is alike within one."""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import ConfigError, DestinationError, RunError, first_line
from shoal.jobs.filesystem import absolute
from shoal.jobs.hashing import quoted
from shoal.jobs.knn import Side, cells_of, join_self, join_sides
from shoal.jobs.layout import TableRef, table_named
from shoal.jobs.prepare import worker_error
from shoal.jobs.published import USER_METADATA, Published, exists, read_settled
from shoal.jobs.session import with_settings
from shoal.udfs.knn_join import JoinOptions

JOIN_PROPERTY = "shoal.join"
"""What a result says of itself: from which versions of which tables, with which k, threshold and fingerprint."""

DEFAULT_K = 10


@dataclass(frozen=True)
class _Input:
    """One side at the version that was read, with its counts."""

    published: Published
    rows: DataFrame
    num_rows: int
    num_vectors: int

    @property
    def side(self) -> Side:
        return Side(self.rows, (*self.published.keys, "chunk_index"), self.num_vectors)

    def public(self) -> dict[str, Any]:
        return {
            "table": str(self.published.ref),
            "version": self.published.version,
            "rows": self.num_rows,
            "without_vector": self.num_rows - self.num_vectors,
        }


def join(
    spark: SparkSession,
    left: str,
    right: str,
    out: str,
    *,
    k: int | None = None,
    threshold: float | None = None,
    probes: int | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the pairs to `out` in one commit and returns the document that `--json` prints.

    Without k all pairs at or above the threshold, without both the 10 nearest; with `probes` each left chunk looks in
    so many cells of the right table's index, and the fresh one, and may miss some. Raises DestinationError when a table
    is not there, or `out` is something that this verb did not make; ConfigError when the tables have different
    encoders, or there is no index to look in; RefusedError when the index is damaged.
    """
    began = time.monotonic()
    options = _options(k, threshold)
    if probes is not None and probes < 1:
        raise ConfigError(f"--probes is {probes}; look in at least 1 cell")
    target, is_there = _target(spark, out)
    one = _input(spark, left)
    other = _input(spark, right, one)
    _require_one_encoder(one.published, other.published)
    cells = None if probes is None else cells_of(spark, other.published, other.rows, probes)
    is_self = one.published.location == other.published.location
    dim = int(one.published.encoder["identity"]["dim"])
    looked_in = {"probes": cells.probes, "of": len(cells.centroids_CD)} if cells else None
    told = f", in {looked_in['probes']} of {looked_in['of']} cells" if looked_in else ""
    say(f"joining {one.num_vectors:,} vectors with {'themselves' if is_self else f'{other.num_vectors:,}'}{told}")
    made_from = {
        "run_id": uuid.uuid4().hex,
        "left": {"table": str(one.published.ref), "version": one.published.version},
        "right": {"table": str(other.published.ref), "version": other.published.version},
        "self": is_self,
        "k": options.k,
        "threshold": options.threshold,
        "cells": looked_in,
        "fingerprint": one.published.fingerprint,
    }
    try:
        pairs = (
            join_self(spark, one.side, dim, options, cells)
            if is_self
            else join_sides(spark, one.side, other.side, dim, options, cells)
        )
        written = _write(spark, target, pairs, made_from, is_there=is_there)
    except AnalysisException as error:
        raise DestinationError(f"--out '{out}' cannot be written: {first_line(error)}") from error
    except (PySparkException, Py4JJavaError) as error:
        raise worker_error(error) from error
    scored = one.num_vectors * (one.num_vectors - 1) // 2 if is_self else one.num_vectors * other.num_vectors
    return {
        "status": "written",
        "table": str(target),
        **written,
        "left": one.public(),
        "right": other.public(),
        "self": is_self,
        "k": options.k,
        "threshold": options.threshold,
        "cells": looked_in,
        "fingerprint": one.published.fingerprint,
        "pairs_scored": None if looked_in else scored,
        "seconds": round(time.monotonic() - began, 3),
    }


def lines(document: dict[str, Any]) -> list[str]:
    """The document for people."""

    def told(side: dict[str, Any]) -> str:
        without = f", {side['without_vector']:,} without a vector" if side["without_vector"] else ""
        return f"{side['table']} version {side['version']}: {side['rows']:,} chunks{without}"

    scored, cells, seconds = document["pairs_scored"], document["cells"], document["seconds"]
    compared = (
        f"compared  each chunk with {cells['probes']} of {cells['of']} cells and fresh rows in {seconds:.1f} s"
        if cells
        else f"scored    {scored:,} pairs in {seconds:.1f} s: {scored / max(seconds, 1e-3):,.0f} pairs/s"
    )
    return [
        f"left      {told(document['left'])}",
        "right     the same" if document["self"] else f"right     {told(document['right'])}",
        compared,
        f"written   {document['pairs_written']:,} pairs to {document['table']} version {document['version']}",
    ]


def _options(k: int | None, threshold: float | None) -> JoinOptions:
    try:
        return JoinOptions(DEFAULT_K if k is None and threshold is None else k, threshold)
    except ValueError as error:
        raise ConfigError(f"--k, --threshold: {error}") from error


def _input(spark: SparkSession, table: str, known: _Input | None = None) -> _Input:
    """The table at its present version; `known` when it is the same table: then both are one version."""
    published = read_settled(spark, table_named(spark, table))
    if known is not None and known.published.location == published.location:
        return known
    rows = published.rows(spark)
    # A constraint keeps one of error and embedding NULL, and the former is much the smaller column to read.
    counts = rows.agg(F.count(F.lit(1)).alias("rows"), F.count("error").alias("errors")).collect()[0]
    return _Input(published, rows, counts["rows"], counts["rows"] - counts["errors"])


def _require_one_encoder(left: Published, right: Published) -> None:
    if left.fingerprint == right.fingerprint:
        return
    one, other = (f"{each.encoder['reference']} (fingerprint {each.fingerprint})" for each in (left, right))
    raise ConfigError(
        f"table {left.ref} holds vectors of {one} and table {right.ref} vectors of {other}: scores between two "
        f"encoders mean nothing. Embed both with one encoder; `next_encoder` in the run file changes a table's",
        code="ENCODERS_DIFFER",
    )


def _target(spark: SparkSession, out: str) -> tuple[TableRef, bool]:
    """The table to write and whether it is there; DestinationError where it is one that `shoal join` did not make."""
    ref = _named(spark, out)
    is_there = exists(spark, ref)
    properties = spark.sql(f"DESCRIBE DETAIL {ref.sql}").collect()[0]["properties"] if is_there else {}
    if is_there and JOIN_PROPERTY not in (properties or {}):
        raise DestinationError(
            f"--out '{out}' is a table that `shoal join` did not make (no property {JOIN_PROPERTY}), and it is left as "
            f"it is; name another one",
            code="TABLE_NOT_OURS",
        )
    return ref, is_there


def _named(spark: SparkSession, out: str) -> TableRef:
    """A catalog name where it has a dot and no slash, or is a table of the catalog; else a path."""
    if "/" not in out and "." in out and not out.startswith("."):
        schema = ".".join(quoted(part) for part in out.split(".")[:-1])
        try:
            spark.sql(f"DESCRIBE NAMESPACE {schema}").collect()
        except AnalysisException as error:
            raise DestinationError(
                f"--out '{out}': the schema {schema} is not there; create it first, or write ./{out} for a folder"
            ) from error
        return TableRef(None, out, "")
    ref = table_named(spark, out)
    return ref if ref.name else TableRef(absolute(out).rstrip("/"), None, "")


def _write(
    spark: SparkSession, target: TableRef, pairs: DataFrame, made_from: dict[str, Any], *, is_there: bool
) -> dict[str, Any]:
    """One commit: the version, the pairs and the bytes of it. A table that appeared meanwhile is not replaced."""
    told = json.dumps(made_from, sort_keys=True)
    writer = pairs.writeTo(target.sql).using("delta").tableProperty(JOIN_PROPERTY, told)
    with with_settings(spark, {USER_METADATA: told}):  # `create` takes no notice of an option
        if is_there:
            writer.createOrReplace()
        else:
            writer.create()
    history = spark.sql(f"DESCRIBE HISTORY {target.sql} LIMIT 8").where(F.col("userMetadata") == told)
    commits = history.select("version", "operationMetrics").collect()
    if not commits:
        raise RunError(f"table {target}: the commit of this join is not in the table's log; run it again")
    version = commits[0]["version"]
    # A session may keep no metrics of its commits: spark.databricks.delta.history.metricsEnabled.
    metrics = commits[0]["operationMetrics"] or {}
    written = metrics.get("numOutputRows")
    if written is None:
        written = spark.sql(f"SELECT count(*) AS n FROM {target.sql} VERSION AS OF {version}").collect()[0]["n"]
    return {
        "version": version,
        "pairs_written": int(written),
        "bytes_written": int(metrics.get("numOutputBytes") or 0),
    }
