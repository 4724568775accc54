"""Reads a table or a query of a database over JDBC, all connections of a run showing the same state."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, DataFrameReader, SparkSession
from pyspark.sql import types as T

from shoal.conf.database import DatabaseConfig
from shoal.conf.errors import ConfigError, SourceError
from shoal.conf.source import SourceConfig

FETCH_ROWS = "10000"
"""Rows that a driver takes from the database at a time, unless source.options says otherwise: some take all at once."""

REPEATABLE_READ = 4
"""Of java.sql.Connection."""


def read_database(spark: SparkSession, source: SourceConfig, session: str | None = None) -> DataFrame:
    """The rows of `source.table` or `source.query` with the database's column names; nothing is read but their types.

    session: an SQL statement that each of several connections runs first, as `shared_snapshot` gives it; without it
    one connection reads all. Raises ConfigError for a password that is not where the run file says, and whatever Spark
    says of the database.
    """
    what = source.table or f"({source.query}) AS shoal_source"
    reader = _reader(spark, source, session, what)
    return (reader if session is None else reader.options(**_shares(spark, source, session, what))).load()


def _shares(spark: SparkSession, source: SourceConfig, session: str, what: str) -> dict[str, str]:
    """Options that share the rows out among the connections, by the range of the column; none for an empty table."""
    database = _database(source)
    column = database.partition_column or ""
    ranged = f"(SELECT min({column}) AS low, max({column}) AS high FROM {what}) AS shoal_range"
    rows = _reader(spark, source, session, ranged).load()
    low, high = rows.collect()[0]
    if low is None:
        return {}
    if isinstance(rows.schema["low"].dataType, T.NumericType):
        try:
            low, high = math.floor(low), math.floor(high) + 1
        except (ValueError, OverflowError) as error:
            raise SourceError(
                f"source.database.partition_column '{column}' reaches from {low} to {high}, which cannot be shared "
                "out; choose one without NaN and infinity"
            ) from error
    bounds = {"lowerBound": str(low), "upperBound": str(high)}
    return {"partitionColumn": column, "numPartitions": str(database.partitions), **bounds}


@contextmanager
def shared_snapshot(spark: SparkSession, source: SourceConfig) -> Iterator[str | None]:
    """For the block, the statement that lets a connection see the state of this moment; None where one reads all.

    By PostgreSQL's exported snapshots: a transaction of the driver's own stays open meanwhile.
    """
    if _database(source).partitions == 1:
        yield None
        return
    connection = _connect(spark, source)
    try:
        connection.setTransactionIsolation(REPEATABLE_READ)
        connection.setAutoCommit(False)
        answer = connection.createStatement().executeQuery("SELECT pg_export_snapshot()")
        answer.next()
        name = answer.getString(1)
        yield f"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{name}'"
    finally:
        connection.close()


def _connect(spark: SparkSession, source: SourceConfig) -> Any:
    """A connection of the driver's, by Spark's own way to the JDBC driver's class."""
    jvm: Any = spark._jvm
    given = jvm.java.util.HashMap()
    for name, value in {**_options(source), "dbtable": "shoal_source"}.items():
        given.put(name, value)
    options = jvm.org.apache.spark.sql.execution.datasources.jdbc.JDBCOptions(
        jvm.org.apache.spark.api.python.PythonUtils.toScalaMap(given)
    )
    dialect = jvm.org.apache.spark.sql.jdbc.JdbcDialects.get(_database(source).url)
    return dialect.createConnectionFactory(options).apply(-1)


def _reader(spark: SparkSession, source: SourceConfig, session: str | None, what: str) -> DataFrameReader:
    reader = spark.read.format("jdbc").options(**_options(source)).option("dbtable", what)
    return reader if session is None else reader.option("sessionInitStatement", session)


def _options(source: SourceConfig) -> dict[str, str]:
    database = _database(source)
    options = {"fetchsize": FETCH_ROWS, **source.options, "url": database.url}
    if database.user is not None:
        options["user"] = database.user
    password = _password(database)
    return options if password is None else {**options, "password": password}


def _password(database: DatabaseConfig) -> str | None:
    if database.password_env is not None:
        if database.password_env not in os.environ:
            raise ConfigError(
                f"source.database.password_env: the environment of the driver has no {database.password_env}; set it "
                "where the run starts"
            )
        return os.environ[database.password_env]
    if database.password_file is None:
        return None
    try:
        return (Path(database.password_file).read_text(encoding="utf-8").splitlines() or [""])[0]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"source.database.password_file: {database.password_file} cannot be read ({type(error).__name__}); it has "
            "to be a file on the driver's machine whose first line is the password"
        ) from error


def _database(source: SourceConfig) -> DatabaseConfig:
    if source.database is None:
        raise SourceError(f"source.format is {source.format}, which has no database")
    return source.database
