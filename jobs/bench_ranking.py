"""`shoal bench ranking`: how good the rankings of a table are on judged queries: vectors, BM25, and both fused.

A folder in BEIR's layout is embedded by the main job, and each query that somebody judged is asked in SQL, as a client
would. Beside it stands bm25s on the same terms, where it is installed.
"""

import importlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.conf.run import (
    DestinationConfig,
    EncoderConfig,
    LexicalConfig,
    RunConfig,
    SparkConfig,
    TrackingConfig,
)
from shoal.conf.section import StemmerName
from shoal.conf.source import SourceConfig
from shoal.jobs.embed import embed
from shoal.jobs.hooks import Hooks
from shoal.jobs.retrieval import ndcg, read_corpus, read_qrels, read_queries
from shoal.jobs.session import open_spark
from shoal.jobs.sql_functions import install
from shoal.jobs.sql_lexical import K1, B
from shoal.jobs.sql_parts import literal
from shoal.udfs.terms import describe_terms, term_finder

K = 10
NAME = "bench"
TEXT = "{title}\n{text}"

FORMS = {
    "vectors": f"{NAME}_search({{query}}, {K})",
    "BM25": f"{NAME}_bm25({{query}}, {K})",
    "fused by rank": f"{NAME}_hybrid({{query}}, {K})",
    "0.5 x vectors + 0.5 x BM25": f"{NAME}_hybrid({{query}}, {K}, 0.5)",
}


def bench_ranking(
    folder: Path, model: str, stemmer: StemmerName | None, num_queries: int | None, *, say: Callable[[str], None]
) -> dict[str, Any]:
    """The document that `--json` prints: nDCG@10 of each ranking.

    num_queries: only the first so many. Raises SourceError for files that are not BEIR's, ConfigError where no query
    is judged.
    """
    if num_queries is not None and num_queries < 1:
        raise ConfigError(f"--queries is {num_queries}; ask for 1 or more, or leave it out")
    queries, qrels = read_queries(folder), read_qrels(folder / "qrels.tsv")
    judged = [query for query in queries if any(gain > 0 for gain in qrels.get(query, {}).values())][:num_queries]
    if not judged:
        raise ConfigError(f"{folder}: no query of queries.jsonl has a relevant row in qrels.tsv; check the two")
    lexical = LexicalConfig(stemmer=stemmer)
    terms = term_finder(str(describe_terms(lexical)))
    asked = {query: queries[query] for query in judged if terms(queries[query])}
    wanted = {query: qrels[query] for query in asked}
    if len(asked) < len(judged):
        say(f"left out: {len(judged) - len(asked)} queries without any word")
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as work:
        spark = open_spark(SparkConfig(master=f"local[{cores}]"), app_name="shoal bench")
        try:
            num_rows = _publish(spark, folder, work, model, lexical, say)
            install(spark, {NAME: f"{work}/docs"})
            found = [_form(spark, form, call, asked, wanted, say) for form, call in FORMS.items()]
        finally:
            spark.stop()
    found.append(_library(folder, terms, asked, wanted, say))
    return {
        "rows": num_rows,
        "queries": len(asked),
        "model": model,
        "stemmer": stemmer,
        "k": K,
        "rankings": found,
    }


def _publish(
    spark: SparkSession, folder: Path, work: str, model: str, lexical: LexicalConfig, say: Callable[[str], None]
) -> int:
    source = SourceConfig(
        format="json", path=str((folder / "corpus.jsonl").resolve()), key=("_id",), text=TEXT,
        schema="_id STRING, title STRING, text STRING",
    )  # fmt: skip
    run = RunConfig(
        name="ranking",
        source=source,
        encoder=EncoderConfig(model=model),
        destination=DestinationConfig(path=f"{work}/docs"),
        lexical=lexical,
        tracking=TrackingConfig(enabled=False),
    )
    return embed(spark, run, hooks=Hooks(say=say)).rows.source


def _form(
    spark: SparkSession,
    name: str,
    call: str,
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, float]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    def ask(text: str) -> list[str]:
        return [row["_id"] for row in spark.sql(f"SELECT _id FROM {call.format(query=literal(text))}").collect()]

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as threads:
        answers = threads.map(ask, queries.values())
        return _judged(name, dict(zip(queries, answers, strict=True)), qrels, say)


def _library(
    folder: Path,
    terms: Callable[[str], list[str]],
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, float]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """BM25 by bm25s, in this process, with the same terms."""
    name = "BM25 of bm25s"
    try:
        bm25s = importlib.import_module("bm25s")
    except ImportError:
        return {"ranking": name, "ndcg": None}
    texts = {key: TEXT.format(**row) for key, row in read_corpus(folder).items()}
    library = bm25s.BM25(method="lucene", k1=K1, b=B)
    library.index([terms(text) for text in texts.values()], show_progress=False)
    keys = list(texts)
    ranked = {}
    for query, text in queries.items():
        scores = library.get_scores(terms(text)).tolist()
        best = sorted(range(len(keys)), key=lambda row: (-scores[row], keys[row]))[:K]
        ranked[query] = [keys[row] for row in best if scores[row] > 0]
    return _judged(name, ranked, qrels, say)


def _judged(
    name: str,
    ranked: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Mapping[str, float]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    found = {"ranking": name, "ndcg": round(ndcg(ranked, qrels, K), 4)}
    say(f"{name}: nDCG@{K} {found['ndcg']:.3f}")
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    measured = [ranking for ranking in found["rankings"] if ranking["ndcg"] is not None]
    return [
        f"{found['rows']:,} rows, {found['queries']} judged queries, {found['model']}, stemmer {found['stemmer']}",
        f"{'':27} nDCG@{found['k']}",
        *[f"{each['ranking']:27} {each['ndcg']:7.3f}" for each in measured],
    ]
