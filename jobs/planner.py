"""The difference between a source and a published table: which rows, which chunks, which content to encode.

    rows     keys, text, hashes, metadata, ACTION         the difference, read from the source once
    chunks   row_hash -> chunk_index, offsets, text, content_hash, error
    todo     content_hash, text, wave, slot                 distinct content that nobody has a vector for

A run writes each of the three below `work/<run id>` and reads nothing else from then on; `shoal plan` keeps them on the
executors' disks instead. All three are functions of the source, the published table and the run file alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Protocol

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Observation, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from shoal.conf.errors import SourceError
from shoal.conf.run import ChunkConfig
from shoal.conf.source import SourceConfig
from shoal.jobs.filesystem import full_disk
from shoal.jobs.hashing import content_hash, quoted
from shoal.jobs.model_files import send_tokenizer
from shoal.jobs.source import ROW_TEXT, SourceRows
from shoal.udfs import reasons
from shoal.udfs.chunk_udf import make_chunk
from shoal.udfs.schema import CHUNK_OUTPUT_DDL

ACTION, RETRIED = "__action", "__retried"
NEW, CHANGED, METADATA_ONLY, DELETED, UNCHANGED = "new", "changed", "metadata_only", "deleted", "unchanged"
DUPLICATE, NULL_KEY = "duplicate key", "NULL key"


class Keep(Protocol):
    """Stores a DataFrame under a name and gives back what reads it; how differs between a run and `shoal plan`."""

    def __call__(self, name: str, table: DataFrame, *, partition_by: str | None = None) -> DataFrame: ...


class Take(Protocol):
    """Picks what to encode now of the contents without a vector (content_hash, text; distinct), and says how many."""

    def __call__(self, missing: DataFrame, number: int) -> tuple[DataFrame, int]: ...


# What Spark says when the data is at fault, and not the cluster or the hour.
BAD_DATA = (
    "No space left",
    "MALFORMED",
    "FAILED_READ_FILE",
    "BadRecordException",
    "CAST_INVALID_INPUT",
    "FileNotFoundException",
    "DIVIDE_BY_ZERO",
)

# Each wave is a partition of `todo` and a commit to staging: past this many, waves grow instead.
MAX_WAVES = 1000

# With less to do a worker would be done sooner than it has loaded the encoder.
MIN_SLOT_CHUNKS = 32

# Whitespace of every script, control and format characters: a text of nothing else has nothing to encode.
BLANK = r"^[\s\p{Z}\p{Cc}\p{Cf}]*$"


@dataclass(frozen=True)
class RowCounts:
    """Rows of the source by what becomes of them; `deleted` rows are in the published table only.

    `changed` includes `retried`: rows whose text is as it was but that have a chunk with an error that may pass.
    """

    source: int = 0
    new: int = 0
    changed: int = 0
    metadata_only: int = 0
    deleted: int = 0
    unchanged: int = 0
    retried: int = 0


@dataclass(frozen=True)
class RowPlan:
    """Rows concerned and their counts; `replace` says that the whole table is built anew, and why."""

    rows: DataFrame
    counts: RowCounts
    keys: tuple[str, ...]
    metadata: tuple[str, ...]
    replace: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the table is what the source asks for already."""
        counts = self.counts
        return self.replace is None and not (counts.new or counts.changed or counts.metadata_only or counts.deleted)

    @property
    def published(self) -> DataFrame:
        """The rows that the table will hold anew: all of `rows` but the deleted ones."""
        return self.rows.where(F.col(ACTION) != DELETED)


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of the rows concerned and the content that has to be encoded.

    planned: chunks over all rows; distinct: different contents among those that can be encoded; num_todo of them have
    no vector yet and are encoded now, in num_waves waves; errors: planned chunks that can never have one, by reason.
    """

    chunks: DataFrame
    todo: DataFrame | None
    planned: int
    distinct: int
    num_todo: int
    num_waves: int
    errors: dict[str, int] = field(default_factory=dict)

    def contents(self) -> DataFrame:
        """The distinct content hashes that a vector is needed for."""
        return self.chunks.where(F.col("error").isNull()).select("content_hash").distinct()


def plan_rows(
    source: SourceRows, settings: SourceConfig, published: DataFrame | None, keep: Keep, *, replace: str | None
) -> RowPlan:
    """Compares source and published rows by key, in one pass over each; rows that stay as they are get no entry.

    With `replace` the unchanged rows are kept too, since the table is written anew. Raises SourceError for NULL or
    doubled keys, three of them shown, and for a source that cannot be read to its end.
    """
    keys = list(source.keys)
    per_key = Window.partitionBy(*[F.col(quoted(key)) for key in keys])
    rows = source.rows
    if settings.duplicates == "keep_first":
        first = per_key.orderBy("row_hash", "meta_hash")
        rows = rows.withColumn("__rank", F.row_number().over(first)).where("__rank = 1").drop("__rank")
    rows = rows.withColumn("__copies", F.count(F.lit(1)).over(per_key))
    no_key = reduce(lambda one, other: one | other, [F.col(quoted(key)).isNull() for key in keys])
    if published is None:
        # Retries and old hashes exist only where there is a table.
        joined = rows.withColumns(
            {
                "__in_source": F.lit(True),
                "__was_row": F.lit(None).cast("binary"),
                "__was_meta": F.lit(None).cast("binary"),
                "__retry": F.lit(False),
            }
        )
    else:
        joined = rows.withColumn("__in_source", F.lit(True)).join(old_rows(published, keys), on=keys, how="full_outer")
    there = F.col("__in_source").isNotNull()
    was = F.col("__was_row").isNotNull()
    action = (
        F.when(~there, DELETED)
        .when(no_key, NULL_KEY)
        .when(F.col("__copies") > 1, DUPLICATE)
        .when(~was, NEW)
        .when((F.col("row_hash") != F.col("__was_row")) | F.coalesce("__retry", F.lit(False)), CHANGED)
        .when(F.col("meta_hash") != F.coalesce("__was_meta", F.lit(b"")), METADATA_ONLY)
        .otherwise(UNCHANGED)
    )
    seen = Observation("rows")
    retried = (F.col("row_hash") == F.col("__was_row")) & F.col("__retry") & (action == CHANGED)
    marked = joined.withColumns({ACTION: action, RETRIED: F.coalesce(retried, F.lit(False))})
    watched = marked.observe(
        seen,
        *[F.count_if(F.col(ACTION) == name).alias(name.replace(" ", "_")) for name in _ACTIONS],
        F.count_if(F.col(RETRIED)).alias("retried"),
    )
    concerned = watched if replace else watched.where(F.col(ACTION) != UNCHANGED)
    columns = [quoted(key) for key in keys] + [ROW_TEXT, "row_hash", "meta_hash"]
    columns += [quoted(name) for name in source.metadata] + [ACTION, RETRIED]
    try:
        kept = keep("rows", concerned.select(*columns))
        found = seen.get
    except (PySparkException, Py4JJavaError) as error:
        if any(sign in str(error) for sign in BAD_DATA):
            raise full_disk(error) or _unreadable(settings, error) from error
        raise
    if found["NULL_key"] or found["duplicate_key"]:
        raise _bad_keys(kept, keys, found["NULL_key"], found["duplicate_key"])
    counts = {name: int(found[name]) for name in (NEW, CHANGED, METADATA_ONLY, DELETED, UNCHANGED)}
    in_source = sum(counts.values()) - counts[DELETED]
    return RowPlan(
        kept,
        RowCounts(source=in_source, retried=int(found["retried"]), **counts),
        source.keys,
        source.metadata,
        replace,
    )


def key_range(rows: DataFrame, keys: Sequence[str]) -> list[str]:
    """Conditions on `t.<key>` that every row here fulfils, with literals, so that Delta skips the other files.

    Only for key columns whose values have an exact literal: others, and a column with a NULL, get no condition. No
    rows at all give `false`.
    """
    types = {key: rows.schema[key].dataType for key in keys}
    bounds = []
    for index, key in enumerate(keys):
        column = F.col(quoted(key))
        for bound, name in ((F.min, "low"), (F.max, "high")):
            bounds.append(_exact(bound(column), types[key]).alias(f"{name}{index}"))
        bounds.append(F.count_if(column.isNull()).alias(f"nulls{index}"))
    found = rows.agg(F.count(F.lit(1)).alias("n"), *bounds).collect()[0]
    if not found["n"]:
        return NOTHING
    conditions = []
    for index, key in enumerate(keys):
        low, high = (_literal(found[f"{name}{index}"], types[key]) for name in ("low", "high"))
        if low is not None and high is not None and not found[f"nulls{index}"]:
            conditions += [f"t.{quoted(key)} >= {low}", f"t.{quoted(key)} <= {high}"]
    return conditions


NOTHING = ["false"]
"""The `key_range` of no rows."""


def near(table: DataFrame, conditions: list[str]) -> DataFrame:
    """The rows of a table within a `key_range`."""
    return table.alias("t").where(" AND ".join(conditions)) if conditions else table


def _exact(bound: Column, data_type: T.DataType) -> Column:
    """The bound as a string that can be written as a literal again, NULL where there is no such string."""
    if data_type == T.StringType():
        return F.when(F.is_valid_utf8(bound), bound)
    if isinstance(data_type, T.TimestampType):
        return F.unix_micros(bound).cast("string")
    if isinstance(data_type, T.IntegralType | T.DateType):
        return bound.cast("string")
    return F.lit(None).cast("string")


def _literal(bound: str | None, data_type: T.DataType) -> str | None:
    if bound is None:
        return None
    if isinstance(data_type, T.IntegralType):
        return bound + _SUFFIXES[data_type.typeName()]
    if isinstance(data_type, T.StringType):
        escaped = bound.replace("\\", "\\\\").replace("'", "\\'")
        # Spark puts variables in, even between quotes.
        return f"'{escaped}'" if bound.isprintable() and "${" not in bound else None
    if isinstance(data_type, T.DateType):
        return f"DATE '{bound}'" if len(bound) == len("2026-01-31") and bound[0] != "-" else None
    try:
        moment = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(bound))
    except OverflowError:
        return None
    return f"TIMESTAMP '{moment:%Y-%m-%d %H:%M:%S.%f}Z'" if moment.year >= 1900 else None


_SUFFIXES = {"byte": "Y", "short": "S", "integer": "", "long": "L"}


def plan_chunks(
    rows: RowPlan,
    chunk: ChunkConfig | None,
    tokenizer_folder: str,
    have: DataFrame | None,
    keep: Keep,
    waves: "Waves",
    take: Take | None = None,
) -> ChunkPlan:
    """Cuts the rows concerned into chunks, and takes from their content what `have` (content_hash) has already.

    What is left is to be encoded: all of it, or what `take` picks.
    """
    chunks = keep("chunks", cut(rows.published, chunk, tokenizer_folder))
    contents = chunks.where(F.col("error").isNull()).select("content_hash", "text")
    known = None if have is None else have.distinct().withColumn("__known", F.lit(True))
    planned = rows.published.select("row_hash").join(chunks.drop("text"), on="row_hash", how="inner")
    planned = (
        planned.withColumn("__known", F.lit(None))
        if known is None
        else planned.join(known, on="content_hash", how="left")
    )
    # Counted on the hashes alone: the number of waves has to be known before the texts are dealt out to them.
    counts = planned.groupBy("error").agg(
        F.count(F.lit(1)).alias("n"),
        F.count_distinct("content_hash").alias("distinct"),
        F.count_distinct(F.when(F.col("__known").isNull(), F.col("content_hash"))).alias("missing"),
    )
    by_reason = {row["error"]: row for row in counts.collect()}
    good = by_reason.get(None)
    num_missing = good["missing"] if good else 0
    missing = contents if have is None else contents.join(have, on="content_hash", how="left_anti")
    num_todo = num_missing
    if take is not None and num_missing:
        missing, num_todo = take(missing.dropDuplicates(["content_hash"]), num_missing)
    num_waves = waves.number(num_todo) if num_todo else 0
    todo = keep("todo", deal(missing, num_waves, waves.slots_for(num_todo)), partition_by="wave") if num_todo else None
    return ChunkPlan(
        chunks=chunks,
        todo=todo,
        planned=sum(row["n"] for row in by_reason.values()),
        distinct=good["distinct"] if good else 0,
        num_todo=num_todo,
        num_waves=num_waves,
        errors={reason: row["n"] for reason, row in by_reason.items() if reason is not None},
    )


def without(plan: ChunkPlan, known: DataFrame, keep: Keep, waves: "Waves") -> ChunkPlan:
    """The plan with less to encode: the contents of `known` (content_hash) have turned out to have a vector."""
    assert plan.todo is not None  # noqa: S101 - there is nothing to take from otherwise
    left = plan.todo.select("content_hash", "text")
    left = left.join(known.distinct(), on="content_hash", how="left_anti")
    num_todo = left.count()
    num_waves = waves.number(num_todo) if num_todo else 0
    todo = keep("missing", deal(left, num_waves, waves.slots_for(num_todo)), partition_by="wave") if num_todo else None
    return replace(plan, todo=todo, num_todo=num_todo, num_waves=num_waves)


@dataclass(frozen=True)
class Waves:
    """How the work is cut: one commit to staging per wave, at most `num_slots` partitions in each.

    chunks: chunks per wave as the run file says; None: at most 50,000, and so many waves (up to eight, of 250
    chunks or more) that a small run killed in the middle has kept something.
    """

    num_slots: int
    chunks: int | None = None

    def number(self, num_chunks: int) -> int:
        if self.chunks is not None:
            return min(MAX_WAVES, max(1, -(-num_chunks // self.chunks)))
        return min(MAX_WAVES, max(1, min(8, num_chunks // 250), -(-num_chunks // 50_000)))

    def slots_for(self, num_chunks: int) -> int:
        """Partitions of a wave that get any of so many chunks: a worker loads the encoder for its first one."""
        return min(self.num_slots, max(1, num_chunks // MIN_SLOT_CHUNKS))


def cut(rows: DataFrame, chunk: ChunkConfig | None, tokenizer_folder: str) -> DataFrame:
    """Chunks of distinct row texts: row_hash, chunk_index, chunk_start, chunk_end, text, content_hash, error.

    A row without a usable text is one chunk with the reason in `error`. Offsets count code points. Bytes that are not
    UTF-8 are shown replaced in `text`; the hash is of what the source holds.
    """
    texts = rows.select("row_hash", F.col(ROW_TEXT).alias("text")).dropDuplicates(["row_hash"])
    text = F.col("text")
    error = (
        F.when(text.isNull(), reasons.NULL_TEXT)
        .when(~F.is_valid_utf8(text), reasons.INVALID_UTF8)
        .when(text.rlike(BLANK), reasons.BLANK_TEXT)
    )
    texts = texts.withColumn("error", error)
    whole: list[Column | str] = [
        "row_hash",
        F.lit(0).alias("chunk_index"),
        F.lit(0).alias("chunk_start"),
        F.coalesce(F.char_length(F.make_valid_utf8("text")), F.lit(0)).alias("chunk_end"),
        F.make_valid_utf8("text").alias("text"),
        content_hash(text).alias("content_hash"),
        "error",
    ]
    if chunk is None:
        return texts.select(*whole)
    good = texts.where(F.col("error").isNull()).select("row_hash", "text")
    send_tokenizer(rows.sparkSession, tokenizer_folder)
    parts = good.mapInArrow(make_chunk(chunk, tokenizer_folder), CHUNK_OUTPUT_DDL)
    parts = parts.withColumns({"content_hash": content_hash(F.col("text")), "error": F.lit(None).cast("string")})
    bad = texts.where(F.col("error").isNotNull()).select(*whole)
    return parts.unionByName(bad)


def deal(missing: DataFrame, num_waves: int, num_slots: int) -> DataFrame:
    """Distinct contents (content_hash, text) with `wave`, a slice of the hashes, and `slot`, a partition of the wave.

    Within each wave and each power of two of length, contents are dealt out to the slots like cards, so that the slots
    of a wave are about equally long.
    """
    wave = F.pmod(F.conv(F.hex(F.substring("content_hash", 1, 6)), 16, 10).cast("long"), F.lit(num_waves)).cast("int")
    contents = missing.groupBy("content_hash").agg(F.first("text").alias("text"))
    sized = contents.withColumns({"wave": wave, "__size": F.floor(F.log2(F.char_length("text") + 1)).cast("int")})
    order = Window.partitionBy("wave", "__size").orderBy("content_hash")
    slot = F.pmod(F.row_number().over(order) + F.col("__size"), F.lit(num_slots)).cast("int")
    return sized.withColumn("slot", slot).select("content_hash", "text", "wave", "slot").hint("rebalance", "wave")


_ACTIONS = (NEW, CHANGED, METADATA_ONLY, DELETED, UNCHANGED, DUPLICATE, NULL_KEY)


def old_rows(published: DataFrame, keys: list[str]) -> DataFrame:
    """Keys and hashes of the published rows; `__retry` where a chunk has an error that may pass."""
    # A foreign writer may have doubled a chunk, or left some out: such a row counts as changed, and is written anew.
    whole = (F.count_if(F.col("chunk_index") == 0) == 1) & (F.count(F.lit(1)) == F.max("chunk_index") + 1)
    was_row = F.when(whole, F.min_by("row_hash", "chunk_index"))
    return published.groupBy(*[quoted(key) for key in keys]).agg(
        F.coalesce(was_row, F.lit(b"")).alias("__was_row"),
        F.coalesce(F.min_by("meta_hash", "chunk_index"), F.lit(b"")).alias("__was_meta"),
        F.coalesce(F.bool_or(passing_error()), F.lit(False)).alias("__retry"),
    )


def passing_error() -> Column:
    """Whether a published chunk has an error that may pass; NULL or false for all others."""
    return F.col("error").isNotNull() & ~F.col("error").isin(list(reasons.PERMANENT))


def _bad_keys(rows: DataFrame, keys: list[str], num_null: int, num_duplicate: int) -> SourceError:
    named = ", ".join(keys)
    if num_null:
        return SourceError(
            f"source.key: {num_null} rows have NULL in ({named}); filter them out with source.filter, or fill "
            "them in a query source",
            code="KEY_NULL",
        )
    shown = rows.where(F.col(ACTION) == DUPLICATE).select(*[quoted(key) for key in keys]).distinct().limit(3).collect()
    examples = "; ".join(", ".join(f"{key}={row[key]!r}" for key in keys) for row in shown)
    return SourceError(
        f"source.key: {num_duplicate} rows share their key ({named}) with another row, for example {examples}; choose "
        f"columns that tell rows apart, or set source.duplicates: keep_first",
        code="KEY_DUPLICATE",
    )


def _unreadable(settings: SourceConfig, error: Exception) -> SourceError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = next(
        (line for line in lines if line.startswith("Caused by") or "MALFORMED" in line), lines[0] if lines else ""
    )
    return SourceError(
        f"source '{settings.path or settings.table or settings.query}' could not be read to its end: {cause}"
    )
