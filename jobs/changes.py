"""The difference between a source and a published table, by the change feed where the source keeps a usable one.

    feed   rows of the source that came (+1) and went (-1) since the state that the table records, by key and hashes;
           what cancels out, as when a table is written anew with equal rows, is no change
    base   what the published table holds for the keys that are left, which is what the source held at that state

base + feed must be one row or none for each key. Where it is not, and wherever the feed cannot tell, the whole source
is compared with the whole table, which is right for any source: the feed only reads less.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import SourceError
from shoal.conf.run import RunConfig
from shoal.jobs.bookkeeping import RUN
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import TableRef, is_delta, read_delta
from shoal.jobs.planner import (
    ACTION,
    CHANGED,
    DELETED,
    METADATA_ONLY,
    NEW,
    NOTHING,
    RETRIED,
    Keep,
    RowCounts,
    RowPlan,
    key_range,
    near,
    old_rows,
    passing_error,
    plan_rows,
)
from shoal.jobs.prepare import FULL_REFRESH, comparable
from shoal.jobs.published import HASHES, Published, readable
from shoal.jobs.source import ROW_TEXT, SIGN, SourceRows, delta_target, read_changes

# Commits that the feed tells completely; the others (RESTORE, CLONE, changes of columns, what is yet to be invented)
# make a night compare the whole source. A SET TBLPROPERTIES that turned the feed off is refused by Delta's own reader.
TOLD_BY_FEED = frozenset(
    {
        "WRITE", "MERGE", "UPDATE", "DELETE", "TRUNCATE", "STREAMING UPDATE", "CREATE OR REPLACE TABLE AS SELECT",
        "OPTIMIZE", "REORG", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "UNSET TBLPROPERTIES",
    }
)  # fmt: skip

# A condition made of these, of columns and of literals says the same of a row at any time and in any place.
_PURE_FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        """and or not in like rlike regexp regexp_like case when then else between is if nvl nvl2 ifnull nullif coalesce
        isnull isnotnull lower lcase upper ucase length len char_length trim ltrim rtrim btrim substr substring left
        right concat startswith endswith contains instr replace split cast try_cast to_date year month day quarter abs
        round floor ceil mod pmod sign greatest least size array_contains element_at get_json_object hash xxhash64 md5
        sha2 string int bigint date timestamp decimal double float boolean""",
    )
)
_CLOCKS_AND_QUERIES = re.compile(
    r"\b(current_\w+|localtimestamp|now|today|user|session_user|rand\w*|uuid|exists|select|interval)\b"
)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`[^`]*`", re.DOTALL)

NET, _CAME, _WENT = "__net", "__came", "__went"


@dataclass(frozen=True)
class SourceState:
    """What a run saw of a Delta source: enough for the next to tell whether the feed goes on from there.

    committed_ms: when `version` was committed, which tells a table put back from a copy; schema and settings are
    digests of the source's columns and of everything in the run file that decides what a row is.
    """

    table_id: str
    version: int
    committed_ms: int
    schema: str
    settings: str

    def record(self) -> dict[str, Any]:
        """For the run's record."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """The rows concerned, how they were found (`feed from version 3 to 7`, `snapshot: <reason>`), and what was seen.

    `state` is None for a source without versions.
    """

    rows: RowPlan
    how: str
    state: SourceState | None


@dataclass(frozen=True)
class _Commit:
    operation: str
    committed_ms: int


@dataclass(frozen=True)
class _Start:
    """The recorded state that the feed is read from; `num_rows` of the source at that state."""

    state: SourceState
    num_rows: int


def find_difference(
    spark: SparkSession,
    config: RunConfig,
    ref: TableRef,
    source: SourceRows,
    published: Published | None,
    keep: Keep,
    *,
    replace: str | None,
) -> Difference:
    """Compares source and published table, by the change feed where that is certain to give the same.

    `replace`: why the table is written anew, for which every row is needed. Raises SourceError as `plan_rows` does.
    """
    rows = comparable(published, source, spark)
    state = _state_of(spark, config, source)
    start: _Start | str = "the table is written anew"
    if replace == FULL_REFRESH and rows is not None and not readable(rows, *HASHES):
        rows, start = None, "the table is written anew, and what it holds cannot be read"
    if replace is None and rows is not None:
        start = _start(spark, config, ref, published, state)
    if isinstance(start, _Start) and rows is not None and state is not None:
        found = _by_feed(spark, config, source, rows, start, state, keep)
        if isinstance(found, RowPlan):
            return Difference(found, f"feed from version {start.state.version} to {state.version}", state)
        start = found
    plan = plan_rows(source, config.source, rows, keep, replace=replace)
    return Difference(plan, f"snapshot: {start}", state)


def is_pure(condition: str) -> bool:
    """Whether an SQL condition is a function of the row alone, as far as is known: no clock, chance, query or UDF."""
    bare = _QUOTED.sub(" ", condition).lower()
    if _CLOCKS_AND_QUERIES.search(bare) or "--" in bare or "/*" in bare:
        return False
    called = set(re.findall(r"([a-z_]\w*)\s*\(", bare))
    return called <= _PURE_FUNCTIONS and "`(" not in condition.replace(" ", "")


def _state_of(spark: SparkSession, config: RunConfig, source: SourceRows) -> SourceState | None:
    target = None if source.version is None else delta_target(spark, config.source)
    if target is None or source.version is None:
        return None
    history = _history(spark, target, source.version)
    if source.version not in history:
        return None
    detail = spark.sql(f"DESCRIBE DETAIL {target}").select("id").collect()[0]
    return SourceState(
        table_id=detail["id"],
        version=source.version,
        committed_ms=history[source.version].committed_ms,
        schema=_digest(source.columns),
        settings=_settings_digest(spark, config),
    )


def _settings_digest(spark: SparkSession, config: RunConfig) -> str:
    settings = config.source.model_dump(mode="json", exclude={"version", "timestamp", "changes"})
    session = [spark.conf.get(name) for name in ("spark.sql.session.timeZone", "spark.sql.ansi.enabled")]
    chunk = None if config.chunk is None else config.chunk.model_dump(mode="json")
    return _digest(json.dumps([settings, chunk, session], sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _history(spark: SparkSession, target: str, since: int) -> dict[int, _Commit]:
    """Commits of the source from version `since` to its newest; what the log no longer has is not in it."""
    columns = ("version", "operation", F.unix_millis("timestamp").alias("ms"))
    newest = spark.sql(f"DESCRIBE HISTORY {target} LIMIT 1").select(*columns).collect()
    number = newest[0]["version"] - since + 1 if newest else 0
    rows = newest
    if number > 1:
        rows = spark.sql(f"DESCRIBE HISTORY {target} LIMIT {number}").select(*columns).collect()
    return {row["version"]: _Commit(row["operation"], row["ms"]) for row in rows if row["version"] >= since}


def _start(
    spark: SparkSession, config: RunConfig, ref: TableRef, published: Published | None, now: SourceState | None
) -> _Start | str:
    """Where the feed can be read from, or why it cannot be used."""
    source = config.source
    if source.changes == "snapshot":
        return "source.changes asks for it"
    if now is None:
        return "the source has no Delta versions"
    if source.duplicates != "error":
        return f"source.duplicates is {source.duplicates}"
    if source.filter and not is_pure(source.filter):
        return "source.filter may say something else of the same row another time"
    if published is None or published.ours is None or published.ours.state is None:
        return "no commit on the table records a run"
    at, record = published.ours.version, published.ours.state.record
    if later := last_unchanged(spark, ref, published):
        at, record = later["version"], later
    others = [commit for commit in published.foreign if commit.version > at]
    if others:
        return f"others wrote to the table: version {others[0].version} ({others[0].operation})"
    recorded = record.get("source_state")
    if not recorded:
        return "the last run recorded no version of the source"
    if (record.get("purge") or {}).get("found"):
        return "rows have been purged"
    before = SourceState(**recorded)
    refused = _broken(spark, delta_target(spark, source) or "", before, now)
    return refused or _Start(before, int(record["rows"]["source"]))


def _broken(spark: SparkSession, target: str, before: SourceState, now: SourceState) -> str | None:
    """Why the source's history does not lead from the recorded state to the present one; None where it does."""
    if before.settings != now.settings:
        return "settings of source or chunk differ from those of the last run"
    if before.table_id != now.table_id:
        return "the source is another table than the last run read"
    if now.version < before.version:
        return f"version {now.version} of the source is older than version {before.version}, which was read before"
    if before.schema != now.schema:
        return "the columns of the source have changed"
    history = _history(spark, target, before.version)
    if before.version not in history:
        return f"version {before.version} of the source, which was read last, is no longer in its log"
    if history[before.version].committed_ms != before.committed_ms:
        return f"version {before.version} of the source is not the one that was read last"
    for version in range(before.version + 1, now.version + 1):
        if version not in history:
            return f"version {version} of the source is missing from its log"
        if history[version].operation not in TOLD_BY_FEED:
            return f"version {version} of the source is a {history[version].operation}"
    return None


def last_unchanged(spark: SparkSession, ref: TableRef, published: Published) -> dict[str, Any] | None:
    """The newest run of the present generation that found nothing to do: it saw later versions of the source."""
    if not is_delta(spark, ref.runs):
        return None
    rows = read_delta(spark, ref.runs).where(F.col("kind") == RUN)
    rows = rows.where(
        (F.get_json_object("record", "$.status") == "unchanged")
        & (F.get_json_object("record", "$.generation").cast("int") == published.generation)
    )
    newest = rows.orderBy(F.desc("written_at")).limit(1).collect()
    return json.loads(newest[0]["record"]) if newest else None


def _by_feed(
    spark: SparkSession,
    config: RunConfig,
    source: SourceRows,
    published: DataFrame,
    start: _Start,
    now: SourceState,
    keep: Keep,
) -> RowPlan | str:
    """The plan, out of the feed and the published rows of its keys; or why the feed cannot be trusted."""
    try:
        parts = _retries(source, published, keep)
        if now.version > start.state.version:
            feed = read_changes(spark, config.source, config.chunk, first=start.state.version + 1, last=now.version)
            if _types(feed.drop(SIGN)) != _types(source.rows):
                return "the change feed has other columns than the source"
            parts = [*parts, *_changes(source, published, feed, keep)]
        return _planned(source, parts, start, keep)
    except (PySparkException, Py4JJavaError, SourceError) as error:
        told = str(error).strip().splitlines()
        return f"the change feed cannot be read ({told[0] if told else type(error).__name__})"


def _changes(source: SourceRows, published: DataFrame, feed: DataFrame, keep: Keep) -> list[DataFrame]:
    """What came and went, joined with what the table holds for those keys."""
    keys = [quoted(key) for key in source.keys]
    content = F.struct(ROW_TEXT, *[quoted(name) for name in source.metadata])
    net = feed.groupBy(*keys, "row_hash", "meta_hash").agg(F.sum(SIGN).alias(NET), F.first(content).alias("__content"))
    net = keep("feed", net.where(F.col(NET) != 0))
    came = F.struct("row_hash", "meta_hash", "__content")
    went = F.struct("row_hash", "meta_hash")
    per_key = net.groupBy(*keys).agg(
        F.sum(F.greatest(F.col(NET), F.lit(0))).alias("__num_came"),
        F.sum(F.greatest(-F.col(NET), F.lit(0))).alias("__num_went"),
        F.max_by(came, NET).alias(_CAME),
        F.min_by(went, NET).alias(_WENT),
    )
    base = _base(published, net, source.keys)
    joined = per_key.join(base, on=list(source.keys), how="left")
    was = F.col("__was_row").isNotNull()
    comes, goes = F.col("__num_came") == 1, F.col("__num_went") == 1
    # Each key held one row or none, the one that went is the one it held, and one or none is left.
    held = (F.col(f"{_WENT}.row_hash") == F.col("__was_row")) & (F.col(f"{_WENT}.meta_hash") == F.col("__was_meta"))
    adds_up = (F.col("__num_came") <= 1) & (F.col("__num_went") <= 1) & (was == goes) & (~goes | held)
    same_text = F.col(f"{_CAME}.row_hash") == F.col("__was_row")
    action = (
        F.when(~comes, DELETED).when(~was, NEW).when(~same_text | F.col("__retry"), CHANGED).otherwise(METADATA_ONLY)
    )
    values = {name: F.when(comes, F.col(f"{_CAME}.{name}")) for name in ("row_hash", "meta_hash")}
    contents = {
        name: F.when(comes, F.col(_CAME).getField("__content").getField(name)) for name in (ROW_TEXT, *source.metadata)
    }
    retried = F.coalesce((action == CHANGED) & same_text, F.lit(False))
    no_key = reduce(lambda one, other: one | other, [F.col(key).isNull() for key in keys])
    adds_up = F.coalesce(adds_up, F.lit(False)) & ~no_key
    return [_shape(source, joined, values | contents, action, retried, adds_up)]


def _retries(source: SourceRows, published: DataFrame, keep: Keep) -> list[DataFrame]:
    """Published rows with an error that may pass, by the error column alone, and their text out of the source."""
    keys = [quoted(key) for key in source.keys]
    failed = keep("failed", published.where(passing_error()).select(*keys).distinct())
    conditions = key_range(failed, source.keys)
    if conditions == NOTHING:
        return []
    base = _base(published, failed, source.keys, conditions)
    rows = near(source.rows, conditions).join(failed, on=list(source.keys), how="left_semi")
    joined = base.join(rows, on=list(source.keys), how="left")
    adds_up = F.coalesce(
        (F.col("row_hash") == F.col("__was_row")) & (F.col("meta_hash") == F.col("__was_meta")), F.lit(False)
    )
    values = {name: F.col(quoted(name)) for name in ("row_hash", "meta_hash", ROW_TEXT, *source.metadata)}
    return [_shape(source, joined, values, F.lit(CHANGED), F.lit(True), adds_up)]


def _base(
    published: DataFrame, touched: DataFrame, keys: tuple[str, ...], conditions: list[str] | None = None
) -> DataFrame:
    """Keys and hashes of the published rows whose keys are touched; files beyond their range are not read."""
    within = near(published, key_range(touched, keys) if conditions is None else conditions)
    touched_keys = touched.select(*[quoted(key) for key in keys]).distinct()
    return old_rows(within.join(touched_keys, on=list(keys), how="left_semi"), list(keys))


def _shape(
    source: SourceRows,
    table: DataFrame,
    values: dict[str, Column],
    action: Column,
    retried: Column,
    adds_up: Column,
) -> DataFrame:
    names = [ROW_TEXT, "row_hash", "meta_hash", *source.metadata]
    return table.select(
        *[F.col(quoted(key)) for key in source.keys],
        *[values[name].alias(name) for name in names],
        action.alias(ACTION),
        retried.alias(RETRIED),
        adds_up.alias("__adds_up"),
    )


def _planned(source: SourceRows, parts: list[DataFrame], start: _Start, keep: Keep) -> RowPlan | str:
    """Writes the rows concerned once and counts them on the way."""
    if not parts:
        counts = RowCounts(source=start.num_rows, unchanged=start.num_rows)
        empty = source.rows.limit(0).withColumns({ACTION: F.lit(""), RETRIED: F.lit(False)})
        return RowPlan(empty, counts, source.keys, source.metadata)
    rows = parts[-1]
    if len(parts) > 1:
        # A row that failed and has changed since is told by the feed.
        failed, rows = parts
        untouched = rows.select(*[quoted(key) for key in source.keys])
        rows = failed.join(untouched, on=list(source.keys), how="left_anti").unionByName(rows)
    seen = Observation("changes")
    actions = (NEW, CHANGED, METADATA_ONLY, DELETED)
    watched = rows.observe(
        seen,
        *[F.count_if(F.col(ACTION) == name).alias(name) for name in actions],
        F.count_if(F.col(RETRIED)).alias("retried"),
        F.count_if(~F.col("__adds_up")).alias("wrong"),
    )
    kept = keep("changes", watched.drop("__adds_up"))
    found = {name: int(number) for name, number in seen.get.items()}
    if found.pop("wrong"):
        return "the change feed does not add up with the table"
    num_rows = start.num_rows + found[NEW] - found[DELETED]
    unchanged = num_rows - found[NEW] - found[CHANGED] - found[METADATA_ONLY]
    if unchanged < 0:
        return "the change feed does not add up with the recorded number of rows"
    return RowPlan(kept, RowCounts(source=num_rows, unchanged=unchanged, **found), source.keys, source.metadata)


def _types(table: DataFrame) -> list[tuple[str, str]]:
    return [(field.name, field.dataType.simpleString()) for field in table.schema.fields]
