"""`shoal history`: each commit of a table with its run, encoder and counts, and the runs that made no commit."""

from datetime import UTC, datetime
from typing import Any

from pyspark.sql import SparkSession

from shoal.conf.errors import DestinationError
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.layout import is_delta, table_named
from shoal.jobs.published import commits, exists, read_published


def history(spark: SparkSession, table: str) -> list[dict[str, Any]]:
    """Newest first: Delta's commits (ours with their run), then the runs that published nothing among them by time."""
    ref = table_named(spark, table)
    there = exists(spark, ref)
    published = read_published(spark, ref) if there else None
    ref = published.ref if published else ref
    has_runs = is_delta(spark, ref.runs)
    if not there and not has_runs:
        raise DestinationError(
            f"table '{table}': there is no such table, and no run has tried to make it", code="TABLE_NOT_FOUND"
        )
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
        "verb": run.get("verb", "embed") if run else None,
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
        "price": _price(run),
        "error": run.get("error"),
        "code": run.get("code"),
    }


def _price(run: dict[str, Any]) -> float | None:
    """What the encoding of a run cost by `encode.price_per_hour` of its own run file; None where that is not set."""
    per_hour = ((run.get("config") or {}).get("encode") or {}).get("price_per_hour")
    seconds = (run.get("seconds") or {}).get("encode", 0.0) + ((run.get("migration") or {}).get("seconds") or 0.0)
    return None if per_hour is None else round(seconds / 3600 * float(per_hour), 6)


def by_month(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs, encoded chunks, tokens and price of each calendar month (UTC), newest first; foreign commits left out."""
    months: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry["status"] == "foreign":
            continue
        name = datetime.fromtimestamp(entry["at_ms"] / 1000, UTC).strftime("%Y-%m")
        month = months.setdefault(name, {"month": name, "runs": 0, "encoded": 0, "tokens": 0, "price": None})
        month["runs"] += 1
        month["encoded"] += (entry["chunks"] or {}).get("encoded", 0)
        month["tokens"] += entry["tokens"] or 0
        if entry["price"] is not None:
            month["price"] = round((month["price"] or 0.0) + entry["price"], 6)
    return sorted(months.values(), key=lambda month: str(month["month"]), reverse=True)


def lines(entries: list[dict[str, Any]]) -> list[str]:
    """The history for people: a line per entry, then one per month."""
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
    for month in by_month(entries):
        price = "" if month["price"] is None else f", price {month['price']:.2f}"
        told.append(
            f"{month['month']}: {month['runs']:,} runs, {month['encoded']:,} chunks encoded, {month['tokens']:,} tokens"
            f"{price}"
        )
    return told
