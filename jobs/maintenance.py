"""What is due on a table, and doing it: compaction, deletion vectors folded in, vacuum, the tables beside it.

`shoal status` says what `due` finds; a run with `maintenance: auto` does it after it has published, under its lease.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.jobs.bookkeeping import RUN
from shoal.jobs.compaction import MAX_DELETED_SHARE, SMALL_BYTES, TableSize, compact, size_of
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.layout import TableRef, read_delta
from shoal.jobs.published import Published
from shoal.jobs.sweep import Part, stale_encoders, sweep, tables


@dataclass(frozen=True)
class Thresholds:
    """From where on maintenance is worth its commits."""

    small_bytes: int = SMALL_BYTES
    small_files: int = 24
    """A night adds one or a few files, so that each is written again about once in three weeks; scans open no more."""
    deleted_share: float = MAX_DELETED_SHARE
    sidecar_files: int = 50
    """Files of runs, staging or canaries: a run appends two to four, and each verb reads them all."""
    vacuum_every: timedelta = timedelta(days=7)
    """Listing a table's folder is what vacuum costs, and space is what waiting costs: a quarter of a month's nights."""


DEFAULT = Thresholds()


@dataclass(frozen=True)
class Due:
    """Why `shoal optimize` and `shoal vacuum` are worth running now; nothing is due where there is no reason."""

    optimize: tuple[str, ...]
    vacuum: tuple[str, ...]
    size: TableSize
    last_vacuum_ms: int | None

    def public(self) -> dict[str, Any]:
        return {
            "optimize": list(self.optimize),
            "vacuum": list(self.vacuum),
            "size": self.size.public(),
            "last_vacuum_ms": self.last_vacuum_ms,
        }


def due(spark: SparkSession, published: Published, thresholds: Thresholds = DEFAULT) -> Due:
    """Reads logs, the runs table and, where something is staged, the hashes of staging; writes nothing."""
    size = size_of(spark, published.ref.sql, thresholds.small_bytes)
    last, first = _vacuums(spark, published.ref)
    return Due(
        tuple(_why_optimize(spark, published.ref, size, thresholds)),
        tuple(_why_vacuum(spark, published, last or first, thresholds, is_first=last is None)),
        size,
        last,
    )


def _why_optimize(spark: SparkSession, ref: TableRef, size: TableSize, limits: Thresholds) -> list[str]:
    why = []
    if size.small_files > limits.small_files:
        why.append(f"{size.small_files} small files (more than {limits.small_files})")
    can_join = size.worn_files + size.small_files > 1
    if size.deleted_share > limits.deleted_share or (size.worn_files and can_join):
        why.append(f"{size.deleted_rows} of {size.rows} rows are marked as deleted")
    for name, sql in tables(spark, ref).items():
        if name != "published" and (num := size_of(spark, sql).files) > limits.sidecar_files:
            why.append(f"{num} files in {name} (more than {limits.sidecar_files})")
    return why


def _why_vacuum(
    spark: SparkSession, published: Published, since: int | None, limits: Thresholds, *, is_first: bool
) -> list[str]:
    why = []
    days = 0.0 if since is None else (time.time() - since / 1000) / 86400
    if days >= limits.vacuum_every.total_seconds() / 86400:
        why.append(f"{'the first run was' if is_first else 'last vacuum'} {days:.0f} days ago")
    if others := sum(part.rows for part in stale_encoders(spark, published)):
        why.append(f"{others} staged rows of encoders that nobody uses")
    return why


def _vacuums(spark: SparkSession, ref: TableRef) -> tuple[int | None, int | None]:
    """When the newest vacuum and the first run that is written down were, in ms."""
    if not DeltaTable.isDeltaTable(spark, ref.runs):
        return None, None
    runs = read_delta(spark, ref.runs).where(F.col("kind") == RUN)
    at = F.coalesce(*[F.get_json_object("record", f"$.{path}.at_ms") for path in ("vacuum", "maintenance.vacuum")])
    found = runs.agg(F.max(at.cast("bigint")), F.unix_millis(F.min("written_at"))).collect()[0]
    return found[0], found[1]


def optimize_tables(
    spark: SparkSession,
    ref: TableRef,
    *,
    check: Callable[[], None],
    step: Callable[[str], None],
    small_bytes: int = SMALL_BYTES,
) -> dict[str, Any]:
    """Compacts the published table and those beside it: `before` and `after` of each, and `at_ms`."""
    found: dict[str, Any] = {}
    for name, sql in tables(spark, ref).items():
        check()
        before = size_of(spark, sql, small_bytes)
        compact(spark, sql, small_bytes)
        found[name] = {"before": before.public(), "after": size_of(spark, sql, small_bytes).public()}
        step(f"{name} optimized")
    return {"at_ms": int(time.time() * 1000), "tables": found}


def vacuum_tables(
    spark: SparkSession,
    files: FileSystem,
    published: Published,
    *,
    check: Callable[[], None],
    step: Callable[[str], None],
) -> dict[str, Any]:
    """Removes what nobody needs: files and bytes in all and by `parts`, and `at_ms`."""
    return swept(sweep(spark, files, published, check=check, step=step)) | {"at_ms": int(time.time() * 1000)}


def swept(parts: list[Part]) -> dict[str, Any]:
    """Parts and their sums as JSON has them."""
    return {
        "files": sum(part.files for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "parts": [part.public() for part in parts],
    }


def maintain(
    spark: SparkSession,
    files: FileSystem,
    published: Published,
    *,
    check: Callable[[], None],
    say: Callable[[str], None],
    step: Callable[[str], None],
    thresholds: Thresholds = DEFAULT,
) -> dict[str, Any]:
    """Does what is due under the caller's lease; `optimize` and `vacuum` of what it returns are None where not due."""
    found = due(spark, published, thresholds)
    done: dict[str, Any] = {"optimize": None, "vacuum": None}
    if found.optimize:
        say(f"maintenance: optimizing, {'; '.join(found.optimize)}")
        done["optimize"] = optimize_tables(
            spark, published.ref, check=check, step=step, small_bytes=thresholds.small_bytes
        ) | {"reasons": list(found.optimize)}
    if found.vacuum:
        say(f"maintenance: vacuuming, {'; '.join(found.vacuum)}")
        done["vacuum"] = vacuum_tables(spark, files, published, check=check, step=step) | {
            "reasons": list(found.vacuum)
        }
    return done
