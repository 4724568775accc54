"""Reads a source as rows of (key columns, text, metadata columns), each with its row hash and metadata hash."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from shoal.conf.errors import RunError, SourceError
from shoal.conf.run import ChunkConfig, RunConfig
from shoal.conf.source import SourceConfig
from shoal.conf.template import FieldPart
from shoal.jobs.database import read_database, shared_snapshot
from shoal.jobs.filesystem import full_disk
from shoal.jobs.hashing import columns_hash, encode_string, hash128, quoted

_KEY_TYPES = (
    T.StringType,
    T.CharType,
    T.VarcharType,
    T.IntegralType,
    T.DecimalType,
    T.DateType,
    T.TimestampType,
    T.TimestampNTZType,
    T.BooleanType,
)

ROW_TEXT = "__shoal_text"
"""Name of the rendered text until it meets the published column `text`; users' own columns cannot be called so."""

LENGTH_LIMIT = "__CHAR_VARCHAR_TYPE_STRING"
"""Where Spark notes that a column of text was declared as CHAR(n) or VARCHAR(n)."""

SIGN = "__sign"
"""Whether a row of the change feed came (1) or went (-1)."""


@dataclass(frozen=True)
class SourceRows:
    """A source made uniform: `rows` has the keys, ROW_TEXT, row_hash, meta_hash and the metadata columns."""

    rows: DataFrame
    keys: tuple[str, ...]
    metadata: tuple[str, ...]
    version: int | None
    columns: str = ""
    """The source's own columns and their types, whether the run reads them or not."""


def read_source(
    spark: SparkSession,
    source: SourceConfig,
    chunk: ChunkConfig | None,
    *,
    limit: int | None = None,
    session: str | None = None,
) -> SourceRows:
    """The source as the run file describes it, pinned to one version where it has versions.

    Nothing is scanned here but what Spark needs to infer a schema. session: what each connection to a database says
    first. Raises SourceError for a source that is not there, a column that is not in it, and a key of a floating-point
    type.
    """
    version = _pinned_version(spark, source)
    table = _load(spark, source, version, session)
    rows = _shaped(table, source, chunk, limit=limit)
    return SourceRows(rows, source.key_names, source.metadata_names, version, table.schema.simpleString())


def as_one_state(
    spark: SparkSession, config: RunConfig, found: SourceRows, folder: str, *, limit: int | None = None
) -> SourceRows:
    """The source as it will be for as long as a run may look at it.

    A database shows other rows each time it is asked: it is read once, and its rows are kept below `folder`. Every
    other source is returned as found.
    """
    if config.source.format != "jdbc":
        return found
    try:
        with shared_snapshot(spark, config.source) as session:
            once = found
            if session is not None:
                once = read_source(spark, config.source, config.chunk, limit=limit, session=session)
            once.rows.write.parquet(folder)
    except (PySparkException, Py4JJavaError) as error:
        raise full_disk(error) or RunError(
            f"{_named(config.source)} was not read to its end ({_root_cause(error) or _reason(error)}); nothing was "
            "published, run it again",
            code="SOURCE_UNREADABLE",
        ) from error
    return replace(once, rows=spark.read.schema(once.rows.schema).parquet(folder))


def read_changes(
    spark: SparkSession, source: SourceConfig, chunk: ChunkConfig | None, *, first: int, last: int
) -> DataFrame:
    """The change feed of a Delta source from version `first` to `last`, filtered and shaped as `read_source` does it.

    SIGN is 1 for a row that came and -1 for one that went; an update is both. Nothing is scanned here.
    """
    reader = spark.read.format("delta").options(**source.options).option("readChangeFeed", "true")
    reader = reader.option("startingVersion", first).option("endingVersion", last)
    feed = reader.table(_sql_name(source.table or "")) if source.format == "table" else reader.load(source.paths[0])
    came = F.when(F.col("_change_type").isin("insert", "update_postimage"), 1)
    sign = came.when(F.col("_change_type").isin("delete", "update_preimage"), -1)
    return _shaped(feed.withColumn(SIGN, sign), source, chunk, also=[SIGN])


def _shaped(
    table: DataFrame,
    source: SourceConfig,
    chunk: ChunkConfig | None,
    *,
    limit: int | None = None,
    also: Sequence[str] = (),
) -> DataFrame:
    """Keys, ROW_TEXT, row_hash, meta_hash and metadata columns of the rows that pass the filter, then `also`."""
    if source.filter:
        try:
            table = table.where(source.filter)
        except PySparkException as error:
            raise SourceError(f"source.filter '{source.filter}': {_reason(error)}", code="SOURCE_MISMATCH") from error
    if limit is not None:
        table = table.limit(limit)
    _require_columns(table, source)
    keys = [_renamed(table, "source.key", column.source, column.name) for column in source.key_columns]
    metadata = [_renamed(table, "source.columns", column.source, column.name) for column in source.metadata_columns]
    key_names, metadata_names = source.key_names, source.metadata_names
    named = table.select(*keys, *metadata, _text(source).alias(ROW_TEXT), *also)
    for name in key_names:
        _require_key_type(name, named.schema[name].dataType)
    return named.select(
        *[F.col(quoted(name)) for name in key_names],
        ROW_TEXT,
        hash128([encode_string(F.lit(_chunk_settings(chunk))), encode_string(F.col(ROW_TEXT))]).alias("row_hash"),
        columns_hash([named.schema[name] for name in metadata_names]).alias("meta_hash"),
        *[F.col(quoted(name)) for name in metadata_names],
        *also,
    )


def delta_target(spark: SparkSession, source: SourceConfig) -> str | None:
    """How SQL names the Delta table that the source is; None for every other kind of source, views included."""
    if source.format == "delta":
        return f"delta.{quoted(str(source.path))}"
    if source.format == "table" and _is_delta_table(spark, source.table or ""):
        return _sql_name(source.table or "")
    return None


def _pinned_version(spark: SparkSession, source: SourceConfig) -> int | None:
    """The Delta version to read; the newest one when the run file names none, None for sources without versions."""
    if source.version is not None:
        return source.version
    target = delta_target(spark, source)
    if target is None:
        return None
    where = f"source '{source.path or source.table}'"
    try:
        if source.timestamp is None:
            return int(spark.sql(f"DESCRIBE HISTORY {target} LIMIT 1").collect()[0]["version"])
        history = spark.sql(f"DESCRIBE HISTORY {target}").where(f"timestamp <= timestamp '{source.timestamp}'")
        version = history.agg(F.max("version")).collect()[0][0]
    except (PySparkException, Py4JJavaError) as error:
        raise SourceError(f"{where} is no readable Delta table: {_reason(error)}") from error
    if version is None:
        raise SourceError(f"source.timestamp '{source.timestamp}': {where} has no version that old; name a later one")
    return int(version)


def _named(source: SourceConfig) -> str:
    return f"source '{source.path or source.table or source.query}'"


def _load(spark: SparkSession, source: SourceConfig, version: int | None, session: str | None) -> DataFrame:
    where = _named(source)
    try:
        if source.format == "jdbc":
            return read_database(spark, source, session)
        if source.format == "query":
            return spark.sql(source.query or "")
        reader = spark.read.options(**source.options)
        if source.schema_ddl:
            reader = reader.schema(source.schema_ddl)
        if source.format == "table":
            name = source.table or ""
            return (reader.option("versionAsOf", version) if version is not None else reader).table(_sql_name(name))
        paths = source.paths
        if source.format == "delta":
            return reader.format("delta").option("versionAsOf", version).load(paths[0])
        if source.format == "text":
            if "recursivefilelookup" not in {key.lower() for key in source.options}:
                reader = reader.option("recursiveFileLookup", True)
            return _text_files(reader.text(paths, wholetext=True))
        if source.format in ("json", "csv") and "mode" not in {key.lower() for key in source.options}:
            reader = reader.option("mode", "FAILFAST")
        if source.format == "csv":
            # With pruning, Spark reads a line of too few fields as NULLs without a word, whatever its mode.
            reader = reader.option("columnPruning", False)
            if "header" not in {key.lower() for key in source.options}:
                reader = reader.option("header", True)
        return reader.format(source.format).load(paths)
    except (PySparkException, Py4JJavaError) as error:
        raise SourceError(f"{where} (format {source.format}) cannot be read: {_reason(error)}") from error


def _text_files(files: DataFrame) -> DataFrame:
    """One row per file: `path` is the file's own address, `text` all of its content; Spark passes over empty files."""
    return files.select(F.col("_metadata.file_path").alias("path"), F.col("value").alias("text"))


def _text(source: SourceConfig) -> Column:
    """`source.text` rendered by Spark as Template.render says: a NULL field is empty, all of them NULL is NULL."""
    template = source.template
    if template.is_column:
        return F.col(quoted(source.text)).cast("string")
    parts = [
        F.coalesce(F.col(quoted(part.column)).cast("string"), F.lit(""))
        if isinstance(part, FieldPart)
        else F.lit(part.text)
        for part in template.parts
    ]
    all_null = reduce(lambda one, other: one & other, [F.col(quoted(name)).isNull() for name in template.fields])
    return F.when(all_null, F.lit(None).cast("string")).otherwise(F.concat(*parts))


def _require_columns(table: DataFrame, source: SourceConfig) -> None:
    wanted = [("source.key", column.source) for column in source.key_columns]
    wanted += [("source.columns", column.source) for column in source.metadata_columns]
    wanted += [("source.text", name) for name in source.text_fields]
    have = set(table.columns)
    problems = []
    for setting, name in wanted:
        # Spark tells names apart by more than their case only when it is asked to.
        alike = [other for other in table.columns if other.lower() == name.lower()]
        if name in have and len(alike) > 1:
            problems.append(
                f"{setting}: the source has {len(alike)} columns '{name}' ({', '.join(alike)}); name them apart in a "
                "query source"
            )
        if name in have:
            continue
        near = difflib.get_close_matches(name, table.columns, n=3, cutoff=0.5)
        listed = f"it has: {', '.join(table.columns)}" if table.columns else "it has no columns: is it empty?"
        hint = f"did you mean {' or '.join(near)}?" if near else listed
        problems.append(f"{setting}: the source has no column '{name}'; {hint}")
    if problems:
        raise SourceError("\n".join(problems), code="SOURCE_MISMATCH")


def _require_key_type(name: str, data_type: T.DataType) -> None:
    if not isinstance(data_type, _KEY_TYPES):
        raise SourceError(
            f"source.key: '{name}' has the type {data_type.simpleString()}; a key must be a string, a whole number, "
            f"a decimal, a date, a timestamp or a boolean: cast it in a query source, or in the file's schema",
            code="SOURCE_MISMATCH",
        )


def _renamed(table: DataFrame, setting: str, source: str, name: str) -> Column:
    if name.startswith("__"):
        raise SourceError(
            f"{setting}: '{name}' begins with __, as Shoal's own names do; publish it as '{name} AS other'",
            code="SOURCE_MISMATCH",
        )
    # Of text of limited length Delta keeps no statistics, and refuses to be asked for some; it is published as text.
    metadata = table.schema[source].metadata
    if LENGTH_LIMIT in metadata:
        return F.col(quoted(source)).cast("string").alias(name)
    return F.col(quoted(source)).alias(name, metadata=metadata)


def _chunk_settings(chunk: ChunkConfig | None) -> str:
    return "whole" if chunk is None else f"{chunk.tokens}/{chunk.overlap}/{chunk.boundary}"


def _is_delta_table(spark: SparkSession, name: str) -> bool:
    try:
        rows = spark.sql(f"DESCRIBE EXTENDED {_sql_name(name)}").collect()
    except PySparkException as error:
        raise SourceError(f"source.table '{name}': {_reason(error)}") from error
    return any(row[0] == "Provider" and str(row[1]).lower() == "delta" for row in rows)


def _sql_name(name: str) -> str:
    return ".".join(quoted(part) for part in name.split("."))


def _reason(error: Exception) -> str:
    """The first line of what Spark says, without its error class."""
    text = str(error) if isinstance(error, PySparkException) else str(getattr(error, "java_exception", error))
    if "[FAILED_JDBC" in text:
        text = f"{text.strip().splitlines()[0]}: {_root_cause(error)}"
    line = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if "No suitable driver" in line or "ClassNotFoundException" in line:
        line += "; its jar has to be on Spark's class path (spark.jars.packages in `spark.conf`)"
    return line.removeprefix("[").replace("] ", ": ", 1) if line.startswith("[") else line


def _root_cause(error: Exception) -> str:
    """What the database's own driver said; Spark's error shows its operation alone."""
    cause = getattr(error, "java_exception", None) or getattr(error, "_origin", None)
    while cause is not None and cause.getCause() is not None:
        cause = cause.getCause()
    return "" if cause is None else (str(cause.getMessage()).strip().splitlines() or [""])[0]
