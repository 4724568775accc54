"""What is written down after a run: the runs table, MLflow, trimming; each step may be repeated without harm."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from shoal.conf.redact import scrub
from shoal.conf.run import TrackingConfig
from shoal.jobs.filesystem import FileSystem, join
from shoal.jobs.layout import TableRef, read_delta
from shoal.jobs.published import Published
from shoal.jobs.tracking import send

RUNS_DDL = "run_id string, kind string, written_at timestamp, record string"
RUN, SENT = "run", "mlflow"

RECENT_RUNS = 20

# A tracking server that was down for long is caught up with a few runs at a time.
MAX_SENT_PER_RUN = 20
PATIENCE = 2


@dataclass(frozen=True)
class Bookkeeper:
    """The long history of one table, append-only: a row for each run, and one when MLflow has taken it."""

    spark: SparkSession
    ref: TableRef
    say: Callable[[str], None]

    def create(self) -> None:
        """Makes the runs table if it is absent."""
        if DeltaTable.isDeltaTable(self.spark, self.ref.runs):
            return
        (
            DeltaTable.createIfNotExists(self.spark)
            .location(self.ref.runs)
            .addColumns(T.StructType.fromDDL(RUNS_DDL))
            .execute()
        )

    def recover(self, published: Published | None, tracking: TrackingConfig) -> None:
        """Writes down what the head commit says of a run that died after it, and sends what MLflow has missed."""
        if published and published.ours and published.ours.state:
            state = published.ours.state
            if not self._was_written(state.run_id):
                self.say(f"run {state.run_id} published version {published.ours.version} and died; writing it down")
                self.write({**state.record, "version": published.ours.version})
        self.send_pending(tracking)

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
            if run.get("fingerprint") == fingerprint and run.get("tokens") and run["seconds"]["encode"] > 0:
                return float(run["tokens"]) / float(run["seconds"]["encode"])
        return None

    def _was_written(self, run_id: str) -> bool:
        runs = read_delta(self.spark, self.ref.runs).where((F.col("run_id") == run_id) & (F.col("kind") == RUN))
        return not runs.where(F.get_json_object("record", "$.status") == "published").isEmpty()

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
