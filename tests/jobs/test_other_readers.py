"""The published table as other engines see it, after nights that changed and deleted rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = pytest.mark.spark

Nights = Callable[..., str]
FIRST = {f"k{n:02}": f"text {n}" for n in range(40)}
SECOND = {key: text + (" anew" if key < "k05" else "") for key, text in FIRST.items() if key != "k39"}


@pytest.fixture
def nights(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> Nights:
    """Two nights, the second with changed rows and one that is gone; keywords are settings of the destination."""

    def run(**destination: Any) -> str:
        for texts in (FIRST, SECOND):
            write_rows([{"id": key, "body": text} for key, text in texts.items()])
            embed(spark, load_run(run_file(destination={"path": "out/docs", **destination})))
        return str(tmp_path / "out" / "docs")

    return run


def require_second(table: pa.Table) -> None:
    rows = {row["id"]: row for row in table.to_pylist()}
    assert {key: row["text"] for key, row in rows.items()} == SECOND
    assert table.num_rows == len(SECOND)
    for key, text in SECOND.items():
        np.testing.assert_array_equal(np.float32(rows[key]["embedding"]), hash_vectors([text], 8)[0])


def test_delta_rs_reads_a_table_with_deletion_vectors_by_its_query_engine(nights: Nights) -> None:
    table = DeltaTable(nights())
    assert "deletionVectors" in (table.protocol().reader_features or [])

    query = QueryBuilder().register("docs", table).execute("SELECT id, text, embedding FROM docs")

    require_second(pa.table(query.read_all()))


def test_without_deletion_vectors_pyarrow_pandas_and_polars_read_it(nights: Nights) -> None:
    path = nights(deletion_vectors=False)
    columns = ["id", "text", "embedding"]

    require_second(DeltaTable(path).to_pyarrow_table(columns=columns))
    require_second(pa.Table.from_pandas(DeltaTable(path).to_pandas(columns=columns)))
    files = pd.concat([pd.read_parquet(file, columns=columns) for file in DeltaTable(path).file_uris()])
    require_second(pa.Table.from_pandas(files))
    require_second(polars.read_delta(path, columns=columns).to_arrow())


def test_the_change_feed_says_which_vectors_a_store_must_upsert_and_which_it_must_drop(
    spark: SparkSession, nights: Nights
) -> None:
    path = nights(change_feed=True)

    feed = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", 1).load(path)
    store = {key: hash_vectors([text], 8)[0] for key, text in FIRST.items()}
    changes = feed.select("id", "embedding", "_change_type").collect()
    for change in changes:
        if change["_change_type"] == "delete":
            del store[change["id"]]
    for change in changes:
        if change["_change_type"] in ("insert", "update_postimage"):
            store[change["id"]] = np.float32(change["embedding"])

    assert len(changes) == 2 * 5 + 1, "rows that did not change are in the feed"
    assert set(store) == set(SECOND)
    for key, text in SECOND.items():
        np.testing.assert_array_equal(store[key], hash_vectors([text], 8)[0])
