"""`shoal search`: the chunks nearest to a text, exactly, with the query encoded by the table's own encoder."""

from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from shoal.conf.errors import ConfigError, DestinationError, EncoderChangedError
from shoal.conf.run import EncoderConfig
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import table_named
from shoal.jobs.model_source import pinned_reference, resolve_spec
from shoal.jobs.prepare import model_cache, worker_error
from shoal.jobs.published import Published, read_published
from shoal.udfs.encode_udf import make_encode
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.schema import ENCODE_INPUT_DDL, ENCODE_OUTPUT_DDL
from shoal.udfs.topk import make_topk


def search(
    spark: SparkSession, table: str, texts: list[str], k: int, *, where: str | None = None
) -> list[list[dict[str, Any]]]:
    """For each text the k best chunks among those that match `where`: key columns, chunk_index, text, score.

    The score is the inner product with the query's vector, which for normalised encoders is the cosine. Raises
    DestinationError when there is no such table, ConfigError for an empty query, a k below 1 or a broken filter,
    EncoderChangedError when the encoder that can be loaded now is not the one of the table.
    """
    if k < 1:
        raise ConfigError(f"-k is {k}; ask for at least 1 neighbour")
    if any(not text.strip() for text in texts):
        raise ConfigError("the query is blank; write what to look for")
    ref = table_named(spark, table)
    published = read_published(spark, ref)
    if published is None:
        raise DestinationError(f"table '{table}': there is no such table; `shoal embed` makes one")
    queries_QD = encode_queries(spark, encoder_of(published), texts)
    rows = published.rows(spark)
    try:
        candidates = rows.where(where) if where else rows
        located = candidates.where(F.col("embedding").isNotNull()).select(
            *[quoted(key) for key in published.keys], "chunk_index", "embedding"
        )
    except PySparkException as error:
        raise ConfigError(f"--where '{where}': {str(error).splitlines()[0]}") from error
    carried = located.drop("embedding").schema
    columns = to_arrow_schema(carried)
    by = [*published.keys, "chunk_index"]
    ddl = ", ".join(
        ["query int", "score float", *[f"{quoted(field.name)} {field.dataType.simpleString()}" for field in carried]]
    )
    try:
        best = located.mapInArrow(make_topk(queries_QD, k, by, pa.schema(columns)), ddl)
        found = best.orderBy("query", F.desc("score"), *[quoted(name) for name in by]).collect()
    except (PySparkException, Py4JJavaError) as error:
        raise worker_error(error) from error
    answers: list[list[dict[str, Any]]] = [[] for _ in texts]
    for row in found:
        if len(answers[row["query"]]) < k:
            hit = {name: plain(row[name]) for name in by}
            answers[row["query"]].append(hit | {"text": None, "score": round(float(row["score"]), 6)})
    _add_texts(spark, published, found, answers, by)
    return answers


def encoder_of(published: Published) -> EncoderSpec:
    """The table's encoder, found again by its reference and proved to be the same by its fingerprint."""
    recorded = published.encoder
    settings = EncoderConfig.model_validate(recorded["settings"])
    if settings.form == "hub" and recorded["revision"]:
        settings = settings.model_copy(update={"revision": recorded["revision"]})
    if settings.form == "registry":
        settings = settings.model_copy(update={"model": pinned_reference(settings.model, recorded["revision"])})
    spec = resolve_spec(settings, model_cache(), tracking_uri=recorded.get("registry"))
    spec = replace(spec, precision=recorded["identity"]["precision"], backend=recorded["backend"])
    if spec.fingerprint != published.fingerprint:
        raise EncoderChangedError(
            f"table {published.ref} holds vectors of fingerprint {published.fingerprint}, and "
            f"{recorded['reference']} is "
            f"now {spec.fingerprint}: the model's files have changed. Put the former files back; a query vector "
            "of another "
            f"encoder would find nothing sensible"
        )
    return spec


def encode_queries(spark: SparkSession, spec: EncoderSpec, texts: list[str]) -> np.ndarray:
    """Query vectors float32 (Q, dim), with the encoder's query prompt, in the order of the texts."""
    rows = [(index.to_bytes(4, "big"), text) for index, text in enumerate(texts)]
    options = EncodeOptions(role="query")
    try:
        batch = spark.createDataFrame(rows, ENCODE_INPUT_DDL).coalesce(1)
        encoded = batch.mapInArrow(make_encode(spec, options, None, None), ENCODE_OUTPUT_DDL).collect()
    except (PySparkException, Py4JJavaError) as error:
        raise worker_error(error) from error
    by_index = {int.from_bytes(row["content_hash"], "big"): row for row in encoded}
    for index, text in enumerate(texts):
        if by_index[index]["error"] is not None:
            raise ConfigError(f"the query '{text[:80]}' cannot be encoded: {by_index[index]['error']}")
    return np.array([by_index[index]["embedding"] for index in range(len(texts))], dtype=np.float32)


def plain(value: Any) -> Any:
    """A key's value as JSON has it."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    return value


def _add_texts(
    spark: SparkSession, published: Published, found: list, answers: list[list[dict[str, Any]]], by: list[str]
) -> None:
    """Fetches the texts of the hits alone: carrying every text through the scoring would cost more than scoring."""
    rows = published.rows(spark)
    if "text" not in rows.columns or not found:
        return
    places = spark.createDataFrame(
        [tuple(row[name] for name in by) for row in found], rows.select(*[quoted(name) for name in by]).schema
    ).distinct()
    texts = (
        rows.select(*[quoted(name) for name in by], "text").join(F.broadcast(places), on=by, how="left_semi").collect()
    )
    text_of = {tuple(plain(row[name]) for name in by): row["text"] for row in texts}
    for answer in answers:
        for hit in answer:
            hit["text"] = text_of.get(tuple(hit[name] for name in by))
