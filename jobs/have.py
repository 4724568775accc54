"""The vectors that an encoder has already: staged, published, or in earlier versions of the table."""

from dataclasses import dataclass
from functools import reduce

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from shoal.jobs.layout import TableRef
from shoal.jobs.published import Published, commits
from shoal.jobs.staging import staged_vectors

VECTOR_COLUMNS = ("content_hash", "embedding", "n_tokens", "truncated", "embedded_at")


@dataclass(frozen=True)
class Have:
    """Where vectors of one encoder are found, in the order in which they are preferred; nothing is read to build it.

    `staged` has what is in staging at the time of reading, so that it grows while a run encodes.
    """

    staged: DataFrame | None
    published: tuple[DataFrame, ...]

    def hashes(self) -> DataFrame | None:
        """Content hashes with a vector, doubles included; None when there is nowhere to look."""
        sources = [source.select("content_hash") for source in (self.staged, *self.published) if source is not None]
        return reduce(DataFrame.unionByName, sources) if sources else None

    def columns(self, needed: DataFrame, *names: str) -> DataFrame:
        """These columns of every vector that is needed (content_hash, distinct), doubles included, lowest "
        "`rank` best.
        """
        parts = []
        if self.staged is not None:
            parts.append(self.staged.select("content_hash", *names).withColumn("rank", F.lit(0)))
        for rank, source in enumerate(self.published, start=1):
            part = source.select("content_hash", *names).join(needed, on="content_hash", how="left_semi")
            parts.append(part.withColumn("rank", F.lit(rank)))
        return reduce(DataFrame.unionByName, parts)

    def vectors(self, needed: DataFrame) -> DataFrame:
        """VECTOR_COLUMNS of each needed content that has a vector, once: staged before published, the first made first.

        The window is partitioned as the join that follows is, and so costs no shuffle of its own.
        """
        found = self.columns(needed, *VECTOR_COLUMNS[1:])
        best = Window.partitionBy("content_hash").orderBy("rank", "embedded_at")
        return found.withColumn("__nth", F.row_number().over(best)).where("__nth = 1").select(*VECTOR_COLUMNS)


def find_have(
    spark: SparkSession, ref: TableRef, published: Published | None, fingerprint: str, *, staged: bool
) -> Have:
    """Staging, where there is one, then the published table, or its earlier versions if it is another encoder's."""
    rows: list[DataFrame] = []
    if published is not None and published.fingerprint == fingerprint:
        rows.append(_with_vector(published.rows(spark)))
    elif published is not None:
        rows += _earlier(spark, ref, fingerprint)
    return Have(staged_vectors(spark, ref, fingerprint) if staged else None, tuple(rows))


def _with_vector(rows: DataFrame) -> DataFrame:
    return rows.where(F.col("embedding").isNotNull() & F.col("content_hash").isNotNull())


def _earlier(spark: SparkSession, ref: TableRef, fingerprint: str) -> list[DataFrame]:
    """Newest first, the last version of each stretch of history in which this encoder served and files still exist."""
    found: list[DataFrame] = []
    newer_is_own = False
    for commit in commits(spark, ref):
        if commit.state is None:
            continue
        is_own = commit.state.record.get("fingerprint") == fingerprint
        if is_own and not newer_is_own:
            try:
                rows = _with_vector(ref.read(spark, commit.version))
                rows.select("content_hash").write.format("noop").mode("overwrite").save()
            except (PySparkException, Py4JJavaError):
                # Vacuumed, or the log no longer reaches back: what cannot be read is encoded again.
                return found
            found.append(rows)
        newer_is_own = is_own
    return found
