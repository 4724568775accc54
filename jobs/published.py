"""What the published table says of itself: its encoder, the newest state of ours in its history, commits by others."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import DestinationError, first_line
from shoal.jobs.cells import INDEX_PROPERTY, Index
from shoal.jobs.filesystem import local_path
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import SIDECAR_PROPERTY, TableRef, is_delta
from shoal.jobs.mounted_files import open_files
from shoal.jobs.remote import without_java

FORMAT = 1
FORMAT_PROPERTY = "shoal.format"
TABLE_ID_PROPERTY = "shoal.table_id"
FINGERPRINT_PROPERTY = "shoal.fingerprint"
ENCODER_PROPERTY = "shoal.encoder"
KEYS_PROPERTY = "shoal.keys"
METADATA_PROPERTY = "shoal.metadata"
LEXICAL_PROPERTY = "shoal.lexical"

TERMS = "bm25_terms"
"""The column of a table with terms: those of each chunk's text in their order, NULL where it has no text."""

USER_METADATA = "spark.databricks.delta.commitInfo.userMetadata"
"""The session setting that SQL commands, and a table's first write, take their commit's metadata from."""

HASHES = ("content_hash", "row_hash", "meta_hash")

# Commits that move bytes but change no row: a plan made before them still holds.
WITHOUT_DATA_CHANGE = frozenset(
    {"OPTIMIZE", "REORG", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "UNSET TBLPROPERTIES"}
)


@dataclass(frozen=True)
class State:
    """What one commit of ours recorded: `record` is the run's summary, as in `shoal embed --json`."""

    run_id: str
    generation: int
    record: dict[str, Any]

    def to_user_metadata(self) -> str:
        body = {"format": FORMAT, "run_id": self.run_id, "generation": self.generation, "record": self.record}
        return json.dumps({"shoal": body}, separators=(",", ":"), sort_keys=True)


@dataclass(frozen=True)
class Commit:
    """One entry of the table's history; `state` only where the commit is ours."""

    version: int
    timestamp: Any
    operation: str
    user: str | None
    state: State | None


@dataclass(frozen=True)
class Published:
    """A published table at its head version."""

    ref: TableRef
    version: int
    properties: Mapping[str, str]
    description: str | None
    location: str
    """Folder of the table, with its scheme, whatever it was named by."""
    head: Commit
    ours: Commit | None
    """The newest commit of ours, at or below the head."""
    foreign: tuple[Commit, ...]
    """Commits by others since ours, newest first, those without data change left out."""

    @property
    def table_id(self) -> str:
        return self.properties[TABLE_ID_PROPERTY]

    @property
    def fingerprint(self) -> str:
        return self.properties[FINGERPRINT_PROPERTY]

    @property
    def encoder(self) -> dict[str, Any]:
        """`identity`, `reference`, `revision`, `backend` and `settings` of the encoder whose vectors these are."""
        return json.loads(self.properties[ENCODER_PROPERTY])

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(json.loads(self.properties[KEYS_PROPERTY]))

    @property
    def metadata(self) -> tuple[str, ...]:
        return tuple(json.loads(self.properties[METADATA_PROPERTY]))

    @property
    def lexical(self) -> str | None:
        """What the terms of the rows were cut by, as `describe_terms` says it; None for a table without terms."""
        return self.properties.get(LEXICAL_PROPERTY)

    @property
    def index(self) -> Index | None:
        """The build whose cells the rows are in, None for a table without an index."""
        found = self.properties.get(INDEX_PROPERTY)
        return Index.from_property(found) if found else None

    @property
    def generation(self) -> int:
        return self.ours.state.generation if self.ours and self.ours.state else 0

    def rows(self, spark: SparkSession) -> DataFrame:
        """The published rows as of the version described here, whatever is committed meanwhile."""
        return self.ref.read(spark, self.version)

    def ours_rows(self, spark: SparkSession) -> DataFrame | None:
        """The rows as our newest commit left them, where others have written since and these can still be read."""
        if not self.foreign or self.ours is None or self.ours.state is None:
            return None
        if self.ours.state.record.get("fingerprint") != self.fingerprint:
            return None
        try:
            rows = self.ref.read(spark, self.ours.version)
        except (PySparkException, Py4JJavaError):
            return None
        return rows if readable(rows, *HASHES) else None

    def changed_by_others(self, spark: SparkSession) -> bool:
        """Whether rows are not as our newest commit left them, as far as that can be told; else whoever commits may go
        on. Costs two passes over the table where others have written, and nothing elsewhere.
        """
        if not self.foreign:
            return False
        before = self.ours_rows(spark)
        return before is None or not keys_that_differ(self.rows(spark), before, self.keys).isEmpty()

    def trusted_rows(self, spark: SparkSession) -> DataFrame:
        """As `rows`; but what others changed since our newest commit has no hashes, and so is made anew by a run.

        Costs two passes over the table where others have written, and nothing elsewhere.
        """
        rows, before = self.rows(spark), self.ours_rows(spark)
        if before is None:
            return rows
        changed = keys_that_differ(rows, before, self.keys).withColumn("__changed", F.lit(True))
        marked = rows.join(changed, on=list(self.keys), how="left")
        hashes = {name: F.when(F.col("__changed").isNull(), F.col(name)) for name in HASHES}
        return marked.withColumns(hashes).select(*[quoted(name) for name in rows.columns])


def readable(rows: DataFrame, *columns: str) -> bool:
    """Whether these columns of all rows can be read: files may be lost, or vacuumed away under an earlier version."""
    try:
        # Not by a "noop" write, which Delta refuses for a table with deletion vectors.
        rows.agg(F.bit_xor(F.xxhash64(*columns))).collect()
    except (PySparkException, Py4JJavaError):
        return False
    return True


def keys_that_differ(rows: DataFrame, before: DataFrame, keys: Sequence[str]) -> DataFrame:
    """The keys, each once, whose chunks in `rows` are not exactly those in `before`; of absent ones too.

    Compared are the columns that both have. Maps have no hash in Spark: a change in maps alone is not seen.
    """
    old = {(field.name, field.dataType) for field in before.schema.fields}
    both = [field for field in rows.schema.fields if (field.name, field.dataType) in old]
    content = F.xxhash64(*[quoted(field.name) for field in both if "map<" not in field.dataType.simpleString()])
    named = [quoted(key) for key in keys]
    chunks = F.struct(F.count(F.lit(1)), F.bit_xor(content))
    now = rows.groupBy(*named).agg(chunks.alias("__now"))
    was = before.groupBy(*named).agg(chunks.alias("__was"))
    return (
        now.join(was, on=list(keys), how="full_outer").where(~F.col("__now").eqNullSafe(F.col("__was"))).select(*named)
    )


def exists(spark: SparkSession, ref: TableRef) -> bool:
    """Whether there is a table at all; DestinationError when something else stands in its place."""
    if ref.name:
        there = bool(spark.catalog.tableExists(ref.sql))
        if not there and ref.location and is_delta(spark, ref.location):
            raise DestinationError(
                f"destination.path '{ref.location}': there is a table there that the catalog does not know as "
                f"'{ref.name}'; tell it by CREATE TABLE {ref.sql} USING delta LOCATION '{ref.location}', or name "
                "another folder",
                code="TABLE_NOT_REGISTERED",
            )
        return there
    if is_delta(spark, ref.path or ""):
        return True
    path = ref.path or ""
    # Delta itself refuses a folder with something in it, where nobody can look before.
    can_look = not without_java(spark) or local_path(path) is not None
    if can_look and open_files(spark, path).is_occupied(path):
        raise DestinationError(
            f"destination.path '{ref.path}': there is something there that is no Delta table; "
            f"name an empty or a new folder",
            code="TABLE_NOT_OURS",
        )
    return False


def read_published(spark: SparkSession, ref: TableRef) -> Published | None:
    """The table's present state, None when there is no table yet.

    Raises DestinationError when a table is there but is not one of Shoal's.
    """
    if not exists(spark, ref):
        return None
    try:
        detail = spark.sql(f"DESCRIBE DETAIL {ref.sql}").collect()[0]
    except (AnalysisException, Py4JJavaError) as error:
        raise DestinationError(
            f"destination '{ref}' cannot be read as a Delta table: {first_line(error)}",
            code="TABLE_UNREADABLE",
        ) from error
    properties = dict(detail["properties"] or {})
    if FORMAT_PROPERTY not in properties:
        raise DestinationError(
            f"destination '{ref}' is not a Shoal table (no property {FORMAT_PROPERTY}): Shoal never overwrites a table "
            f"that it did not make; name another destination",
            code="TABLE_NOT_OURS",
        )
    if int(properties[FORMAT_PROPERTY]) > FORMAT:
        raise DestinationError(
            f"destination '{ref}' has the table format {properties[FORMAT_PROPERTY]} and this Shoal reads up to "
            f"{FORMAT}; upgrade Shoal",
            code="TABLE_FORMAT_NEWER",
        )
    if ref.location and _qualified(spark, detail["location"]) != _qualified(spark, ref.location):
        raise DestinationError(
            f"destination: the catalog has '{ref.name}' in {detail['location']}, and destination.path is "
            f"'{ref.location}'; leave destination.path out, or name another table",
            code="TABLE_ELSEWHERE",
        )
    ref = replace(ref, sidecar=properties.get(SIDECAR_PROPERTY, ref.sidecar))
    since: list[Commit] = []
    ours = None
    for commit in commits(spark, ref):
        since.append(commit)
        if commit.state is not None:
            ours = commit
            break
    foreign = tuple(c for c in since if c.state is None and c.operation not in WITHOUT_DATA_CHANGE)
    return Published(
        ref, since[0].version, properties, detail["description"], detail["location"], since[0], ours, foreign
    )


def _qualified(spark: SparkSession, path: str) -> str:
    if without_java(spark) and local_path(path) is None:
        return path.rstrip("/")
    return open_files(spark, path).qualified(path)


def read_settled(spark: SparkSession, ref: TableRef) -> Published:
    """The table, read until no commit came in between: properties and version then belong together.

    Raises DestinationError when there is no such table.
    """
    while True:
        published = read_published(spark, ref)
        if published is None:
            raise DestinationError(
                f"table '{ref}': there is no such table; `shoal embed` makes one", code="TABLE_NOT_FOUND"
            )
        if is_head(spark, published):
            return published


def is_head(spark: SparkSession, published: Published | None) -> bool:
    """Whether nobody has committed to the table since it was read."""
    return published is not None and next(commits(spark, published.ref)).version == published.version


def commits(spark: SparkSession, ref: TableRef) -> Iterator[Commit]:
    """The history newest first, read a few entries at a time so that a long one costs little."""
    size, seen = 8, 0
    while True:
        history = spark.sql(f"DESCRIBE HISTORY {ref.sql} LIMIT {size}")
        rows = history.select("version", "timestamp", "operation", "userName", "userMetadata").collect()
        for row in rows[seen:]:
            yield Commit(
                row["version"], row["timestamp"], row["operation"], row["userName"], _state(row["userMetadata"])
            )
        if len(rows) < size or rows[-1]["version"] == 0:
            return
        size, seen = size * 8, len(rows)


def _state(user_metadata: str | None) -> State | None:
    if not user_metadata or '"shoal"' not in user_metadata:
        return None
    try:
        body = json.loads(user_metadata)["shoal"]
        return State(body["run_id"], int(body["generation"]), body["record"])
    except (ValueError, KeyError, TypeError):
        return None
