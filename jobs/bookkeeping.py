"""What is written down after a run: the runs table, MLflow, trimming; each step may be repeated without harm."""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.redact import scrub
from shoal.conf.run import TrackingConfig
from shoal.jobs.filesystem import FileSystem, join
from shoal.jobs.layout import TableRef, create_delta, read_delta
from shoal.jobs.published import Published, State, commits
from shoal.jobs.tracking import send

RUNS_DDL = "run_id string, kind string, written_at timestamp, record string"
RUN, SENT = "run", "mlflow"

RECENT_RUNS = 20

FIRST_VERB = "embed"
"""Of a run's commits the first."""

# The night's publication, the cut-over to the next encoder, maintenance.
COMMITS_PER_RUN = 4

# A tracking server that was down for long is caught up with a few runs at a time.
MAX_SENT_PER_RUN = 20
PATIENCE = 2


def new_run_id() -> str:
    """Sorts by time, and no two are alike."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class Bookkeeper:
    """The long history of one table, append-only: a row for each run, and one when MLflow has taken it."""

    spark: SparkSession
    ref: TableRef
    say: Callable[[str], None]

    def create(self) -> None:
        """Makes the runs table if it is absent."""
        create_delta(self.spark, self.ref.runs, RUNS_DDL)

    def recover(self, published: Published | None, tracking: TrackingConfig) -> None:
        """Writes down what the newest commits say of a run that died after them, and sends what MLflow has missed.

        A night may have published and cut over before it died: commits are looked at until one has been written down.
        """
        for version, state in reversed(self._unwritten(published)):
            self.say(f"run {state.run_id} published version {version} and died; writing it down")
            self.write({**state.record, "version": version})
        self.send_pending(tracking)

    def _unwritten(self, published: Published | None) -> list[tuple[int, State]]:
        """Our commits that the runs table lacks, newest first, among those of one run."""
        newest = published.ours if published else None
        if published is None or newest is None or newest.state is None:
            return []
        found = []
        if not self._was_written(newest.state):
            found.append((newest.version, newest.state))
        elif newest.state.record.get("verb", FIRST_VERB) == FIRST_VERB:
            return []
        seen = 1
        for commit in commits(self.spark, published.ref):
            if commit.state is None or commit.version >= newest.version:
                continue
            was_written = self._was_written(commit.state)
            if not was_written:
                found.append((commit.version, commit.state))
            seen += 1
            # A run publishes before it cuts over and maintains, and each writes down its own: none is left before that.
            if seen == COMMITS_PER_RUN or (was_written and commit.state.record.get("verb", FIRST_VERB) == FIRST_VERB):
                break
        return found

    def write(self, record: dict[str, Any]) -> None:
        """Adds a run's record once, however often it is called.

        A run whose commit landed although it failed afterwards has two: what it believed, and what `recover` found.
        """
        self._append(record["run_id"], RUN, json.dumps(record, sort_keys=True), once=record["status"])

    def send_pending(self, tracking: TrackingConfig) -> dict[str, str]:
        """Sends what MLflow does not have yet, newest first; run id -> MLflow run id.

        MLflow being down costs nothing: what was not sent stays pending. Newest first, and on to the next after one
        failure, so that a record which the server will not take holds up no other.
        """
        if not tracking.enabled:
            return {}
        runs = read_delta(self.spark, self.ref.runs)
        runs = runs.withColumn("status", F.get_json_object("record", "$.status"))
        sent = runs.where(F.col("kind") == SENT).select("run_id", "status")
        pending = (
            runs.where(F.col("kind") == RUN)
            .join(sent, on=["run_id", "status"], how="left_anti")
            .orderBy(F.desc("written_at"))
            .limit(MAX_SENT_PER_RUN)
            .collect()
        )
        taken: dict[str, str] = {}
        num_failed = 0
        for row in pending:
            try:
                taken[row["run_id"]] = send(json.loads(row["record"]), tracking)
            except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the vectors are published
                told = f"MLflow ({tracking.uri}) did not take run {row['run_id']}: {error}; the next run sends it again"
                self.say(scrub(told, pairs=True))
                num_failed += 1
                if num_failed == PATIENCE:
                    break
                continue
            ticked = {"mlflow_run": taken[row["run_id"]], "status": row["status"]}
            self._append(row["run_id"], SENT, json.dumps(ticked), once=f"{SENT}/{row['status']}")
        return taken

    def records(self) -> list[dict[str, Any]]:
        """All runs, newest first, each with its `mlflow_run` where there is one; of two records of a run the later."""
        rows = read_delta(self.spark, self.ref.runs).orderBy(F.desc("written_at")).collect()
        sent = {row["run_id"]: json.loads(row["record"])["mlflow_run"] for row in rows if row["kind"] == SENT}
        runs: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["kind"] == RUN:
                runs.setdefault(row["run_id"], json.loads(row["record"]))
        return [{**run, "mlflow_run": sent.get(run_id)} for run_id, run in runs.items()]

    def last_generation(self) -> int:
        """The highest generation written down, 0 where there is none; for tables whose own log no longer reaches it."""
        runs = read_delta(self.spark, self.ref.runs).where(F.col("kind") == RUN)
        highest = runs.agg(F.max(F.get_json_object("record", "$.generation").cast("int"))).collect()[0][0]
        return int(highest or 0)

    def last_rate(self, fingerprint: str) -> float | None:
        """Tokens per second of the newest run that encoded with this encoder, None when there was none lately."""
        runs = read_delta(self.spark, self.ref.runs).where(F.col("kind") == RUN)
        for row in runs.orderBy(F.desc("written_at")).limit(RECENT_RUNS).collect():
            run = json.loads(row["record"])
            coming = run.get("migration") or {}
            for part, seconds in ((run, run["seconds"]["encode"]), (coming, coming.get("seconds") or 0.0)):
                if part.get("fingerprint") == fingerprint and part.get("tokens") and seconds > 0:
                    return float(part["tokens"]) / float(seconds)
        return None

    def _was_written(self, state: State) -> bool:
        runs = read_delta(self.spark, self.ref.runs).where((F.col("run_id") == state.run_id) & (F.col("kind") == RUN))
        status = state.record.get("status", "published")
        return not runs.where(F.get_json_object("record", "$.status") == status).isEmpty()

    def _append(self, run_id: str, kind: str, record: str, *, once: str) -> None:
        row = [(run_id, kind, datetime.now(UTC), record)]
        (
            self.spark.createDataFrame(row, RUNS_DDL)
            .coalesce(1)
            .write.format("delta")
            .mode("append")
            .option("txnAppId", f"{run_id}/{once}")
            .option("txnVersion", 0)
            .save(self.ref.runs)
        )


def drop_work(files: FileSystem, ref: TableRef) -> None:
    """Removes the work tables of every run; only the holder of the lease may call it."""
    for name in files.names(ref.work):
        files.delete(join(ref.work, name))
