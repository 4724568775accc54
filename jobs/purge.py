"""`shoal purge`: what is gone from a table leaves every file beside it too: older versions, log, staging, runs.

    mark -> published -> staging -> runs -> seal -> cut

Marked first, by a commit that `shoal restore` will not go behind, so that a purge which dies in between leaves nothing
that could come back; every step may be repeated, and `shoal purge TABLE` once more goes through all of them.
"""

import csv
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from shoal.conf.errors import ConfigError, InternalError, RunError
from shoal.jobs.filesystem import FileSystem, full_disk, join
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import is_delta, read_delta
from shoal.jobs.operation import Operation, operating, table_of_ours
from shoal.jobs.published import HASHES, Published, keys_that_differ

PURGED_PROPERTY = "shoal.purged_at"
PURGING, PURGED = "purging", "purged"
MASK = "(purged)"

# What messages of Spark and of Shoal quote from rows, in records of runs.
FREE_TEXT = frozenset({"error", "warnings"})
# Settings that name rows, below config.source of a record.
NAMES_ROWS = ("filter", "query")

SAMPLES = 20

_VERSION = re.compile(r"^(\d{20})\.")
_RETENTION_CHECK = "spark.databricks.delta.retentionDurationCheck.enabled"


@dataclass
class Purge:
    """What a purge did: counts, the first version that is left, and what it could not do."""

    table: str
    run_id: str
    status: str = PURGING
    version: int | None = None
    generation: int | None = None
    given: int | None = None
    """Different keys in the file; None without one."""
    found: int = 0
    not_found: tuple[str, ...] = ()
    """The first of them."""
    chunks: int = 0
    """Published chunks of the keys that were found."""
    staged: int = 0
    """Rows of staging whose content no published row has."""
    bytes_freed: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    def public(self) -> dict[str, Any]:
        return asdict(self)


def purge(
    spark: SparkSession,
    table: str,
    keys_file: Path | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    step: Callable[[str], None] = lambda _: None,
) -> Purge:
    """Removes for good what the table no longer holds, and with a file of keys these rows first.

    Restore, time travel and the table's change feed end before the version that it returns. Raises ConfigError for a
    file of keys that does not fit the table, RunError where Spark or the disk failed: running it again goes on.
    """
    wanted = None
    if keys_file is not None:
        wanted = read_keys(spark, keys_file, key_fields(spark, table_of_ours(spark, table)))
    with operating(spark, table, "purge", say=say, step=step) as operation:
        try:
            return _Purging(operation, wanted).go()
        except (PySparkException, Py4JJavaError) as error:
            # What Spark says may quote a row, and the books would keep it.
            raise full_disk(error) or RunError(
                f"table {operation.ref}: the purge stopped with {_kind_of(error)} (--debug shows all of it); what it "
                f"had to remove is not removed everywhere. Run `shoal purge {table}` again",
                code="PURGE_INCOMPLETE",
            ) from error


@dataclass
class _Purging:
    operation: Operation
    wanted: DataFrame | None

    def __post_init__(self) -> None:
        # What the purge's own records go on from: our newest, without what it quotes from rows.
        newest = self.operation.newest()
        self.base = masked_record(newest) if newest else None

    def go(self) -> Purge:
        operation, published = self.operation, self.operation.published
        done = Purge(str(operation.ref), operation.run_id)
        size = self._size()
        self._mark(done)
        self._clear_published()
        self._clear_staging(done)
        self._clear_cells()
        operation.files.delete(join(operation.ref.sidecar, "try"))
        self._clear_runs()
        self._seal(done)
        done.status = PURGED
        done.bytes_freed = max(0, size - self._size())
        done.seconds = round(time.time() - operation.started, 3)
        if published.foreign:
            others = ", ".join(f"version {commit.version} ({commit.operation})" for commit in published.foreign[:3])
            done.warnings = (f"others had committed to the table since Shoal did: {others}; the log of it is gone",)
        operation.write(self._record(done) | {"version": done.version, "generation": done.generation})
        return done

    def _mark(self, done: Purge) -> None:
        """The commit that restore stops at: it deletes the rows of the given keys, where there are any.

        Rows that others have changed lose their hashes, and so are made anew by the next run: when the log is cut,
        nothing else tells that they are not what Shoal published.
        """
        operation = self.operation
        spark, published = operation.spark, operation.published
        keys = list(published.keys)
        if self.wanted is not None:
            self._count(done, self.wanted, keys)
        before = published.ours_rows(spark)
        if (done.found or published.foreign) and self.base is not None:
            # The change feed of the source does not tell what is missing here now.
            self.base["source_state"] = None
        parts = []
        if self.wanted is not None and done.found:
            parts.append(self.wanted.withColumn("__goes", F.lit(True)))
        if before is not None:
            rows = published.rows(spark)
            changed = keys_that_differ(rows, before, keys).join(rows, on=keys, how="left_semi")
            if self.wanted is not None:
                changed = changed.join(self.wanted, on=keys, how="left_anti")
            # A MERGE that matches nothing makes no commit.
            if not changed.isEmpty():
                parts.append(changed.withColumn("__goes", F.lit(False)))
        if not parts:
            operation.commit(self._neutral(operation.ref.sql), PURGING, **self._more(done))
        else:
            view = f"shoal_{operation.run_id.replace('-', '_')}"
            reduce(DataFrame.unionByName, parts).createOrReplaceTempView(view)
            on = " AND ".join(f"t.{quoted(key)} = s.{quoted(key)}" for key in keys)
            hashes = ", ".join(f"t.{name} = NULL" for name in HASHES)
            try:
                operation.commit(
                    f"MERGE INTO {operation.ref.sql} AS t USING {view} AS s ON {on} "
                    f"WHEN MATCHED AND s.__goes THEN DELETE WHEN MATCHED THEN UPDATE SET {hashes}",
                    PURGING,
                    **self._more(done),
                )
            finally:
                spark.catalog.dropTempView(view)
        operation.step("marked")

    def _count(self, done: Purge, wanted: DataFrame, keys: list[str]) -> None:
        operation = self.operation
        named = [quoted(key) for key in keys]
        rows = operation.published.rows(operation.spark).select(*named)
        found = rows.join(wanted, on=keys, how="left_semi").groupBy(*named).count()
        counts = found.agg(F.count(F.lit(1)).alias("keys"), F.sum("count").alias("chunks")).collect()[0]
        done.given, done.found, done.chunks = wanted.count(), counts["keys"], counts["chunks"] or 0
        absent = wanted.join(found, on=keys, how="left_anti").limit(SAMPLES).collect()
        done.not_found = tuple(", ".join(str(row[key]) for key in keys) for row in absent)
        operation.say(f"keys: {done.given} given, {done.found} found with {done.chunks} chunks")

    def _clear_published(self) -> None:
        operation = self.operation
        operation.say("rewriting files with deleted rows, removing those that only older versions need")
        _leave_live_files(operation.spark, operation.ref.sql)
        operation.step("published purged")

    def _clear_staging(self, done: Purge) -> None:
        """Drops what no published row has: of content that is not published nobody can say here whose it was."""
        operation = self.operation
        spark, ref = operation.spark, operation.ref
        operation.lease.check()
        if not is_delta(spark, ref.staging):
            return
        live = ref.read(spark).select("content_hash").where(F.col("content_hash").isNotNull()).distinct()
        done.staged = read_delta(spark, ref.staging).join(live, on="content_hash", how="left_anti").count()
        if done.staged:
            staged = DeltaTable.forPath(spark, ref.staging).alias("t")
            (staged.merge(live.alias("s"), "t.content_hash = s.content_hash").whenNotMatchedBySourceDelete().execute())
        self._leave_head_only(ref.staging)
        operation.step("staging purged")

    def _clear_cells(self) -> None:
        """Drops the centroids of all builds but the table's own: no restore will want them."""
        operation = self.operation
        spark, ref, made = operation.spark, operation.ref, operation.published.index
        operation.lease.check()
        if not is_delta(spark, ref.cells):
            return
        DeltaTable.forPath(spark, ref.cells).delete(F.col("build") != (made.build if made else ""))
        self._leave_head_only(ref.cells)
        operation.step("cells purged")

    def _clear_runs(self) -> None:
        """Masks what the records of all runs quote from rows; counts, times, versions and reasons stay."""
        operation = self.operation
        spark, path = operation.spark, operation.ref.runs
        operation.lease.check()
        rows = read_delta(spark, path).withColumn("at", F.unix_micros("written_at")).drop("written_at").collect()
        masked = [(row["run_id"], row["kind"], row["at"], _masked_text(row["record"])) for row in rows]
        (
            spark.createDataFrame(masked, "run_id string, kind string, at bigint, record string")
            .select("run_id", "kind", F.timestamp_micros("at").alias("written_at"), "record")
            .coalesce(1)
            .write.format("delta")
            .mode("overwrite")
            .save(path)
        )
        self._leave_head_only(path)
        operation.step("runs purged")

    def _seal(self, done: Purge) -> None:
        """A commit that says nothing of rows becomes the first that the table's log still has."""
        operation = self.operation
        operation.published = table_of_ours(operation.spark, str(operation.ref))
        sealed = operation.commit(self._neutral(operation.ref.sql), PURGING, **self._more(done))
        operation.step("sealed")
        done.version, done.generation = sealed["version"], sealed["generation"]
        cut_log(operation.spark, operation.ref.sql, done.version)
        operation.step("log cut")

    def _leave_head_only(self, path: str) -> None:
        """For a table beside the published one, whose history nobody reads."""
        spark, sql = self.operation.spark, f"delta.{quoted(path)}"
        _leave_live_files(spark, sql)
        spark.sql(self._neutral(sql))
        cut_log(spark, sql)

    def _more(self, done: Purge) -> dict[str, Any]:
        told = {"keys": done.given, "found": done.found, "chunks": done.chunks, "staged": done.staged}
        return {"base": self.base, "purge": told, "rows": self._rows(done)}

    def _record(self, done: Purge) -> dict[str, Any]:
        more = self._more(done)
        return self.operation.record(PURGED, more.pop("base"), **more, warnings=list(done.warnings))

    def _rows(self, done: Purge) -> dict[str, int]:
        before: dict[str, int] = (self.base or {}).get("rows") or {}
        num = sum(before.get(name, 0) for name in ("new", "changed", "metadata_only", "unchanged"))
        return {**dict.fromkeys(before, 0), "source": num - done.found, "unchanged": num - done.found}

    def _neutral(self, sql: str) -> str:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return f"ALTER TABLE {sql} SET TBLPROPERTIES ('{PURGED_PROPERTY}' = '{now}')"

    def _size(self) -> int:
        operation = self.operation
        table = _data_path(operation.spark, operation.ref.sql)
        return FileSystem(operation.spark, table).size(table) + operation.files.size(operation.ref.sidecar)


def masked_record(record: dict[str, Any]) -> dict[str, Any]:
    """A run's record without the messages and settings that may quote a row."""
    masked = _without_messages(record)
    source = (masked.get("config") or {}).get("source") or {}
    for name in NAMES_ROWS:
        if source.get(name):
            source[name] = MASK
    return masked


def _without_messages(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _hidden(below) if name in FREE_TEXT else _without_messages(below) for name, below in value.items()
        }
    if isinstance(value, list):
        return [_without_messages(item) for item in value]
    return value


def _hidden(value: Any) -> Any:
    if isinstance(value, list):
        return [MASK for _ in value]
    return MASK if value else value


def _masked_text(record: str) -> str:
    return json.dumps(masked_record(json.loads(record)), sort_keys=True)


def key_fields(spark: SparkSession, published: Published) -> list[T.StructField]:
    """The key columns with the types that the table gives them."""
    schema = published.rows(spark).schema
    return [schema[name] for name in published.keys]


def read_keys(spark: SparkSession, path: Path, fields: Sequence[T.StructField]) -> DataFrame:
    """Different keys from a file, typed as the table's: .csv and .jsonl name their columns, else one key per line.

    Raises ConfigError for a file that cannot be read, has no keys, lacks a column or has a value of another type.
    """
    names = [field.name for field in fields]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--keys {path}: it cannot be read as UTF-8 text ({error}); name a file of keys") from error
    rows = list(_keys_in(text, path, names))
    if not rows:
        raise ConfigError(f"--keys {path}: there are no keys in it; name one key per line, or leave --keys out")
    strings = T.StructType([T.StructField(str(index), T.StringType()) for index in range(len(names))])
    told = spark.createDataFrame(rows, strings.add("line", T.IntegerType()))
    typed = told.select(
        "line",
        *[
            F.expr(f"try_cast({quoted(str(index))} AS {field.dataType.simpleString()})").alias(field.name)
            for index, field in enumerate(fields)
        ],
    )
    wrong = typed.where(" OR ".join(f"{quoted(name)} IS NULL" for name in names)).orderBy("line").limit(3).collect()
    if wrong:
        types = ", ".join(f"{field.name} {field.dataType.simpleString()}" for field in fields)
        raise ConfigError(
            f"--keys {path}: line {', '.join(str(row['line']) for row in wrong)} has no value that is a key of the "
            f"table ({types}); write it as the table shows it"
        )
    return typed.drop("line").distinct()


def _keys_in(text: str, path: Path, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """The values of the key columns as strings, None where one is missing, and the number of the line."""
    kind = path.suffix.lower()
    if kind == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        absent = [name for name in names if name not in (reader.fieldnames or ())]
        if absent:
            raise ConfigError(
                f"--keys {path}: its header lacks the key column {', '.join(absent)}; it has "
                f"{', '.join(reader.fieldnames or ()) or 'no columns'}"
            )
        for row in reader:
            yield (*[row[name] for name in names], reader.line_num)
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if kind in (".jsonl", ".ndjson", ".json"):
        for number, line in lines:
            yield (*_key_in_json(line, number, path, names), number)
        return
    if len(names) > 1:
        raise ConfigError(
            f"--keys {path}: the table's key has {len(names)} columns ({', '.join(names)}); write them as JSON lines "
            f"(.jsonl) or as CSV with a header (.csv)"
        )
    for number, line in lines:
        yield line.removesuffix("\r"), number


def _key_in_json(line: str, number: int, path: Path, names: list[str]) -> list[str | None]:
    try:
        row = json.loads(line, parse_float=str)
    except ValueError:
        row = None
    if not isinstance(row, dict) or any(name not in row for name in names):
        raise ConfigError(
            f"--keys {path}: line {number} is no JSON object with the key columns {', '.join(names)}; write one per "
            f"line"
        )
    values = [row[name] for name in names]
    return [value if isinstance(value, str) or value is None else json.dumps(value) for value in values]


def _leave_live_files(spark: SparkSession, sql: str) -> None:
    """Rewrites files with rows marked as deleted, then removes all that the newest version does not use."""
    spark.sql(f"REORG TABLE {sql} APPLY (PURGE)")
    with _without_retention_check(spark):
        spark.sql(f"VACUUM {sql} RETAIN 0 HOURS")


@contextmanager
def _without_retention_check(spark: SparkSession) -> Iterator[None]:
    before = spark.conf.get(_RETENTION_CHECK, None)
    spark.conf.set(_RETENTION_CHECK, "false")
    try:
        yield
    finally:
        if before is None:
            spark.conf.unset(_RETENTION_CHECK)
        else:
            spark.conf.set(_RETENTION_CHECK, before)


def cut_log(spark: SparkSession, sql: str, first: int | None = None) -> None:
    """Leaves a table's log with a checkpoint of its newest version, and the commits from `first` (unset: that) on.

    Commits and checkpoints before it hold smallest and largest values of columns of files that are gone. Delta itself
    drops them by the day, and not before a day is over. Oldest first, so that what is left has no gap if this dies.
    """
    all_logs: Any = spark._jvm.org.apache.spark.sql.delta.DeltaLog  # type: ignore[union-attr]
    # A log that is held in memory may still build its snapshot from the files that go.
    all_logs.clearCache()
    log = DeltaTable.forName(spark, sql)._jdt.deltaLog()
    version = int(log.unsafeVolatileSnapshot().version())
    log.checkpoint()
    folder = join(str(log.dataPath().toString()), "_delta_log")
    files = FileSystem(spark, folder)
    names = files.names(folder)
    of_head = [name for name in names if name.startswith(f"{version:020d}.checkpoint")]
    pointer = json.loads(files.read(join(folder, "_last_checkpoint")) or "{}")
    if not of_head or pointer.get("version", -1) < version:
        raise InternalError(
            f"table {sql}: Delta wrote no checkpoint of version {version}, so its log cannot be cut; please report "
            f"this, and run the purge again"
        )
    for name in names:
        number = _version_of(name)
        # Somebody may have committed since the purge sealed the table: our commit carries our state and has to stay.
        is_old = number is not None and number < (version if ".checkpoint" in name or first is None else first)
        # Names with a dot in front are commits that a killed writer never put in place.
        if is_old or (name.startswith(".") and name.endswith(".tmp")):
            files.delete(join(folder, name))
    used = _sidecars_of(spark, folder, of_head) if "_sidecars" in names else set()
    for name in files.names(join(folder, "_sidecars")):
        if name not in used and (_version_of(name) or 0) <= version:
            files.delete(join(folder, "_sidecars", name))
    all_logs.clearCache()


def _version_of(name: str) -> int | None:
    found = _VERSION.match(name)
    return int(found[1]) if found else None


def _sidecars_of(spark: SparkSession, folder: str, names: list[str]) -> set[str]:
    """Names of the files that a checkpoint in several parts refers to."""
    used: set[str] = set()
    for name in names:
        path = join(folder, name)
        part = spark.read.json(path) if name.endswith(".json") else spark.read.parquet(path)
        if "sidecar" in part.columns:
            used |= {row[0].rsplit("/", 1)[-1] for row in part.select("sidecar.path").dropna().collect()}
    return used


def _data_path(spark: SparkSession, sql: str) -> str:
    """Delta's own words for the folder: DESCRIBE DETAIL escapes what a path does not."""
    return str(DeltaTable.forName(spark, sql)._jdt.deltaLog().dataPath().toString())


def _kind_of(error: PySparkException | Py4JJavaError) -> str:
    if isinstance(error, PySparkException):
        return error.getCondition() or type(error).__name__
    return str(error.java_exception.getClass().getName())


def lines(done: Purge) -> list[str]:
    """The purge for people: what went, what it ended, what it cannot reach."""
    told = [f"purged {done.table}: version {done.version} is the first that its log has now"]
    if done.given is not None:
        told.append(f"keys      {done.given:,} given, {done.found:,} found, {done.chunks:,} chunks deleted")
        if done.given > done.found:
            told.append(f"          {done.given - done.found:,} not in the table: {'; '.join(done.not_found)}")
        told.append("          still in the source? Remove them there, or the next run brings them back")
    told += [
        f"staging   {done.staged:,} rows of content that is not published",
        f"freed     {done.bytes_freed:,} bytes",
        f"ended     restore, time travel and change feed before version {done.version}; messages in the runs table;",
        "          vectors of older versions: going back to a former encoder encodes again",
        "not seen  the source, MLflow, copies, backups and snapshots, and whoever read the table before",
    ]
    return told + [f"warning   {warning}" for warning in done.warnings]
