"""What is due on a table, and doing it: index, compaction, deletion vectors folded in, vacuum, the tables beside it.

`shoal status` says what `due` finds; a run with `maintenance: auto` does it after it has published, under its lease.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import RefusedError
from shoal.conf.run import IndexConfig
from shoal.jobs.bookkeeping import RUN
from shoal.jobs.cells import FRESH, CellSize, Index, cell_sizes, has_build
from shoal.jobs.compaction import MAX_DELETED_SHARE, SMALL_BYTES, TableSize, compact, size_of
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.indexing import FOLDED, build, fold, has_drifted
from shoal.jobs.layout import TableRef, is_delta, read_delta
from shoal.jobs.operation import Operation
from shoal.jobs.published import Published
from shoal.jobs.sweep import Part, stale_encoders, sweep, tables

Cells = Mapping[int | None, CellSize]


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
    fresh_share: float = 0.5
    """Fresh rows that every search looks through, as a share of those in the cells that it looks in anyway."""
    growth: float = 4.0
    """Rows since the build, in rows at the build: cells that have grown so much are too large."""
    drifted_rows: int = 1000
    """Fewer rows than this, folded in at once, say nothing of those to come."""
    imbalance: float = 3.0
    """The largest cell against the mean one, in what it was at the build."""


DEFAULT = Thresholds()


@dataclass(frozen=True)
class Due:
    """Why `shoal index`, `optimize` and `vacuum` are worth running now; nothing is due where there is no reason."""

    index: tuple[str, ...]
    optimize: tuple[str, ...]
    vacuum: tuple[str, ...]
    size: TableSize
    last_vacuum_ms: int | None
    fresh_rows: int = 0
    last_fit: float | None = None
    """Both of a table with an index: rows that wait to be folded in, and how well those before fitted their cells."""

    def public(self) -> dict[str, Any]:
        return {
            "index": list(self.index),
            "optimize": list(self.optimize),
            "vacuum": list(self.vacuum),
            "size": self.size.public(),
            "last_vacuum_ms": self.last_vacuum_ms,
        }


def due(
    spark: SparkSession, published: Published, thresholds: Thresholds = DEFAULT, *, index: IndexConfig | None = None
) -> Due:
    """Reads logs, the runs table and, where something is staged, the hashes of staging; writes nothing.

    `index`: what the run file says of it.
    """
    cells = cell_sizes(spark, published.ref.sql) if published.index else {}
    limits = thresholds_of(published, cells, thresholds)
    size = size_of(spark, published.ref.sql, limits.small_bytes)
    fit = last_fit(spark, published, limits.drifted_rows)
    last, first = _vacuums(spark, published.ref)
    return Due(
        tuple(_why_index(spark, published, size, cells, fit, index, limits)),
        (*_why_fold(published.index, cells, limits), *_why_optimize(spark, published, size, limits)),
        tuple(_why_vacuum(spark, published, last or first, thresholds, is_first=last is None)),
        size,
        last,
        cells[FRESH].rows if FRESH in cells else 0,
        fit,
    )


def thresholds_of(published: Published, cells: Cells, thresholds: Thresholds = DEFAULT) -> Thresholds:
    """The same for a table in cells: a file per cell is as few as there can be, and small is what is less than half."""
    made = published.index
    if made is None:
        return thresholds
    num_bytes = sum(cell.bytes for cell in cells.values())
    return replace(
        thresholds,
        small_bytes=min(thresholds.small_bytes, num_bytes // made.cells // 2),
        small_files=thresholds.small_files + made.cells,
    )


def _why_index(
    spark: SparkSession,
    published: Published,
    size: TableSize,
    cells: Cells,
    fit: float | None,
    wanted: IndexConfig | None,
    limits: Thresholds,
) -> list[str]:
    made = published.index
    if made is None:
        rows = size.rows - size.deleted_rows
        asked = wanted is not None and rows >= wanted.min_chunks
        return [f"the run file asks for an index, and {rows} chunks have none"] if asked else []
    if not has_build(spark, published.ref, made):
        return ["its centroids are gone"]
    why = []
    rows = sum(cell.rows for number, cell in cells.items() if number is not None)
    if rows > made.rows * limits.growth:
        why.append(f"{rows} chunks, {made.rows} when the cells were made")
    own = [cell.rows for number, cell in cells.items() if number is not None and number != FRESH]
    balance = max(own, default=0) * made.cells / max(1, sum(own))
    if balance > made.balance * limits.imbalance:
        why.append(f"the largest cell has {balance:.1f} times the mean ({made.balance:.1f} when the cells were made)")
    if fit is not None and has_drifted(fit, made):
        why.append(f"the rows folded in last are unlike the cells (mean cosine {fit:.3f}, {made.fit:.3f} at the build)")
    return why


def last_fit(spark: SparkSession, published: Published, min_rows: int = DEFAULT.drifted_rows) -> float | None:
    """Mean cosine, of the rows that were folded in last, with the centroids of their cells; None before any were.

    A fold of fewer than `min_rows` rows is passed over.
    """
    ref, made = published.ref, published.index
    if made is None or not is_delta(spark, ref.runs):
        return None
    runs = read_delta(spark, ref.runs).where((F.col("kind") == RUN) & F.col("record").contains(f'"{FOLDED}"'))
    of_build = runs.where(
        (F.get_json_object("record", "$.fold.build") == made.build)
        & (F.get_json_object("record", "$.fold.rows").cast("bigint") >= min_rows)
    )
    newest = of_build.orderBy(F.desc("written_at")).limit(1).collect()
    found = json.loads(newest[0]["record"])["fold"]["fit"] if newest else None
    return None if found is None else float(found)


def _why_fold(made: Index | None, cells: Cells, limits: Thresholds) -> list[str]:
    if made is None or FRESH not in cells:
        return []
    looked_in = min(made.probes.values()) / made.cells * sum(size.rows for size in cells.values())
    rows = cells[FRESH].rows
    if rows <= looked_in * limits.fresh_share:
        return []
    return [f"{rows} rows in the fresh cell (a search looks through {looked_in:.0f} others)"]


def _why_optimize(spark: SparkSession, published: Published, size: TableSize, limits: Thresholds) -> list[str]:
    ref, why = published.ref, []
    if size.small_files > limits.small_files:
        why.append(f"{size.small_files} small files (more than {limits.small_files})")
    # In cells, each of which is a file, a worn one has no other to be joined with.
    can_join = size.worn_files + size.small_files > 1 and published.index is None
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
    if not is_delta(spark, ref.runs):
        return None, None
    runs = read_delta(spark, ref.runs).where(F.col("kind") == RUN)
    at = F.coalesce(*[F.get_json_object("record", f"$.{path}.at_ms") for path in ("vacuum", "maintenance.vacuum")])
    found = runs.agg(F.max(at.cast("bigint")), F.unix_millis(F.min("written_at"))).collect()[0]
    return found[0], found[1]


def optimize_tables(operation: Operation, *, thresholds: Thresholds = DEFAULT) -> dict[str, Any]:
    """Folds the fresh cell in, and compacts the published table and those beside it.

    `before` and `after` of each, `folded` rows, and `at_ms`.
    """
    spark, published = operation.spark, operation.published
    cells = cell_sizes(spark, published.ref.sql) if published.index else {}
    limits = thresholds_of(published, cells, thresholds)
    small = {"published": limits.small_bytes}
    before = {
        name: size_of(spark, sql, small.get(name, thresholds.small_bytes))
        for name, sql in tables(spark, published.ref).items()
    }
    # Its commit is a run of its own in the books: the other record tells what all of this came to.
    folded = fold(replace(operation, run_id=f"{operation.run_id}-fold")) if FRESH in cells else None
    found: dict[str, Any] = {}
    for name, sql in tables(spark, published.ref).items():
        operation.lease.check()
        small_bytes = small.get(name, thresholds.small_bytes)
        compact(spark, sql, small_bytes)
        found[name] = {"before": before[name].public(), "after": size_of(spark, sql, small_bytes).public()}
        operation.step(f"{name} optimized")
    num_folded = folded["fold"]["rows"] if folded else 0
    return {"at_ms": int(time.time() * 1000), "folded": num_folded, "tables": found}


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
    operation: Operation, *, index: IndexConfig | None = None, thresholds: Thresholds = DEFAULT
) -> dict[str, Any]:
    """Does what is due under the caller's lease; what was not due is None in what it returns."""
    found = due(operation.spark, operation.published, thresholds, index=index)
    done: dict[str, Any] = {"index": None, "optimize": None, "vacuum": None}
    if found.index:
        operation.say(f"maintenance: indexing, {'; '.join(found.index)}")
        former = operation.published.index
        if index is not None or former is None:
            wanted = index or IndexConfig()
            cells, recall = wanted.cells, wanted.recall
        else:
            cells, recall = former.asked, former.target
        try:
            made = build(operation, cells=cells, recall=recall)
            done["index"] = {"version": made["version"], "reasons": list(found.index)}
        except RefusedError as error:
            operation.say(f"not indexed: {error}")
    if found.optimize and not done["index"]:
        # After a build there is nothing to fold in or to compact.
        operation.say(f"maintenance: optimizing, {'; '.join(found.optimize)}")
        done["optimize"] = optimize_tables(operation, thresholds=thresholds) | {"reasons": list(found.optimize)}
    if found.vacuum:
        operation.say(f"maintenance: vacuuming, {'; '.join(found.vacuum)}")
        swept_up = vacuum_tables(
            operation.spark, operation.files, operation.published, check=operation.lease.check, step=operation.step
        )
        done["vacuum"] = swept_up | {"reasons": list(found.vacuum)}
    return done
