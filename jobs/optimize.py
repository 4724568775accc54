"""`shoal optimize`: few large files instead of many small ones, and deleted rows out of the files they are in."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyspark.sql import SparkSession

from shoal.jobs.compaction import SMALL_BYTES, size_of
from shoal.jobs.maintenance import DEFAULT, due, optimize_tables
from shoal.jobs.operation import operating, table_of_ours
from shoal.jobs.sweep import tables

VERB = "optimize"
OPTIMIZED, DRY_RUN = "optimized", "dry run"


def optimize(
    spark: SparkSession,
    table: str,
    *,
    dry_run: bool = False,
    small_bytes: int = SMALL_BYTES,
    say: Callable[[str], None] = lambda _: None,
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The record, with `optimize.tables`: size of each table before and after; a dry run writes nothing, and says why.

    Changes no row; raises BusyError when a run is alive on the table.
    """
    if dry_run:
        published = table_of_ours(spark, table)
        sizes = {name: size_of(spark, sql, small_bytes) for name, sql in tables(spark, published.ref).items()}
        found = {name: {"before": size.public(), "after": None} for name, size in sizes.items()}
        reasons = list(due(spark, published).optimize)
        return {"table": str(published.ref), "status": DRY_RUN, "optimize": {"tables": found, "reasons": reasons}}
    with operating(spark, table, VERB, say=say, step=step) as operation:
        done = optimize_tables(operation, thresholds=replace(DEFAULT, small_bytes=small_bytes))
        record = operation.record(OPTIMIZED, optimize=done)
        operation.write(record)
        return record


def lines(found: dict[str, Any]) -> list[str]:
    """Sizes for people, a line per table."""
    told = [f"{found['status']} {found['table']}"]
    if folded := found["optimize"].get("folded"):
        told.append(f"{folded:,} fresh rows put into their cells")
    for name, sizes in found["optimize"]["tables"].items():
        before, after = sizes["before"], sizes["after"]
        line = f"{name:10}{_size(before)}"
        told.append(line if after is None else f"{line} -> {_size(after)}")
    if found["status"] == DRY_RUN:
        told += [f"due: {reason}" for reason in found["optimize"]["reasons"]] or ["nothing is due"]
    return told


def _size(size: dict[str, int]) -> str:
    return (
        f"{size['files']:,} files ({size['small_files']:,} small), {size['bytes']:,} bytes, "
        f"{size['deleted_rows']:,} rows marked as deleted"
    )
