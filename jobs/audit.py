"""`shoal audit`: what foreign writers, lost files and bit rot did to a published table, and what repairs it.

    log -> files -> rows -> chunks -> a sample of vectors, encoded again -> staging

Reads one version of the table and changes nothing, so it takes no lease and may run beside a run.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import CODES, ConfigError, DestinationError, ShoalError
from shoal.conf.fingerprint import digest
from shoal.jobs.canary_store import load_probe
from shoal.jobs.cells import CELL, FRESH, read_build
from shoal.jobs.encoder_tasks import encoder_tasks, map_encoders
from shoal.jobs.hashing import HASH_BYTES, columns_hash, content_hash, quoted
from shoal.jobs.layout import TableRef, is_delta, read_delta, table_named
from shoal.jobs.prepare import encoder_of, worker_error
from shoal.jobs.publish import missing_constraints
from shoal.jobs.published import TERMS, Published, commits, exists, read_published
from shoal.jobs.report import plain
from shoal.jobs.session import with_settings
from shoal.udfs import reasons
from shoal.udfs.encode_udf import make_encode
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.schema import ENCODE_INPUT_DDL, ENCODE_OUTPUT_DDL
from shoal.udfs.vectors import cosines

EXAMPLES = 3
SAMPLE, MAX_SAMPLE = 256, 10_000

# Lowest cosine of a stored vector with one of the same text made now, and highest difference of their lengths: wider
# than between two batches, far closer than between two texts.
MIN_COSINE = {"float32": 1 - 1e-4, "bfloat16": 0.999, "float16": 0.999}
MAX_LENGTH_DIFFERENCE = 1e-2
MAX_UNIT_DIFFERENCE = 1e-3

FIXED_COLUMNS = ("chunk_index", "content_hash", "row_hash", "meta_hash", "embedding", "error")

_VERIFY_PAGES = "parquet.page.verify-checksum.enabled"
_FILE = re.compile(r"[^\s'\",;=]+\.(?:parquet|bin)\b")


@dataclass(frozen=True)
class Finding:
    """One kind of damage: how many files, rows, commits or vectors, up to three of them, and what repairs it."""

    code: str
    count: int
    examples: tuple[Any, ...]
    repair: str

    def public(self) -> dict[str, Any]:
        return {**asdict(self), "examples": list(self.examples), "what": CODES[self.code]}


@dataclass
class Audit:
    """What was looked at and what was found; `not_checked` says what could not be looked at, and why."""

    table: str
    version: int | None = None
    rows: int | None = None
    vectors: int | None = None
    sampled: int = 0
    seed: int = 0
    """Chooses the sample: the same seed finds the same rows again."""
    findings: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.findings

    def public(self) -> dict[str, Any]:
        """The document that `shoal audit --json` prints."""
        found = [finding.public() for finding in self.findings]
        return {"status": "clean" if self.is_clean else "damaged", **vars(self), "findings": found}


def audit(spark: SparkSession, table: str, *, sample: int = SAMPLE, seed: int | None = None) -> Audit:
    """Looks through the whole table; of the vectors it encodes `sample` anew, others with each seed (unset: any).

    Raises DestinationError when there is no such table or it was never one of Shoal's, ConfigError for a sample that is
    negative or above MAX_SAMPLE.
    """
    if not 0 <= sample <= MAX_SAMPLE:
        raise ConfigError(f"--sample is {sample}; it is a number of vectors between 0 and {MAX_SAMPLE}")
    ref = table_named(spark, table)
    if not exists(spark, ref):
        raise DestinationError(
            f"table '{table}': there is no such table; name a path or a catalog name", code="TABLE_NOT_FOUND"
        )
    done = Audit(str(ref), seed=random.getrandbits(31) if seed is None else seed)
    try:
        published = read_published(spark, ref)
    except DestinationError as error:
        if error.code != "TABLE_NOT_OURS":
            raise
        # A foreign replace takes the properties with it; the log knows better.
        if (was := _last_of_ours(spark, ref)) is None:
            raise
        done.findings.append(Finding("PROPERTIES_DAMAGED", 1, (str(error),), _put_back(ref, was)))
        done.not_checked.append("rows: the properties that say what they are made of are gone")
        return done
    assert published is not None  # noqa: S101 - it exists
    done.version = published.version
    _Auditing(spark, published, done, sample).go()
    return done


def lines(done: Audit) -> list[str]:
    """The audit for people: a paragraph per finding."""
    told = [
        f"{done.table} version {done.version}: {_number(done.rows)} rows, {_number(done.vectors)} vectors",
        f"{done.sampled:,} vectors made again and compared (seed {done.seed})",
    ]
    for finding in done.findings:
        told += [f"{finding.code}  {CODES[finding.code]}: {finding.count:,}"]
        told += [f"    {example if isinstance(example, str) else _keys(example)}" for example in finding.examples]
        told += [f"    repair: {finding.repair}"]
    told += [f"not checked: {what}" for what in done.not_checked]
    if done.is_clean:
        told.append("nothing was found")
    return told


def _keys(example: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in example.items())


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


@dataclass
class _Auditing:
    spark: SparkSession
    published: Published
    done: Audit
    sample: int

    def __post_init__(self) -> None:
        published = self.published
        self.ref = published.ref
        anew = "`shoal embed FILE --full-refresh` writes every row and encodes every text anew"
        night = f"`shoal embed FILE` compares with version {self._ours}, and writes anew what others changed"
        # Without a foreign commit a night has nothing to compare with, and would believe the hashes.
        self.repair = night if published.foreign and published.ours else anew
        self.anew = anew

    def go(self) -> None:
        self._log()
        problems = list(broken_properties(self.spark, self.published))
        if problems:
            self._find("PROPERTIES_DAMAGED", len(problems), problems, _put_back(self.ref, self._ours))
            self.done.not_checked.append("rows: the properties that say what they are made of are damaged")
            return
        self._constraints()
        if not self._files():
            self._foreign(is_known=False)
        else:
            try:
                with with_settings(self.spark, {_VERIFY_PAGES: "true"}):
                    rows = self.published.rows(self.spark)
                    self._foreign(is_known=True)
                    self._rows(rows)
                    self._chunks(rows)
                    self._index(rows)
                    self._vectors(rows)
            except (PySparkException, Py4JJavaError) as error:
                self._damaged_file(error)
        self._staging()

    @property
    def _ours(self) -> int | None:
        return self.published.ours.version if self.published.ours else None

    @property
    def _dim(self) -> int:
        return int(self.published.encoder["identity"]["dim"])

    def _find(self, code: str, count: int, examples: Sequence[Any], repair: str) -> None:
        self.done.findings.append(Finding(code, count, tuple(examples[:EXAMPLES]), repair))

    def _log(self) -> None:
        published = self.published
        since = published.version - self._ours if self._ours is not None else None
        history = self.spark.sql(f"DESCRIBE HISTORY {self.ref.sql}" + ("" if since is None else f" LIMIT {since + 1}"))
        bad = history.where(F.col("userMetadata").contains('"shoal"'))
        if self._ours is not None:
            bad = bad.where(F.col("version") > self._ours)
        told = [f"version {row['version']}" for row in bad.select("version").orderBy(F.desc("version")).collect()]
        if told or published.ours is None:
            self._find("STATE_UNREADABLE", max(1, len(told)), told, self.anew)

    def _foreign(self, *, is_known: bool) -> None:
        """Commits by others, unless every row is as our newest commit left it, as after a RESTORE."""
        published = self.published
        if not published.foreign or (is_known and not published.changed_by_others(self.spark)):
            return
        told = [f"version {c.version}: {c.operation} by {c.user or 'unknown'}" for c in published.foreign]
        back = "" if self._ours is None else f"; `shoal restore {self.ref} --to {self._ours}` undoes it"
        self._find("FOREIGN_COMMITS", len(told), told, f"{self.repair}{back}")

    def _constraints(self) -> None:
        if gone := missing_constraints(self.published.properties, self._dim):
            repair = "`shoal embed FILE` writes the table anew, with the vectors that others have not touched"
            self._find("CONSTRAINTS_MISSING", len(gone), gone, repair)

    def _files(self) -> bool:
        """Whether every data file is there."""
        location = self.spark.sql(f"DESCRIBE DETAIL {self.ref.sql}").select("location").collect()[0][0]
        name = F.regexp_extract("path", r"([^/]+)$", 1)
        there = self.spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(location)
        listed = [(path.rpartition("/")[2],) for path in self.published.rows(self.spark).inputFiles()]
        wanted = self.spark.createDataFrame(listed, "name string").distinct()
        gone = wanted.join(there.select(name.alias("name")), on="name", how="left_anti").orderBy("name")
        count = gone.count()
        if count:
            shown = [row["name"] for row in gone.limit(EXAMPLES).collect()]
            self._find(
                "FILES_MISSING", count, shown, f"put them back from a copy of {location}; without one, {self.anew}"
            )
            self.done.not_checked.append("rows: files that hold them are missing")
        return not count

    def _damaged_file(self, error: PySparkException | Py4JJavaError) -> None:
        named = _FILE.search(str(error))
        if named is None:
            raise worker_error(error) from error
        self._find(
            "FILES_DAMAGED",
            1,
            [named[0].rpartition("/")[2]],
            f"put it back from a copy of the table; without one, {self.anew}",
        )
        self.done.not_checked.append("rows: not all of them can be read")

    def _rows(self, rows: DataFrame) -> None:
        """One pass over everything: what a row alone shows."""
        checks = row_checks(rows, self.published, self._dim)
        counts = rows.agg(
            F.count(F.lit(1)).alias("rows"),
            F.count("embedding").alias("vectors"),
            *[F.count_if(F.coalesce(check, F.lit(False))).alias(code) for code, check in checks.items()],
        ).collect()[0]
        self.done.rows, self.done.vectors = counts["rows"], counts["vectors"]
        for code, check in checks.items():
            if counts[code]:
                by = [*self.published.keys, "chunk_index"]
                self._find(code, counts[code], self._shown(rows.where(check), by), self.repair)

    def _chunks(self, rows: DataFrame) -> None:
        """A row's chunks are numbered from 0, each is there once, and all are cut from one text."""
        keys = list(self.published.keys)
        per_row = rows.groupBy(*[quoted(key) for key in keys]).agg(
            F.count(F.lit(1)).alias("__n"),
            F.count_distinct("chunk_index").alias("__distinct"),
            F.max("chunk_index").alias("__last"),
            F.count_distinct("row_hash").alias("__texts"),
        )
        doubled = F.col("__n") > F.col("__distinct")
        gap = F.coalesce(F.col("__distinct") != F.col("__last") + 1, F.lit(True)) | (F.col("__texts") > 1)
        counts = per_row.agg(F.count_if(doubled).alias("doubled"), F.count_if(gap).alias("gap")).collect()[0]
        for code, name, check in (("CHUNKS_DOUBLED", "doubled", doubled), ("CHUNKS_MISSING", "gap", gap)):
            if counts[name]:
                self._find(code, counts[name], self._shown(per_row.where(check), keys), self.repair)

    def _index(self, rows: DataFrame) -> None:
        """Whether the centroids are there, and every row with a vector is where a search would look for it."""
        made = self.published.index
        if made is None:
            return
        repair = f"`shoal index {self.ref}` builds it anew"
        centroids_CD = read_build(self.spark, self.ref, made.build)
        if centroids_CD is None or len(centroids_CD) != made.cells:
            self._find("INDEX_DAMAGED", 1, [f"no centroids of build {made.build}"], repair)
            return
        is_placed = F.col(CELL).between(0, made.cells - 1) | (F.col(CELL) == FRESH)
        lost = rows.where(F.col("embedding").isNotNull() & ~F.coalesce(is_placed, F.lit(False)))
        if count := lost.count():
            by = [*self.published.keys, "chunk_index"]
            self._find("INDEX_DAMAGED", count, self._shown(lost, by), repair)

    def _shown(self, rows: DataFrame, by: list[str]) -> list[dict[str, Any]]:
        found = rows.select(*[quoted(name) for name in by]).limit(EXAMPLES).collect()
        return [{name: plain(value) for name, value in zip(by, row, strict=True)} for row in found]

    def _vectors(self, rows: DataFrame) -> None:
        """Encodes texts of the table again and compares; what keeps that from happening is no fault of the table."""
        if not self.sample:
            return
        if "text" not in rows.columns:
            self.done.not_checked.append("vectors: the table holds no texts to encode again (store_text: false)")
            return
        by = [*self.published.keys, "chunk_index"]
        good = rows.where(F.col("error").isNull() & F.col("text").isNotNull() & (F.size("embedding") == self._dim))
        picked = (
            good.orderBy(F.xxhash64("content_hash", F.lit(self.done.seed)), *[quoted(name) for name in by])
            .limit(self.sample)
            .select(*[quoted(name) for name in by], F.col("text").alias("__text"), F.col("embedding").alias("__vector"))
            .collect()
        )
        if not picked:
            return
        try:
            made = self._encoded([row["__text"] for row in picked])
        except ShoalError as error:
            self.done.not_checked.append(f"vectors: they could not be made again: [{error.code}] {error}")
            return
        stored_ND = np.array([row["__vector"] for row in picked], dtype=np.float32)
        self.done.sampled = len(made)
        wrong = differing(stored_ND, made, str(self.published.encoder["identity"]["precision"]))
        if wrong:
            shown = [{name: plain(picked[at][name]) for name in by} for at in wrong[:EXAMPLES]]
            self._find("VECTORS_DIFFER", len(wrong), shown, self.repair)

    def _encoded(self, texts: list[str]) -> dict[int, np.ndarray]:
        """Position -> vector of every text that the table's encoder can encode now."""
        spec = encoder_of(self.published)
        probe = load_probe(self.spark, self.ref, spec.fingerprint)
        places = [(index.to_bytes(4, "big"), text) for index, text in enumerate(texts)]
        batch = self.spark.createDataFrame(places, ENCODE_INPUT_DDL).repartition(encoder_tasks(self.spark).slots)
        encode = make_encode(spec, EncodeOptions(), probe.canaries if probe else None)
        try:
            rows = map_encoders(batch, spec, encode, ENCODE_OUTPUT_DDL).collect()
        except (PySparkException, Py4JJavaError) as error:
            raise worker_error(error) from error
        return {
            int.from_bytes(row["content_hash"], "big"): np.array(row["embedding"], dtype=np.float32)
            for row in rows
            if row["error"] is None
        }

    def _staging(self) -> None:
        if not is_delta(self.spark, self.ref.staging):
            return
        repair = f"delete the folder {self.ref.staging} while no run is alive; what was in it is encoded again"
        try:
            staged = read_delta(self.spark, self.ref.staging)
            own = F.col("fingerprint") == self.published.fingerprint
            bad = (F.octet_length("content_hash") != HASH_BYTES) | F.col("content_hash").isNull()
            bad |= F.col("embedding").isNull() == F.col("error").isNull()
            bad |= own & F.col("embedding").isNotNull() & (F.size("embedding") != self._dim)
            bad |= F.col("embedding").isNotNull() & not_finite(F.col("embedding"))
            count = staged.where(F.coalesce(bad, F.lit(False))).count()
        except (PySparkException, Py4JJavaError) as error:
            named = _FILE.search(str(error))
            self._find("STAGING_DAMAGED", 1, [named[0].rpartition("/")[2]] if named else [], repair)
            return
        if count:
            self._find("STAGING_DAMAGED", count, [], repair)


def row_checks(rows: DataFrame, published: Published, dim: int) -> dict[str, Column]:
    """Code -> what is true of a row that has this damage; NULL counts as not."""
    embedding, has_vector = F.col("embedding"), F.col("embedding").isNotNull()
    right_dim = F.size(embedding) == dim
    squares = _squares(embedding)
    if published.encoder["identity"].get("normalize"):
        wrong_length = F.abs(F.sqrt(squares) - 1) > MAX_UNIT_DIFFERENCE
    else:
        wrong_length = squares == 0
    no_hash = [F.col(name).isNull() | (F.octet_length(name) != HASH_BYTES) for name in _HASHES]
    checks = {
        "ROWS_WITHOUT_HASH": no_hash[0] | no_hash[1] | no_hash[2],
        "ROWS_UNACCOUNTED": embedding.isNull() == F.col("error").isNull(),
        "VECTORS_WRONG_DIM": has_vector & ~right_dim,
        "VECTORS_NOT_FINITE": has_vector & not_finite(embedding),
        "VECTORS_NOT_UNIT": has_vector & right_dim & ~not_finite(embedding) & wrong_length,
    }
    if "text" in rows.columns:
        # Of bytes that are not UTF-8 the table shows a mended text, and the hash is of the bytes.
        mended = F.coalesce(F.col("error") == reasons.INVALID_UTF8, F.lit(False))
        checks["TEXT_CHANGED"] = ~mended & (F.col("content_hash") != content_hash(F.col("text")))
    fields = [rows.schema[name] for name in published.metadata]
    checks["METADATA_CHANGED"] = F.col("meta_hash") != columns_hash(fields)
    return checks


_HASHES = ("content_hash", "row_hash", "meta_hash")


def not_finite(embedding: Column) -> Column:
    """Whether an array has an element that is NULL, NaN or infinite: its sum of squares tells all three."""
    squares = _squares(embedding)
    return squares.isNull() | F.isnan(squares) | (squares == float("inf"))


def _squares(embedding: Column) -> Column:
    return F.aggregate(embedding, F.lit(0.0), lambda sum_, x: sum_ + x.cast("double") * x.cast("double"))


def differing(stored_ND: np.ndarray, made: dict[int, np.ndarray], precision: str) -> list[int]:
    """Positions of the stored vectors that are not those made now, in direction or in length."""
    at = sorted(made)
    left_MD, right_MD = stored_ND[at], np.array([made[index] for index in at], dtype=np.float32)
    lengths_M, wanted_M = np.linalg.norm(left_MD, axis=1), np.linalg.norm(right_MD, axis=1)
    same_M = cosines(left_MD, right_MD) >= MIN_COSINE[precision]
    same_M &= np.abs(lengths_M - wanted_M) <= MAX_LENGTH_DIFFERENCE * wanted_M
    return [index for index, same in zip(at, same_M, strict=True) if not same]


def broken_properties(spark: SparkSession, published: Published) -> Iterator[str]:
    """What is wrong with what the table says of itself, a sentence each."""
    try:
        identity, fingerprint = published.encoder["identity"], published.fingerprint
        named = [*published.keys, *published.metadata]
        assert published.table_id  # noqa: S101 - reading it is the check
        dim = int(identity["dim"])
        ours = {*FIXED_COLUMNS, *((CELL,) if published.index else ()), *((TERMS,) if published.lexical else ())}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield f"a property of Shoal's is missing or cannot be read ({type(error).__name__}: {error})"
        return
    if digest(identity)[:32] != fingerprint:
        yield f"shoal.fingerprint is {fingerprint}, and shoal.encoder describes {digest(identity)[:32]}"
    if dim < 1:
        yield f"shoal.encoder has the dimension {dim}"
    there = set(published.rows(spark).columns)
    if gone := sorted({*named, *ours} - there):
        yield f"columns are missing: {', '.join(gone)}"


def _last_of_ours(spark: SparkSession, ref: TableRef) -> int | None:
    return next((commit.version for commit in commits(spark, ref) if commit.state is not None), None)


def _put_back(ref: TableRef, version: int | None) -> str:
    if version is None:
        return "drop the table and its folder, and make it anew with `shoal embed FILE`"
    return f"`RESTORE TABLE {ref.sql} TO VERSION AS OF {version}` in Spark SQL, then `shoal embed FILE`"
