"""`shoal vacuum`: staging, work and files of dead runs, and what earlier versions needed longer ago than `retain`."""

from collections.abc import Callable
from typing import Any

from pyspark.sql import SparkSession

from shoal.jobs.filesystem import FileSystem
from shoal.jobs.maintenance import swept, vacuum_tables
from shoal.jobs.operation import operating, table_of_ours
from shoal.jobs.sweep import Part, leftovers

VERB = "vacuum"
VACUUMED, DRY_RUN = "vacuumed", "dry run"


def vacuum(
    spark: SparkSession,
    table: str,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda _: None,
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The record, with `vacuum`: files and bytes in all and by part; a dry run lists the same and removes nothing.

    Restore goes back as far as before: `retain` long. Raises BusyError when a run is alive on the table.
    """
    published = table_of_ours(spark, table)
    files = FileSystem(spark, published.ref.sidecar)
    if dry_run:
        found = swept(leftovers(spark, files, published))
        return {"table": str(published.ref), "status": DRY_RUN, "vacuum": found}
    # The work of dead runs goes as the lease is taken, as it does in every run.
    work = Part("work", *files.usage(published.ref.work))
    with operating(spark, table, VERB, say=say, step=step) as operation:
        done = vacuum_tables(
            spark, operation.files, operation.published, check=operation.lease.check, step=operation.step
        )
        if work.files:
            done["files"], done["bytes"] = done["files"] + work.files, done["bytes"] + work.bytes
            done["parts"].insert(0, work.public())
        record = operation.record(VACUUMED, vacuum=done)
        operation.write(record)
        return record


def lines(found: dict[str, Any]) -> list[str]:
    """What went, or would go, for people."""
    done = found["vacuum"]
    verb = "would remove" if found["status"] == DRY_RUN else "removed"
    told = [f"{verb} {done['files']:,} files, {done['bytes']:,} bytes, of {found['table']}"]
    for part in done["parts"]:
        rows = f", {part['rows']:,} rows" if part["rows"] else ""
        told.append(f"{part['name']:14}{part['files']:,} files, {part['bytes']:,} bytes{rows}")
    return told
