"""A published table of vectors in clusters, for the bench of search: nothing is encoded, rows are published as made.

Row `id` lies near a centre, and so do queries. The columns of NAMES hold 1 for so many rows in a thousand: `u..` at
random, `c..` for whole clusters, so that a filter cuts across the cells of an index or along them.

Axes: N rows, Q queries, D elements.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.run import DestinationConfig, EncoderConfig
from shoal.jobs.bookkeeping import Bookkeeper, new_run_id
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import TableRef, table_named
from shoal.jobs.planner import ACTION, CHANGED, NEW, RowCounts, RowPlan
from shoal.jobs.prepare import Encoding
from shoal.jobs.publish import Target, new_table_id, publish_merge, publish_replace
from shoal.jobs.published import Published, State, read_settled
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.vectors import to_list_array

PER_MILLE = (500, 100, 10, 1)
NAMES = tuple(f"{kind}{share}" for kind in "uc" for share in PER_MILLE)

QUERY_SALT = 0
"""Nights have others, so that no query is a row."""

FLAG_SALT = 10**9
BLOCK_ROWS = 2000

ROWS_PER_CLUSTER = 500
SPREAD = 0.9
"""Length of what is added at random to a centre of length 1: neighbours of a row are in its cluster, but not all."""


@dataclass
class SyntheticVectors:
    """`rows` vectors of `dim` numbers in a table at `path`."""

    spark: SparkSession
    path: str
    rows: int
    dim: int
    spec: EncoderSpec
    settings: EncoderConfig
    generation: int = 0
    centres_CD: npt.NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        number = max(8, self.rows // ROWS_PER_CLUSTER)
        centres_CD = np.random.default_rng(0).standard_normal((number, self.dim))
        self.centres_CD = (centres_CD / np.linalg.norm(centres_CD, axis=1, keepdims=True)).astype(np.float32)

    @property
    def ref(self) -> TableRef:
        return table_named(self.spark, self.path)

    def queries(self, number: int) -> npt.NDArray[np.float32]:
        """Vectors float32 (Q, D) that lie as rows do, and are none of them."""
        return near(self.centres_CD, np.arange(number), QUERY_SALT)[0]

    def publish(self) -> None:
        """The first publication: all rows."""
        Bookkeeper(self.spark, self.ref, lambda _: None).create()
        content = self._content(self.spark.range(0, self.rows, 1, max(4, self.rows // 100_000)), salt=1)
        target = Target(self.ref, None, new_table_id(), 1)
        encoder = Encoding(self.settings, self.spec, None).described("")
        settings, plan = DestinationConfig(path=self.path), self._plan(content, NEW)
        publish_replace(self.spark, target, settings, plan, content, self.spec, encoder, self._state())

    def night(self, share: float, salt: int) -> None:
        """One MERGE that gives so large a share of the rows, at random, other vectors."""
        ids = self.spark.range(0, self.rows, 1, 4)
        chosen = ids.where(F.pmod(F.xxhash64("id", F.lit(salt)), F.lit(1_000_000)) < int(share * 1_000_000))
        content = self._content(chosen, salt).localCheckpoint()
        before = self.published()
        target = Target(self.ref, before, before.table_id, before.generation + 1)
        publish_merge(self.spark, target, self._plan(content, CHANGED), content, self._state(before.generation + 1))

    def published(self) -> Published:
        return read_settled(self.spark, self.ref)

    def _state(self, generation: int = 1) -> State:
        run_id = new_run_id()
        rows = {"source": self.rows}
        record = {"run_id": run_id, "status": "published", "fingerprint": self.spec.fingerprint, "rows": rows}
        return State(run_id, generation, record)

    def _plan(self, content: DataFrame, action: str) -> RowPlan:
        rows = content.select("id", *NAMES).withColumn(ACTION, F.lit(action))
        return RowPlan(rows, RowCounts(source=self.rows), ("id",), NAMES)

    def _content(self, ids: DataFrame, salt: int) -> DataFrame:
        centres_CD = self.centres_CD

        def blocks(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                ids_N = batch.column(0).to_numpy()
                vectors_ND, cluster_N, drawn_N = near(centres_CD, ids_N, salt)
                along_N = cluster_N * 1000 // len(centres_CD)
                flags = [(drawn_N < share) for share in PER_MILLE] + [(along_N < share) for share in PER_MILLE]
                yield pa.RecordBatch.from_arrays(
                    [
                        batch.column(0),
                        to_list_array(vectors_ND, np.ones(len(ids_N), dtype=np.bool_)),
                        *[pa.array(flag.astype(np.int32)) for flag in flags],
                    ],
                    names=["id", "embedding", *NAMES],
                )

        made = ids.mapInArrow(blocks, f"id long, embedding array<float>, {', '.join(f'{name} int' for name in NAMES)}")
        hashed = F.sha2(F.concat_ws("/", F.lit(str(salt)), F.col("id")), 256)
        return made.select(
            "id",
            F.lit(0).alias("chunk_index"),
            F.lit(0).alias("chunk_start"),
            F.lit(0).alias("chunk_end"),
            *[F.unhex(F.substring(hashed, 1, 32)).alias(name) for name in ("content_hash", "row_hash", "meta_hash")],
            "embedding",
            F.lit(1).alias("n_tokens"),
            F.lit(False).alias("truncated"),
            F.lit(None).cast("string").alias("error"),
            F.current_timestamp().alias("embedded_at"),
            *[quoted(name) for name in NAMES],
        )


def near(
    centres_CD: npt.NDArray[np.float32], ids_N: npt.NDArray[np.int64], salt: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Unit vectors float32 (N, D), the number of each one's centre, and a number below 1000 drawn for each row.

    The same for the same arguments, one row or many: they are drawn in whole blocks of BLOCK_ROWS.
    """
    num_rows, dim = len(ids_N), centres_CD.shape[1]
    vectors_ND, cluster_N = np.empty((num_rows, dim), np.float32), np.empty(num_rows, np.int64)
    drawn_N = np.empty(num_rows, np.int64)
    block_N = ids_N // BLOCK_ROWS
    for block in np.unique(block_N):
        chosen_N = block_N == block
        rows = ids_N[chosen_N] % BLOCK_ROWS
        drawn_N[chosen_N] = np.random.default_rng((FLAG_SALT, int(block))).integers(1000, size=BLOCK_ROWS)[rows]
        random = np.random.default_rng((salt, int(block)))
        cluster_N[chosen_N] = random.integers(len(centres_CD), size=BLOCK_ROWS)[rows]
        vectors_ND[chosen_N] = random.standard_normal((BLOCK_ROWS, dim), dtype=np.float32)[rows]
    vectors_ND = centres_CD[cluster_N] + vectors_ND * np.float32(SPREAD / np.sqrt(dim))
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True), cluster_N, drawn_N
