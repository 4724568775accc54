"""`shoal plan`: what a run would do and cost; writes nothing but the shuffle files of its own Spark job."""

from dataclasses import asdict
from typing import Any

from delta.tables import DeltaTable
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession

from shoal.conf.run import RunConfig
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.canary_store import load_probe
from shoal.jobs.estimate import estimate, warnings_of
from shoal.jobs.have import find_have
from shoal.jobs.layout import table_of
from shoal.jobs.planner import Waves, plan_chunks, plan_rows
from shoal.jobs.prepare import comparable, describe_encoder, options_of, replace_reason, resolve_encoder, try_out
from shoal.jobs.publish import published_columns
from shoal.jobs.published import read_published
from shoal.jobs.session import slots
from shoal.jobs.source import read_source


def plan(spark: SparkSession, config: RunConfig, *, full_refresh: bool = False) -> dict[str, Any]:
    """The document of `shoal plan --json`: rows, chunks, tokens, estimate, and how the run would publish.

    Keys as in a run's document, with what the run would report: `encoded` are the chunks to encode.
    """
    ref = table_of(spark, config.destination)
    published = read_published(spark, ref)
    described = describe_encoder(config)
    encoding = resolve_encoder(spark, config, described, ref, published, full_refresh=full_refresh, say=lambda _: None)
    spec = encoding.spec
    source = read_source(spark, config.source, config.chunk)
    columns = published_columns(source, store_text=config.destination.store_text)
    replace = replace_reason(published, source, columns, spark, spec.fingerprint, full_refresh=full_refresh)
    kept: list[DataFrame] = []

    def keep(name: str, table: DataFrame, *, partition_by: str | None = None) -> DataFrame:
        del name, partition_by
        kept.append(table.persist(StorageLevel.DISK_ONLY))
        kept[-1].count()
        return kept[-1]

    try:
        rows = plan_rows(source, config.source, comparable(published, source, spark), keep, replace=replace)
        have = find_have(spark, ref, published, spec.fingerprint, staged=DeltaTable.isDeltaTable(spark, ref.staging))
        waves = Waves(slots(spark), config.encode.wave_chunks)
        chunks = plan_chunks(rows, config.chunk, spec.folder, have.hashes(), keep, waves)
        rate = None
        if chunks.num_todo:
            if DeltaTable.isDeltaTable(spark, ref.runs):
                rate = Bookkeeper(spark, ref, lambda _: None).last_rate(spec.fingerprint)
            if rate is None:
                probe = (
                    encoding.probe
                    or load_probe(spark, ref, spec.fingerprint)
                    or try_out(spark, spec, options_of(config))[0]
                )
                rate = probe.report["tokens_per_s"] * slots(spark)
        price_per_hour = config.encode.price_per_hour
        found = estimate(chunks.todo, chunks.num_todo, spec, rate=rate, price_per_hour=price_per_hour)
    finally:
        for table in kept:
            table.unpersist()
    return {
        "table": str(ref),
        "fingerprint": spec.fingerprint,
        "source_version": source.version,
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
        "publish": f"write the table anew: {replace}" if replace else "one MERGE",
        "warnings": warnings_of(spec, found, config.chunk),
    }


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
    ]
    if cost["seconds"] is not None:
        price = "" if cost["price"] is None else f", price {cost['price']:.2f}"
        told.append(f"estimate {cost['seconds']:,.0f} s of encoding{price}")
    return told + [f"warning  {warning}" for warning in found["warnings"]]
