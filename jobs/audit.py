"""Nothing is published before it has been accounted for: counts reconcile, and the run stays within its limits."""

from dataclasses import dataclass, field

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import InternalError, LimitError
from shoal.conf.run import LimitsConfig
from shoal.conf.values import Limit
from shoal.jobs.have import Have
from shoal.jobs.layout import TableRef
from shoal.jobs.planner import RETRIED, ChunkPlan, RowCounts, RowPlan
from shoal.jobs.staging import staged_errors, staged_rows

MIN_CONTENTS = 100
COLLAPSED_SHARE = 0.5


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


def check_rows(limits: LimitsConfig, counts: RowCounts) -> None:
    """LimitError when the source is too small, or when too many published rows would go."""
    if counts.source < limits.min_rows:
        raise LimitError(
            f"limits.min_rows is {limits.min_rows} and the source has {counts.source} rows; nothing was "
            f"published. If the source is right, lower limits.min_rows"
        )
    num_published = counts.unchanged + counts.changed + counts.metadata_only + counts.deleted
    if counts.deleted and limits.max_deleted.exceeded(counts.deleted, num_published):
        raise LimitError(
            f"limits.max_deleted is {limits.max_deleted} and {counts.deleted} of the {num_published} published "
            f"rows are no longer in the source; nothing was published. If the source is right, run once with --set "
            f"limits.max_deleted=100%"
        )


def check_errors(limit: Limit, account: Account) -> None:
    """LimitError when too many of the planned chunks have a reason instead of a vector; retried ones do not count."""
    count = sum(account.errors.values()) - account.num_retried
    whole = account.planned - account.num_retried
    if count > 0 and limit.exceeded(count, whole):
        shown = ", ".join(f"{reason}: {number}" for reason, number in account.errors.items())
        raise LimitError(
            f"limits.max_errors is {limit} and {count} of {whole} planned chunks have no vector ({shown}); nothing was "
            f"published, the good vectors wait in staging. Mend the source, or raise limits.max_errors"
        )


def check_vectors(spark: SparkSession, ref: TableRef, *, fingerprint: str, run_id: str) -> None:
    """LimitError when the encoder has collapsed: most of what this run encoded came out as one and the same vector.

    That a vector is finite, not zero and of the right width has been checked where it was made.
    """
    mine = staged_rows(spark, ref, fingerprint).where((F.col("run_id") == run_id) & F.col("error").isNull())
    by_vector = mine.groupBy(F.xxhash64("embedding").alias("vector")).count()
    row = by_vector.agg(F.coalesce(F.sum("count"), F.lit(0)).alias("n"), F.max("count").alias("most")).collect()[0]
    if row["n"] >= MIN_CONTENTS and row["most"] > COLLAPSED_SHARE * row["n"]:
        raise LimitError(
            f"encoder: {row['most']} of {row['n']} different texts got one and the same vector; nothing was "
            f"published. The checkpoint or its pooling is broken: compare it with the model's own figures"
        )


def check_cost(max_cost: float | None, price: float | None) -> None:
    """LimitError when the estimate is above the price that the run file allows."""
    if max_cost is not None and price is not None and price > max_cost:
        raise LimitError(
            f"limits.max_cost is {max_cost:g} and this run would cost about {price:.2f}; nothing was encoded. "
            f"Raise the limit, or see `shoal plan` for what is new"
        )
