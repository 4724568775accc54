"""A published table as SQL serves it: one version, with the encoder that made the vectors of exactly this version."""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from pyspark.sql import SparkSession

from shoal.conf.errors import ShoalError
from shoal.conf.fingerprint import digest
from shoal.conf.run import EncoderConfig
from shoal.jobs.cells import FRESH, Index, cell_sizes, damaged, read_build
from shoal.jobs.filesystem import FileStamp, FileSystem, join
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import TableRef, table_named
from shoal.jobs.prepare import encoder_of
from shoal.jobs.published import TERMS, Published, read_settled
from shoal.udfs.query_udf import QueryEncoder

LOG_FILE = "_delta_log/{version:020d}.json"


@dataclass(frozen=True)
class Column:
    """A column that hits carry along: its name and its type as SQL writes it."""

    name: str
    type: str


@dataclass(frozen=True)
class ServedIndex:
    """The build that the rows of one version are in, and what its cells hold at least."""

    made: Index
    centroids_CD: npt.NDArray[np.float32] = field(repr=False, compare=False)
    enough: tuple[tuple[int, int], ...]
    """(chunks, cells): any so many cells hold so many chunks or more; a step for each power of two."""
    longest: int
    """Chunks of the longest row at most: all of them may be in one cell."""

    @property
    def enough_rows(self) -> tuple[tuple[int, int], ...]:
        """(rows, cells): as `enough`, for rows of the source."""
        return tuple((chunks // self.longest, cells) for chunks, cells in self.enough)


@dataclass(frozen=True)
class ServedTable:
    """What the functions of one table are made from; all of it belongs to `version`.

    encoder: None where it cannot be had, and `problem` says why, beginning with the error's code in brackets.
    """

    name: str
    ref: TableRef
    location: str
    version: int
    stamp: FileStamp | None
    keys: tuple[Column, ...]
    metadata: tuple[Column, ...]
    has_text: bool
    dim: int
    bytes: int
    """Of the files of this version."""
    encoder: QueryEncoder | None
    lexical: str | None = None
    """What the terms of the rows were cut by, None for a table without terms."""
    problem: str | None = None
    index: ServedIndex | None = None
    index_problem: str | None = None
    """Why a table with an index is searched exactly."""

    @property
    def relation(self) -> str:
        """How SQL names this version of the table.

        By its folder where the session's own catalog has it: a name may mean another folder later on.
        """
        is_of_session = self.ref.name is None or self.ref.name.startswith("spark_catalog.")
        return f"{f'delta.{quoted(self.location)}' if is_of_session else self.ref.sql} VERSION AS OF {self.version}"

    @property
    def cells_key(self) -> str:
        """The name under which `shoal_cells` knows the build of this version."""
        return f"{self.name}@{self.index.made.build}" if self.index else ""

    @property
    def encoder_key(self) -> str:
        """The name under which `shoal_embed` knows the encoder of this version, whatever the table's is by then."""
        if self.encoder is None:
            return self.name
        spec = self.encoder.spec
        return f"{self.name}@{digest([spec.fingerprint, spec.query_prompt, spec.folder, spec.backend])[:16]}"


def read_served(spark: SparkSession, name: str, table: str) -> ServedTable:
    """The table's newest version with its own encoder, never the properties of one version with the rows of another.

    Raises DestinationError when there is no such table. An encoder that cannot be had is no error here: whoever asks
    for it in SQL gets the reason.
    """
    ref = _qualified(spark, table_named(spark, table))
    published = read_settled(spark, ref)
    rows = published.rows(spark)._jdf
    fields = rows.schema().fields()
    types = {field.name(): field.dataType().sql() for field in fields}
    encoder, problem = _encoder(published)
    index, index_problem = _index(spark, published)
    return ServedTable(
        name=name,
        ref=ref,
        location=published.location,
        version=published.version,
        stamp=FileSystem(spark, published.location).stamp(_log_file(published.location, published.version)),
        keys=tuple(Column(key, types[key]) for key in published.keys),
        metadata=tuple(Column(column, types[column]) for column in published.metadata),
        has_text="text" in types,
        dim=int(published.encoder["identity"]["dim"]),
        bytes=int(rows.queryExecution().optimizedPlan().stats().sizeInBytes()),
        encoder=encoder,
        lexical=published.lexical if TERMS in types else None,
        problem=problem,
        index=index,
        index_problem=index_problem,
    )


def has_moved(spark: SparkSession, served: ServedTable) -> bool:
    """Whether the table has a newer version, or its folder is another table's by now: two look-ups in its log."""
    files = FileSystem(spark, served.location)
    return (
        files.exists(_log_file(served.location, served.version + 1))
        or files.stamp(_log_file(served.location, served.version)) != served.stamp
    )


def has_been_moved(spark: SparkSession, served: ServedTable) -> bool:
    """Whether the table's name means another folder by now, or none: a query of the catalog."""
    if served.ref.name is None:
        return False
    return bool(spark.sql(f"DESCRIBE DETAIL {served.ref.sql}").collect()[0]["location"] != served.location)


def _index(spark: SparkSession, published: Published) -> tuple[ServedIndex | None, str | None]:
    made = published.index
    if made is None:
        return None, None
    centroids_CD = read_build(spark, published.ref, made.build)
    if centroids_CD is None or len(centroids_CD) != made.cells:
        error = damaged(published.ref, made)
        return None, f"[{error.code}] {error}"
    sizes = cell_sizes(spark, published.ref.sql)
    longest = 1 + max((size.last_chunk for size in sizes.values()), default=0)
    cells = sorted(size.rows for cell, size in sizes.items() if cell is not None and cell != FRESH)
    held = np.cumsum([0] * (made.cells - len(cells)) + cells)
    steps = sorted({min(2**power, made.cells) for power in range(made.cells.bit_length() + 1)})
    enough = tuple((int(held[number - 1]), number) for number in steps)
    return ServedIndex(made, centroids_CD, enough, longest), None


def _encoder(published: Published) -> tuple[QueryEncoder | None, str | None]:
    try:
        return QueryEncoder(encoder_of(published), EncoderConfig.model_validate(published.encoder["settings"])), None
    except ShoalError as error:
        return None, f"[{error.code}] {error}"
    except (OSError, ValueError) as error:  # files that cannot be read now, settings of a Shoal to come
        return None, f"[MODEL_UNUSABLE] the table's encoder cannot be loaded: {error}"


def _log_file(location: str, version: int) -> str:
    return join(location, LOG_FILE.format(version=version))


def _qualified(spark: SparkSession, ref: TableRef) -> TableRef:
    """A name with its catalog and schema: a client's USE changes what a shorter one means."""
    if ref.name is None:
        return ref
    parts = ref.name.split(".")
    if len(parts) == 1:
        parts = [spark.catalog.currentDatabase(), *parts]
    if len(parts) == 2:
        parts = [spark.catalog.currentCatalog(), *parts]
    return replace(ref, name=".".join(parts))
