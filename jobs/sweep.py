"""What runs, and dead ones above all, have left beside a table or in it that nobody needs any more."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.jobs.bookkeeping import RUN
from shoal.jobs.filesystem import FileSystem, join
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import TableRef, is_delta, read_delta
from shoal.jobs.lease import holder
from shoal.jobs.published import Published

RETENTION = "delta.deletedFileRetentionDuration"
_INTERVAL = re.compile(r"interval (\d+) (hour|day|week)s?", re.IGNORECASE)
_HOURS = {"hour": 1, "day": 24, "week": 168}
DEFAULT_RETAIN = timedelta(days=7)
"""What Delta does where the property is not set, or not in words of Shoal's."""

MIN_KEPT_IDS = timedelta(days=7)
"""Transaction ids guard a wave's commit against being repeated: far longer than any run, whatever `retain` says."""


@dataclass(frozen=True)
class Part:
    """Files and bytes of one place that go, or have gone; of staging also rows."""

    name: str
    files: int = 0
    bytes: int = 0
    rows: int = 0

    def public(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Stale:
    """Rows of staging that no run will publish, all of one encoder."""

    fingerprint: str
    rows: int
    is_serving: bool
    """Of the table's own encoder only those go whose vectors have been published."""


def retain_of(published: Published) -> timedelta:
    """How long earlier versions are kept, as the table's property says it."""
    found = _INTERVAL.fullmatch(published.properties.get(RETENTION, "").strip())
    if found is None:
        return DEFAULT_RETAIN
    return timedelta(hours=int(found[1]) * _HOURS[found[2].lower()])


def stale_staging(spark: SparkSession, published: Published) -> list[Stale]:
    """Of encoders nobody needs, what is older than `retain`; of the serving one, what has been published."""
    stale = stale_encoders(spark, published)
    if is_delta(spark, published.ref.staging):
        rows = _staged_and_published(spark, published).count()
        stale += [Stale(published.fingerprint, rows, is_serving=True)] if rows else []
    return stale


def stale_encoders(spark: SparkSession, published: Published) -> list[Stale]:
    """Of encoders that neither serve nor are to come, what nobody has added to for `retain`; joins nothing."""
    ref = published.ref
    if not is_delta(spark, ref.staging):
        return []
    staged = read_delta(spark, ref.staging)
    newest = F.unix_millis(F.max("embedded_at")).alias("newest")
    groups = staged.groupBy("fingerprint").agg(F.count(F.lit(1)).alias("rows"), newest).collect()
    if not groups:
        return []
    coming = _next_fingerprints(spark, ref)
    if coming is None:
        return []
    kept = {published.fingerprint, *coming}
    limit = (datetime.now(UTC) - retain_of(published)).timestamp() * 1000
    return [
        Stale(group["fingerprint"], group["rows"], is_serving=False)
        for group in groups
        if group["fingerprint"] not in kept and (group["newest"] or 0) < limit
    ]


def _next_fingerprints(spark: SparkSession, ref: TableRef) -> set[str] | None:
    """Fingerprints of the next encoder of the newest run; None where it has one that was never settled."""
    if not is_delta(spark, ref.runs):
        return None
    runs = read_delta(spark, ref.runs).where(F.col("kind") == RUN)
    verb = F.coalesce(F.get_json_object("record", "$.verb"), F.lit("embed"))
    newest = runs.where(verb == "embed").orderBy(F.desc("written_at")).limit(1).collect()
    if not newest:
        return None
    if not (json.loads(newest[0]["record"]).get("config") or {}).get("next_encoder"):
        return set()
    fingerprint = F.get_json_object("record", "$.migration.fingerprint")
    settled = runs.where(fingerprint.isNotNull()).orderBy(F.desc("written_at")).select(fingerprint).limit(1).collect()
    return {settled[0][0]} if settled else None


def _staged_and_published(spark: SparkSession, published: Published) -> DataFrame:
    ref = published.ref
    staged = read_delta(spark, ref.staging).where(F.col("fingerprint") == published.fingerprint)
    return staged.select("content_hash").join(_with_vector(spark, published), on="content_hash", how="left_semi")


def _with_vector(spark: SparkSession, published: Published) -> DataFrame:
    rows = published.rows(spark).where(F.col("error").isNull() & F.col("content_hash").isNotNull())
    return rows.select("content_hash").distinct()


def trim(spark: SparkSession, published: Published, stale: list[Stale]) -> None:
    """Deletes them from staging; each is one commit, and may be repeated."""
    staging = DeltaTable.forPath(spark, published.ref.staging)
    for part in stale:
        of_encoder = F.col("fingerprint") == part.fingerprint
        if not part.is_serving:
            staging.delete(of_encoder)
            continue
        done = _with_vector(spark, published)
        matched = (F.col("t.content_hash") == F.col("s.content_hash")) & (F.col("t.fingerprint") == part.fingerprint)
        staging.alias("t").merge(done.alias("s"), matched).whenMatchedDelete().execute()


def leftovers(spark: SparkSession, files: FileSystem, published: Published) -> list[Part]:
    """What a vacuum would remove now, without removing it; what belongs to a run that may be alive is left out."""
    ref = published.ref
    holding = holder(files, ref.lease)
    alive = holding.get("run_id") if holding is not None else None
    work = [join(ref.work, name) for name in files.names(ref.work) if name != alive]
    parts = [_sum("work", [files.usage(path) for path in work])]
    if holding is None:
        parts.append(Part("try", *files.usage(join(ref.sidecar, "try"))))
        parts.append(Part("staging rows", rows=sum(part.rows for part in stale_staging(spark, published))))
    for name, sql in tables(spark, ref).items():
        listed = spark.sql(f"VACUUM {sql} DRY RUN").toLocalIterator()
        parts.append(_sum(name, (files.usage(row[0]) for row in listed)))
    return [part for part in parts if part.files or part.rows]


def _sum(name: str, usages: Any) -> Part:
    num, size = 0, 0
    for count, length in usages:
        num, size = num + count, size + length
    return Part(name, num, size)


def sweep(
    spark: SparkSession,
    files: FileSystem,
    published: Published,
    *,
    check: Callable[[], None],
    step: Callable[[str], None],
) -> list[Part]:
    """Removes it; only the holder of the lease may call this, and `check` is its look whether it still is that.

    Delta's VACUUM leaves alone what is younger than `retain`, orphans of killed drivers too: it cannot tell them from
    files that somebody is about to commit.
    """
    ref, parts = published.ref, []
    scratch = join(ref.sidecar, "try")
    parts.append(Part("try", *files.usage(scratch)))
    files.delete(scratch)
    step("try removed")
    stale = stale_staging(spark, published)
    if stale:
        check()
        trim(spark, published, stale)
        parts.append(Part("staging rows", rows=sum(part.rows for part in stale)))
    step("staging trimmed")
    for name, sql in tables(spark, ref).items():
        check()
        if name != "published":
            keep_as_long(spark, published, sql)
        folder = data_path(spark, sql)
        before = _data_usage(files, folder)
        spark.sql(f"VACUUM {sql}")
        after = _data_usage(files, folder)
        parts.append(Part(name, max(0, before[0] - after[0]), max(0, before[1] - after[1])))
        step(f"{name} vacuumed")
    return [part for part in parts if part.files or part.rows]


def tables(spark: SparkSession, ref: TableRef) -> dict[str, str]:
    """The Delta tables of one destination that are there, as SQL names them; the published one first."""
    beside = {"staging": ref.staging, "runs": ref.runs, "canaries": ref.canaries, "cells": ref.cells}
    there = {name: f"delta.{quoted(path)}" for name, path in beside.items() if is_delta(spark, path)}
    return {"published": ref.sql} | there


def keep_as_long(spark: SparkSession, published: Published, sql: str) -> None:
    """Files, log and transaction ids of a table beside the published one are kept no longer than those of it."""
    retain = retain_of(published)
    wanted = {
        RETENTION: _interval(retain),
        "delta.logRetentionDuration": _interval(retain),
        "delta.setTransactionRetentionDuration": _interval(max(retain, MIN_KEPT_IDS)),
    }
    there = spark.sql(f"DESCRIBE DETAIL {sql}").select("properties").collect()[0][0] or {}
    if any(there.get(name) != value for name, value in wanted.items()):
        listed = ", ".join(f"'{name}' = '{value}'" for name, value in wanted.items())
        spark.sql(f"ALTER TABLE {sql} SET TBLPROPERTIES ({listed})")


def data_path(spark: SparkSession, sql: str) -> str:
    """Delta's own words for the folder: DESCRIBE DETAIL escapes what a path does not."""
    return str(DeltaTable.forName(spark, sql)._jdt.deltaLog().dataPath().toString())


def _data_usage(files: FileSystem, folder: str) -> tuple[int, int]:
    num, size = files.usage(folder)
    num_log, size_log = files.usage(join(folder, "_delta_log"))
    return num - num_log, size - size_log


def _interval(retain: timedelta) -> str:
    return f"interval {int(retain.total_seconds() // 3600)} hours"
