"""Exact nearest neighbours over any rows with keys and vectors: what `shoal search` and the gate are made of."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from shoal.conf.errors import ConfigError
from shoal.jobs.encoder_tasks import map_encoders
from shoal.jobs.hashing import quoted
from shoal.jobs.prepare import worker_error
from shoal.udfs.encode_udf import make_encode
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.schema import ENCODE_INPUT_DDL, ENCODE_OUTPUT_DDL
from shoal.udfs.topk import make_topk

SCORE = "__score"
"""A name that no key column can have."""


def encode_queries(spark: SparkSession, spec: EncoderSpec, texts: Sequence[str]) -> np.ndarray:
    """Query vectors float32 (Q, dim), with the encoder's query prompt, in the order of the texts.

    Raises ConfigError, showing the query, when one cannot be encoded.
    """
    rows = [(index.to_bytes(4, "big"), text) for index, text in enumerate(texts)]
    try:
        batch = spark.createDataFrame(rows, ENCODE_INPUT_DDL).coalesce(1)
        encode = make_encode(spec, EncodeOptions(role="query"))
        encoded = map_encoders(batch, spec, encode, ENCODE_OUTPUT_DDL).collect()
    except (PySparkException, Py4JJavaError) as error:
        raise worker_error(error) from error
    by_index = {int.from_bytes(row["content_hash"], "big"): row for row in encoded}
    for index, text in enumerate(texts):
        if by_index[index]["error"] is not None:
            raise ConfigError(f"the query '{text[:80]}' cannot be encoded: {by_index[index]['error']}")
    return np.array([by_index[index]["embedding"] for index in range(len(texts))], dtype=np.float32)


def nearest(rows: DataFrame, by: Sequence[str], queries_QD: np.ndarray, k: int) -> list[list[Row]]:
    """For each query its k best rows, best first: the columns `by`, which also decide ties, and SCORE.

    `rows` has these columns and `embedding`; one pass over it, and Q * k rows to the driver.
    """
    # mapInArrow takes a dot in a column's name for a field of a struct, and a key may be called `query`.
    short = [f"by_{index}" for index in range(len(by))]
    renamed = [F.col(quoted(name)).alias(new) for name, new in zip(by, short, strict=True)]
    located = rows.where(F.col("embedding").isNotNull()).select(*renamed, "embedding")
    carried = located.drop("embedding").schema
    types = [f"{field.name} {field.dataType.simpleString()}" for field in carried]
    ddl = ", ".join(["query int", "score float", *types])
    find = make_topk(queries_QD, k, short, pa.schema(to_arrow_schema(carried)))
    try:
        best = located.mapInArrow(find, ddl)
        nth = F.row_number().over(Window.partitionBy("query").orderBy(F.desc("score"), *short))
        found = best.withColumn("nth", nth).where(F.col("nth") <= k).orderBy("query", "nth").drop("nth").collect()
    except (PySparkException, Py4JJavaError) as error:
        raise worker_error(error) from error
    hit = Row(*by, SCORE)
    answers: list[list[Row]] = [[] for _ in queries_QD]
    for row in found:
        answers[row["query"]].append(hit(*row[2:], row["score"]))
    return answers
