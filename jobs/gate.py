"""The gate: exact search in the table as it would be published has to find what the judged queries ask for."""

from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import LimitError
from shoal.conf.run import GateConfig
from shoal.jobs.hashing import quoted
from shoal.jobs.nearest import encode_queries, nearest
from shoal.jobs.planner import ACTION, NEW, RowPlan
from shoal.jobs.retrieval import ndcg, read_qrels, read_queries
from shoal.udfs.encoder_spec import EncoderSpec

# Chunks looked at per wanted row: a row may hold several of the best chunks, and counts once.
CHUNKS_PER_ROW = 10


def check_gate(
    spark: SparkSession,
    gate: GateConfig,
    spec: EncoderSpec,
    rows: RowPlan,
    content: DataFrame,
    published: DataFrame | None,
    *,
    chunked: bool,
) -> float:
    """The mean nDCG@k of the table to come, between 0 and 1; LimitError when it is below the gate's minimum.

    `content`: the rows to publish; `published`: the rows that stay, those that `rows` replaces still among them.
    """
    (key,) = rows.keys
    candidates = content.select(quoted(key), "embedding")
    if published is not None and rows.replace is None:
        gone = rows.rows.where(F.col(ACTION) != NEW).select(quoted(key))
        stay = published.select(quoted(key), "embedding").join(gone, on=key, how="left_anti")
        candidates = candidates.unionByName(stay)
    folder = Path(gate.folder)
    queries = read_queries(folder)
    wanted = gate.k * CHUNKS_PER_ROW if chunked else gate.k
    answers = nearest(candidates, [key], encode_queries(spark, spec, list(queries.values())), wanted)
    ranked = {
        query: list(dict.fromkeys(str(row[key]) for row in answer))[: gate.k]
        for query, answer in zip(queries, answers, strict=True)
    }
    found = ndcg(ranked, read_qrels(folder / "qrels.tsv"), gate.k)
    if found < gate.min_ndcg:
        raise LimitError(
            f"gate.min_ndcg is {gate.min_ndcg:g} and the table to come reaches nDCG@{gate.k} {found:.4f} on the "
            f"queries of {folder}; nothing was published, the vectors wait in staging. See what changed in the source "
            "or the encoder, or lower the gate",
            code="GATE_FAILED",
        )
    return found
