"""Moves the published table in one Delta commit, and only if nobody moved it since the plan: the fence.

A night is one MERGE that deletes the rows concerned by key and inserts them anew; a first run, a full refresh, a change
of schema, a cut-over and a build of the index are one createOrReplace. All carry the run's state as userMetadata and
one transaction id per generation, and the head is read afterwards: a MERGE that Delta skips because its transaction id
is taken looks like an empty success.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, DataFrameWriterV2, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import DestinationError, OvertakenError, RunError, first_line
from shoal.conf.run import DestinationConfig, RunConfig
from shoal.jobs.cells import CELL, INDEX_PROPERTY, Index, fresh_cell
from shoal.jobs.filesystem import full_disk
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import SIDECAR_PROPERTY, TableRef
from shoal.jobs.planner import ACTION, NEW, RowPlan, key_range
from shoal.jobs.published import (
    ENCODER_PROPERTY,
    FINGERPRINT_PROPERTY,
    FORMAT,
    FORMAT_PROPERTY,
    KEYS_PROPERTY,
    LEXICAL_PROPERTY,
    METADATA_PROPERTY,
    TABLE_ID_PROPERTY,
    TERMS,
    USER_METADATA,
    WITHOUT_DATA_CHANGE,
    Published,
    State,
    commits,
    exists,
)
from shoal.jobs.session import with_settings
from shoal.jobs.source import ROW_TEXT, SourceRows
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.terms_udf import terms_udf

_TXN_APP = "spark.databricks.delta.write.txnAppId"
_TXN_VERSION = "spark.databricks.delta.write.txnVersion"

CONFLICTS = ("DELTA_CONCURRENT", "Concurrent", "DELTA_PROTOCOL_CHANGED", "ProtocolChanged", "MetadataChanged")

# Delta writes these itself, lists them among the properties, and refuses them from anybody else.
KEPT_BY_DELTA = ("delta.columnMapping.maxColumnId", "delta.rowTracking.materialized", "delta.inCommitTimestamp")

_OF_ERRORS = ("error", "n_tokens", "truncated", "embedded_at")


@dataclass(frozen=True)
class Target:
    """Where a run publishes to and what it found there when it planned; `before` is None for a first run."""

    ref: TableRef
    before: Published | None
    table_id: str
    generation: int
    """Of the commit to come: Delta skips a transaction whose number is not above all former ones, in silence."""


def new_table_id() -> str:
    """Ours, not Delta's: it names the table in transaction ids for as long as the table lives."""
    return uuid.uuid4().hex


def assemble(
    rows: RowPlan,
    chunks: DataFrame,
    vectors: DataFrame,
    errors: DataFrame,
    *,
    store_text: bool,
    lexical: str | None = None,
) -> DataFrame:
    """The published rows of a plan: every chunk of every row, with its vector or with the reason why it has none.

    `vectors`: content_hash, embedding, n_tokens, truncated, embedded_at, one row per hash; `errors`: content_hash,
    n_tokens, truncated, error, embedded_at of content that the encoder failed on. `lexical`: what `describe_terms`
    says, for a table with terms.
    """
    keys = [quoted(key) for key in rows.keys]
    metadata = [quoted(name) for name in rows.metadata]
    text = [F.col("text")] if store_text else []
    # Text that is no UTF-8 would end the Python worker.
    terms = [terms_udf(lexical)(F.make_valid_utf8("text")).alias(TERMS)] if lexical else []
    with_chunks = rows.published.drop(ROW_TEXT).join(chunks, on="row_hash", how="inner")
    with_vectors = with_chunks.join(vectors, on="content_hash", how="left")
    why = errors.select("content_hash", *[F.col(name).alias(f"__{name}") for name in _OF_ERRORS])
    joined = with_vectors.join(why, on="content_hash", how="left")
    # A vector beats an error, so what an error brought counts only where there is no vector.
    failed = F.col("embedding").isNull()
    filled = {name: F.coalesce(name, F.when(failed, F.col(f"__{name}"))) for name in _OF_ERRORS}
    return joined.select(
        *keys,
        "chunk_index",
        "chunk_start",
        "chunk_end",
        *text,
        "content_hash",
        "row_hash",
        "meta_hash",
        "embedding",
        filled["n_tokens"].alias("n_tokens"),
        F.coalesce(filled["truncated"], F.lit(False)).alias("truncated"),
        filled["error"].alias("error"),
        filled["embedded_at"].alias("embedded_at"),
        *terms,
        *metadata,
    )


def publish_merge(spark: SparkSession, target: Target, rows: RowPlan, content: DataFrame, state: State) -> int:
    """One MERGE: the old chunks of every row concerned go, however many they are, and the new ones come.

    Returns the Delta version; raises OvertakenError when somebody else published since the plan.
    """
    before = target.before
    assert before is not None  # noqa: S101 - the caller chose a MERGE because there is a table
    if before.index is not None:
        content = content.withColumn(CELL, fresh_cell(F.col("embedding")))
    columns = content.columns
    gone = rows.rows.where(F.col(ACTION) != NEW).select(*[quoted(key) for key in rows.keys])
    for field in content.schema.fields:
        if field.name not in rows.keys:
            gone = gone.withColumn(field.name, F.lit(None).cast(field.dataType))
    # New rows carry their keys too, and the marker that keeps them from matching: NULL keys would all be shuffled into
    # one partition.
    source = gone.withColumn("__come", F.lit(False)).unionByName(content.withColumn("__come", F.lit(True)))
    # The range of the keys concerned, in literals, lets Delta leave out the files that hold none of them.
    on = " AND ".join(
        [
            *key_range(gone, rows.keys),
            "NOT s.__come",
            *[f"t.{quoted(key)} <=> s.{quoted(key)}" for key in rows.keys],
        ]
    )
    listed = ", ".join(quoted(name) for name in columns)
    values = ", ".join(f"s.{quoted(name)}" for name in columns)
    view = f"shoal_{state.run_id.replace('-', '_')}"
    source.createOrReplaceTempView(view)
    try:
        return commit_sql(
            spark,
            target,
            state,
            f"MERGE INTO {target.ref.sql} AS t USING {view} AS s ON {on} "
            f"WHEN MATCHED THEN DELETE "
            f"WHEN NOT MATCHED AND s.__come THEN INSERT ({listed}) VALUES ({values})",
        )
    finally:
        spark.catalog.dropTempView(view)


def commit_sql(spark: SparkSession, target: Target, state: State, statement: str) -> int:
    """Runs a statement that makes one commit on the published table, fenced and with the state on it; its version."""
    try:
        _fence(spark, target)
        with with_settings(spark, _commit_settings(target, state)):
            spark.sql(statement)
    except (PySparkException, Py4JJavaError) as error:
        return _landed_or_failed(spark, target, state, error)
    return _own_head(spark, target, state)


def publish_index(spark: SparkSession, target: Target, content: DataFrame, index: Index, state: State) -> int:
    """One createOrReplace of all rows, each with its cell, and of the property that names the build; the version.

    Everything else that the table says of itself stays.
    """
    before = target.before
    assert before is not None  # noqa: S101 - there is a table to index
    writer = _replacing(spark, target, content, kept_properties(before) | {INDEX_PROPERTY: index.to_property()})
    return _replace(spark, target, writer, state)


def publish_replace(
    spark: SparkSession,
    target: Target,
    settings: DestinationConfig,
    rows: RowPlan,
    content: DataFrame,
    spec: EncoderSpec,
    encoder: dict,
    state: State,
    lexical: str | None = None,
) -> int:
    """One createOrReplace: rows, schema, identity and constraints change together; the table's history goes on.

    Comments, tags, properties and constraints that the user set on the table are carried over. Returns the Delta
    version.
    """
    if is_indexed(target, spec):
        # Whatever cells the rows had, maintenance puts them into theirs again.
        content = content.withColumn(CELL, fresh_cell(F.col("embedding")))
    properties = table_properties(target, settings, rows, spec, encoder, lexical)
    return _replace(spark, target, _replacing(spark, target, content, properties), state)


def _replacing(
    spark: SparkSession, target: Target, content: DataFrame, properties: Mapping[str, str]
) -> DataFrameWriterV2:
    """What writes a whole table with these properties, and the present one's comments."""
    writer = _with_comments(spark, target, content).writeTo(target.ref.sql).using("delta")
    if CELL in content.columns:
        writer = writer.partitionedBy(F.col(CELL))
    for name, value in properties.items():
        writer = writer.tableProperty(name, value)
    if target.ref.location:
        writer = writer.tableProperty("location", target.ref.location)
    if target.before and target.before.description:
        writer = writer.tableProperty("comment", target.before.description)
    return writer


def _replace(spark: SparkSession, target: Target, writer: DataFrameWriterV2, state: State) -> int:
    writer = writer.option("userMetadata", state.to_user_metadata())
    writer = writer.option("txnAppId", f"shoal:{target.table_id}").option("txnVersion", str(target.generation))
    try:
        _fence(spark, target)
        writer.createOrReplace()
    except (PySparkException, Py4JJavaError) as error:
        return _landed_or_failed(spark, target, state, error)
    return _own_head(spark, target, state)


def table_properties(
    target: Target,
    settings: DestinationConfig,
    rows: RowPlan,
    spec: EncoderSpec,
    encoder: dict,
    lexical: str | None = None,
) -> dict[str, str]:
    """Everything that the table says of itself; the user's own properties first, so that ours stand."""
    kept = kept_properties(target.before) if target.before else {}
    if not is_indexed(target, spec):
        kept.pop(INDEX_PROPERTY, None)
    kept.pop(LEXICAL_PROPERTY, None)
    # Who knows an external table by its name alone would not look beside its folder.
    sidecar = settings.sidecar or (target.ref.sidecar if target.ref.location else None)
    ours = {
        FORMAT_PROPERTY: str(FORMAT),
        TABLE_ID_PROPERTY: target.table_id,
        FINGERPRINT_PROPERTY: spec.fingerprint,
        ENCODER_PROPERTY: json.dumps(encoder, sort_keys=True),
        KEYS_PROPERTY: json.dumps(list(rows.keys)),
        METADATA_PROPERTY: json.dumps(list(rows.metadata)),
        **({SIDECAR_PROPERTY: sidecar} if sidecar else {}),
        **({LEXICAL_PROPERTY: lexical} if lexical else {}),
        **constraints_of(spec.dim),
    }
    stats = _statistics_columns(rows)
    if stats:
        ours["delta.dataSkippingStatsColumns"] = stats
    return kept | ours | settable_properties(settings)


def kept_properties(before: Published) -> dict[str, str]:
    """The properties of the present table that somebody may set."""
    return {name: value for name, value in before.properties.items() if not name.startswith(KEPT_BY_DELTA)}


def is_indexed(target: Target, spec: EncoderSpec) -> bool:
    """Whether the table to come has an index: that of the present one, whose centroids are of this encoder."""
    before = target.before
    return before is not None and before.index is not None and before.fingerprint == spec.fingerprint


def constraints_of(dim: int) -> dict[str, str]:
    """The properties by which Delta refuses, from any writer, vectors of another width and rows without account."""
    return {
        "delta.constraints.shoal_dim": f"embedding IS NULL OR size(embedding) = {dim}",
        "delta.constraints.shoal_accounted": "(embedding IS NULL) <> (error IS NULL)",
    }


def missing_constraints(properties: Mapping[str, str], dim: int) -> list[str]:
    """Names of Shoal's own constraints that a table with these properties does not have, or not as Shoal wrote them."""
    wanted = constraints_of(dim)
    return [name.rpartition(".")[2] for name, condition in wanted.items() if properties.get(name) != condition]


def settable_properties(settings: DestinationConfig) -> dict[str, str]:
    """What the run file says of the table itself and may change from one night to the next."""
    hours = max(1, int(settings.retain.total_seconds() // 3600))
    return {
        "delta.enableDeletionVectors": str(settings.deletion_vectors).lower(),
        "delta.enableChangeDataFeed": str(settings.change_feed).lower(),
        "delta.deletedFileRetentionDuration": f"interval {hours} hours",
        "delta.logRetentionDuration": f"interval {hours} hours",
        **settings.properties,
    }


def apply_settings(spark: SparkSession, published: Published, settings: DestinationConfig) -> list[str]:
    """Sets the properties that the run file has changed since the last run, in a commit of their own; their names."""
    wanted = settable_properties(settings)
    changed = {name: value for name, value in wanted.items() if published.properties.get(name) != value}
    if changed:
        listed = ", ".join(f"{_literal(name)} = {_literal(value)}" for name, value in sorted(changed.items()))
        spark.sql(f"ALTER TABLE {published.ref.sql} SET TBLPROPERTIES ({listed})")
    return sorted(changed)


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def published_columns(source: SourceRows, config: RunConfig) -> dict[str, str]:
    """Name -> type of every column that a run over this source publishes."""
    fixed = {
        "chunk_index": "int",
        "chunk_start": "int",
        "chunk_end": "int",
        **({"text": "string"} if config.destination.store_text else {}),
        "content_hash": "binary",
        "row_hash": "binary",
        "meta_hash": "binary",
        "embedding": "array<float>",
        "n_tokens": "int",
        "truncated": "boolean",
        "error": "string",
        "embedded_at": "timestamp",
        **({TERMS: "array<string>"} if config.lexical else {}),
    }
    own = {name: source.rows.schema[name].dataType.simpleString() for name in (*source.keys, *source.metadata)}
    return fixed | own


def _statistics_columns(rows: RowPlan) -> str:
    """Keys, chunk_index and the scalar metadata columns: what a filter can skip files by."""
    scalars = {
        "string",
        "tinyint",
        "smallint",
        "int",
        "bigint",
        "float",
        "double",
        "date",
        "timestamp",
        "timestamp_ntz",
    }
    names = [*rows.keys, *rows.metadata]
    good = [
        name
        for name in names
        if rows.rows.schema[name].dataType.simpleString() in scalars
        or rows.rows.schema[name].dataType.simpleString().startswith("decimal")
    ]
    return ",".join(
        [name if name.isascii() and name.isidentifier() else quoted(name) for name in good]
        # Of errors the number of NULLs counts: what has none is not read to find those that may pass.
        + ["chunk_index", "error"]
    )


def _with_comments(spark: SparkSession, target: Target, content: DataFrame) -> DataFrame:
    """Column comments of the present table, on the columns that stay."""
    if target.before is None:
        return content
    old = {field.name: field.metadata for field in target.before.ref.read(spark).schema.fields if field.metadata}
    return content.select(
        *[
            F.col(quoted(field.name)).alias(field.name, metadata={**field.metadata, **old[field.name]})
            if field.name in old
            else F.col(quoted(field.name))
            for field in content.schema.fields
        ]
    )


def _fence(spark: SparkSession, target: Target) -> None:
    """OvertakenError unless the head is the planned one, or differs only by commits that change no row."""
    if target.before is None:
        if exists(spark, target.ref):
            raise OvertakenError(f"table {target.ref}: somebody created it while this run encoded; run it again")
        return
    for commit in commits(spark, target.ref):
        if commit.version <= target.before.version:
            return
        if commit.operation not in WITHOUT_DATA_CHANGE:
            raise _overtaken(target, f"version {commit.version} ({commit.operation} by {commit.user or 'unknown'})")


def _own_head(spark: SparkSession, target: Target, state: State) -> int:
    """The version that this run committed; OvertakenError when it committed none and another run did.

    Somebody may have published on top of it by now, so all commits since the plan are looked at, not the newest alone.
    """
    planned = target.before.version if target.before else -1
    others: list[str] = []
    for commit in commits(spark, target.ref):
        if commit.version <= planned:
            break
        if commit.state is not None:
            if commit.state.run_id == state.run_id:
                return commit.version
            others.append(f"version {commit.version} (run {commit.state.run_id})")
    if others:
        raise _overtaken(target, others[0])
    raise RunError(
        f"table {target.ref}: run {state.run_id} has made no commit (Delta passes over a generation that it has "
        f"already, and {target.generation} may be one); nothing was published, run it again",
        code="PUBLISH_FAILED",
    )


def _overtaken(target: Target, by: str) -> OvertakenError:
    planned = target.before.version if target.before else "no table"
    return OvertakenError(
        f"table {target.ref}: {by} landed after this run planned on version {planned}; nothing was published, "
        f"the vectors wait in staging: run it again"
    )


def _commit_settings(target: Target, state: State) -> dict[str, str]:
    """SQL commands take their commit's metadata from the session; left behind, it would swallow later commits."""
    return {
        USER_METADATA: state.to_user_metadata(),
        _TXN_APP: f"shoal:{target.table_id}",
        _TXN_VERSION: str(target.generation),
    }


def _landed_or_failed(
    spark: SparkSession, target: Target, state: State, error: PySparkException | Py4JJavaError
) -> int:
    """The version of a commit that landed although its answer got lost; else the error, in words."""
    outcome = "the table is as it was and the vectors wait in staging: run it again"
    try:
        return _own_head(spark, target, state)
    except RunError:
        pass
    except (PySparkException, Py4JJavaError):
        outcome = "whether it landed could not be seen, the table cannot be read now; run it again, which finds out"
    raise _lost_or_failed(error, outcome) from error


def _lost_or_failed(error: PySparkException | Py4JJavaError, outcome: str) -> RunError | DestinationError:
    if full := full_disk(error):
        return full
    if any(sign in str(error) for sign in CONFLICTS):
        return OvertakenError(f"the publication met another commit on the table ({first_line(error)}); run it again")
    return RunError(f"the publication failed: {first_line(error)}; {outcome}", code="PUBLISH_FAILED")
