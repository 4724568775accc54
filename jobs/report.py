"""A run's summary: the one record that `--json` prints, the commit carries, the runs table keeps and MLflow is sent."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from shoal.conf.run import RunConfig
from shoal.jobs.planner import ChunkPlan, RowCounts
from shoal.jobs.reconcile import Account

PHASES = ("start", "plan", "encode", "audit", "publish", "migrate", "maintain", "record")
SOMETIMES = ("migrate", "maintain")
"""Phases that most runs do not have."""


@dataclass
class Report:
    """Filled in as the run goes; `record()` is valid at any time."""

    config: RunConfig | None = None
    run_id: str = ""
    table: str = ""
    started: float = field(default_factory=time.time)
    status: str = "failed"
    version: int | None = None
    generation: int | None = None
    mlflow_run: str | None = None
    fingerprint: str | None = None
    encoder: str | None = None
    verb: str = "embed"
    source_version: int | None = None
    source_state: dict[str, Any] | None = None
    difference: str | None = None
    rows: RowCounts = field(default_factory=RowCounts)
    planned: int = 0
    distinct: int = 0
    num_todo: int = 0
    account: Account | None = None
    encoded: int = 0
    tokens: int = 0
    """Both only for a run that failed before its account was made."""
    estimate: dict[str, float | None] = field(default_factory=lambda: {"seconds": 0.0, "price": None})
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    bytes_written: int = 0
    padding_share: float | None = None
    parity_min_cosine: float | None = None
    ndcg: float | None = None
    migration: dict[str, Any] | None = None
    maintenance: dict[str, Any] | None = None
    progress: list[tuple[float, int, int]] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None
    code: str | None = None
    warnings: list[str] = field(default_factory=list)
    around: Callable[[str], AbstractContextManager[Any]] = nullcontext
    """What is entered for the length of a phase, made from its name."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `seconds[name]`, also when it fails."""
        began = time.monotonic()
        try:
            with self.around(name):
                yield
        finally:
            self.seconds[name] += time.monotonic() - began

    def planned_chunks(self, plan: ChunkPlan) -> None:
        self.planned, self.distinct, self.num_todo = plan.planned, plan.distinct, plan.num_todo

    def public(self) -> dict[str, Any]:
        """The document that `shoal embed --json` prints; needs no run file."""
        account = self.account or Account(self.planned, 0, 0, self.encoded, self.tokens)
        total = time.time() - self.started
        return {
            "status": self.status,
            "table": self.table or None,
            "version": self.version,
            "generation": self.generation,
            "run_id": self.run_id or None,
            "mlflow_run": self.mlflow_run,
            "fingerprint": self.fingerprint,
            "source_version": self.source_version,
            "difference": self.difference,
            "rows": asdict(self.rows),
            "chunks": {
                "planned": self.planned,
                "distinct": self.distinct,
                "reused": self.distinct - self.num_todo,
                "encoded": account.encoded,
                "embedded": account.embedded,
                "errors": sum(account.errors.values()),
                "truncated": account.truncated,
            },
            "errors": account.errors,
            "tokens": account.tokens,
            "estimate": self.estimate,
            "seconds": {"total": round(total, 3), **{k: round(v, 3) for k, v in self.seconds.items()}},
            "bytes_written": self.bytes_written,
            "padding_share": self.padding_share,
            "parity_min_cosine": self.parity_min_cosine,
            "ndcg": self.ndcg,
            "migration": self.migration,
            "maintenance": self.maintenance,
            "reason": self.reason,
            "error": self.error,
            "code": self.code,
            "warnings": self.warnings,
        }

    def record(self) -> dict[str, Any]:
        """What is printed, and what else the commit, the runs table and MLflow keep; plain JSON values only."""
        assert self.config is not None  # noqa: S101 - only a failure before the run file was read has none
        return self.public() | {
            "verb": self.verb,
            "name": self.config.name,
            "encoder": self.encoder,
            "source": source_name(self.config),
            "source_state": self.source_state,
            "progress": self.progress,
            "started_ms": int(self.started * 1000),
            "ended_ms": int(time.time() * 1000),
            "git_revision": git_revision(self.config.folder),
            "config": self.config.redacted(),
        }

    def lines(self) -> list[str]:
        """The summary for people."""
        record = self.public()
        rows, chunks = record["rows"], record["chunks"]
        if self.status == "unchanged":
            told = [f"nothing to do: {rows['source']:,} rows unchanged in {self.table} (version {self.version})"]
            return told + self._next_encoder()
        told = [
            f"published {self.table} version {self.version}"
            if self.status == "published"
            else f"{self.status}: {self.error}",
            (
                f"rows      {rows['source']:,}: {rows['new']:,} new, {rows['changed']:,} changed, "
                f"{rows['metadata_only']:,} metadata "
                f"only, {rows['deleted']:,} deleted, {rows['unchanged']:,} unchanged"
            ),
            (
                f"chunks    {chunks['planned']:,}: {chunks['encoded']:,} encoded, {chunks['reused']:,} reused, "
                f"{counted(chunks['errors'], 'error')}, {chunks['truncated']:,} truncated"
            ),
        ]
        encode = record["seconds"]["encode"]
        if record["tokens"] and encode:
            told.append(
                f"encoding  {record['tokens']:,} tokens in {encode:.1f} s: {chunks['encoded'] / encode:,.0f} chunks/s, "
                f"{record['tokens'] / encode:,.0f} tokens/s"
            )
        taken = {name: seconds for name, seconds in record["seconds"].items() if name != "total"}
        phases = ", ".join(f"{name} {taken[name]:.1f}" for name in taken if taken[name] or name not in SOMETIMES)
        told.append(f"seconds   {record['seconds']['total']:.1f}: {phases}")
        if record["errors"]:
            told.append("errors    " + ", ".join(f"{reason}: {count}" for reason, count in record["errors"].items()))
        told += self._next_encoder()
        told.append(f"run       {self.run_id}, MLflow {self.mlflow_run or 'not recorded'}")
        return told

    def _next_encoder(self) -> list[str]:
        """One line on the migration, where there is one."""
        part = self.migration
        if part is None:
            return []
        counts = f"{part['encoded']:,} encoded, {part['missing']:,} of {part['distinct']:,} contents missing"
        left = f", about {part['nights_left']:,} more nights" if part["nights_left"] else ""
        why = f" ({part['reason']})" if part["reason"] and part["state"] != "backfilling" else ""
        return [f"next      {part['encoder']}: {part['state']}, {counts}{left}{why}"]


def source_name(config: RunConfig) -> str:
    """The source as one word for people and for MLflow's datasets; what came from the environment stays hidden."""
    source = config.redacted()["source"]
    return str(source["path"] or source["table"] or source["query"])


def git_revision(folder: Path) -> str | None:
    """The commit of the run file's folder, None where it is not under git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def plain(value: Any) -> Any:
    """A key's value as JSON has it."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    return value


def counted(count: int, noun: str) -> str:
    """`1 error`, `2 errors`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
