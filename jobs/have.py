"""The vectors that an encoder has already: staged, published, or in earlier versions of the table."""

from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from shoal.jobs.hashing import quoted
from shoal.jobs.layout import TableRef
from shoal.jobs.planner import NOTHING, ChunkPlan, Keep, Waves, key_range, near, without
from shoal.jobs.published import Commit, Published, commits, readable
from shoal.jobs.staging import staged_vectors

VECTOR_COLUMNS = ("content_hash", "embedding", "n_tokens", "truncated", "embedded_at")

# What an earlier version is worth: reading a hash against encoding a chunk, in seconds of one core. Small tables are
# looked through a little in any case.
SECONDS_PER_CHUNK, SECONDS_PER_HASH, SECONDS_PER_VERSION = 2e-3, 2e-7, 0.2
FREE_VERSIONS, FREE_ROWS, MAX_VERSIONS = 4, 1_000_000, 30


@dataclass(frozen=True)
class Have:
    """Where vectors of one encoder are found, in the order in which they are preferred; nothing is read to build it.

    `staged` has what is in staging at the time of reading, so that it grows while a run encodes.
    """

    staged: DataFrame | None
    published: tuple[DataFrame, ...]
    keys: tuple[str, ...] = ()
    """Key columns of the published rows, by which Delta can skip their files."""

    def hashes(self) -> DataFrame | None:
        """Content hashes with a vector, doubles included; None when there is nowhere to look."""
        sources = [source.select("content_hash") for source in (self.staged, *self.published) if source is not None]
        return reduce(DataFrame.unionByName, sources) if sources else None

    def columns(self, needed: DataFrame, *names: str) -> DataFrame:
        """These columns of every vector that is needed (content_hash, distinct), doubles included, lowest
        `rank` best.
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
        found = self._holding(needed).columns(needed, *VECTOR_COLUMNS[1:])
        best = Window.partitionBy("content_hash").orderBy("rank", "embedded_at")
        return found.withColumn("__nth", F.row_number().over(best)).where("__nth = 1").select(*VECTOR_COLUMNS)

    def _holding(self, needed: DataFrame) -> "Have":
        """The same without the published files that hold nothing of what is needed: reads their hashes and keys once.

        Of several rows that hold a content the one with the greatest key counts: as a rule the newest, near the others.
        """
        if self.staged is not None:
            needed = needed.join(self.staged.select("content_hash"), on="content_hash", how="left_anti")
        holders = []
        for source in self.published:
            if not set(self.keys) <= set(source.columns):
                # An earlier version may have been keyed by other columns.
                holders.append(source)
                continue
            key = F.max(F.struct(*[quoted(name) for name in self.keys])).alias("__key")
            found = source.join(needed, on="content_hash", how="left_semi").groupBy("content_hash").agg(key)
            conditions = key_range(found.select("__key.*"), self.keys)
            if conditions != NOTHING:
                holders.append(near(source, conditions))
        return replace(self, published=tuple(holders))


def find_have(
    spark: SparkSession, ref: TableRef, published: Published | None, fingerprint: str, *, staged: bool
) -> Have:
    """Staging, where there is one, then the published table, or its earlier versions if it is another encoder's."""
    rows: list[DataFrame] = []
    if published is not None and published.fingerprint == fingerprint:
        rows.append(_with_vector(published.trusted_rows(spark)))
        if (before := published.ours_rows(spark)) is not None:
            rows.append(_with_vector(before))
    elif published is not None:
        rows += _earlier(spark, ref, fingerprint)
    keys = published.keys if published else ()
    return Have(staged_vectors(spark, ref, fingerprint) if staged else None, tuple(rows), keys)


def look_back(
    spark: SparkSession, published: Published | None, have: Have, chunks: ChunkPlan, keep: Keep, waves: Waves
) -> tuple[ChunkPlan, Have]:
    """Takes from what is to be encoded the texts that were published before and have come back since.

    Only versions of the same encoder that rows were taken from since, newest first, and only as many as cost less to
    look through than to encode anew.
    """
    if published is None or chunks.todo is None:
        return chunks, have
    tables: dict[int, DataFrame] = {}
    for version in _before_removals(spark, published, chunks.num_todo):
        try:
            tables[version] = _with_vector(published.ref.read(spark, version))
        except (PySparkException, Py4JJavaError):
            # The log no longer reaches back.
            break
    contents = chunks.todo.select("content_hash")
    try:
        holders = _holders(tables, contents)
    except (PySparkException, Py4JJavaError):
        # Vacuumed in part: what cannot be read is encoded again.
        left = takewhile(lambda version: readable(tables[version], "content_hash"), tables)
        holders = _holders({version: tables[version] for version in left}, contents)
    if not holders:
        return chunks, have
    found = [tables[version] for version in holders]
    have = replace(have, published=(*have.published, *found))
    returned = reduce(DataFrame.unionByName, [rows.select("content_hash") for rows in found])
    return without(chunks, returned, keep, waves), have


def _holders(tables: dict[int, DataFrame], contents: DataFrame) -> list[int]:
    """The newest version that holds each of the contents: these versions, newest first."""
    if not tables:
        return []
    tagged = [rows.select("content_hash", F.lit(version).alias("version")) for version, rows in tables.items()]
    held = reduce(DataFrame.unionByName, tagged).join(contents, on="content_hash", how="left_semi")
    newest = held.groupBy("content_hash").agg(F.max("version").alias("version"))
    return sorted((row["version"] for row in newest.select("version").distinct().collect()), reverse=True)


def _before_removals(spark: SparkSession, published: Published, num_todo: int) -> list[int]:
    """Versions whose rows the commit that followed took away or replaced, as far back as is worth it."""
    state = published.ours.state if published.ours else None
    if state is None or state.record.get("fingerprint") != published.fingerprint:
        return []
    num_rows = (state.record.get("rows") or {}).get("source", 0)
    worth = int(num_todo * SECONDS_PER_CHUNK / (SECONDS_PER_VERSION + num_rows * SECONDS_PER_HASH))
    number = min(MAX_VERSIONS, max(worth, FREE_VERSIONS if num_rows <= FREE_ROWS else 0))
    found: list[int] = []
    since: Commit | None = None
    for commit in commits(spark, published.ref):
        if len(found) >= number:
            break
        if commit.state is None:
            continue
        if commit.state.record.get("fingerprint") != published.fingerprint:
            break
        if since is not None and _removed(since):
            found.append(commit.version)
        since = commit
    return found


def _removed(commit: Commit) -> bool:
    """Whether a commit of ours took rows, or their text, out of the table."""
    rows = (commit.state.record.get("rows") or {}) if commit.state else {}
    return commit.operation != "MERGE" or bool(rows.get("deleted") or rows.get("changed"))


def _with_vector(rows: DataFrame) -> DataFrame:
    # A constraint of the table keeps one of the two NULL, and the reason is much the smaller column to read.
    return rows.where(F.col("error").isNull() & F.col("content_hash").isNotNull())


def _earlier(spark: SparkSession, ref: TableRef, fingerprint: str) -> list[DataFrame]:
    """Newest first, the last version of each stretch of history in which this encoder served and files still exist."""
    found: list[DataFrame] = []
    newer_is_own = False
    for commit in commits(spark, ref):
        if commit.state is None:
            continue
        is_own = commit.state.record.get("fingerprint") == fingerprint
        if is_own and not newer_is_own:
            rows = _readable_version(spark, ref, commit.version)
            if rows is None:
                return found
            found.append(rows)
        newer_is_own = is_own
    return found


def _readable_version(spark: SparkSession, ref: TableRef, version: int) -> DataFrame | None:
    """The rows with a vector of an earlier version; None where it cannot be read: then they are encoded again."""
    try:
        rows = _with_vector(ref.read(spark, version))
    except (PySparkException, Py4JJavaError):
        # The log no longer reaches back.
        return None
    return rows if readable(rows, "content_hash") else None
