"""Nothing is published before it has been accounted for: every planned chunk has a vector or a reason."""

from dataclasses import dataclass, field

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import InternalError
from shoal.jobs.have import Have
from shoal.jobs.layout import TableRef
from shoal.jobs.planner import RETRIED, ChunkPlan, RowPlan
from shoal.jobs.staging import staged_errors, staged_rows


@dataclass(frozen=True)
class Account:
    """What became of every planned chunk: `embedded` + the errors = `planned`; tokens are those of distinct content."""

    planned: int
    embedded: int
    truncated: int
    encoded: int
    tokens: int
    errors: dict[str, int] = field(default_factory=dict)
    num_retried: int = 0
    """Errors of rows whose text is as published: this run only tried again, and has not made them."""
    num_doubled: int = 0
    """Planned chunks whose content was staged twice, by a run that lost its lease in the middle of a wave."""


def reconcile(
    spark: SparkSession,
    ref: TableRef,
    rows: RowPlan,
    chunks: ChunkPlan,
    have: Have,
    *,
    fingerprint: str,
    run_id: str,
) -> Account:
    """Accounts for every planned chunk from the hash columns alone.

    Raises InternalError when one chunk has neither a vector nor a reason. Of a vector that is staged twice the first is
    published; the account says how many there were.
    """
    planned = rows.published.select("row_hash", RETRIED).join(
        chunks.chunks.select("row_hash", "content_hash", "error"), on="row_hash", how="inner"
    )
    needed = chunks.contents()
    vectors = (
        have.columns(needed, "truncated")
        .groupBy("content_hash")
        .agg(
            F.count_if(F.col("rank") == 0).alias("__staged"),
            F.min_by(F.coalesce("truncated", F.lit(False)), "rank").alias("__cut"),
        )
    )
    failed = staged_errors(spark, ref, fingerprint).select("content_hash", F.col("error").alias("__why"))
    joined = planned.join(vectors, on="content_hash", how="left").join(failed, on="content_hash", how="left")
    has_vector = F.col("error").isNull() & F.col("__staged").isNotNull()
    reason = F.coalesce("error", F.when(~has_vector, F.col("__why")))
    counts = joined.groupBy(reason.alias("reason"), has_vector.alias("has")).agg(
        F.count(F.lit(1)).alias("n"),
        F.count_if(has_vector & F.col("__cut")).alias("cut"),
        F.count_if(F.col("__staged") > 1).alias("doubled"),
        F.count_if(F.col(RETRIED)).alias("retried"),
    )
    embedded = truncated = lost = doubled = again = 0
    errors: dict[str, int] = {}
    for row in counts.collect():
        doubled += row["doubled"]
        if row["reason"] is not None:
            errors[row["reason"]] = errors.get(row["reason"], 0) + row["n"]
            again += row["retried"]
        elif row["has"]:
            embedded, truncated = row["n"], row["cut"]
        else:
            lost = row["n"]
    total = embedded + lost + sum(errors.values())
    if lost or total != chunks.planned:
        raise InternalError(
            f"run {run_id}: {chunks.planned} chunks were planned, {embedded} have a vector, {sum(errors.values())} a "
            f"reason, and {lost} neither; nothing was published. Please report this; `shoal embed` again plans from "
            f"scratch"
        )
    encoded, tokens = count_encoded(spark, ref, fingerprint, run_id)
    return Account(chunks.planned, embedded, truncated, encoded, tokens, dict(sorted(errors.items())), again, doubled)


def count_encoded(spark: SparkSession, ref: TableRef, fingerprint: str, run_id: str) -> tuple[int, int]:
    """Contents that executors encoded for a run and have staged, and their tokens."""
    mine = staged_rows(spark, ref, fingerprint).where(F.col("run_id") == run_id)
    sums = mine.agg(F.count(F.lit(1)).alias("n"), F.coalesce(F.sum("n_tokens"), F.lit(0)).alias("tokens")).collect()[0]
    return int(sums["n"]), int(sums["tokens"])
