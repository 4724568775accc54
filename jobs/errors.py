"""`shoal errors`: the chunks of a table that have a reason instead of a vector, by reason, with samples."""

from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.jobs.hashing import quoted
from shoal.jobs.layout import table_named
from shoal.jobs.published import read_settled
from shoal.jobs.report import plain
from shoal.udfs import reasons

SAMPLE_CHARS = 80


def errors(spark: SparkSession, table: str, *, samples: int = 3) -> list[dict[str, Any]]:
    """Most frequent first: reason, count, whether it is permanent, and up to `samples` keys with their texts."""
    published = read_settled(spark, table_named(spark, table))
    failed = published.rows(spark).where(F.col("error").isNotNull())
    keys = [*published.keys, "chunk_index"]
    text = F.substring("text", 1, SAMPLE_CHARS) if "text" in failed.columns else F.lit(None).cast("string")
    found = []
    counts = failed.groupBy("error").count().orderBy(F.desc("count"), "error").collect()
    for row in counts:
        shown = (
            failed.where(F.col("error") == row["error"])
            .select(*[quoted(key) for key in keys], text.alias("__text"))
            .limit(samples)
            .collect()
        )
        found.append(
            {
                "reason": row["error"],
                "count": row["count"],
                "permanent": row["error"] in reasons.PERMANENT,
                "samples": [{**{key: plain(one[key]) for key in keys}, "text": one["__text"]} for one in shown],
            }
        )
    return found


def lines(found: list[dict[str, Any]]) -> list[str]:
    """The errors for people: a line per reason, the samples below it."""
    told = []
    for one in found:
        told.append(
            f"{one['count']:>8,}  {one['reason']}  "
            f"({'permanent' if one['permanent'] else 'tried again at the next run'})"
        )
        for sample in one["samples"]:
            keys = ", ".join(f"{name}={value}" for name, value in sample.items() if name != "text")
            told.append(f"          {keys}  {' '.join((sample['text'] or '').split())!r}")
    return told or ["no errors: every chunk has a vector"]
