"""`shoal status`: how far tables are behind their sources, what went wrong last, what is due; for people and monitors.

Reads only, and takes no lease: it may look at a table while a run is at work on it.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import DestinationError, ShoalError, code_of
from shoal.conf.redact import MASK
from shoal.conf.run import RunConfig
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.changes import find_difference, last_unchanged
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.layout import TableRef, is_delta, table_named
from shoal.jobs.lease import died_here, holder
from shoal.jobs.maintenance import Due, due
from shoal.jobs.published import Published, exists, read_published
from shoal.jobs.source import delta_target, read_source

SUCCESSFUL = ("published", "unchanged")


@dataclass(frozen=True)
class Lag:
    """Seconds that a table is behind its source, by the clock that `measure` names; None where nothing can be said."""

    seconds: float | None
    measure: str


def status(
    spark: SparkSession, tables: Sequence[str], *, max_lag: timedelta | None = None, pending: bool = False
) -> list[dict[str, Any]]:
    """One document per table, in the order asked for; `problems` is empty where all is well.

    `pending` compares whole sources with their tables; without it only a Delta source that has moved is looked at. A
    table that cannot be read is a document with its error, and hides no other.
    """
    found = []
    for table in tables:
        try:
            found.append(_status_of(spark, table, max_lag, pending))
        except (ShoalError, PySparkException, Py4JJavaError) as error:
            told = str(error).strip().splitlines()
            line = told[0] if told else type(error).__name__
            found.append({"table": table, "problems": [line], "error": line, "code": code_of(error)})
    return found


def _status_of(spark: SparkSession, table: str, max_lag: timedelta | None, pending: bool) -> dict[str, Any]:  # noqa: FBT001
    ref = table_named(spark, table)
    published = read_published(spark, ref) if exists(spark, ref) else None
    ref = published.ref if published else ref
    has_runs = is_delta(spark, ref.runs)
    if published is None and not has_runs:
        raise DestinationError(
            f"table '{table}': there is no such table, and no run has tried to make it", code="TABLE_NOT_FOUND"
        )
    records = Bookkeeper(spark, ref, lambda _: None).records() if has_runs else []
    runs = [record for record in records if record.get("verb", "embed") == "embed"]
    last = runs[0] if runs else None
    good = next((run for run in runs if run["status"] in SUCCESSFUL), None)
    config = _config_of(last)
    lag = _lag(spark, config, ref, published, good)
    wanted = config.index if isinstance(config, RunConfig) else None
    to_do = due(spark, published, index=wanted) if published else None
    found = {
        "table": str(ref),
        "version": published.version if published else None,
        "generation": published.generation if published else None,
        "encoder": published.encoder["reference"] if published else None,
        "fingerprint": published.fingerprint if published else None,
        "last_run": _shown_run(last),
        "last_success_ms": good["ended_ms"] if good else None,
        "lag_s": lag.seconds,
        "lag_measure": lag.measure,
        "pending": _pending(spark, config, ref, published, lag, asked=pending),
        **_chunks(spark, published),
        "migration": last.get("migration") if last else None,
        "index": _index(published, to_do),
        "maintenance": to_do.public() if to_do else None,
        "lease": _lease(spark, ref),
        "foreign": [
            {"version": commit.version, "operation": commit.operation, "user": commit.user}
            for commit in (published.foreign if published else ())
        ],
        "error": None,
        "code": None,
    }
    return found | {"problems": list(_problems(found, max_lag))}


def _problems(found: dict[str, Any], max_lag: timedelta | None) -> list[str]:
    """What somebody should look at; a monitor's exit code is whether there is any."""
    problems = []
    last, migration = found["last_run"], found["migration"]
    if found["version"] is None:
        problems.append("no run has published the table yet")
    if last is not None and last["status"] not in SUCCESSFUL:
        problems.append(f"the last run, {last['run_id']}, {last['status']}: [{last['code']}] {last['error']}")
    if max_lag is not None:
        limit = max_lag.total_seconds()
        if found["lag_s"] is None:
            problems.append(f"the lag is unknown ({found['lag_measure']}), so --max-lag cannot be kept")
        elif found["lag_s"] > limit:
            problems.append(
                f"the table is {_span(found['lag_s'])} behind ({found['lag_measure']}); --max-lag is {_span(limit)}"
            )
    if found["foreign"]:
        versions = ", ".join(f"{each['version']} ({each['operation']})" for each in found["foreign"])
        problems.append(f"others wrote to the table since our last commit: version {versions}; see `shoal audit`")
    if migration is not None and migration["state"] in ("refused", "failed"):
        problems.append(f"the next encoder {migration['state']}: {migration['reason']}")
    return problems


def _shown_run(run: dict[str, Any] | None) -> dict[str, Any] | None:
    if run is None:
        return None
    return {name: run.get(name) for name in ("run_id", "status", "started_ms", "ended_ms", "version", "error", "code")}


def _config_of(run: dict[str, Any] | None) -> RunConfig | str:
    """The run file of the newest run, as far as it was recorded; or why its source cannot be looked at."""
    if run is None:
        return "no run is written down"
    recorded = run.get("config") or {}
    if MASK in str(recorded.get("source")):
        return "the source's settings came from the environment, and are not recorded"
    try:
        return RunConfig.model_validate({**recorded, "on_success": None, "on_failure": None})
    except ValueError:
        return "the run file was recorded by another version of Shoal"


def _lag(
    spark: SparkSession,
    config: RunConfig | str,
    ref: TableRef,
    published: Published | None,
    good: dict[str, Any] | None,
) -> Lag:
    """By the oldest commit of a Delta source that no run has seen; else by the start of the last successful run."""
    now_ms = time.time() * 1000
    state = published.ours.state if published and published.ours else None
    if published is not None and state is not None and isinstance(config, RunConfig):
        seen = last_unchanged(spark, ref, published) or state.record
        if seen.get("source_state") and (target := delta_target(spark, config.source)):
            unseen = spark.sql(f"DESCRIBE HISTORY {target}").where(F.col("version") > seen["source_state"]["version"])
            oldest = unseen.agg(F.unix_millis(F.min("timestamp"))).collect()[0][0]
            seconds = 0.0 if oldest is None else max(0.0, (now_ms - oldest) / 1000)
            return Lag(
                round(seconds, 3), "since the oldest commit of the source that no run has seen, by its log's clock"
            )
    if good is None:
        return Lag(None, "no run has been successful")
    return Lag(round(max(0.0, now_ms - good["started_ms"]) / 1000, 3), "since the start of the last successful run")


def _pending(
    spark: SparkSession, config: RunConfig | str, ref: TableRef, published: Published | None, lag: Lag, *, asked: bool
) -> dict[str, Any]:
    """Rows by kind that a run would find; `rows` is None where that is unknown, and `how` says why, or how."""
    if isinstance(config, str):
        return {"rows": None, "how": config}
    if published is None:
        return {"rows": None, "how": "there is no table to compare with"}
    has_versions = delta_target(spark, config.source) is not None
    if has_versions and lag.seconds == 0 and not asked:
        return {
            "rows": dict.fromkeys(("new", "changed", "metadata_only", "deleted"), 0),
            "how": "the source has not moved",
        }
    if not has_versions and not asked:
        return {"rows": None, "how": "--pending compares the source with the table"}
    kept: list[DataFrame] = []

    def keep(name: str, table: DataFrame, *, partition_by: str | None = None) -> DataFrame:
        del name, partition_by
        kept.append(table.persist(StorageLevel.DISK_ONLY))
        kept[-1].count()
        return kept[-1]

    try:
        source = read_source(spark, config.source, config.chunk)
        difference = find_difference(spark, config, ref, source, published, keep, replace=None)
    finally:
        for table in kept:
            table.unpersist()
    counts = asdict(difference.rows.counts)
    return {
        "rows": {name: counts[name] for name in ("new", "changed", "metadata_only", "deleted")},
        "how": difference.how,
    }


def _chunks(spark: SparkSession, published: Published | None) -> dict[str, Any]:
    """Chunks of the table, and those with a reason instead of a vector, by reason; reads only the column `error`."""
    if published is None:
        return {"chunks": 0, "errors": {}}
    counts = {row["error"]: row["count"] for row in published.rows(spark).groupBy("error").count().collect()}
    errors = {reason: count for reason, count in counts.items() if reason is not None}
    return {"chunks": sum(counts.values()), "errors": dict(sorted(errors.items()))}


def _index(published: Published | None, to_do: Due | None) -> dict[str, Any] | None:
    """The build that the rows are in, with the rows that wait in the fresh cell and how well those before fitted."""
    made = published.index if published else None
    if made is None or to_do is None:
        return None
    return {**made.public(), "fresh_rows": to_do.fresh_rows, "last_fit": to_do.last_fit}


def _lease(spark: SparkSession, ref: TableRef) -> dict[str, Any] | None:
    """Who holds the table; `alive` is None where the holder runs on another machine: its heartbeat would tell."""
    body = holder(FileSystem(spark, ref.sidecar), ref.lease)
    if body is None:
        return None
    shown = {name: body.get(name) for name in ("run_id", "host", "user", "pid", "started", "heartbeat")}
    return shown | {"alive": False if died_here(body) else None}


def lines(found: list[dict[str, Any]]) -> list[str]:
    """The status for people: a paragraph per table, problems last."""
    told: list[str] = []
    for each in found:
        told += [f"{each['table']}: {'needs a look' if each['problems'] else 'in order'}"]
        if each["error"] is None:
            told += [f"  {line}" for line in _facts(each)]
        told += [f"  problem   {problem}" for problem in each["problems"]]
    return told


def _facts(each: dict[str, Any]) -> list[str]:
    errors = ", ".join(f"{reason}: {count:,}" for reason, count in each["errors"].items())
    chunks = f"{each['chunks']:,} chunks{f' ({errors})' if errors else ''}"
    told = [f"table     version {each['version']}, {chunks}, {each['encoder']}"]
    if last := each["last_run"]:
        ended = datetime.fromtimestamp(last["ended_ms"] / 1000, UTC)
        told.append(f"last run  {last['status']} at {ended:%Y-%m-%d %H:%M:%S} UTC, {last['run_id']}")
    if each["lag_s"] is not None:
        told.append(f"lag       {_span(each['lag_s'])} {each['lag_measure']}")
    if (rows := each["pending"]["rows"]) is not None:
        told.append(
            f"pending   {rows['new']:,} new, {rows['changed']:,} changed, {rows['metadata_only']:,} metadata only, "
            f"{rows['deleted']:,} deleted ({each['pending']['how']})"
        )
    else:
        told.append(f"pending   unknown ({each['pending']['how']})")
    if part := each["migration"]:
        left = f", about {part['nights_left']:,} more nights" if part["nights_left"] else ""
        told.append(
            f"next      {part['encoder']}: {part['state']}, {part['missing']:,} of {part['distinct']:,} missing{left}"
        )
    if made := each["index"]:
        k, probes = min(made["probes"].items())
        told.append(
            f"index     {made['cells']:,} cells, {probes:,} of them for {made['target']:.0%} of the {k} nearest, "
            f"{made['fresh_rows']:,} fresh rows"
        )
    work = each["maintenance"] or {}
    verbs = ("index", "optimize", "vacuum")
    told += [f"due       shoal {verb}: {'; '.join(work[verb])}" for verb in verbs if work.get(verb)]
    if lease := each["lease"]:
        dead = "; it is dead, and the next run takes over" if lease["alive"] is False else ""
        told.append(
            f"lease     run {lease['run_id']} by {lease['user']} on {lease['host']} since {lease['started']}{dead}"
        )
    return told


def _span(seconds: float) -> str:
    """A length of time in its two largest units: `1 d 2 h`, `3 min 4 s`."""
    whole = round(seconds)
    parts = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "0 s"
