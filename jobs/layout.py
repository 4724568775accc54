"""Where the tables of one destination lie: the published one, and beside it what only Shoal reads."""

from dataclasses import dataclass, replace

from delta.tables import DeltaTable
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession

from shoal.conf.errors import DestinationError
from shoal.conf.roots import require_inside
from shoal.conf.run import DestinationConfig
from shoal.jobs.filesystem import absolute, join
from shoal.jobs.hashing import quoted
from shoal.jobs.remote import is_remote

SIDECAR_SUFFIX = "__shoal"
NO_TABLE = ("PATH_NOT_FOUND", "DELTA_TABLE_NOT_FOUND", "DELTA_PATH_DOES_NOT_EXIST", "DELTA_MISSING_DELTA_TABLE")
SIDECAR_PROPERTY = "shoal.sidecar"
"""Of a table whose sidecar is not where its name or path would have it."""


@dataclass(frozen=True)
class TableRef:
    """A Delta table by path or by catalog name, and the folder of its sidecar tables.

    location: where a table by name is to lie, None where the catalog decides that.
    """

    path: str | None
    name: str | None
    sidecar: str
    location: str | None = None

    def __str__(self) -> str:
        return self.name or self.path or ""

    @property
    def sql(self) -> str:
        """How SQL and DataFrameWriterV2 name the table."""
        if self.name:
            return ".".join(quoted(part) for part in self.name.split("."))
        return f"delta.{quoted(self.path or '')}"

    @property
    def staging(self) -> str:
        return join(self.sidecar, "staging")

    @property
    def runs(self) -> str:
        return join(self.sidecar, "runs")

    @property
    def canaries(self) -> str:
        return join(self.sidecar, "canaries")

    @property
    def cells(self) -> str:
        return join(self.sidecar, "cells")

    @property
    def lease(self) -> str:
        return join(self.sidecar, "lease.json")

    @property
    def work(self) -> str:
        """Folder of run-scoped tables: `work/<run id>/{rows,chunks,todo}`."""
        return join(self.sidecar, "work")

    def read(self, spark: SparkSession, version: int | None = None) -> DataFrame:
        """The published rows, at a Delta version when one is given."""
        reader = spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        return reader.load(self.path) if self.path else reader.table(self.sql)


def table_of(spark: SparkSession, destination: DestinationConfig) -> TableRef:
    """The table that a run file names; the sidecar lies beside it unless `destination.sidecar` says where."""
    if destination.path:
        path = destination.path.rstrip("/")
        sidecar = destination.sidecar or path + SIDECAR_SUFFIX
        return TableRef(None, destination.table, sidecar, path) if destination.table else TableRef(path, None, sidecar)
    name = destination.table or ""
    return TableRef(None, name, destination.sidecar or _sidecar_of_name(spark, name))


def table_named(spark: SparkSession, table: str) -> TableRef:
    """The table that a user names on the command line: a path when it looks like one, else a catalog name."""
    if "/" in table or not _is_catalog_table(spark, table):
        path = absolute(table).rstrip("/")
        require_inside(path, "the table")
        return TableRef(path, None, path + SIDECAR_SUFFIX)
    ref = TableRef(None, table, "")
    return replace(ref, sidecar=_recorded_sidecar(spark, ref) or _sidecar_of_name(spark, table))


def read_delta(spark: SparkSession, path: str) -> DataFrame:
    """A sidecar table as it is now."""
    return spark.read.format("delta").load(path)


def is_delta(spark: SparkSession, path: str) -> bool:
    """Whether there is a Delta table at a path."""
    if not is_remote(spark):
        return bool(DeltaTable.isDeltaTable(spark, path))
    # Delta's own call wants a plugin of the server's.
    try:
        return len(read_delta(spark, path).schema) > 0
    except AnalysisException as error:
        if error.getCondition() in NO_TABLE:
            return False
        raise


def create_delta(spark: SparkSession, path: str, columns: str, more: str = "") -> None:
    """Makes an empty Delta table at a path, unless there is one: two drivers that create it by a first append collide.

    columns, and more after them: as in CREATE TABLE.
    """
    if is_delta(spark, path):
        return
    spark.sql(f"CREATE TABLE IF NOT EXISTS delta.{quoted(path)} ({columns}) USING delta {more}")


def _is_catalog_table(spark: SparkSession, name: str) -> bool:
    try:
        return bool(spark.catalog.tableExists(".".join(quoted(part) for part in name.split("."))))
    except AnalysisException:
        return False


def _recorded_sidecar(spark: SparkSession, ref: TableRef) -> str | None:
    """What a table says itself; None for one whose sidecar is where its name says, and for what is no table."""
    try:
        rows = spark.sql(f"SHOW TBLPROPERTIES {ref.sql}").collect()
    except AnalysisException:
        return None
    return next((row["value"] for row in rows if row["key"] == SIDECAR_PROPERTY), None)


def _sidecar_of_name(spark: SparkSession, name: str) -> str:
    *namespace, table = name.split(".")
    described = ".".join(quoted(part) for part in namespace) or quoted(spark.catalog.currentDatabase())
    try:
        rows = spark.sql(f"DESCRIBE NAMESPACE {described}").collect()
    except AnalysisException as error:
        raise DestinationError(
            f"destination.table '{name}': the schema {described} is not there; create it first (CREATE SCHEMA ..)"
        ) from error
    location = next((row[1] for row in rows if row[0].lower() == "location"), None)
    if not location:
        raise DestinationError(
            f"destination.table '{name}': the schema {described} has no location; say with destination.sidecar in "
            f"which folder Shoal keeps its staging and run tables"
        )
    return join(location, table + SIDECAR_SUFFIX)
