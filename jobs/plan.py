"""`shoal plan`: what a run would do and cost; writes nothing but the shuffle files of its own Spark job."""

from dataclasses import asdict
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.run import RunConfig
from shoal.jobs.changes import find_difference
from shoal.jobs.encoder_work import EncoderWork
from shoal.jobs.estimate import warnings_of
from shoal.jobs.layout import table_of
from shoal.jobs.meter import human
from shoal.jobs.migration import BACKFILLING, READY, document_of, plan_next, settled_document
from shoal.jobs.planner import ACTION, NEW, RowPlan, key_range, near
from shoal.jobs.prepare import Encoders, describe_encoders, replace_reason, resolve_encoder
from shoal.jobs.publish import published_columns
from shoal.jobs.published import Published, read_published
from shoal.jobs.remote import require_supported, without_java
from shoal.jobs.source import SourceRows, read_source
from shoal.udfs.terms import describe_terms

UNKNOWN_BYTES = 2**60


def plan(spark: SparkSession, config: RunConfig, *, full_refresh: bool = False) -> dict[str, Any]:
    """The document of `shoal plan --json`: rows, chunks, tokens, estimate, and how the run would publish.

    Keys as in a run's document, with what the run would report: `encoded` are the chunks to encode.
    """
    require_supported(spark, config)
    ref = table_of(spark, config.destination)
    published = read_published(spark, ref)
    encoders = describe_encoders(config).on(published)
    encoding = resolve_encoder(
        spark, config, encoders.serving, ref, published, full_refresh=full_refresh, say=lambda _: None
    )
    spec = encoding.spec
    source = read_source(spark, config.source, config.chunk)
    columns, lexical = published_columns(source, config), describe_terms(config.lexical)
    replace = replace_reason(published, source, columns, spark, spec.fingerprint, lexical, full_refresh=full_refresh)
    kept: list[DataFrame] = []

    def keep(name: str, table: DataFrame, *, partition_by: str | None = None) -> DataFrame:
        del name, partition_by
        kept.append(table.persist(StorageLevel.DISK_ONLY))
        kept[-1].count()
        return kept[-1]

    try:
        difference = find_difference(spark, config, ref, source, published, keep, replace=replace)
        rows = difference.rows
        work = EncoderWork(spark, config, ref, encoding, keep)
        chunks, _ = work.plan_chunks(rows, published)
        found = work.estimate(chunks.todo, chunks.num_todo)
        reads = _reads(spark, source, published, rows)
        migration = _migration(work, source, published, encoders)
    finally:
        for table in kept:
            table.unpersist()
    return {
        "table": str(ref),
        "fingerprint": spec.fingerprint,
        "source_version": source.version,
        "difference": difference.how,
        "rows": asdict(rows.counts),
        "chunks": {
            "planned": chunks.planned,
            "distinct": chunks.distinct,
            "reused": chunks.distinct - chunks.num_todo,
            "encoded": chunks.num_todo,
            "embedded": chunks.planned - sum(chunks.errors.values()),
            "errors": sum(chunks.errors.values()),
            "truncated": round(found.truncated_share * chunks.num_todo),
            "waves": chunks.num_waves,
        },
        "errors": chunks.errors,
        "tokens": found.tokens,
        "estimate": {"seconds": found.seconds, "price": found.price},
        "migration": migration,
        "reads": reads,
        "publish": f"write the table anew: {replace}" if replace else "one MERGE",
        "warnings": warnings_of(spec, found, config.chunk),
    }


def _reads(spark: SparkSession, source: SourceRows, published: Published | None, rows: RowPlan) -> dict[str, Any]:
    """What the run reads of data files: the source as long as no change feed tells the difference, and for the MERGE.

    A MERGE opens every file of the table that may hold one of the keys concerned: few where keys that change together
    lie together, all of them where they are spread.
    """
    found: dict[str, Any] = {
        "source_bytes": _source_bytes(source),
        "table_files": 0,
        "merge_files": 0,
        "merge_bytes": 0,
    }
    if published is not None:
        found["table_files"] = spark.sql(f"DESCRIBE DETAIL {published.ref.sql}").collect()[0]["numFiles"]
    if published is not None and rows.replace is None:
        touched = key_range(rows.rows.where(F.col(ACTION) != NEW), rows.keys)
        file = F.col("_metadata.file_path").alias("path"), F.col("_metadata.file_size").alias("size")
        files = near(published.rows(spark), touched).select(*file).distinct()
        opened = files.agg(F.count(F.lit(1)).alias("files"), F.sum("size").alias("bytes")).collect()[0]
        found |= {"merge_files": opened["files"], "merge_bytes": opened["bytes"] or 0}
    return found


def _source_bytes(source: SourceRows) -> int | None:
    """What Spark takes a source's files to be; None of a database, and through Spark Connect, which does not say it."""
    if without_java(source.rows.sparkSession):
        return None
    leaves = source.rows._jdf.queryExecution().optimizedPlan().collectLeaves()
    sizes = [int(leaves.apply(index).stats().sizeInBytes()) for index in range(leaves.size())]
    # Of a database Spark knows no size, and takes the largest number that there is for it.
    return sum(sizes) if max(sizes, default=0) < UNKNOWN_BYTES else None


def _migration(
    serving: EncoderWork, source: SourceRows, published: Published | None, encoders: Encoders
) -> dict[str, Any] | None:
    """What the run would do for the next encoder; `encoded`, `tokens` and `estimate` are those of this one night."""
    if encoders.cut_over:
        return settled_document(serving)
    if encoders.coming is None:
        return None
    spark, config, ref = serving.spark, serving.config, serving.ref
    encoding = resolve_encoder(spark, config, encoders.coming, ref, None, full_refresh=False, say=lambda _: None)
    if encoding.spec.fingerprint == serving.spec.fingerprint:
        return settled_document(serving)
    budget = config.migration.budget
    planned = plan_next(EncoderWork(spark, config, ref, encoding, serving.keep), source, published, budget)
    state = BACKFILLING if planned.missing else READY
    return document_of(encoding.spec.reference, encoding.spec.fingerprint, state, None) | {
        "planned": planned.chunks.planned,
        "distinct": planned.chunks.distinct,
        "missing": planned.fresh,
        "encoded": planned.chunks.num_todo,
        "errors": planned.chunks.errors,
        "tokens": planned.tonight.tokens,
        "budget": budget.model_dump(mode="json"),
        "per_night": planned.per_night,
        "nights_left": planned.nights_left(planned.missing),
        "estimate": {"seconds": planned.tonight.seconds, "price": planned.tonight.price},
    }


def _told(found: dict[str, Any]) -> str:
    reads = found["reads"]
    whole = "the source" if reads["source_bytes"] is None else f"the source, {human(reads['source_bytes'])}"
    source = "the change feed of the source" if found["difference"].startswith("feed") else whole
    if not found["publish"].startswith("one MERGE"):
        return source
    files = f"{reads['merge_files']:,} of {reads['table_files']:,} files of the table"
    return f"{source}; {files} to publish, {human(reads['merge_bytes'])}"


def lines(found: dict[str, Any]) -> list[str]:
    """The plan for people."""
    rows, chunks, cost = found["rows"], found["chunks"], found["estimate"]
    told = [
        f"table    {found['table']}  ({found['publish']})",
        (
            f"rows     {rows['source']:,} in the source: {rows['new']:,} new, {rows['changed']:,} changed, "
            f"{rows['metadata_only']:,} metadata only, {rows['unchanged']:,} unchanged; {rows['deleted']:,} to delete"
        ),
        (
            f"chunks   {chunks['planned']:,} planned, {chunks['distinct']:,} distinct: {chunks['reused']:,} are there, "
            f"{chunks['encoded']:,} to encode in {chunks['waves']} waves; {chunks['errors']:,} errors"
        ),
        f"tokens   {found['tokens']:,}",
        f"compares {found['difference']}",
        f"reads    {_told(found)}",
    ]
    if cost["seconds"] is not None:
        price = "" if cost["price"] is None else f", price {cost['price']:.2f}"
        told.append(f"estimate {cost['seconds']:,.0f} s of encoding{price}")
    migration = found["migration"]
    if migration is not None and migration["reason"]:
        told.append(f"next     {migration['encoder']}: {migration['reason']}")
    elif migration is not None:
        seconds, price = migration["estimate"]["seconds"], migration["estimate"]["price"]
        cost = "" if seconds is None else f", {seconds:,.0f} s" + ("" if price is None else f", price {price:.2f}")
        told.append(
            f"next     {migration['encoder']}: {migration['missing']:,} of {migration['distinct']:,} missing, "
            f"{migration['encoded']:,} to encode in this run{cost}; {migration['nights_left']:,} more nights"
        )
    return told + [f"warning  {warning}" for warning in found["warnings"]]
