"""The staging table: vectors that wait for an audit, one commit per wave; readers never look at it."""

import re
from urllib.parse import unquote

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.jobs.hashing import quoted
from shoal.jobs.layout import TableRef, create_delta, read_delta
from shoal.jobs.session import with_settings

STAGING_DDL = (
    "fingerprint string, content_hash binary, embedding array<float>, n_tokens int, truncated boolean, error string, "
    "embedded_at timestamp, run_id string"
)
SIGNS_OF_DAMAGE = ("FAILED_READ_FILE", "ChecksumException", "FileNotFoundException", "ParquetDecodingException")
COLUMNS = ("fingerprint", "content_hash", "embedding", "n_tokens", "truncated", "error", "embedded_at", "run_id")


def create_staging(spark: SparkSession, ref: TableRef) -> None:
    """Makes the table if it is absent."""
    skipping = "PARTITIONED BY (fingerprint) TBLPROPERTIES ('delta.dataSkippingStatsColumns' = 'run_id')"
    create_delta(spark, ref.staging, STAGING_DDL, skipping)


def append_wave(vectors: DataFrame, ref: TableRef, *, fingerprint: str, run_id: str, wave: str) -> None:
    """Appends one wave (columns of ENCODE_OUTPUT) in one commit; the same wave of the same run lands once.

    An id per attempt and wave, not a sequence: Delta skips a lower version of one id in silence, so waves that overtake
    each other would be lost.
    """
    (
        vectors.withColumns({"fingerprint": F.lit(fingerprint), "run_id": F.lit(run_id)})
        .select(*COLUMNS)
        .write.format("delta")
        .mode("append")
        .option("txnAppId", f"{run_id}/{wave}")
        .option("txnVersion", 0)
        .save(ref.staging)
    )


def staged_rows(spark: SparkSession, ref: TableRef, fingerprint: str) -> DataFrame:
    """All that is staged of one encoder, vectors and errors; a content may stand there more than once."""
    return read_delta(spark, ref.staging).where(F.col("fingerprint") == fingerprint)


def staged_vectors(spark: SparkSession, ref: TableRef, fingerprint: str) -> DataFrame:
    """Rows of staging that have a vector of this encoder."""
    return staged_rows(spark, ref, fingerprint).where(F.col("error").isNull())


def staged_errors(spark: SparkSession, ref: TableRef, fingerprint: str) -> DataFrame:
    """The newest error of each content: content_hash, error, n_tokens, truncated, embedded_at.

    A vector beats an error: of content that has both, use the vector.
    """
    errors = staged_rows(spark, ref, fingerprint).where(F.col("error").isNotNull())
    newest = F.max_by(F.struct("error", "n_tokens", "truncated", "embedded_at"), "embedded_at")
    return errors.groupBy("content_hash").agg(newest.alias("last")).select("content_hash", "last.*")


def mend_staging(spark: SparkSession, ref: TableRef, failure: Exception) -> bool:
    """Drops what cannot be read of staging, where that is what failed; False where it is not.

    The rest of the encoder's partition is written again, with every page compared with its sum.
    """
    told = unquote(str(failure))
    found = re.search(rf"{re.escape(unquote(ref.staging))}/fingerprint=(\w+)/", told)
    if found is None or not any(sign in told for sign in SIGNS_OF_DAMAGE):
        return False
    tolerant = {
        "spark.sql.files.ignoreCorruptFiles": "true",
        "spark.sql.files.ignoreMissingFiles": "true",
        "parquet.page.verify-checksum.enabled": "true",
    }
    with with_settings(spark, tolerant):
        (
            staged_rows(spark, ref, found[1])
            .write.format("delta")
            .mode("overwrite")
            .option("replaceWhere", f"fingerprint = '{found[1]}'")
            .save(ref.staging)
        )
    return True


def trim_staging(spark: SparkSession, ref: TableRef, fingerprint: str) -> None:
    """Empties the partition of an encoder whose vectors have been published."""
    if not staged_rows(spark, ref, fingerprint).isEmpty():
        spark.sql(f"DELETE FROM delta.{quoted(ref.staging)} WHERE fingerprint = '{fingerprint}'")
