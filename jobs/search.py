"""`shoal search`: the chunks nearest to a text, exactly, with the query encoded by the table's own encoder."""

from typing import Any

from pyspark.errors import PySparkException
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import ConfigError, first_line
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import table_named
from shoal.jobs.nearest import SCORE, encode_queries, nearest
from shoal.jobs.prepare import encoder_of
from shoal.jobs.published import Published, read_settled
from shoal.jobs.report import plain


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
    published = read_settled(spark, ref)
    queries_QD = encode_queries(spark, encoder_of(published), texts)
    rows = published.rows(spark)
    try:
        candidates = rows.where(where) if where else rows
    except PySparkException as error:
        raise ConfigError(f"--where '{where}': {first_line(error)}") from error
    by = [*published.keys, "chunk_index"]
    found = nearest(candidates, by, queries_QD, k)
    texts_of = _texts(spark, published, [row for hits in found for row in hits], by)
    return [
        [
            {name: plain(row[name]) for name in by}
            | {"text": texts_of.get(tuple(row[name] for name in by)), "score": round(float(row[SCORE]), 6)}
            for row in hits
        ]
        for hits in found
    ]


def _texts(spark: SparkSession, published: Published, found: list[Row], by: list[str]) -> dict[tuple[Any, ...], str]:
    """Texts of the hits alone: carrying every text through the scoring would cost more than the scoring."""
    rows = published.rows(spark)
    if "text" not in rows.columns or not found:
        return {}
    named = [quoted(name) for name in by]
    places = {tuple(row[name] for name in by) for row in found}
    wanted = F.broadcast(spark.createDataFrame(list(places), rows.select(*named).schema))
    texts = rows.select(*named, "text").join(wanted, on=by, how="left_semi").collect()
    return {tuple(row[name] for name in by): row["text"] for row in texts}
