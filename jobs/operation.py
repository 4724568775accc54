"""A verb that changes a published table outside of a run: under the lease, in the books, in one commit at most."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import ShoalError, first_line
from shoal.conf.run import TrackingConfig
from shoal.jobs.bookkeeping import Bookkeeper, drop_work, new_run_id
from shoal.jobs.changes import last_unchanged
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.layout import TableRef, table_named
from shoal.jobs.lease import Lease, held
from shoal.jobs.mounted_files import open_files
from shoal.jobs.publish import Target, commit_sql
from shoal.jobs.published import Published, State, read_settled
from shoal.jobs.report import PHASES


@dataclass
class Operation:
    """One verb at work on one table; `published` is what it found there, with the lease taken."""

    spark: SparkSession
    verb: str
    run_id: str
    published: Published
    files: FileSystem
    books: Bookkeeper
    lease: Lease
    say: Callable[[str], None]
    step: Callable[[str], None]
    started: float = field(default_factory=time.time)

    @property
    def ref(self) -> TableRef:
        return self.published.ref

    def newest(self) -> dict[str, Any]:
        """What our newest commit says, with what nights without changes have seen of the source since.

        A commit of a later generation hides those nights: it has to carry on what they saw.
        """
        state = self.published.ours.state if self.published.ours else None
        if state is None:
            return {}
        seen = last_unchanged(self.spark, self.ref, self.published) or {}
        return {**state.record, **{name: seen[name] for name in ("source_state", "source_version") if name in seen}}

    def record(self, status: str, base: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """A record as the runs table keeps them: what `base` (unset: our newest commit) says, with nothing encoded."""
        state = self.published.ours.state if self.published.ours else None
        now = int(time.time() * 1000)
        before = base or (state.record if state else {})
        rows: dict[str, int] = before.get("rows") or {}
        num_rows = rows.get("source", 0)
        return {
            **before,
            "verb": self.verb,
            "status": status,
            "run_id": self.run_id,
            "mlflow_run": None,
            "table": str(self.ref),
            "version": None,
            "generation": self.published.generation,
            "rows": {**dict.fromkeys(rows, 0), "source": num_rows, "unchanged": num_rows},
            "chunks": dict.fromkeys(before.get("chunks") or {}, 0),
            "errors": {},
            "tokens": 0,
            "bytes_written": 0,
            "estimate": {"seconds": 0.0, "price": None},
            "seconds": {
                **dict.fromkeys(PHASES, 0.0),
                "total": round(now / 1000 - self.started, 3),
            },
            "difference": None,
            "migration": None,
            "maintenance": None,
            "index": None,
            "fold": None,
            "progress": [],
            "warnings": [],
            "reason": None,
            "error": None,
            "code": None,
            "started_ms": int(self.started * 1000),
            "ended_ms": now,
            **more,
        }

    def commit(self, statement: str, status: str, base: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """Runs one statement as our next commit, writes it down, and returns its record with the version."""

        def write(target: Target, state: State) -> int:
            return commit_sql(self.spark, target, state, statement)

        return self.publish(write, status, base, **more)

    def publish(
        self, write: Callable[[Target, State], int], status: str, base: dict[str, Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        """As `commit`, for a commit that `write` makes: it returns the version."""
        self.lease.check()
        generation = max(self.published.generation, self.books.last_generation()) + 1
        target = Target(self.ref, self.published, self.published.table_id, generation)
        record = self.record(status, base or self.newest(), **more) | {"generation": generation}
        version = write(target, State(self.run_id, generation, record))
        self.step("committed")
        record["version"] = version
        self.write(record)
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record to the runs table; the next run sends it to MLflow."""
        self.books.write(record)
        self.step("recorded")


@contextmanager
def operating(
    spark: SparkSession,
    table: str,
    verb: str,
    *,
    say: Callable[[str], None] = lambda _: None,
    step: Callable[[str], None] = lambda _: None,
) -> Iterator[Operation]:
    """Holds the table's lease for the block, after finishing what a dead run left; a failure goes into the books too.

    Raises DestinationError when there is no such table, BusyError when a run is alive on it.
    """
    found = table_of_ours(spark, table)
    files, run_id = open_files(spark, found.ref.sidecar), new_run_id()
    with held(files, found.ref.lease, run_id, say=say) as lease:
        step("lease taken")
        published = table_of_ours(spark, table)
        books = Bookkeeper(spark, published.ref, say)
        books.create()
        books.recover(published, TrackingConfig(enabled=False))
        drop_work(files, published.ref)
        step("recovered")
        operation = Operation(spark, verb, run_id, published, files, books, lease, say, step)
        try:
            yield operation
        except ShoalError as error:
            _write_down_failure(operation, error)
            raise


def table_of_ours(spark: SparkSession, table: str) -> Published:
    """The published table that a user names; DestinationError when there is none."""
    return read_settled(spark, table_named(spark, table))


def _write_down_failure(operation: Operation, error: ShoalError) -> None:
    try:
        operation.lease.check()
        operation.books.write(operation.record(error.status, error=str(error), code=error.code))
    except (ShoalError, PySparkException, Py4JJavaError) as second:
        operation.say(f"the failure could not be written down: {first_line(second)}")
