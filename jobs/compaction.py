"""How a Delta table lies on disk, and making few large files of many small ones; no row changes by it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.jobs.session import with_settings

# Files above this are left as they are, so that a night's small files never cause a large one to be written again.
SMALL_BYTES = 128 * 1024 * 1024

# A row marked as deleted costs a look at every scan, and to be rid of it the vectors of its whole file are written
# again: with one row in ten, a byte is written again at most ten times for each that a night deletes.
MAX_DELETED_SHARE = 0.1

_SMALL_FILES = "spark.databricks.delta.optimize.minFileSize"
_DELETED_SHARE = "spark.databricks.delta.optimize.maxDeletedRowsRatio"


@dataclass(frozen=True)
class TableSize:
    """Of the newest version: live data files, those of them that are small or worn, and rows marked as deleted."""

    files: int
    bytes: int
    small_files: int
    worn_files: int
    """Of the others, those with a greater share of deleted rows than MAX_DELETED_SHARE."""
    rows: int
    """Rows in the files, those marked as deleted included."""
    deleted_rows: int

    @property
    def deleted_share(self) -> float:
        return self.deleted_rows / self.rows if self.rows else 0.0

    def public(self) -> dict[str, int]:
        return asdict(self)


def size_of(spark: SparkSession, sql: str, small_bytes: int = SMALL_BYTES) -> TableSize:
    """Reads the log alone, on executors: what comes back is one row of sums."""
    files = live_files(spark, sql)
    rows = F.get_json_object("stats", "$.numRecords").cast("bigint")
    deleted = F.col("deletionVector.cardinality")
    is_small = F.col("size") < small_bytes
    sums = files.agg(
        F.count(F.lit(1)).alias("files"),
        F.sum("size").alias("bytes"),
        F.count_if(is_small).alias("small_files"),
        F.count_if(~is_small & (deleted > rows * MAX_DELETED_SHARE)).alias("worn_files"),
        F.sum(rows).alias("rows"),
        F.sum(deleted).alias("deleted_rows"),
    ).collect()[0]
    return TableSize(**{name: int(value or 0) for name, value in sums.asDict().items()})


def live_files(spark: SparkSession, sql: str) -> DataFrame:
    """The data files of the newest version as the log has them: path, partitionValues, size, stats, deletionVector."""
    spark.sql(f"DESCRIBE DETAIL {sql}").collect()  # Delta then knows of commits by other drivers
    snapshot: Any = DeltaTable.forName(spark, sql)._jdt.deltaLog().unsafeVolatileSnapshot()
    return DataFrame(snapshot.allFiles().toDF(), spark)


def physical_name(spark: SparkSession, sql: str, column: str) -> str:
    """What the log calls a column: another name where the table maps its columns."""
    snapshot: Any = DeltaTable.forName(spark, sql)._jdt.deltaLog().unsafeVolatileSnapshot()
    fields = json.loads(snapshot.metadata().schemaString())["fields"]
    metadata = {field["name"]: field["metadata"] for field in fields}.get(column, {})
    return str(metadata.get("delta.columnMapping.physicalName", column))


def compact(spark: SparkSession, sql: str, small_bytes: int = SMALL_BYTES) -> None:
    """OPTIMIZE of the small files, and of those with too many deleted rows, which are left out of what is written.

    Commits without change of data, or none where there is nothing to do. OPTIMIZE leaves a file alone that it finds no
    other to join with; REORG does not, but writes every file again that has a single deleted row, which is worth it
    where the whole table has too many.
    """
    with with_settings(spark, {_SMALL_FILES: str(small_bytes), _DELETED_SHARE: str(MAX_DELETED_SHARE)}):
        spark.sql(f"OPTIMIZE {sql}")
        if size_of(spark, sql, small_bytes).deleted_share > MAX_DELETED_SHARE:
            spark.sql(f"REORG TABLE {sql} APPLY (PURGE)")
