"""`shoal export`: the vectors of a published table as Parquet files, a Lance dataset or a FAISS index."""

import importlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from shoal.conf.errors import ConfigError, DestinationError, RunError, first_line
from shoal.conf.roots import require_inside
from shoal.jobs.filesystem import FileSystem, absolute, full_disk, join, local_path
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import table_named
from shoal.jobs.published import Published, read_settled
from shoal.jobs.session import with_settings

ABOUT_FILE = "_shoal.json"
"""Beside the data: the table, its version and the encoder. Readers of Parquet pass over a name with an underscore."""

PLAIN_TIMES = {"spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS"}
"""Spark's default is a format of its own, which other readers take for other times from the year 2262 on."""

PARTS = ".parts"
BATCH_ROWS = 8192


def export(spark: SparkSession, table: str, kind: str, out: str) -> dict[str, Any]:
    """Writes all chunks of the table's newest version that have a vector, and returns the document of `--json`.

    kind: one of KINDS; out: a folder that is not there yet or is empty, local for all but Parquet. Raises
    DestinationError when there is no such table or `out` cannot be used, ConfigError when the library is missing.
    """
    began = time.monotonic()
    write = KINDS[kind]
    if kind != "parquet":
        _library(kind)  # before anything is read
    published = read_settled(spark, table_named(spark, table))
    out = absolute(out).rstrip("/")
    require_inside(out, "--out")
    if FileSystem(spark, out).is_occupied(out):
        raise DestinationError(f"--out '{out}': something is there already, and it is left as it is; name a new folder")
    everything = published.rows(spark)
    # A constraint keeps one of error and embedding NULL, and the former is much the smaller column to read.
    counts = everything.agg(F.count(F.lit(1)).alias("rows"), F.count("error").alias("errors")).collect()[0]
    num_vectors = counts["rows"] - counts["errors"]
    about = {
        "table": str(published.ref),
        "version": published.version,
        "fingerprint": published.fingerprint,
        "encoder": published.encoder["reference"],
        "identity": published.encoder["identity"],
    }
    try:
        with with_settings(spark, PLAIN_TIMES):
            written = write(_wanted(everything, published), out, about)
        if written != num_vectors:
            raise RunError(
                f"--out '{out}' has {written} of {num_vectors} chunks: the executors write to disks of their "
                "own, or another export writes there too; name a folder that all share and nobody else uses"
            )
    except (PySparkException, Py4JJavaError) as error:
        raise full_disk(error) or RunError(
            f"--out '{out}' could not be written: {first_line(error)}; remove what is there, and run it again"
        ) from error
    return {
        "status": "written",
        "kind": kind,
        "out": out,
        **about,
        "rows": written,
        "without_vector": counts["errors"],
        "bytes_written": FileSystem(spark, out).size(out),
        "seconds": round(time.monotonic() - began, 3),
    }


def lines(document: dict[str, Any]) -> list[str]:
    """The document for people."""
    left_out = f", {document['without_vector']:,} without a vector left out" if document["without_vector"] else ""
    return [
        f"{document['table']} version {document['version']}: {document['rows']:,} chunks{left_out}",
        f"written to {document['out']} as {document['kind']}: {document['bytes_written']:,} bytes",
    ]


def _wanted(rows: DataFrame, published: Published) -> DataFrame:
    columns = [*published.keys, "chunk_index", *(["text"] if "text" in rows.columns else []), *published.metadata]
    return rows.where(F.col("embedding").isNotNull()).select(*(F.col(quoted(name)) for name in columns), "embedding")


def _to_parquet(rows: DataFrame, out: str, about: Mapping[str, Any]) -> int:
    files = FileSystem(rows.sparkSession, out)
    files.delete(out)  # it is empty
    rows.write.parquet(_address(out))
    files.replace(join(out, ABOUT_FILE), json.dumps(about, indent=2) + "\n")
    return rows.sparkSession.read.schema(rows.schema).parquet(_address(out)).count()


def _to_lance(rows: DataFrame, out: str, about: Mapping[str, Any]) -> int:
    lance = _library("lance")
    dim = int(about["identity"]["dim"])

    def write(parts: pds.Dataset, folder: Path) -> int:
        place = parts.schema.get_field_index("embedding")
        schema = parts.schema.set(place, pa.field("embedding", pa.list_(pa.float32(), dim)))
        schema = schema.with_metadata({"shoal": json.dumps(about)})
        batches = (
            pa.RecordBatch.from_arrays(
                [
                    pa.FixedSizeListArray.from_arrays(pa.array(_vectors(batch, dim).ravel()), dim)
                    if nth == place
                    else column
                    for nth, column in enumerate(batch.columns)
                ],
                schema=schema,
            )
            for batch in _batches(parts)
        )
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        return int(lance.write_dataset(reader, str(folder), schema=schema).count_rows())

    return _by_this_process(rows, out, "lance", write)


def _to_faiss(rows: DataFrame, out: str, about: Mapping[str, Any]) -> int:
    faiss = _library("faiss")
    dim = int(about["identity"]["dim"])

    def write(parts: pds.Dataset, folder: Path) -> int:
        folder.mkdir()
        index = faiss.IndexFlatIP(dim)
        schema = parts.schema.remove(parts.schema.get_field_index("embedding"))
        with pq.ParquetWriter(folder / "rows.parquet", schema) as rows_of_index:
            for batch in _batches(parts):
                index.add(_vectors(batch, dim))
                rows_of_index.write_batch(batch.drop_columns(["embedding"]))
        faiss.write_index(index, str(folder / "index.faiss"))
        (folder / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n")
        return int(index.ntotal)

    return _by_this_process(rows, out, "faiss", write)


KINDS: Final[Mapping[str, Callable[[DataFrame, str, Mapping[str, Any]], int]]] = {
    "parquet": _to_parquet,
    "lance": _to_lance,
    "faiss": _to_faiss,
}


def _by_this_process(rows: DataFrame, out: str, kind: str, write: Callable[[pds.Dataset, Path], int]) -> int:
    """Has the executors write Parquet beside `out`, and this process make of it what appears at `out` when whole.

    So the driver holds a batch of rows at a time, and whatever the library holds.
    """
    folder = local_path(out)
    if folder is None:
        raise ConfigError(f"--out '{out}' is not on a disk of this machine, and {kind} is written by this process")
    beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        rows.write.parquet(_address(str(beside / PARTS)))
        schema = to_arrow_schema(rows.schema, timezone="UTC")
        written = write(pds.dataset(beside / PARTS, schema=schema, format="parquet"), beside / folder.name)
        if folder.is_dir():
            folder.rmdir()
        (beside / folder.name).rename(folder)
        return written
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _address(path: str) -> str:
    """A local path with its scheme: without one it would mean the cluster's default file system."""
    return path if local_path(path) is None or path.startswith("file:") else f"file://{path}"


def _batches(parts: pds.Dataset) -> Iterator[pa.RecordBatch]:
    return iter(parts.to_batches(batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1))


def _vectors(batch: pa.RecordBatch, dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 (N, dim); RunError where a row has another width."""
    lists = batch.column("embedding")
    if len(lists) and set(lists.value_lengths().unique().to_pylist()) != {dim}:
        raise RunError(f"column embedding has vectors of another width than {dim}; `shoal audit` names the rows")
    vectors_ND: np.ndarray[Any, np.dtype[np.float32]] = lists.flatten().to_numpy().reshape(-1, dim)
    return vectors_ND


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"--to {name} needs a library that is not installed: pip install 'shoal[{name}]'") from error
