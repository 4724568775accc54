"""The limits that stop a run before readers see anything: rows, errors, price, an encoder that has collapsed."""

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import LimitError
from shoal.conf.run import LimitsConfig
from shoal.conf.values import Limit
from shoal.jobs.layout import TableRef
from shoal.jobs.planner import RowCounts
from shoal.jobs.reconcile import Account
from shoal.jobs.staging import staged_vectors

MIN_CONTENTS = 100
COLLAPSED_SHARE = 0.5


def check_rows(limits: LimitsConfig, counts: RowCounts) -> None:
    """LimitError when the source is too small, or when too many published rows would go."""
    if counts.source < limits.min_rows:
        raise LimitError(
            f"limits.min_rows is {limits.min_rows} and the source has {counts.source} rows; nothing was "
            f"published. If the source is right, lower limits.min_rows",
            code="LIMIT_MIN_ROWS",
        )
    num_published = counts.unchanged + counts.changed + counts.metadata_only + counts.deleted
    if counts.deleted and limits.max_deleted.exceeded(counts.deleted, num_published):
        raise LimitError(
            f"limits.max_deleted is {limits.max_deleted} and {counts.deleted} of the {num_published} published "
            f"rows are no longer in the source; nothing was published. If the source is right, run once with --set "
            f"limits.max_deleted=100%",
            code="LIMIT_MAX_DELETED",
        )


def check_errors(limit: Limit, account: Account) -> None:
    """LimitError when too many of the planned chunks have a reason instead of a vector; retried ones do not count."""
    count = sum(account.errors.values()) - account.num_retried
    whole = account.planned - account.num_retried
    if count > 0 and limit.exceeded(count, whole):
        shown = ", ".join(f"{reason}: {number}" for reason, number in account.errors.items())
        raise LimitError(
            f"limits.max_errors is {limit} and {count} of {whole} planned chunks have no vector ({shown}); nothing was "
            f"published, the good vectors wait in staging. Mend the source, or raise limits.max_errors",
            code="LIMIT_MAX_ERRORS",
        )


def check_vectors(spark: SparkSession, ref: TableRef, *, fingerprint: str, run_id: str | None) -> None:
    """LimitError when the encoder has collapsed: most of what is staged came out as one and the same vector.

    With a run id only what that run has staged counts. That a vector is finite, not zero and of the right width has
    been checked where it was made.
    """
    staged = staged_vectors(spark, ref, fingerprint)
    mine = staged if run_id is None else staged.where(F.col("run_id") == run_id)
    by_vector = mine.groupBy(F.xxhash64("embedding").alias("vector")).count()
    row = by_vector.agg(F.coalesce(F.sum("count"), F.lit(0)).alias("n"), F.max("count").alias("most")).collect()[0]
    if row["n"] >= MIN_CONTENTS and row["most"] > COLLAPSED_SHARE * row["n"]:
        raise LimitError(
            f"encoder: {row['most']} of {row['n']} different texts got one and the same vector; nothing was "
            f"published. The checkpoint or its pooling is broken: compare it with the model's own figures",
            code="ENCODER_COLLAPSED",
        )


def check_cost(max_cost: float | None, price: float | None) -> None:
    """LimitError when the estimate is above the price that the run file allows."""
    if max_cost is not None and price is not None and price > max_cost:
        raise LimitError(
            f"limits.max_cost is {max_cost:g} and this run would cost about {price:.2f}; nothing was encoded. "
            f"Raise the limit, or see `shoal plan` for what is new",
            code="LIMIT_MAX_COST",
        )
