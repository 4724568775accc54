"""`shoal history`: each commit of a table with its run, encoder and counts, and the runs that made no commit."""

from datetime import UTC, datetime
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import SparkSession

from shoal.conf.errors import DestinationError
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.layout import table_named
from shoal.jobs.published import commits, exists, read_published


def history(spark: SparkSession, table: str) -> list[dict[str, Any]]:
    """Newest first: Delta's commits (ours with their run), then the runs that published nothing among them by time."""
    ref = table_named(spark, table)
    there = exists(spark, ref)
    published = read_published(spark, ref) if there else None
    ref = published.ref if published else ref
    has_runs = DeltaTable.isDeltaTable(spark, ref.runs)
    if not there and not has_runs:
        raise DestinationError(f"table '{table}': there is no such table, and no run has tried to make it")
    runs = {run["run_id"]: run for run in Bookkeeper(spark, ref, lambda _: None).records()} if has_runs else {}
    entries = []
    if there:
        for commit in commits(spark, ref):
            run = None
            if commit.state is not None:
                run = runs.pop(commit.state.run_id, None) or commit.state.record
            entries.append(_entry(commit.version, int(commit.timestamp.timestamp() * 1000), commit.operation, run))
    # What is left published nothing, or published a version that the log no longer reaches.
    entries += [
        _entry(run["version"] if run["status"] == "published" else None, run["ended_ms"], "run", run)
        for run in runs.values()
    ]
    return sorted(entries, key=lambda entry: entry["at_ms"], reverse=True)


def _entry(version: int | None, at_ms: int, operation: str, run: dict[str, Any] | None) -> dict[str, Any]:
    run = run or {}
    return {
        "version": version,
        "at_ms": at_ms,
        "operation": operation,
        "status": run.get("status", "foreign"),
        "run_id": run.get("run_id"),
        "mlflow_run": run.get("mlflow_run"),
        "generation": run.get("generation"),
        "encoder": (run.get("config") or {}).get("encoder", {}).get("model"),
        "fingerprint": run.get("fingerprint"),
        "source_version": run.get("source_version"),
        "rows": run.get("rows"),
        "chunks": run.get("chunks"),
        "tokens": run.get("tokens"),
        "error": run.get("error"),
    }


def lines(entries: list[dict[str, Any]]) -> list[str]:
    """The history for people: a line per entry."""
    told = [f"{'version':>7}  {'when (UTC)':19}  {'what':12}  {'run':25}  {'encoded':>8}  {'errors':>6}  encoder"]
    for entry in entries:
        version = "-" if entry["version"] is None else str(entry["version"])
        when = datetime.fromtimestamp(entry["at_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        what = entry["operation"] if entry["status"] == "foreign" else entry["status"]
        chunks = entry["chunks"] or {}
        told.append(
            f"{version:>7}  {when}  {what[:12]:12}  {entry['run_id'] or '-':25}  {chunks.get('encoded', '-'):>8}  "
            f"{chunks.get('errors', '-'):>6}  {entry['encoder'] or '-'}"
        )
    return told
